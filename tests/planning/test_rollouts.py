"""Rollouts that cannot work are refused by the plan: the place, what is there, what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_runs import rollout_config, write_run
from tiny_run import tiny_config
from transformers import OpenAIGPTConfig

import mtkd
from mtkd.errors import UserError
from mtkd.models.create import new_model
from mtkd.models.generate import Session
from mtkd.models.info import CAUSAL_LM
from mtkd.models.taps import TappedModel
from mtkd.planning.budget import _step
from mtkd.planning.data import DataReader
from mtkd.planning.plan import resolve, specify
from mtkd.planning.rollouts import check_can_write, writing_bytes
from mtkd.planning.spec import ModelSpec

CACHE = {"kind": "cache", "teachers": ["stage:teacher"]}
POLICY = [{"feature": "logits", "loss": "policy_gradient"}]
CE = [{"feature": "logits", "loss": "ce", "target": "labels"}]


def refused(config: Any, where: str, *texts: str) -> None:
    with pytest.raises(UserError) as caught:
        mtkd.plan(config)
    assert caught.value.where == where
    for text in texts:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("rollout", "student", "where", "texts"),
    [
        ({"max_new_tokens": 25}, {}, "rollout.max_new_tokens", ("25", "at most 24", "max_length")),
        ({}, {"batch": {"sequences": None, "tokens": 200}}, "batch.tokens", ("set batch.sequences",)),
        ({}, {"match": CE}, "rollout.share", ("row logits:ce", "hard: 0", "below 1")),
        ({}, {"method": "kd", "match": None}, "rollout.share", ("row logits:ce", "hard: 0")),
        ({}, {"weighting": "learned"}, "rollout.share", ("weighting 'learned'", "posterior")),
        (None, {"match": POLICY}, "match[0]", ("writes none", "no rollout", "max_new_tokens")),
        ({"share": 0}, {"match": POLICY}, "match[0]", ("rollout.share: 0",)),
        ({"top_p": 0.9}, {"match": POLICY}, "rollout.top_p", ("0.9", "allowed: 1")),
        ({"top_k": 5}, {"match": POLICY}, "rollout.top_k", ("reverse_kl",)),
        ({"temperature": 0.7}, {"match": POLICY}, "rollout.temperature", ("0.7", "options: {temperature")),
        ({}, {"match": [{**POLICY[0], "positions": "all"}]}, "match[0].positions", ("drop positions",)),
        ({}, {"weighting": "mt_bert"}, "rollout.share", ("weighting 'mt_bert'",)),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    tmp_path: Path, rollout: dict[str, Any] | None, student: dict[str, Any], where: str, texts: tuple[str, ...]
) -> None:
    refused(rollout_config(tmp_path, rollout, student=student), f"stages.student.{where}", *texts)


@pytest.mark.parametrize(
    "student", [{"match": CE}, {"weighting": "learned"}, {"batch": {"sequences": 8, "packing": True}}]
)
def test_labels_are_read_where_the_data_answers_a_part(tmp_path: Path, student: dict[str, Any]) -> None:
    """Law: below share 1 nothing of it is refused; nor at share 0, where nothing is written."""
    for share in (0.0, 0.5):
        (tmp_path / str(share)).mkdir()
        mtkd.plan(rollout_config(tmp_path / str(share), {"share": share}, student=student))


def test_gradients_of_drawn_words_are_not_compared(tmp_path: Path) -> None:
    """Law: a weighting in the space of gradients is refused; drawn at the row's temperature, others are planned."""
    teachers = ["stage:teacher", {"name": "again", "model": "stage:teacher"}]
    student = {"match": POLICY, "teachers": teachers, "weighting": "mgda"}
    refused(rollout_config(tmp_path, {}, student=student), "stages.student.weighting", "mgda", "reverse_kl")
    warm = [{**POLICY[0], "options": {"temperature": 0.7}}]
    mtkd.plan(
        rollout_config(tmp_path, {"temperature": 0.7}, student={**student, "match": warm, "weighting": "entropy"})
    )


