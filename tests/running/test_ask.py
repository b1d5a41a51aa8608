"""`mtkd generate`: finished models of a run answer as transformers would, and wrong asks are told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rollout_runs import write_run
from tiny_run import NAME
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mtkd
from mtkd.cli.app import app
from mtkd.config import AnswersConfig
from mtkd.config.read import load_config
from mtkd.errors import UserError
from mtkd.running.ask import ask

PROMPTS = ["say abc: ", "say d: ", "say "]
GREEDY = AnswersConfig(max_new_tokens=6)
DRAWN = AnswersConfig(max_new_tokens=6, temperature=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    twice = ["stage:teacher", {"model": "stage:teacher", "name": "again"}]
    mtkd.run(load_config(write_run(folder, None, {"teachers": twice, "steps": 2})))
    return folder / "runs" / NAME


def continued(folder: Path, prompt: str) -> str:
    """What transformers writes after the beginning token and a prompt, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    rows = torch.tensor([ids])
    out = model.generate(
        rows,
        attention_mask=torch.ones_like(rows),
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize(("stage", "name"), [("student", "02-student"), ("teacher", "01-teacher"), ("", "02-student")])
def test_an_answer_is_that_of_transformers(run: Path, stage: str, name: str) -> None:
    answers = ask(run / stage, PROMPTS, GREEDY)
    assert [a.text for a in answers] == [continued(run / "stages" / name / "export", prompt) for prompt in PROMPTS]
    assert [a.prompt for a in answers] == PROMPTS
    assert {a.model for a in answers} == {name[3:]}


def test_teachers_answer_beside_their_student(run: Path) -> None:
    """Law: each answers as if asked alone; two names of one model give one text, also where it is drawn."""
    answers = ask(run / "student", PROMPTS[:1], DRAWN, teachers=True, seed=3)
    assert [a.model for a in answers] == ["student", "teacher", "again"]
    assert answers[1].text == answers[2].text == ask(run / "teacher", PROMPTS[:1], DRAWN, seed=3)[0].text
    drawn = {ask(run / "teacher", PROMPTS[:1], DRAWN, seed=seed)[0].text for seed in range(8)}
    assert len(drawn) > 1


def test_the_command_prints_texts_or_json(run: Path) -> None:
    runner, (answer,) = CliRunner(), ask(run / "student", PROMPTS[:1], AnswersConfig(max_new_tokens=4))
    plain = runner.invoke(app, ["generate", str(run / "student"), PROMPTS[0], "--max-new-tokens", "4"])
    assert plain.stdout == answer.text + (" [cut]" if answer.cut else "") + "\n"
    told = runner.invoke(app, ["generate", str(run), PROMPTS[0], "--max-new-tokens", "4", "--json"])
    assert json.loads(told.stdout) == [vars(answer)]
    both = runner.invoke(app, ["generate", str(run), PROMPTS[0], "--teachers"]).stdout
    assert [line.split(":")[0] for line in both.splitlines()] == ["student", "teacher", "again"]


@pytest.mark.parametrize(
    ("where", "options", "words"),
    [
        ("nothing", [], ("makes no such model", "nothing", "teacher, student")),
        ("teacher", ["--teachers"], ("no teacher with weights",)),
        ("student", ["--temperature", "-1"], ("--temperature", "-1")),
        ("student", ["--max-new-tokens", "0"], ("--max-new-tokens", "0")),
        ("student", ["--top-p", "0"], ("--top-p",)),
        ("../..", [], ("not the folder of a run",)),
        ("../../..", [], ("not a run folder",)),
    ],
)
def test_wrong_asks_are_told(run: Path, where: str, options: list[str], words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["generate", str(run / where), "say a: ", *options])
    assert isinstance(result.exception, UserError)
    for word in words:
        assert word in str(result.exception)


def test_prompts_that_cannot_be_read_are_told(run: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        ask(run, [""], GREEDY)
    with pytest.raises(UserError, match="cannot read so long a prompt"):
        ask(run, ["a b " * 400], GREEDY)


def test_classifiers_write_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = SimpleNamespace(find=lambda name: SimpleNamespace(left_to_right=False))
    monkeypatch.setattr("mtkd.running.ask.TASKS", tasks)
    with pytest.raises(UserError, match="makes no model that writes text"):
        ask(run, ["a"], GREEDY)


def test_unfinished_stages_write_nothing(run: Path) -> None:
    (done,) = (run / "stages").glob("02-*/DONE")
    record = done.read_bytes()
    done.unlink()
    try:
        with pytest.raises(UserError, match="is not finished"):
            ask(run, ["a"], GREEDY)
    finally:
        done.write_bytes(record)
