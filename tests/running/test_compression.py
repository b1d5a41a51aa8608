"""Students with a compressed vocabulary in training, scoring and whole runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import CPU, NUM_IDS, causal_batch, causal_model, make_objective
from tiny_run import NAME, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtkd
import mtkd.running.models
from mtkd.config import ModelConfig
from mtkd.config.match import Match
from mtkd.data.batch import position_counts
from mtkd.data.collate import collate_tokens
from mtkd.data.examples import CausalExamples
from mtkd.data.load import LoadedData
from mtkd.data.sampler import TrainStream
from mtkd.data.split import Documents, Split
from mtkd.data.tasks import TASKS
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir
from mtkd.engine.testing import run_distributed
from mtkd.errors import DataError, Preempted, UserError
from mtkd.evaluate.metrics import summarise
from mtkd.evaluate.score import Scorer
from mtkd.models.info import CAUSAL_LM
from mtkd.models.load import compress_model
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import VocabularyMap
from mtkd.running.context import RunContext
from mtkd.running.identity import stage_identity
from mtkd.running.models import load_model

K = 20


def random_map(seed: int = 0) -> VocabularyMap:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(NUM_IDS, generator=generator)[:K].sort().values
    to_kept = torch.randint(K, (NUM_IDS,), generator=generator)
    to_kept[kept] = torch.arange(K)
    return VocabularyMap(kept, to_kept, torch.randint(9, (NUM_IDS,), generator=generator), "x")


def compressed(model: TappedModel, found: VocabularyMap) -> TappedModel:
    return TappedModel(compress_model(model.model, CAUSAL_LM, found, seed=0), CAUSAL_LM, NUM_IDS, found)


@pytest.mark.parametrize("tied", [True, False])
def test_kl_and_cross_entropy_over_the_kept_columns(tied: bool) -> None:
    """``sum_k w_k KL(softmax(t_k[kept]) || softmax(s)) + CE(s, map(y))``, values and gradients, written out with dense
    logits; the student reads mapped ids, the teachers (one with padded columns) the run's."""
    found = random_map()
    student = compressed(causal_model(16, 2, seed=1, tied=tied), found).eval()
    teachers = [causal_model(24, 2, seed=2).eval(), causal_model(16, 1, seed=3, padded=3).eval()]
    rows = [Match(loss="kl", weight=0.7, options={"temperature": 2.0}), Match(loss="ce", target="labels", weight=0.3)]
    objective, pool = make_objective(student, teachers, rows, tile=4)
    batch = causal_batch([7, 5, 6], prompt=1)
    counts = position_counts([batch])
    loss, metrics = objective(batch, pool.forward(batch), counts)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in student.model.named_parameters()}

    plain = AutoModelForCausalLM.from_config(student.model.config, attn_implementation="eager").eval()
    plain.load_state_dict(student.model.state_dict())
    mask, at = batch.attention_mask.long(), batch.target_mask
    logits = plain(found.to_kept[batch.input_ids], attention_mask=mask).logits[at]
    labels = found.to_kept[batch.targets[at]]
    wanted = torch.zeros(())
    for teacher in teachers:
        dense = torch.cat([t.rows(torch.arange(at.numel())) for t in [teacher(batch, frozenset({"logits"}))["logits"]]])
        target = torch.softmax(dense.reshape(*at.shape, -1)[at][:, found.kept] / 2, -1)
        kl = (target * (target.log() - torch.log_softmax(logits / 2, -1))).sum(-1)
        wanted = wanted + 0.7 * 4 * (kl / 2).sum() / int(at.sum())
    wanted = wanted + 0.3 * torch.nn.functional.cross_entropy(logits, labels)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
    assert metrics["loss"] == loss


def test_weights_are_of_the_kept_columns_too() -> None:
    """A weighting by cross entropy sees the teacher's distribution over the kept ids, and the mapped label."""
    found = random_map()
    teachers = [causal_model(24, 2, seed=2).eval(), causal_model(16, 1, seed=3).eval()]
    student = compressed(causal_model(16, 1, seed=1), found)
    objective, pool = make_objective(student, teachers, [Match(loss="kl")], weighting="mt_bert", per="token")
    batch = causal_batch([6])
    features = pool.forward(batch)
    _, metrics = objective(batch, features, position_counts([batch]))
    for k in range(2):
        dense = features[k]["logits"].rows(torch.arange(6))[:, found.kept]
        ce = torch.nn.functional.cross_entropy(dense, found.to_kept[batch.targets[0]], reduction="none")
        torch.testing.assert_close(metrics[f"weight/t{k}"], (1 / (1 + ce)).mean())