def test_a_cached_teacher_is_refused(tmp_path: Path) -> None:
    """What was not written yet is in no cache."""
    teachers = [{"model": "stage:cache/teacher", "backend": "cached"}]
    stages = {"cache": CACHE, "student": None, "reader": {
        "kind": "distill", "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}, "steps": 1,
        "teachers": teachers, "match": [{"feature": "logits", "loss": "reverse_kl"}],
        "rollout": {"max_new_tokens": 4}}}  # fmt: skip
    write_run(tmp_path, None)
    refused(rollout_config(tmp_path, None, stages=stages), "stages.reader.rollout", "'teacher' is cached", "share: 0")


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "classify"])
def test_texts_without_prompts_are_refused(tmp_path: Path, task: str) -> None:
    stage = {"rollout": {"max_new_tokens": 4}, "match": [{"feature": "logits", "loss": "kl"}], "method": None}
    bert = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}
    models = {} if task == "causal-lm" else {"student": bert}
    data = {"task": task, **({"labels": ["a", "b"]} if task == "classify" else {})}
    stages = {"teacher": models, "student": {**stage, **models}}
    config = tiny_config(tmp_path, data={"text": data}, stages=stages)
    refused(config, "stages.student.rollout", "answers prompts", "data.NAME.prompt")


@pytest.mark.parametrize("kind", ["finetune", "cofinetune", "cache"])
def test_stages_without_teachers_of_a_student_have_no_rollout(tmp_path: Path, kind: str) -> None:
    model = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}
    models = {"cofinetune": {"student": None, "members": {"a": model, "b": model}}, "cache": CACHE}
    stage = {**models.get(kind, {}), "kind": kind, "rollout": {"max_new_tokens": 4}}
    with pytest.raises(UserError, match="rollout"):
        rollout_config(tmp_path, None, stages={"cache" if kind == "cache" else "teacher": stage})


@pytest.mark.parametrize(
    ("field", "value"),
    [("share", 1.5), ("share", -0.1), ("per_prompt", 0), ("reuse", 0), ("max_new_tokens", 0), ("temperature", 0),
     ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("stop", [""]), ("stop", ["a", "a"]), ("engine", "vllm"),
     ("lambda", 1)],
)  # fmt: skip
def test_values_without_a_meaning_are_refused(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"stages\.student\.rollout\.{field}"):
        rollout_config(tmp_path, {field: value})


def test_a_stop_text_of_several_tokens_is_refused(tmp_path: Path) -> None:
    """The run trains its tokenizer, so this shows when it is there, before a model is loaded."""
    with pytest.raises(UserError, match="not one token") as caught:
        mtkd.run(rollout_config(tmp_path, {"stop": ["c", "zzz"]}))
    assert caught.value.where == "stages.student.rollout.stop[1]"


def test_a_model_without_a_cache_is_refused() -> None:
    config = OpenAIGPTConfig(n_layer=1, n_embd=8, n_head=2, vocab_size=20)
    with pytest.raises(UserError, match="architecture 'openai-gpt' cannot write with a key-value cache") as caught:
        check_can_write(ModelSpec(config, CAUSAL_LM, 20), "stages.s.rollout")
    assert (caught.value.where, caught.value.found) == ("stages.s.rollout", "it takes no cache")


def test_the_plan_counts_the_cache_that_writing_fills(tmp_path: Path) -> None:
    """Law: the bytes of a real cache of all rows of a step, each as long as may be; of one layer twice."""
    config = resolve(rollout_config(tmp_path, {"per_prompt": 3}))
    spec = specify(config, DataReader(config.base)).stages["student"]
    step = _step(spec, config.engine, on_gpu=False)
    assert step.sequences == 3 * 8
    student = TappedModel(new_model(spec.trained["student"].config, CAUSAL_LM, 0), CAUSAL_LM, 20)
    with torch.no_grad():
        cache = Session(student, [[1] * step.length] * step.sequences, torch.float32)._cache
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert writing_bytes(step, 4)["key-value cache"] == 2 * real  # the student has one layer
    none = rollout_config(tmp_path, {"per_prompt": 3, "share": 0.0})
    assert (
        writing_bytes(
            _step(specify(resolve(none), DataReader(none.base)).stages["student"], none.engine, on_gpu=False), 4
        )
        == {}
    )
