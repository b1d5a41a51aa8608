"""Pipes, sockets, devices and folders where a file belongs: refused with the place; nothing waits for ever."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from datasets import Dataset
from tiny_run import write_yaml
from transformers import GPT2Config, GPT2LMHeadModel

import mtkd
from mtkd.data.tokenizers import train_tokenizer
from mtkd.engine.hostfile import read_hostfile
from mtkd.errors import EXIT_DATA, EXIT_USAGE, UserError

_SECONDS = 120  # what must not wait at all takes a second


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """What waits for a pipe is interrupted, so that a failure is a failure."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it waits for a pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    """Bound from its folder: the path of a socket has at most 108 bytes."""
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = (pipe, unix_socket, endless, folder, loop)
Make = Callable[[Path], None]


def refused(file: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        mtkd.plan(mtkd.load_config(file))
    assert caught.value.exit_code in (EXIT_USAGE, EXIT_DATA)
    return caught.value


@pytest.mark.parametrize("make", KINDS)
def test_the_configuration_is_a_file(tmp_path: Path, make: Make) -> None:
    make(tmp_path / "run.yaml")
    assert "run.yaml" in refused(tmp_path / "run.yaml").where


@pytest.mark.parametrize("make", KINDS)
def test_a_plugin_is_a_file(tmp_path: Path, make: Make) -> None:
    make(tmp_path / "plug.py")
    assert "plugins" in refused(write_yaml(tmp_path, plugins=["plug.py"])).where


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["odd.jsonl", "odd.parquet", "odd.csv.gz"])
def test_data_are_files(tmp_path: Path, name: str, make: Make) -> None:
    file = write_yaml(tmp_path, data={"text": {"files": {"train": name}}})
    make(tmp_path / "data" / name)
    error = refused(file)
    assert "data.text.files.train" in error.where
    assert name in str(error.found)


@pytest.mark.parametrize("make", [pipe, endless, unix_socket])
def test_what_a_pattern_matches_is_a_file(tmp_path: Path, make: Make) -> None:
    file = write_yaml(tmp_path, data={"text": {"files": {"train": "tr*.jsonl"}}})
    make(tmp_path / "data" / "trap.jsonl")
    assert "matches what is no file" in refused(file).message


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("name", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_saved_data_set_is_made_of_files(tmp_path: Path, name: str, make: Make) -> None:
    file = write_yaml(tmp_path, data={"text": {"files": {"train": "saved"}}})
    saved = tmp_path / "data" / "saved"
    Dataset.from_dict({"text": ["one text", "another"]}).save_to_disk(saved)
    (saved / name).unlink()
    make(saved / name)
    refused(file)


@pytest.mark.parametrize("make", [pipe, unix_socket, endless])
def test_a_hostfile_is_a_file(tmp_path: Path, make: Make) -> None:
    make(tmp_path / "hosts")
    with pytest.raises(UserError, match="this is a "):
        read_hostfile(str(tmp_path / "hosts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "model"
    tokenizer = train_tokenizer(["one text"], 270)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2)).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_models_and_tokenizers_are_made_of_files(tmp_path: Path, model: Path, name: str, make: Make) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    (own / name).unlink(missing_ok=True)
    make(own / name)
    distilled = {"student": {"teachers": [{"name": "teacher", "model": "model"}]}, "teacher": None}
    changes = {"ensembles": None, "comparisons": None}
    file = write_yaml(tmp_path, tokenizer={"train_on": None, "vocab_size": None, "path": "model"}, stages=distilled,
                      evaluate=changes)  # fmt: skip
    error = refused(file)
    assert name in str(error)
