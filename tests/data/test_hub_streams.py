"""So many rows of a hub's data set as a stream: those that `datasets` gives, kept once, of one commit for a run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from pydantic import ValidationError
from tiny_run import tiny_config

import mtkd
from mtkd.config import DataConfig
from mtkd.config.mix import resolve_mixes
from mtkd.data.hub import NotReached, commit_of
from mtkd.data.sources import check_source, read_source
from mtkd.errors import DataError, UserError

ONE, TWO = "a" * 40, "b" * 40
ANSWER: Any = SimpleNamespace(headers={}, request=None, status_code=403)
LOAD = datasets.load_dataset


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def folder(base: Path, rows: int = 40) -> Path:
    """A data set as the hub has them: three files of train, one of validation."""
    place = base / "set"
    place.mkdir(exist_ok=True)
    for part in range(3):
        lines = [{"text": f"text {part} {row}", "other": row, "label": row % 2} for row in range(rows)]
        (place / f"train-{part:05d}-of-00003.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "validation.jsonl").write_text("".join(json.dumps({"text": f"held {row}"}) + "\n" for row in range(7)))
    return place


def read(base: Path, **fields: Any) -> Any:
    config = DataConfig(source="hub", **{"path": "set", **fields})
    check_source(config, base)
    return read_source(config, base)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the hub is asked again")


@pytest.mark.parametrize("buffer", [0, 7, 1000])
def test_the_rows_are_those_of_datasets_and_are_kept(
    buffer: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Law: load_dataset(streaming=True).shuffle(seed, buffer).take(n), in this order; the second time from the disk."""
    place = folder(tmp_path)
    fields = {"stream": {"train": 25, "validation": 50}, "stream_buffer": buffer, "seed": 3}
    raw = read(tmp_path, **fields)
    stream = LOAD(str(place), streaming=True)["train"]
    stream = stream.shuffle(seed=3, buffer_size=buffer) if buffer else stream
    assert raw.splits["train"]["text"][:] == [row["text"] for row in stream.take(25)]
    assert raw.splits["train"].column_names == ["text"]  # of a wide data set no other is kept
    assert sorted(raw.splits["validation"]["text"]) == [f"held {row}" for row in range(7)]
    assert "the 7 rows that it has" in raw.notes[1]
    monkeypatch.setattr(datasets, "load_dataset", never)
    again = read(tmp_path, **fields)
    assert (again.fingerprint, again.splits["train"][:]) == (raw.fingerprint, raw.splits["train"][:])


def test_other_rows_have_another_fingerprint(tmp_path: Path) -> None:
    """By content: another seed, number or file; the same rows below another path are the same."""
    folder(tmp_path)
    prints = [read(tmp_path, stream={"train": 20}, **more).fingerprint for more in ({}, {"seed": 1})]
    prints.append(read(tmp_path, stream={"train": 21}).fingerprint)
    folder(tmp_path, rows=30)
    prints.append(read(tmp_path, stream={"train": 20}).fingerprint)
    assert len(set(prints)) == 4


