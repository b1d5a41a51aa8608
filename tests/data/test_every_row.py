"""A row that the run would refuse, or silently misread, is the plan's to find: in every split, however far down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data.data_examples import sentences
from datasets import Dataset

import mtkd
import mtkd.data.everyrow
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError

ROWS, BAD = 48, 40  # rows of a split, and the one (from 0) that is wrong: behind the first 32
TEXTS = [f"one more {text}" for text in sentences(ROWS, 1, 8)]
MODELS = {name: {"architecture": name, "layers": 1, "width": 8, "heads": 2} for name in ("bert", "gpt2", "glm_blocklm")}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "classes": ("bert", {"task": "classify", "labels": ["no", "yes"]}),
    "numbers": ("bert", {"task": "classify", "label": "score"}),
    "text": ("gpt2", {"task": "causal-lm"}),
    "named": ("gpt2", {"task": "causal-lm", "name": "name", "domain": "domain"}),
    "chat": ("gpt2", {"task": "causal-lm", "prompt": "prompt", "chat": True}),
    "prompt": ("gpt2", {"task": "causal-lm", "prompt": "prompt"}),
    "pairs": ("bert", {"task": "masked-lm", "next_sentence": True}),
    "infill": ("glm_blocklm", {"task": "glm-infill"}),
    "cloze": (
        "glm_blocklm",
        {"task": "glm-cloze", "cloze": "{text} It was [MASK].", "verbalizers": {"no": "bad", "yes": "good"}},
    ),
}
TEMPLATE = (
    "{% for m in messages %}{% if 'never' in m.content %}{{ raise_exception('refused') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer per architecture."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name in MODELS:
        made = train_tokenizer(TEXTS, 400, closed=name == "bert", commands="glm" if name.startswith("glm") else "plain")
        if name == "gpt2":
            made.chat_template = TEMPLATE
        made.save_pretrained(folder / name)
    return folder


def rows() -> list[dict[str, Any]]:
    return [
        {
            "text": text,
            "prompt": f"what is {i}",
            "label": ("no", "yes")[i % 2],
            "score": i / 7,
            "name": f"n{i}",
            "domain": "d",
        }
        for i, text in enumerate(TEXTS)
    ]


def run_of(folder: Path, tokenizers: Path, kind: str, split: str, changed: dict[str, Any], **data: Any) -> Path:
    """The YAML file of a run whose `split` has one changed row."""
    for name in ("train", "validation", "test"):
        made = rows()
        if name == split:
            made[BAD] |= changed
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    architecture, entry = KINDS[kind]
    files = {name: f"{name}.jsonl" for name in ("train", "validation", "test")}
    values = {
        "name": "run",
        "output": str(folder / "runs"),
        "tokenizer": {"path": str(tokenizers / architecture)},
        "data": {"rows": {"source": "files", "files": files, "max_length": 32, **entry, **data}},
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {
            "m": {"kind": "finetune", "student": MODELS[architecture], "steps": 1, "batch": {"sequences": 4}},
        },
        "evaluate": {"resamples": 100},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def plan(file: Path) -> mtkd.Plan:
    return mtkd.plan(mtkd.load_config(file))


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        ("classes", {"label": "maybe"}, "unknown label"),
        ("classes", {"label": ["no"]}, "changes its type"),
        ("classes", {"text": None}, "no text in column 'text'"),
        ("numbers", {"score": float("inf")}, "needs a number"),
        ("numbers", {"score": 1e30}, "too large"),
        ("numbers", {"score": True}, "changes its type"),
        ("text", {"text": ["a", "list"]}, "changes its type"),
        ("text", {"text": "\ud800"}, "half of a character"),
        ("chat", {"prompt": "never"}, "refuses the turns"),
        ("chat", {"text": None}, "no text in column 'text'"),
        ("prompt", {"prompt": 5}, "changes its type"),
        ("named", {"name": "n3"}, "two rows have the same name"),
        ("named", {"name": None}, "no text in column 'name'"),
        ("pairs", {"text": "a"}, "only one token"),
        ("infill", {"text": None}, "no text in column 'text'"),
        ("cloze", {"text": "a [MASK] b"}, "holds the blank itself"),
        ("cloze", {"label": "maybe"}, "unknown label"),
    ],
)
def test_a_row_far_down_is_refused_by_the_plan(
    tmp_path: Path, tokenizers: Path, kind: str, changed: dict[str, Any], message: str
) -> None:
    """With its file and number, and in a split that only the evaluation reads too."""
    split = ("train", "validation", "test")[len(message) % 3]
    with pytest.raises(DataError, match=message) as caught:
        plan(run_of(tmp_path, tokenizers, kind, split, changed))
    assert caught.value.where.startswith(f"{split}.jsonl, ")
    assert str(BAD + 1) in caught.value.where


@pytest.mark.parametrize(("kind", "said"), [("text", "left out"), ("classes", "read as an empty text")])
def test_rows_without_text_are_counted_in_the_plan(tmp_path: Path, tokenizers: Path, kind: str, said: str) -> None:
    (shown,) = plan(run_of(tmp_path, tokenizers, kind, "validation", {"text": " \n"})).data
    (note,) = shown.unread
    assert "1 of 48 rows have no text, the first is validation.jsonl, row 41 (line 41)" in note
    assert said in note


def test_what_a_prompt_costs_is_said_in_the_plan(tmp_path: Path, tokenizers: Path) -> None:
    """As the run says it: rows left out, responses cut."""
    long = {"prompt": "the teacher and a student " * 30}
    (shown,) = plan(run_of(tmp_path, tokenizers, "prompt", "train", long)).data
    assert any("1 of 48 rows left out" in note for note in shown.unread)


def test_a_split_without_any_text_is_refused(tmp_path: Path, tokenizers: Path) -> None:
    file = run_of(tmp_path, tokenizers, "classes", "train", {})
    blank = [{**row, "text": ""} for row in rows()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in blank))
    with pytest.raises(DataError, match="no row has a text") as caught:
        plan(file)
    assert caught.value.where == "test.jsonl"


@pytest.mark.parametrize("saved", [False, True])
def test_a_table_whose_text_is_no_utf8_is_refused_with_its_row(tmp_path: Path, tokenizers: Path, saved: bool) -> None:
    texts = [text.encode() for text in TEXTS]
    texts[BAD] = b"ab\xff"
    raw = pa.array(texts, pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())})
    if saved:
        Dataset(table).save_to_disk(tmp_path / "odd")
    else:
        pq.write_table(table, tmp_path / "odd.parquet")
    name = "odd" if saved else "odd.parquet"
    file = run_of(tmp_path, tokenizers, "text", "", {}, files={"train": name, "test": "test.jsonl"})
    with pytest.raises(DataError, match="column 'text' is not UTF-8") as caught:
        plan(file)
    assert caught.value.where.endswith(f"{name}, row 41")


def test_of_many_rows_some_are_tokenised_and_each_short_one(
    tmp_path: Path, tokenizers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mtkd.data.everyrow, "_FIRST", 2)
    monkeypatch.setattr(mtkd.data.everyrow, "_MOST_ROWS", 9)
    (shown,) = plan(run_of(tmp_path, tokenizers, "pairs", "test", {})).data
    assert "train.jsonl (train): 15 of 48 rows were tokenised for this plan" in shown.unread  # 7 of them short
    assert len(shown.examples) == 2
    with pytest.raises(DataError, match="only one token"):  # row 40 is not one of every sixth: 0, 6, 12, ...
        plan(run_of(tmp_path, tokenizers, "pairs", "test", {"text": "a"}))


def test_a_row_without_a_teacher_of_the_stage_is_refused(tmp_path: Path, tokenizers: Path) -> None:
    file = run_of(tmp_path, tokenizers, "text", "", {})
    values = yaml.safe_load(file.read_text())
    tune = values["stages"].pop("m")
    values["stages"] = dict.fromkeys(("first", "second"), tune) | {
        "student": {**tune, "kind": "distill", "teachers": ["stage:first", "stage:second"], "method": "kd"}
        | {"weighting": "route"}
    }
    values["data"]["rows"]["teacher"] = "name"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    made = [{**row, "name": ("first", "second")[i % 2]} for i, row in enumerate(rows())]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    plan(file)
    made[BAD]["name"] = "third"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    with pytest.raises(DataError, match="a teacher that the stage does not have") as caught:
        plan(file)
    assert "train.jsonl, row 41" in caught.value.where