def test_scores_are_of_the_ids_themselves() -> None:
    """p(id) = p(class) * share: a distribution over all ids; a removed target is counted, and never right."""
    found = random_map()
    student = compressed(causal_model(16, 1, seed=1), found).eval()
    batch = causal_batch([30, 25])
    tokens = [
        np.append(ids[mask], 1) for ids, mask in zip(batch.input_ids.numpy(), batch.attention_mask.numpy(), strict=True)
    ]
    lengths = np.array([30, 25])
    examples = CausalExamples(np.concatenate(tokens), np.array([0, 31]), lengths)
    documents = Documents(np.arange(2), ["a", "b"], ["", ""], np.array([40, 50]))
    split = Split(partial(collate_tokens, examples), lengths, documents)
    own = split.collate([0, 1])
    data = LoadedData("text", tiny_data(), TASKS["causal-lm"], {"test": split})
    records = Scorer(CPU, torch.float32, Dist(), 7).records([student], data, split, [own])
    assert records is not None
    logits = student(own, frozenset({"logits"}))["logits"].rows(torch.arange(60)).reshape(2, 30, K)
    classes = torch.log_softmax(logits, -1)
    counts, sums = found.counts.double() + 1, torch.zeros(K, dtype=torch.float64)
    for number in range(NUM_IDS):
        sums[found.to_kept[number]] += counts[number]
    every = classes[..., found.to_kept] + (counts / sums[found.to_kept]).log().float()
    torch.testing.assert_close(every.exp().sum(-1), torch.ones(2, 30))
    for row, record in enumerate(records):
        at = own.target_mask[row]
        labels = own.targets[row][at]
        removed = ~torch.isin(labels, found.kept)
        assert record["removed"] == int(removed.sum()) > 0
        assert record["nll"] == pytest.approx(float(-every[row][at].gather(-1, labels[:, None]).sum()), rel=1e-5)
        right = found.kept[classes[row][at].argmax(-1)] == labels
        assert record["correct"] == int(right.sum())
        assert not bool((right & removed).any())
    total = sum(r["nll"] for r in records)
    assert Scorer(CPU, torch.float32, Dist(), 7).mean_loss(student, [own]) == pytest.approx(total / 55, rel=1e-5)
    summary = summarise("causal-lm", records)
    assert summary["bits_per_byte"] == pytest.approx(total / math.log(2) / 90)
    assert summary["removed_share"] == pytest.approx(sum(r["removed"] for r in records) / 55)
    assert "removed_share" not in summarise("causal-lm", [without(record) for record in records])


def without(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "removed"}


def tiny_data() -> mtkd.config.DataConfig:
    return mtkd.config.DataConfig(source="files", files={"train": "x"})


