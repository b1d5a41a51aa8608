"""A stage whose teachers write texts, and a student that learns from them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rollout_runs import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtkd
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import DataError, UserError

WRITE: dict[str, Any] = {"max_new_tokens": 8, "per_prompt": 2}


def _file(folder: Path, write: dict[str, Any] | None = None, **stage: Any) -> Path:
    """A run of two fine-tuned teachers, `cold`, which they write, and a student that is fine-tuned on it."""
    file = write_run(folder, None, {"steps": 1})
    values = yaml.safe_load(file.read_text())
    teacher, student = values["stages"]["teacher"], values["stages"]["student"]
    teacher["steps"] = 30
    values["data"]["cold"] = {"source": "stage", "stage": "cold"}
    generate = {"kind": "generate", "data": "text", "teachers": ["stage:one", "stage:two"], "write": write or WRITE}
    learn = {"kind": "finetune", "data": "cold", "steps": 2, "student": student["student"], "batch": {"sequences": 4}}
    values["stages"] = {
        "one": {**teacher, "data": "text"},
        "two": {**teacher, "data": "text", "seed": 7},
        "cold": {**generate, **stage},
        "student": learn,
    }
    values["evaluate"] = {"data": "text", "agreement": False, "resamples": 100}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def _export(folder: Path) -> Path:
    return folder / "runs/tiny/stages/03-cold/export"


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: everything without an end is left out, all others are kept."""
    folder = tmp_path_factory.mktemp("generated")
    mtkd.run(load_config(_file(folder)))
    return folder


def _copy(ran: Path, folder: Path, write: dict[str, Any] | None = None, **stage: Any) -> Path:
    """The run file of the two finished teachers, with `cold` still to be made."""
    run = folder / "runs/tiny"
    shutil.copytree(ran / "runs/tiny", run, ignore=shutil.ignore_patterns("03-cold", "04-student", "results.json"))
    return _file(folder, write, **stage)


def test_every_text_has_its_writer_prompt_and_scores(ran: Path) -> None:
    """Two teachers write two texts to each of 24 prompts; what is kept ends by itself and is there once."""
    every, kept = read_jsonl(_export(ran) / "all.jsonl"), read_jsonl(_export(ran) / "texts.jsonl")
    assert len(every) == 2 * 2 * 24
    assert {(text["example"], text["writer"], text["draw"]) for text in every} == {
        (example, writer, draw) for example in range(24) for writer in ("one", "two") for draw in (0, 1)
    }
    prompts = [json.loads(line)["prompt"] for line in (ran / "data/train.jsonl").read_text().splitlines()]
    assert all(text["prompt"] == prompts[text["example"]] for text in every)
    expected: dict[tuple[int, str], dict[str, Any]] = {}
    for text in every:
        if not text["cut"] and text["text"].strip():
            expected.setdefault((text["example"], text["text"]), text)
    assert kept == list(expected.values())
    assert 0 < len(kept) < len(every)


def test_the_scores_are_those_of_the_exported_teachers(ran: Path) -> None:
    """Mean log-probability per token, by plain transformers on the exports, in float64, one text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(ran / "runs/tiny/stages/01-one/export")
    texts = read_jsonl(_export(ran) / "texts.jsonl")[:5]
    for number, teacher in ((1, "one"), (2, "two")):
        model = AutoModelForCausalLM.from_pretrained(ran / f"runs/tiny/stages/0{number}-{teacher}/export").double()
        model.eval()
        for text in texts:
            prompt = tokenizer.encode(text["prompt"], add_special_tokens=False)
            answer = [*tokenizer.encode(text["text"], add_special_tokens=False), tokenizer.eos_token_id]
            if len(answer) != text["length"]:
                continue  # the model wrote the same text in other tokens
            begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            ids = torch.tensor([[*begin, *prompt, *answer]])
            logs = torch.log_softmax(model(ids).logits[0], -1)
            start = ids.shape[1] - len(answer)
            mean = sum(float(logs[start + i - 1, token]) for i, token in enumerate(answer)) / len(answer)
            assert text["log_probs"][teacher] == pytest.approx(mean, abs=1e-4)


def test_the_student_learns_from_the_texts(ran: Path) -> None:
    """The identity of the student's stage holds the digest of the texts, and its data the kept rows."""
    done = json.loads((ran / "runs/tiny/stages/04-student/DONE").read_text())
    assert done["identity"]["data"]["config"]["stage"] == "cold"
    assert json.loads((ran / "runs/tiny/stages/03-cold/DONE").read_text())["kind"] == "generate"
    config = load_config(ran / "run.yaml")
    assert config.data["cold"].texts is not None
    assert mtkd.plan(config).stages[3].needs == ["cold"]


