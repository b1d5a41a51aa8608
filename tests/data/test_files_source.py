"""Local files: every format gives the same rows, and every fault is reported with its file and row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_examples import load_raw
from transformers import PreTrainedTokenizerFast

from mtkd.config import DataConfig
from mtkd.data.load import load_data
from mtkd.data.raw import Raw
from mtkd.data.sources import check_source
from mtkd.errors import DataError, UserError

Write = Callable[..., DataConfig]
ROWS = [("plain text", "yes"), ('a "quoted" word, and a comma', "no"), ("naïve – 漢字", "yes")]


def failure(config: DataConfig, base: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    try:
        load_data("corpus", config, load_raw(config, base), tokenizer)
    except UserError as error:
        return str(error)
    return pytest.fail("nothing was refused")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_format_gives_the_same_rows(kind: str, mark: bytes, tmp_path: Path) -> None:
    if kind == "jsonl":
        content = "\n".join(json.dumps({"text": t, "label": y}) for t, y in ROWS)
    elif kind == "json":
        content = json.dumps([{"text": t, "label": y} for t, y in ROWS], indent=1)
    elif kind == "csv":
        content = "text,label\r\n" + "\r\n".join('"' + t.replace('"', '""') + f'",{y}' for t, y in ROWS)
    else:
        content = "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in ROWS)
    if kind == "parquet":
        table = pa.table({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        (tmp_path / f"a.{kind}").write_bytes(mark + content.encode())
    config = DataConfig(source="files", files={"train": f"a.{kind}"}, task="classify")
    check_source(config, tmp_path)
    rows = load_raw(config, tmp_path).splits["train"]
    assert list(zip(rows["text"], rows["label"], strict=True)) == ROWS


def test_values_of_csv_stay_text(write: Write, tmp_path: Path) -> None:
    config = write("a.csv", 'text,label\nNA,1\n"null\nline",0\n2020-01-01,1\n')
    rows = load_raw(config, tmp_path).splits["train"]
    assert list(rows["text"]) == ["NA", "null\nline", "2020-01-01"]
    assert list(rows["label"]) == ["1", "0", "1"]


def test_a_text_file_is_one_document_per_block(write: Write, tmp_path: Path) -> None:
    config = write("a.txt", "\n\none\ntwo\n \n\nthree\r\n")
    assert list(load_raw(config, tmp_path).splits["train"]["text"]) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y"}\n{"text": "z"\n', ("a.jsonl, line 3", "malformed JSON")),
        ("a.jsonl", '{"text": "x"}\n\n["y"]\n', ("a.jsonl, line 3", "JSON object")),
        ("a.jsonl", '{"text": "x"}\n{"text": {"y": 1}}\n', ("a.jsonl, ", "2")),
        ("a.json", '[{"text": "x"},\n {"text": }]', ("a.json, line 2", "malformed JSON")),
        ("a.csv", "text,label\nx,1\ny\n", ("a.csv, row 2 (line 3)", "wrong number of columns")),
        ("a.csv", 'text,label\n"x\nx",1\ny,1,2\n', ("a.csv, row 2 (line 4)", "3 columns")),
        ("a.tsv", "text\tlabel\nx\t1\ty\n", ("a.tsv, row 1 (line 2)", "3 columns")),
        ("a.csv", 'text,label\nx,1\n"y,1\n', ("a.csv, after row 1", "malformed row")),
        ("a.csv", "text,text\nx,y\n", ("a.csv, line 1", "once")),
        ("a.txt", b"one\n\ntw\xff\n", ("a.txt, line 3", "not UTF-8")),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', ("a.jsonl, line 2", "not UTF-8")),
        ("a.csv", b"text\nx\n\xe9\n", ("a.csv, line 3", "not UTF-8")),
        ("a.parquet", b"no parquet", ("a.parquet", "cannot be read")),
        *[(f"a.{kind}", "", (f"a.{kind}", "no rows")) for kind in ("jsonl", "json", "txt")],
        *[(f"a.{kind}", " \n", (f"a.{kind}", "no rows")) for kind in ("jsonl", "txt")],
        ("a.json", "[]", ("a.json", "no rows")),
        ("a.csv", "text,label\n", ("a.csv", "no rows")),
        ("a.tsv", "", ("a.tsv", "header")),
    ],
)
def test_a_broken_file_is_named_with_its_row(
    name: str, content: str | bytes, expected: tuple[str, ...], write: Write, tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    message = failure(write(name, content), tmp_path, tokenizer)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("name", "content", "fields", "expected"),
    [
        ("a.csv", "text,label\nx,1\ny,nan\nz,0.5\n", {}, ("a.csv, row 2 (line 3)", "nan")),
        ("a.csv", "text,label\nx,yes\ny,maybe\n", {"labels": ("yes", "no")}, ("row 2 (line 3)", "maybe", "yes, no")),
        ("a.csv", "text,label\nx,1\ny,1\n", {}, ("a.csv", "same label")),
        ("a.csv", "text,label\nx,1\ny,0\n", {"text_pair": "other"}, ("a.csv", "no column 'other'")),
        ("a.jsonl", '{"text": "x", "label": 0}\n{"text": null, "label": 1}\n', {}, ("row 2 (line 2)", "no text")),
        ("a.jsonl", '{"text": 5, "label": 0}\n{"text": 6, "label": 1}\n', {}, ("row 1 (line 1)", "no text")),
        ("a.csv", "text,label\nx,0\ny,1\n", {"label": "labell"}, ("a.csv", "no column 'labell'", "'label'")),
    ],
)
def test_a_row_without_label_or_text_is_named(
    name: str, content: str, fields: dict, expected: tuple[str, ...], write: Write, tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    message = failure(write(name, content, task="classify", **fields), tmp_path, tokenizer)
    assert all(part in message for part in expected), message


def test_a_row_keeps_its_number_after_limit_and_hold_out(
    write: Write, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    lines = [f"text {i},{i % 2}" for i in range(40)]
    lines[25] = "unknown,2"
    for fields in ({"validation_share": 0.5, "seed": 1}, {"limit": {"train": 39}, "seed": 3}):
        config = write("a.csv", "\n".join(["text,label", *lines]), task="classify", labels=("0", "1"), **fields)
        assert "a.csv, row 26 (line 27)" in failure(config, tmp_path, tokenizer)


def test_hold_out_and_limit_follow_the_seed(write: Write, tmp_path: Path) -> None:
    content = "\n\n".join(f"document {i}" for i in range(50))

    def texts(**fields: object) -> dict[str, list[str]]:
        raw = load_raw(write("a.txt", content, **fields), tmp_path)
        return {split: list(rows["text"]) for split, rows in raw.splits.items()}

    held = texts(validation_share=0.2, seed=1)
    assert (len(held["train"]), len(held["validation"])) == (40, 10)
    assert sorted(held["train"] + held["validation"]) == sorted(texts()["train"])
    assert held == texts(validation_share=0.2, seed=1)
    assert held != texts(validation_share=0.2, seed=2)
    limited = texts(limit={"train": 7}, seed=1)["train"]
    assert len(limited) == 7
    assert limited != texts(limit={"train": 7}, seed=2)["train"]


def test_the_fingerprint_follows_the_content_and_the_choice(write: Write, tmp_path: Path) -> None:
    first = load_raw(write("a.txt", "one\n\ntwo"), tmp_path).fingerprint
    assert load_raw(write("b.txt", "one\n\ntwo"), tmp_path).fingerprint == first
    assert load_raw(write("b.txt", "one\n\nto"), tmp_path).fingerprint != first
    chosen = [{"limit": {"train": 1}}, {"limit": {"train": 1}, "seed": 1}, {"validation_share": 0.5}]
    prints = [load_raw(write("b.txt", "one\n\ntwo", **fields), tmp_path).fingerprint for fields in chosen]
    assert len({first, *prints}) == 4


def test_raw_texts_are_checked(write: Write, tmp_path: Path) -> None:
    raw = load_raw(write("a.jsonl", '{"text": "x", "other": "y"}\n{"text": "z", "other": null}\n'), tmp_path)
    assert raw.texts("train", "text") == ["x", "z"]
    with pytest.raises(DataError, match="no text") as caught:
        raw.texts("train", "other")
    assert "row 2 (line 2)" in str(caught.value)
    for split, column in (("test", "text"), ("train", "txt")):
        with pytest.raises(DataError):
            raw.texts(split, column)


def test_files_are_found_beside_the_yaml_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, text in (("yaml", "beside"), ("cwd", "working")):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / f"{folder}.txt").write_text(text)
        (tmp_path / folder / "data" / "both.txt").write_text(text)
    monkeypatch.chdir(tmp_path / "cwd")

    def first(name: str) -> str:
        config = DataConfig(source="files", path="data", files={"train": name})
        return load_raw(config, tmp_path / "yaml").splits["train"]["text"][0]

    assert [first("both.txt"), first("yaml.txt"), first("cwd.txt")] == ["beside", "beside", "working"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"source": "nowhere"}, ("unknown data source", "python-stdlib")),
        ({"source": "file", "files": {"train": "a.txt"}}, ("did you mean 'files'",)),
        ({"source": "files"}, ("needs `files`",)),
        ({"source": "files", "files": {"train": "missing.txt"}}, ("no such file", "missing.txt")),
        ({"source": "files", "files": {"train": "a.xlsx"}}, ("not read", ".jsonl")),
        ({"source": "files", "files": {"train": "a.txt"}, "domains": ("prose",)}, ("data.domains",)),
        ({"source": "files", "files": {"train": "a.txt"}, "splits": {"train": "x"}}, ("data.splits",)),
        ({"source": "files", "files": {"train": "a.csv"}, "text": "txet"}, ("no column 'txet'", "'text'")),
        ({"source": "python-stdlib", "files": {"train": "a.txt"}}, ("data.files",)),
        ({"source": "python-stdlib", "validation_share": 0.1}, ("validation_share",)),
        ({"source": "hub", "path": "a/b", "files": {"train": "a.txt"}}, ("data.files",)),
        ({"source": "hub"}, ("needs `path`",)),
        ({"source": "python-stdlib", "label": "y"}, ("data.label", "classify")),
        ({"source": "python-stdlib", "task": "masked_lm"}, ("data.task", "did you mean 'masked-lm'")),
    ],
)
def test_what_can_be_refused_before_reading_is(fields: dict, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.csv").write_text("text,label\nx,1\n")
    with pytest.raises(UserError) as caught:
        check_source(DataConfig(**fields), tmp_path)
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_a_limit_on_a_missing_split_is_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such split"):
        load_raw(write("a.txt", "one", limit={"test": 3}), tmp_path)


def test_the_hub_source_maps_splits_and_reports_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    found = datasets.DatasetDict(
        {s: datasets.Dataset.from_dict({"sentence": [s, "b"], "label": [1, 0]}, features) for s in ("train", "dev")}
    )
    asked: list[tuple] = []

    def load_dataset(path: str, name: str | None, revision: str | None) -> datasets.DatasetDict:
        asked.append((path, name, revision))
        if path == "gone/away":
            raise ConnectionError("cannot reach the hub")
        return found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    fields = {"source": "hub", "subset": "sst2", "revision": "main", "text": "sentence", "task": "classify"}
    raw: Raw = load_raw(DataConfig(path="org/set", splits={"train": "train", "test": "dev"}, **fields), tmp_path)
    assert asked == [("org/set", "sst2", "main")]
    assert {s: rows["sentence"][0] for s, rows in raw.splits.items()} == {"train": "train", "test": "dev"}
    with pytest.raises(DataError, match="no such split"):
        load_raw(DataConfig(path="org/set", splits={"test": "test"}, **fields), tmp_path)
    with pytest.raises(DataError, match="cannot reach the hub"):
        load_raw(DataConfig(path="gone/away", **fields), tmp_path)