KEEP = 0.2
STUDENT = {"vocabulary": {"keep": KEEP}}
ON = {
    "kind": "finetune",
    "student": {"path": "stage:student", "keep_layers": [1], "slice": {"width": 4, "heads": 1}},
    "steps": 2,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, compressed student, and a slice of that student, which goes on with its map."""
    folder = tmp_path_factory.mktemp("compressed")
    mtkd.run(tiny_config(folder, stages={"student": {"student": STUDENT}, "on": ON}))
    return folder


def config_of(folder: Path, **student: object) -> mtkd.RunConfig:
    return tiny_config(folder, stages={"student": {"student": {**STUDENT, **student}}, "on": ON})


def context_of(folder: Path) -> RunContext:
    return RunContext(config_of(folder), RunDir(folder / "runs" / NAME), Dist(), CPU)


@pytest.mark.parametrize(("stage", "number"), [("student", 2), ("on", 3)])
def test_an_export_works_by_itself_on_plain_text(made: Path, stage: str, number: int) -> None:
    """Plain text -> exported tokenizer -> exported model: the logits of mtkd's own student with the run's tokenizer."""
    export = made / "runs" / NAME / "stages" / f"0{number}-{stage}" / "export"
    plain, report = AutoModelForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer, context = AutoTokenizer.from_pretrained(export), context_of(made)
    rows = round(KEEP * len(context.tokenizer))
    assert plain.get_input_embeddings().weight.shape[0] == plain.get_output_embeddings().weight.shape[0] == rows
    assert max(tokenizer.get_vocab().values()) == rows - 1
    student = load_model(context, ModelConfig(path=f"stage:{stage}"), context.data("text")).eval()
    assert student.vocabulary is not None
    removed = 0
    for text in ("the teacher shows a student how one word follows another", "features remain far apart", "Zebra 12"):
        ids = torch.tensor([context.tokenizer(text)["input_ids"]])
        removed += int(student.vocabulary.is_removed(ids).sum())
        batch = dataclasses.replace(
            causal_batch([ids.shape[1]]), input_ids=ids, attention_mask=torch.ones_like(ids).bool()
        )
        ours = student(batch, frozenset({"logits"}))["logits"].rows(torch.arange(ids.shape[1]))
        torch.testing.assert_close(plain(**tokenizer(text, return_tensors="pt")).logits[0], ours, atol=1e-5, rtol=1e-5)
    assert removed


def test_what_the_plan_and_the_results_say(made: Path) -> None:
    """Parameters by plan and results agree; the share of removed ids is the student's alone."""
    config = config_of(made)
    results = json.loads((made / "runs" / NAME / "results.json").read_text())
    planned = {stage.name: stage.models[0].parameters for stage in mtkd.plan(config).stages}
    assert {name: facts["parameters"] for name, facts in results["models"].items() if "parameters" in facts} == planned
    overall = {name: facts["overall"] for name, facts in results["models"].items()}
    assert 0 < overall["student"]["removed_share"] < 1
    assert "removed_share" not in overall["teacher"]
    assert all(math.isfinite(facts["bits_per_byte"]) for facts in overall.values())


def test_another_corpus_is_another_student(made: Path) -> None:
    """The counted texts identify the stage, even when they are not what it is trained on."""
    changes = {
        "data": {"counted": {"source": "files", "path": "data", "files": {"train": "test.jsonl"}, "max_length": 9}}
    }
    changes["stages"] = {"student": {"student": {"vocabulary": {"keep": KEEP, "counts": "counted"}}, "data": "text"}}
    changes["stages"] |= {"teacher": {"data": "text"}, "on": None}
    config = tiny_config(made, **changes, tokenizer={"train_on": "text"}, evaluate={"data": "text"})
    first = stage_identity(RunContext(config, RunDir(made / "runs" / NAME), Dist(), CPU), "student")
    (made / "data" / "other.jsonl").write_text('{"text": "the far apart word"}\n')
    changes["data"]["counted"]["files"] = {"train": "other.jsonl"}
    config = tiny_config(made, **changes, tokenizer={"train_on": "text"}, evaluate={"data": "text"})
    second = stage_identity(RunContext(config, RunDir(made / "runs" / NAME), Dist(), CPU), "student")
    assert first["models"]["student vocabulary"] != second["models"]["student vocabulary"]
    with pytest.raises(DataError, match="finished, but with another") as error:
        mtkd.run(config_of(made, vocabulary={"keep": 0.25}))
    assert "keep" in str(error.value)


def test_a_stopped_student_goes_on_bit_for_bit(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and vocabulary map of it and of the next stage are those of the undisturbed run."""
    draw, calls = TrainStream.__next__, []

    def stop(stream: TrainStream) -> list:
        calls.append(1)
        if len(calls) == 8:  # the teacher has 3 steps
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(stream)

    monkeypatch.setattr(TrainStream, "__next__", stop)
    with pytest.raises(Preempted):
        mtkd.run(config_of(tmp_path))
    mtkd.run(config_of(tmp_path))
    for name in ("02-student", "03-on"):
        ours, theirs = (
            load_file(f / "runs" / NAME / "stages" / name / "export/model.safetensors") for f in (tmp_path, made)
        )
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
        maps = [
            (f / "runs" / NAME / "stages" / name / "export/vocabulary_map.json").read_text() for f in (tmp_path, made)
        ]
        assert maps[0] == maps[1]


def map_of_rank(folder: str) -> list[list[int]]:
    """The student's map on this rank, where every rank rounds the embedding in its own way."""
    dist, make = Dist.current(), mtkd.running.models.make_vocabulary

    def rounded(*args: object) -> VocabularyMap:
        *first, table = args
        noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(dist.rank))  # type: ignore[attr-defined]
        return make(*first, table + noise)

    mtkd.running.models.make_vocabulary = rounded
    context = context_of(Path(folder))
    context.dist = dist
    student = load_model(context, ModelConfig(path="stage:teacher", **STUDENT), context.data("text"))
    assert student.vocabulary is not None
    return [student.vocabulary.kept.tolist(), student.vocabulary.to_kept.tolist()]


@pytest.mark.slow
def test_every_rank_has_the_main_ranks_map(made: Path) -> None:
    first, second = run_distributed(map_of_rank, 2, str(made))
    assert first == second


def test_what_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    teaches = {"kind": "distill", "student": ON["student"], "teachers": ["stage:student"], "method": "kd", "steps": 1}
    with pytest.raises(UserError, match="needs its whole vocabulary") as error:
        mtkd.run(tiny_config(tmp_path, stages={"student": {"student": STUDENT}, "last": teaches}))
    assert "stages.last.teachers[0]" in str(error.value)
    twice = {**ON, "student": {"path": "stage:student", "vocabulary": {"keep": 0.5}}}
    with pytest.raises(UserError, match="compressed already"):
        mtkd.plan(tiny_config(tmp_path, stages={"student": {"student": STUDENT}, "last": twice}))
    with pytest.raises(UserError, match="first teacher's"):
        tiny_config(tmp_path, stages={"teacher": {"student": STUDENT}})
    with pytest.raises(UserError, match="no data named 'x'"):
        tiny_config(tmp_path, stages={"student": {"student": {"vocabulary": {"keep": 0.5, "counts": "x"}}}})
    assert not (tmp_path / "runs").exists()