def test_texts_are_those_of_the_stage_of_this_very_name(ran: Path, tmp_path: Path) -> None:
    """Law: a name that ends in another's, with a dash before, is another stage's."""
    config = load_config(_copy(ran, tmp_path))
    stages = config.folder / "stages"
    for name in ("01-very-cold", "05-cold"):
        (stages / name / "export").mkdir(parents=True)
        (stages / name / "export/texts.jsonl").write_text("")
    assert config.data["cold"].texts == stages / "05-cold/export/texts.jsonl"


def test_a_second_run_writes_nothing_and_a_changed_file_is_refused(ran: Path, tmp_path: Path) -> None:
    """A finished run stays; a text that was changed afterwards is named."""
    shutil.copytree(ran, tmp_path / "copy")
    folder = tmp_path / "copy"
    values = yaml.safe_load((folder / "run.yaml").read_text())
    values["output"] = str(folder / "runs")
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    before = (_export(folder) / "texts.jsonl").stat().st_mtime_ns
    mtkd.run(load_config(folder / "run.yaml"))
    assert (_export(folder) / "texts.jsonl").stat().st_mtime_ns == before
    with (_export(folder) / "texts.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match="not what it sealed"):
        mtkd.run(load_config(folder / "run.yaml"))


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(
    ran: Path, tmp_path: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first, third or fifth file of texts or scores, the second session makes the same texts."""
    from mtkd.running import generate

    monkeypatch.setattr(generate, "_PART", 10)  # three parts a writer
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    mtkd.run(load_config(_copy(ran, whole)))
    config, count = load_config(_copy(ran, stopped)), 0
    written = generate.write_atomic

    def counted(path: Path, text: str) -> None:
        nonlocal count
        if count == stop and path.name.startswith(("write", "score")):
            raise KeyboardInterrupt
        count += 1
        written(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_atomic", counted)
        with pytest.raises(KeyboardInterrupt):
            mtkd.run(config)
    assert len(list((stopped / "runs/tiny/stages/03-cold/partial").glob("*.jsonl"))) == stop
    mtkd.run(load_config(stopped / "run.yaml"))
    for name in ("texts.jsonl", "all.jsonl"):
        assert (_export(stopped) / name).read_bytes() == (_export(whole) / name).read_bytes()


def test_the_best_by_agreement_is_what_the_other_teacher_finds_most_probable(ran: Path, tmp_path: Path) -> None:
    """Of each prompt the text with the largest score of the teacher that did not write it."""
    mtkd.run(load_config(_copy(ran, tmp_path, {**WRITE, "keep": {"by": "agreement", "best": 1}})))
    kept = read_jsonl(_export(tmp_path) / "texts.jsonl")
    best: dict[int, float] = {}
    other = {"one": "two", "two": "one"}
    for text in read_jsonl(_export(tmp_path) / "all.jsonl"):
        if not text["cut"] and text["text"].strip():
            score = text["log_probs"][other[text["writer"]]]
            best[text["example"]] = max(best.get(text["example"], -math.inf), score)
    assert {text["example"]: text["log_probs"][other[text["writer"]]] for text in kept} == best


def test_an_ensemble_writes_and_answers_are_compared(ran: Path, tmp_path: Path) -> None:
    """Two teachers write one text; kept is what begins as the data's answer does."""
    keep = {"by": "answer", "extract": {"pattern": "^(.)"}}
    mtkd.run(load_config(_copy(ran, tmp_path, {**WRITE, "ensemble": True, "keep": keep})))
    every, kept = (read_jsonl(_export(tmp_path) / name) for name in ("all.jsonl", "texts.jsonl"))
    assert {text["writer"] for text in every} == {"ensemble"}
    assert len(every) == 2 * 24
    answers = [json.loads(line)["text"] for line in (tmp_path / "data/train.jsonl").read_text().splitlines()]
    assert all(text["matches"] == (text["text"][:1] == answers[text["example"]][0]) for text in every if text["text"])
    assert all(text["text"][0] == answers[text["example"]][0] for text in kept)


@pytest.mark.parametrize(
    ("write", "stage", "says"),
    [
        ({"temperature": 0}, {}, "all texts of a prompt are the same"),
        ({"writers": ["three"]}, {}, "no teacher of the stage"),
        ({"keep": {"by": "answer"}}, {}, "go together"),
        ({"keep": {"by": "agreement"}}, {"teachers": ["stage:one"]}, "name a second one"),
        ({"max_new_tokens": 30}, {}, "at most data.NAME.max_length, 24"),
        ({"stop": ["no token"]}, {}, "not one token"),
        ({}, {"steps": 3}, "drop steps"),
        ({}, {"batch": {"tokens": 64}}, "only sequences is read"),
        ({}, {"data": "cold"}, "no entry of prompts"),
    ],
)
def test_mistakes_are_refused(
    ran: Path, tmp_path: Path, write: dict[str, Any], stage: dict[str, Any], says: str
) -> None:
    """Each is named before a text is written."""
    with pytest.raises(UserError, match=says):
        mtkd.run(load_config(_copy(ran, tmp_path, {**WRITE, **write}, **stage)))
    assert not _export(tmp_path).exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": {"cold": {"stage": "one"}}}, "no stage of kind: generate"),
        ({"evaluate": {"data": "cold"}}, "a stage writes these data"),
        ({"stages": {"one": {"data": "cold"}}}, "is not an earlier stage"),
        ({"stages": {"student": {"student": {"path": "stage:cold"}}}}, "is no model"),
        ({"data": {"cold": {"prompt": "asked"}}}, "columns of their own"),
    ],
)
def test_references_to_texts_are_checked(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """Who reads a stage's texts stands behind it, and reads them as data alone."""
    file = _file(tmp_path)
    values = yaml.safe_load(file.read_text())
    for part, entries in changes.items():
        for name, change in entries.items():
            values[part][name] = {**values[part][name], **change} if isinstance(change, dict) else change
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(UserError, match=says):
        load_config(file)


def test_prompts_of_chats_are_answered_and_learned_from(tmp_path: Path) -> None:
    """Of prompts alone the stage makes chats that end with the assistant; the student predicts that turn alone."""
    file = _file(tmp_path, {**WRITE, "writers": ["one"]})
    values = yaml.safe_load(file.read_text())
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"data/{split}.jsonl").read_text().splitlines()]
        asked = [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        chats = [
            {"messages": [*a["messages"], {"role": "assistant", "content": r["text"]}]}
            for a, r in zip(asked, rows, strict=True)
        ]
        for name, lines in ((split, chats), (f"{split}-asked", asked)):
            (tmp_path / f"data/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = values["data"]["text"]
    text.pop("prompt")
    text |= {"messages": "messages", "max_length": 64}
    values["data"]["asked"] = {**text, "prompts_only": True, "files": {"train": "train-asked.jsonl"}}
    values["tokenizer"]["chat_template"] = "chatml"
    values["stages"]["cold"]["data"] = "asked"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    mtkd.run(load_config(file))
    kept = read_jsonl(_export(tmp_path) / "texts.jsonl")
    assert kept
    assert all(text["messages"][-1] == {"role": "assistant", "content": text["text"]} for text in kept)
    assert all(len(text["messages"]) == 2 for text in kept)
    again = load_config(tmp_path / "runs/tiny/run.yaml")
    assert again.data["cold"].mask_history


def test_the_plan_says_what_will_be_written(tmp_path: Path) -> None:
    """Before the stage has run its texts are stood in for, and the plan counts memory too."""
    plan = mtkd.plan(load_config(_file(tmp_path)), memory=True)
    assert plan.stages[2].rows == ["2 text(s) each of one, two to 24 prompts, at most 8 tokens; kept: all"]
    assert plan.stages[3].needs == ["cold"]
    assert any("still to write" in note for data in plan.data for note in data.unread)
