"""Credentials in URLs stand neither in the run's files nor on the screen (D21)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import processes
import pytest
from tiny_run import NAME, tiny_config, write_yaml

import mtkd
from mtkd.data.progress import console, say
from mtkd.errors import UserError, in_url, masked, tell
from mtkd.evaluate.report.read import read_run

SECRET = "s3cr3tmark"
URL = f"https://user:{SECRET}@host.invalid/x"
STUDENT_OF_PATH = {"path": URL} | dict.fromkeys(("architecture", "layers", "width", "heads", "dropout"))
PLACES: list[tuple[str, dict[str, Any]]] = [
    ("stages.student.teachers[0]", {"stages": {"student": {"teachers": [URL]}}}),
    ("stages.teacher.student.path", {"stages": {"teacher": {"student": STUDENT_OF_PATH}}}),
    ("tokenizer.path", {"tokenizer": {"path": URL, "train_on": None, "vocab_size": None}}),
    ("data.text.files.train", {"data": {"text": {"files": {"train": URL}}}}),
    ("data.text.path", {"data": {"text": {"path": URL}}}),
    ("data.text.text", {"data": {"text": {"text": f"see {URL}"}}}),
    ("plugins[0]", {"plugins": [URL]}),
    ("output", {"output": URL}),
    ("stages.student.method", {"stages": {"student": {"method": URL}}}),
    (
        "stages.student.weighting.options.tracker",
        {
            "stages": {
                "student": {
                    "weighting": {"name": "uniform", "options": {"tracker": f"https://host.invalid/?api_key={SECRET}"}}
                }
            }
        },
    ),
]


@pytest.mark.parametrize(("place", "changes"), PLACES)
def test_they_are_refused_at_their_place(tmp_path: Path, place: str, changes: dict[str, Any]) -> None:
    """Before anything is written: what run.yaml masked could not be resumed."""
    file = write_yaml(tmp_path, **changes)
    before = sorted(tmp_path.rglob("*"))
    for act in (mtkd.plan, mtkd.run):
        with pytest.raises(UserError, match="a URL with credentials") as caught:
            act(mtkd.load_config(file))
        assert caught.value.where == place
        assert caught.value.line.startswith(f"{file}:")
        assert SECRET not in str(caught.value)
        assert "HF_TOKEN" in caught.value.todo
    assert sorted(tmp_path.rglob("*")) == before


def test_a_configuration_made_in_code_is_refused_too(tmp_path: Path) -> None:
    config = tiny_config(tmp_path).model_copy(update={"output": URL})
    with pytest.raises(UserError, match=r"output: a URL with credentials"):
        mtkd.run(config)


@pytest.mark.parametrize(
    "changes",
    [
        {URL: 3},
        {"name": URL},
        {"stages": {"student": {"steps": URL}}},
        {"stages": {URL: {"kind": "finetune"}}},
        {"engine": {"device": URL}},
    ],
)
def test_what_is_wrong_in_another_way_is_shown_masked(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        mtkd.load_config(write_yaml(tmp_path, **changes))
    assert SECRET not in str(caught.value)


def test_the_command_shows_none(tmp_path: Path) -> None:
    """Nor does an override, or a variable of the environment."""
    file = str(write_yaml(tmp_path))
    over = ("-o", f"stages.student.teachers.0={URL}")
    code, output = processes.run(tmp_path, "run", file, *over, environment={"HTTPS_PROXY": URL, "HF_ENDPOINT": URL})
    assert (code, SECRET in output) == (2, False), output
    assert "-o stages.student.teachers.0: stages.student.teachers[0]: a URL with credentials" in output
    assert not (tmp_path / "runs" / NAME).exists()


def test_lines_and_reports_are_masked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of other people's errors, and a run.yaml of an older version."""
    tell(f"cannot reach {URL}")
    with console.capture() as said:
        say(f"cannot reach {URL}")
    assert SECRET not in capsys.readouterr().err + said.get()
    (tmp_path / "run.yaml").write_text(f"name: old\noutput: {URL}\n")
    assert SECRET not in str(read_run(tmp_path).config_text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:a@b@host/x", "https://***@host/x"),
        ("https://token@host/x and ftp://u:p@h", "https://***@host/x and ftp://***@h"),
        ("/home/me/https:/user:token@host/x", "/home/me/https:/***@host/x"),
        ("https://host/?a=1&access_token=abc&b=2", "https://host/?a=1&access_token=***&b=2"),
        ("https://host/?X-Amz-Signature=abc", "https://host/?X-Amz-Signature=***"),
        ("https://host/path@v1", "https://host/path@v1"),
        ("https://host/?q=me@example.org", "https://host/?q=me@example.org"),
        ("me@example.org", "me@example.org"),
    ],
)
def test_what_is_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert in_url(text) == (text != shown and "://" in text)