def test_chats_and_mixes_take_streams(tmp_path: Path) -> None:
    place = tmp_path / "set"
    place.mkdir()
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (place / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    raw = read(tmp_path, messages="messages", stream={"train": 1}, stream_buffer=0)
    assert json.loads(raw.splits["train"]["messages"][0]) == turns
    part = DataConfig(source="hub", path="set", messages="messages", stream={"train": 2})
    mix = resolve_mixes({"part": part, "all": DataConfig(source="mix", mix={"part": 1})})["all"]
    assert len(read_source(mix, tmp_path).splits["train"]) == 2


def test_what_broke_off_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A connection that is lost in the middle: an error of the network, no rows, and the next time all of them."""
    folder(tmp_path)

    def broken(*_: Any, **__: Any) -> Any:
        def rows() -> Any:
            yield from ({"text": f"{row}"} for row in range(1500))
            raise HfHubHTTPError("connection lost", response=ANSWER)

        features = datasets.Features({"text": datasets.Value("string")})
        return datasets.IterableDatasetDict({"train": datasets.IterableDataset.from_generator(rows, features)})

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", broken)
        with pytest.raises(NotReached, match="connection lost"):
            read(tmp_path, stream={"train": 2000})
    assert [*(tmp_path / "cache" / "mtkd-streams").iterdir()] == []
    assert len(read(tmp_path, stream={"train": 2000}).splits["train"]) == 120


@pytest.mark.parametrize("file", ["rows.parquet", "stream.json"])
@pytest.mark.parametrize("damage", [b"", b"PAR1 {", None])
def test_damaged_rows_are_streamed_again(file: str, damage: bytes | None, tmp_path: Path) -> None:
    """Emptied, overwritten or gone; also one byte in the middle of the values."""
    folder(tmp_path)
    before = read(tmp_path, stream={"train": 20})
    (place,) = (tmp_path / "cache" / "mtkd-streams").iterdir()
    (place / file).unlink()
    if damage is not None:
        (place / file).write_bytes(damage)
    after = read(tmp_path, stream={"train": 20})
    assert (after.fingerprint, after.splits["train"][:]) == (before.fingerprint, before.splits["train"][:])
    rows = bytearray((place / "rows.parquet").read_bytes())
    rows[len(rows) // 4] ^= 1
    (place / "rows.parquet").write_bytes(rows)
    assert read(tmp_path, stream={"train": 20}).splits["train"][:] == before.splits["train"][:]


def test_files_that_are_no_data_set(tmp_path: Path) -> None:
    """An empty file, a broken one, a folder of save_to_disk, a file in place of a folder: each has words of its own."""
    for name, text in (("empty", ""), ("broken", '{"text": "a"}\n{"text": \n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(text)
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    for path, message, todo in (
        ("empty", "has no rows", ""),
        ("broken", "cannot be loaded", "correct its files"),
        ("saved", "cannot be loaded", "source: files"),
        ("broken/train.jsonl", "data set", "source: files"),
    ):
        with pytest.raises(DataError, match=message) as refused:
            read(tmp_path, path=path, stream={"train": 3})
        assert todo in refused.value.todo


@pytest.mark.parametrize(
    ("fields", "where", "message"),
    [
        ({"stream": {"test": 3}}, "@data.stream.test", "no such split"),
        ({"stream": {"test": 3}, "splits": {"test": "dev"}}, "@data.splits.test", "no such split"),
        ({"stream": {"train": 3}, "text": "txt"}, "set train", "no such column"),
        ({"stream": {"train": 3}, "subset": "en"}, "@data.subset", "no such subset"),
        ({"stream": {"train": 3}, "path": "../gone"}, "@data.path", "neither a folder nor the id"),
    ],
)
def test_what_is_not_there(fields: dict[str, Any], where: str, message: str, tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(DataError, match=message) as refused:
        read(tmp_path, **fields)
    assert refused.value.where == where
    assert refused.value.found


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": {"train": 0}},
        {"stream": {"dev": 5}},
        {"stream": True},
        {"stream_buffer": 5},
        {"stream": {"train": 3}, "stream_buffer": -1},
        {"stream": {"train": 3}, "splits": {"test": "test"}},
    ],
)
def test_blocks_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(source="hub", path="a/b", **fields)


def test_files_are_no_stream(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not read this"):
        check_source(DataConfig(source="files", files={"train": "a.txt"}, stream={"train": 3}), tmp_path)


@pytest.mark.parametrize(
    ("kind", "message", "where"),
    [
        (GatedRepoError, "gated", "@data.path"),
        (RevisionNotFoundError, "no such revision", "@data.revision"),
        (RepositoryNotFoundError, "no such data set", "@data.path"),
    ],
)
def test_what_the_hub_refuses(
    kind: Any, message: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise kind("403", response=ANSWER)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    with pytest.raises(DataError, match=message) as refused:
        commit_of(DataConfig(source="hub", path="org/set", revision="v1", stream={"train": 3}), tmp_path)
    assert refused.value.where == where
    assert not isinstance(refused.value, NotReached)


def test_a_run_keeps_its_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The branch moves: the run goes on with the rows that it began with, a new run takes the new ones."""
    now, asked = [ONE], []
    place = folder(tmp_path)

    def load(path: str, subset: str | None, revision: str, streaming: bool) -> Any:
        assert (path, subset, streaming) == ("org/set", None, True)
        asked.append(revision)
        return LOAD(str(place), streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha=now[0]))
    streamed = {"source": "hub", "path": "org/set", "files": None, "revision": "main"}
    streamed |= {"stream": {"train": 16, "validation": 4}}
    stages = {"teacher": {"steps": 1}, "student": {"steps": 1}}
    more = {"data": {"text": streamed}, "stages": stages, "evaluate": {"split": "validation", "resamples": 50}}
    config = tiny_config(tmp_path, **more)
    first = mtkd.run(config)
    assert asked == [ONE, ONE]
    assert json.loads((first.folder / "env.json").read_text())["streams"]["text"]["commit"] == ONE
    assert f"revision: {ONE}" in (first.folder / "run.yaml").read_text()
    now[0] = TWO
    again = mtkd.run(config)
    assert again.stages["student"]["fingerprint"] == first.stages["student"]["fingerprint"]
    assert asked == [ONE, ONE]
    mtkd.run(tiny_config(tmp_path, name="other", **more))
    assert asked == [ONE, ONE, TWO, TWO]

    def away(*_: Any, **__: Any) -> Any:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", away)
    offline = config.data["text"]
    assert commit_of(offline, tmp_path) == TWO  # the last that was seen
