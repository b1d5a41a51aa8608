"""Encoders with a WordPiece tokenizer: sliced, compressed, distilled, then teachers and students of classifiers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_bank import build, description, lively
from test_vocabulary import WORDS, wordpiece
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

import mtkd
from mtkd.config import ModelConfig, RunConfig
from mtkd.config.read import load_config
from mtkd.data.tokenizers import num_real_ids
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir
from mtkd.errors import DataError, UserError
from mtkd.models.info import MASKED_LM
from mtkd.running.context import RunContext
from mtkd.running.models import load_model

KEEP = 0.6
BATCH = {"batch": {"sequences": 4}, "steps": 2}


def run_of(folder: Path, **stages: dict) -> RunConfig:
    files = dict.fromkeys(("train", "test"), "rows.jsonl")
    common = {"source": "files", "path": "data", "files": files, "max_length": 12}
    values = {
        "name": "run",
        "output": str(folder / "runs"),
        "tokenizer": {"path": "teacher"},
        "data": {"text": {**common, "task": "masked-lm"}, "classes": {**common, "task": "classify"}},
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {name: {**BATCH, **stage} for name, stage in stages.items()},
        "evaluate": {"data": stages["last"]["data"], "stages": ["last"], "resamples": 20},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    return load_config(folder / "run.yaml")


def material(folder: Path) -> None:
    """A BERT with its tokenizer, and 16 labelled rows."""
    tokenizer: BertTokenizer = wordpiece()
    model = lively(build(description("bert"), MASKED_LM, num_ids=num_real_ids(tokenizer)))
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    (folder / "data").mkdir()
    rows = [{"text": " ".join([*WORDS[i % 5 : i % 5 + 4], "dad"]), "label": ("ab", "dad")[i % 2]} for i in range(16)]
    (folder / "data" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


COMPRESS = {
    "path": "teacher",
    "keep_layers": [1, 3],
    "slice": {"width": 12, "heads": 2},
    "vocabulary": {"keep": KEEP, "counts": "classes"},
}


def test_pre_training_then_classes(tmp_path: Path) -> None:
    """Compressed while pre-training; fine-tuned; then its classifier teaches another one, compressed or not."""
    material(tmp_path)
    kd = {"method": "kd", "kind": "distill", "data": "classes"}
    config = run_of(
        tmp_path,
        pre={"kind": "distill", "data": "text", "student": COMPRESS, "teachers": ["teacher"], "method": "kd"},
        tuned={"kind": "finetune", "data": "classes", "student": "stage:pre"},
        last={**kd, "student": "stage:pre", "teachers": ["stage:tuned"]},
        whole={**kd, "student": {"path": "teacher", "keep_layers": [2]}, "teachers": ["stage:tuned"]},
    )
    mtkd.plan(config)
    result = mtkd.run(config)
    num_ids = num_real_ids(wordpiece())
    context = RunContext(config, RunDir(tmp_path / "runs" / "run"), Dist(), torch.device("cpu"))
    text = "abc dab back, dad"
    for stage, auto, data in (
        ("pre", AutoModelForMaskedLM, "text"),
        ("last", AutoModelForSequenceClassification, "classes"),
    ):
        plain, tokenizer = (a.from_pretrained(result.export(stage)) for a in (auto, AutoTokenizer))
        assert plain.config.vocab_size == round(KEEP * num_ids)
        own = load_model(context, ModelConfig(path=f"stage:{stage}"), context.data(data)).eval()
        batch = context.data(data).splits["test"].collate([0])
        batch.input_ids = torch.tensor([context.tokenizer(text)["input_ids"]])
        batch.attention_mask, batch.token_type_ids = torch.ones_like(batch.input_ids).bool(), None
        assert own.vocabulary is not None
        assert own.vocabulary.is_removed(batch.input_ids).any()
        wanted = plain(**tokenizer(text, return_tensors="pt")).logits.flatten(0, -2)
        ours = own(batch, frozenset({"logits"}))["logits"].rows(torch.arange(len(wanted)))  # type: ignore[union-attr]
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
        labels = context.tokenizer("ab dad", add_special_tokens=False)["input_ids"]
        assert not own.vocabulary.is_removed(torch.tensor(labels)).any()  # the class names' own ids stay
    assert AutoModelForSequenceClassification.from_pretrained(result.export("whole")).config.vocab_size == num_ids

    (tmp_path / "pre").symlink_to(result.export("pre"))  # as a folder of another run
    again = run_of(tmp_path, last={"kind": "finetune", "data": "classes", "student": "pre"})
    again = again.model_copy(update={"name": "again"})
    assert mtkd.plan(again).stages[0].models[0].parameters == result.stages["last"]["parameters"]
    other = again.model_copy(update={"tokenizer": None})  # that of the first model: the compressed one
    with pytest.raises(DataError, match=r"compressed from another tokenizer"):
        mtkd.plan(other)
    teaches = {"kind": "distill", "data": "text", "student": COMPRESS, "teachers": ["pre"], "method": "kd"}
    with pytest.raises(UserError, match="needs its whole vocabulary"):
        mtkd.plan(run_of(tmp_path, last=teaches))
    twice = {"kind": "finetune", "data": "classes", "student": {**COMPRESS, "path": "pre", "keep_layers": None}}
    twice["student"]["slice"] = None
    with pytest.raises(UserError, match="compressed already"):
        mtkd.plan(run_of(tmp_path, last=twice))
