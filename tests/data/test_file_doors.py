"""Files as other programs write them: the same rows come out, whatever the form, or the message says what to do."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from data_examples import load_raw
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from mtkd.config import DataConfig
from mtkd.data.raw import Raw
from mtkd.data.sources import check_source, choose_rows, read_source
from mtkd.errors import DataError, UserError

ROWS = [("plain; text", "yes"), ('a "quoted" word, and\na second line', "no"), ("naïve – 漢字\ttab", "yes")]


def read(folder: Path, files: object, **fields: object) -> Raw:
    """Every row; labels are not looked at."""
    config = DataConfig(source="files", files=files, task="classify", **fields)
    check_source(config, folder)
    return read_source(config, folder)


def rows_of(raw: Raw, split: str = "train") -> list[tuple]:
    rows = raw.splits[split]
    return list(zip(rows["text"], rows["label"], strict=True))


def table(rows: list[tuple], header: list[str] | None = None, separator: str = ",", end: str = "\n") -> str:
    """What Python's csv module writes."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, lineterminator=end)
    writer.writerows([header or ["text", "label"], *rows])
    return stream.getvalue()


def message(folder: Path, name: str, content: str | bytes, **fields: object) -> str:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError) as caught:
        read(folder, {"train": name}, **fields)
    return str(caught.value)


@pytest.mark.parametrize("index", [[""], ["", ""], ["Unnamed: 0"], ["Unnamed: 0", "Unnamed: 0.1"], [" "]])
def test_an_index_that_pandas_wrote_is_ignored_with_a_note(index: list[str], tmp_path: Path) -> None:
    written = table([(*["7"] * len(index), *row) for row in ROWS], [*index, "text", "label"])
    (tmp_path / "a.csv").write_text(written)
    raw = read(tmp_path, {"train": "a.csv"})
    assert rows_of(raw) == ROWS
    assert raw.splits["train"].column_names == ["text", "label"]
    assert "ignored" in raw.notes[0]
    assert "a.csv" in raw.notes[0]


def test_an_index_in_the_middle_is_ignored_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table([(t, "3", y) for t, y in ROWS], ["text", "Unnamed: 1", "label"]))
    assert rows_of(read(tmp_path, {"train": "a.csv"})) == ROWS


def test_rownames_that_r_writes_without_a_header_are_ignored(tmp_path: Path) -> None:
    """write.table names one column less; only numbers that count are taken for row names."""
    written = table([(str(i), *row) for i, row in enumerate(ROWS, 1)])
    (tmp_path / "a.csv").write_text(written)
    assert rows_of(read(tmp_path, {"train": "a.csv"})) == ROWS
    assert "wrong number of columns" in message(tmp_path, "b.csv", 'text,label\n1,"x",y\n3,"x",y\n')
    assert "wrong number of columns" in message(tmp_path, "b.csv", "text,label\nx,and more,y\nx,and more,n\n")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("text,,label", ("line 1", "column 2 has no name", "remove the header and name all with `columns`")),
        ("text,label,", ("column 3 has no name",)),
        (",text,text,label", ("column 'text' is there twice",)),
        (",", ("names no column",)),
    ],
)
def test_a_header_with_gaps_says_what_to_do(header: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    found = message(tmp_path, "a.csv", f"{header}\n" + ",".join("x" * (header.count(",") + 1)) + "\n")
    assert all(part in found for part in expected), found


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [";", "\t", "|", "\\t", "tab"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_is_read_with_its_separator(separator: str, kind: str, end: str, tmp_path: Path) -> None:
    character = "\t" if separator in ("\\t", "tab") else separator
    (tmp_path / f"a.{kind}").write_bytes(table(ROWS, separator=character, end=end).encode("utf-8-sig"))
    assert rows_of(read(tmp_path, {"train": f"a.{kind}"}, separator=separator)) == ROWS


@pytest.mark.parametrize(("separator", "written"), [(";", '";"'), ("\t", '"\\t"'), ("|", '"|"')])
def test_another_separator_is_guessed_in_the_message_only(separator: str, written: str, tmp_path: Path) -> None:
    found = message(tmp_path, "a.csv", table([("x", "y")], separator=separator))
    assert f"the header looks separated by {written}: set separator: {written}" in found
    found = message(
        tmp_path, "a.csv", table([("x, y", "z")], ["text", "my label"], separator=separator), label="my label"
    )
    assert f"set separator: {written}" in found


@pytest.mark.parametrize("separator", ["", ";;", "a", '"', "\n"])
def test_a_separator_is_one_character(separator: str) -> None:
    with pytest.raises(ValueError, match="separator"):
        DataConfig(source="files", files={"train": "a.csv"}, separator=separator)


@pytest.mark.parametrize(("kind", "separator"), [("csv", ","), ("tsv", "\t")])
def test_columns_name_a_file_without_a_header(kind: str, separator: str, tmp_path: Path) -> None:
    plain = [("first", "yes"), ("second", "no")]
    (tmp_path / f"a.{kind}").write_text("".join(f"{y}{separator}{t}\n" for t, y in plain))
    raw = read(tmp_path, {"train": f"a.{kind}"}, columns=("label", "text"))
    assert rows_of(raw) == plain
    assert raw.origins["train"].where(1) == f"a.{kind}, row 2 (line 2)"
    found = message(tmp_path, "b.csv", "text,label\nx,y\n", columns=("text", "label"))
    assert "the first line is a header" in found
    assert "drop `columns`" in found
    assert "3 columns, as `columns` names" in message(tmp_path, "b.csv", "x,y\n", columns=("text", "label", "c"))
    for columns in (("text", "text"), ("text", " ")):
        with pytest.raises(ValueError, match="name of its own"):
            DataConfig(source="files", columns=columns)


@pytest.mark.parametrize("fields", [{"separator": ";"}, {"columns": ("text", "label")}])
def test_only_tables_have_a_separator_and_columns(fields: dict, tmp_path: Path) -> None:
    found = message(tmp_path, "a.jsonl", '{"text": "x", "label": "y"}\n', **fields)
    assert f"data.{next(iter(fields))}: only tables have it" in found


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as packed:
        packed.write(data)
    return sink.getvalue().to_pybytes()


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd,
}  # fmt: skip


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt"])
def test_compressed_files_hold_the_same_rows(kind: str, packed: str, tmp_path: Path) -> None:
    rows = [(t.replace("\n", " ").replace("\t", " "), y) for t, y in ROWS]
    content = {
        "jsonl": "\n".join(json.dumps({"text": t, "label": y}) for t, y in rows),
        "json": json.dumps([{"text": t, "label": y} for t, y in rows]),
        "csv": table(rows),
        "tsv": "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows),
        "txt": "\n\n".join(t for t, _ in rows),
    }[kind].encode()
    (tmp_path / f"a.{kind}{packed}").write_bytes(PACK[packed](content))
    (tmp_path / f"a.{kind}").write_bytes(content)
    both = []
    for name in (f"a.{kind}", f"a.{kind}{packed}"):
        config = DataConfig(source="files", files={"train": name}, task="causal-lm")
        check_source(config, tmp_path)
        raw = load_raw(config, tmp_path)
        both.append((raw.splits["train"].to_dict(), raw.origins["train"].where(1).removeprefix(name)))
    assert both[0] == both[1]
    assert both[0][0]["text"] == [t for t, _ in rows]


@pytest.mark.parametrize("packed", PACK)
def test_a_damaged_compressed_file_is_named(packed: str, tmp_path: Path) -> None:
    whole = PACK[packed](os.urandom(3000).hex().encode())
    for broken in (whole[: len(whole) // 2], b"no such thing"):
        (tmp_path / f"a.txt{packed}").write_bytes(broken)
        with pytest.raises(DataError, match="cannot be unpacked") as caught:
            load_raw(DataConfig(source="files", files={"train": f"a.txt{packed}"}), tmp_path)
        assert f"a.txt{packed}" in str(caught.value)


def shards(folder: Path) -> None:
    (folder / "parts").mkdir()
    for i in range(3):
        lines = [json.dumps({"text": f"{i}-{j}", "label": "ab"[j % 2]}) for j in range(2 + i)]
        (folder / "parts" / f"part-{i}.jsonl").write_text("\n".join(lines) + "\n")


def test_files_of_a_split_are_read_in_order(tmp_path: Path) -> None:
    shards(tmp_path)
    names = [f"parts/part-{i}.jsonl" for i in range(3)]
    one_by_one = [rows_of(read(tmp_path, {"train": name})) for name in names]
    for files in (names, "parts/part-*.jsonl", "**/*.jsonl", [names[0], "parts/*"]):
        raw = read(tmp_path, {"train": files})
        assert rows_of(raw) == list(chain(*one_by_one))
        assert raw.origins["train"].where(4) == "parts/part-1.jsonl, row 3 (line 3)"
    backwards = read(tmp_path, {"train": names[::-1]})
    assert rows_of(backwards) == list(chain(*one_by_one[::-1]))
    assert backwards.fingerprint != read(tmp_path, {"train": names}).fingerprint


def test_the_fingerprint_of_one_file_is_what_it_was(tmp_path: Path) -> None:
    """Finished stages and caches keep their names: sha256 of the split and of the file's own sha256."""
    from hashlib import sha256

    (tmp_path / "a.txt").write_text("one\n\ntwo")
    inner = sha256(b"one\n\ntwo").hexdigest()
    expected = sha256(f"train:{inner};".encode()).hexdigest()
    for files in ("a.txt", ["a.txt"], "*.txt"):
        config = DataConfig(source="files", files={"train": files})
        assert load_raw(config, tmp_path).fingerprint == expected
    assert not {"separator", "columns"} & DataConfig(source="files", files={"train": "a.txt"}).values().keys()
    (tmp_path / "a.csv").write_text("text,label\nx,y\n")
    prints = {read(tmp_path, {"train": "a.csv"}, **fields).fingerprint for fields in (
        {}, {"separator": ";", "text": "text,label", "label": "text,label"}, {"columns": ("label", "text")},
    )}  # fmt: skip
    assert len(prints) == 3


def test_the_row_of_the_right_file_is_named_after_a_choice(tmp_path: Path) -> None:
    for i, name in enumerate(("a.csv", "b.csv")):
        (tmp_path / name).write_text(table([(f"text {i}", str(j)) for j in range(20)]))
    config = DataConfig(source="files", files={"train": ["a.csv", "b.csv"]}, limit={"train": 25}, seed=4)
    raw = choose_rows(read_source(config, tmp_path), config)
    assert len(rows_of(raw)) == 25
    for index, (text, label) in enumerate(rows_of(raw)):
        name, number = ("a.csv", "b.csv")[int(text[-1])], int(label) + 1
        assert raw.origins["train"].where(index) == f"{name}, row {number} (line {number + 1})"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("none-*.jsonl", ("data.files.train", "no file matches", "none-*.jsonl")),
        (["a.csv", "gone.csv"], ("data.files.train[1]", "no such file")),
        (["a.csv", "a.csv"], ("data.files.train[1]", "named twice")),
        ([], ("data.files.train", "no file is named")),
        ("https://user:word@host/a.csv", ("files are read from disk", "source: hub")),
        ("folder", ("none that `save_to_disk` wrote", "folder/*.jsonl")),
        (["a.csv", "b.jsonl"], ("b.jsonl", "column 'label' has another type than in a.csv")),
        (["a.csv", "c.csv"], ("c.csv", "no column 'label'")),
        *[(f"a{kind}", ("data.files.train", way)) for kind, way in (
            (".xlsx", "export the sheet as CSV"), (".xls", "CSV"), (".arrow", "save_to_disk"), (".pkl", "JSON lines"),
            (".zip", "unpack"), (".tar.gz", "unpack"), (".sqlite", "export the table"), (".parquet.gz", "unpack it"),
            (".gz", "name it after what is in it"), (".dat", "set `separator`"), ("", "JSON lines"),
        )],
    ],
)  # fmt: skip
def test_what_is_not_read_says_what_to_do(files: object, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table(ROWS))
    (tmp_path / "b.jsonl").write_text('{"text": "x", "label": 5}\n')
    (tmp_path / "c.csv").write_text("text,lable\nx,y\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        read(tmp_path, {"train": files})
    assert all(part in str(caught.value) for part in expected), str(caught.value)


def test_columns_that_only_some_files_have_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(table([("x", "y")]))
    (tmp_path / "b.csv").write_text(table([("1", "n", "z")], ["id", "label", "text"]))
    raw = read(tmp_path, {"train": "*.csv"})
    assert rows_of(raw) == [("x", "y"), ("z", "n")]
    assert raw.notes == ("not in every file, and not read: id",)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_numbers_of_several_files_meet(kind: str, tmp_path: Path) -> None:
    """Whole numbers in one file and others in the next are numbers, as in one file; nothing in one is no type."""
    for i, values in enumerate(([1, 2], [None, None], [0.5, 1])):
        rows = [{"text": "x", "label": value} for value in values]
        if kind == "jsonl":
            (tmp_path / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{i}.parquet")
    raw = read(tmp_path, {"train": f"*.{kind}"})
    assert [label for _, label in rows_of(raw)] == [1.0, 2.0, None, None, 0.5, 1.0]


@pytest.fixture
def saved(tmp_path: Path) -> DatasetDict:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    parts = {
        split: Dataset.from_dict({"text": [f"{split} {i}" for i in range(4)], "label": [0, 1, 1, 0]}, features)
        for split in ("train", "test", "dev")
    }
    whole = DatasetDict(parts)
    whole.save_to_disk(tmp_path / "whole")
    parts["train"].select([2, 0]).save_to_disk(tmp_path / "one")
    return whole


def test_folders_of_save_to_disk_are_read(saved: DatasetDict, tmp_path: Path) -> None:
    train, test = (list(zip(saved[s]["text"], saved[s]["label"], strict=True)) for s in ("train", "test"))
    by_path = read(tmp_path, {}, path="whole")
    assert list(by_path.splits) == ["train", "test"]
    assert (rows_of(by_path), rows_of(by_path, "test")) == (train, test)
    assert by_path.splits["train"].features["label"].names == ["no", "yes"]
    by_file = read(tmp_path, {"train": "whole", "validation": "whole/dev", "test": "one"})
    assert rows_of(by_file) == train
    assert [text for text, _ in rows_of(by_file, "validation")] == [f"dev {i}" for i in range(4)]
    assert rows_of(by_file, "test") == [train[2], train[0]]
    assert by_file.origins["validation"].where(3) == "whole/dev, row 4"
    assert rows_of(read(tmp_path, {}, path="one")) == [train[2], train[0]]
    assert rows_of(read(tmp_path, {"train": ["one", "whole"]})) == [train[2], train[0], *train]
    prints = {read(tmp_path, {"train": name}).fingerprint for name in ("whole", "whole/train", "one", "whole/test")}
    assert len(prints) == 3


def test_the_names_of_a_saved_folders_classes_are_part_of_it(saved: DatasetDict, tmp_path: Path) -> None:
    """They stand next to the rows, which have numbers; what else is said of the folder changes nothing."""
    before = read(tmp_path, {"train": "one"}).fingerprint
    info = tmp_path / "one/dataset_info.json"
    told = json.loads(info.read_text())
    info.write_text(json.dumps({**told, "description": "with a description", "license": "MIT"}))
    assert read(tmp_path, {"train": "one"}).fingerprint == before
    told["features"]["label"]["names"].reverse()
    info.write_text(json.dumps(told))
    assert read(tmp_path, {"train": "one"}).fingerprint != before


def test_what_is_wrong_with_a_saved_folder_is_said(saved: DatasetDict, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no validation split"):
        read(tmp_path, {"validation": "whole"})
    with pytest.raises(UserError, match=r"data\.separator: only tables"):
        read(tmp_path, {"train": "whole"}, separator=";")
    shard = next((tmp_path / "whole/train").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read") as caught:
        read(tmp_path, {"train": "whole"})
    assert "whole/train" in str(caught.value)
    (tmp_path / "whole/test/state.json").write_text('{"_data_files": [{"filename": "../../a"}]}')
    (tmp_path / "whole/dataset_dict.json").write_text("{")
    for name in ("whole", "whole/test"):
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path, {"test": name})


@pytest.mark.parametrize("outer", [{"data": None}, {"version": "1", "data": None}, {"rows": None, "n": [1]}])
def test_rows_under_a_key_of_an_object_are_read(outer: dict, tmp_path: Path) -> None:
    rows = [{"text": t, "label": y} for t, y in ROWS]
    value = {key: rows if item is None else item for key, item in outer.items()}
    (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
    assert rows_of(read(tmp_path, {"train": "a.json"})) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '{"text": {"0": "x"}, "label": {"0": "y"}}', ("'text', 'label'", "orient='records'", '{"data": [')),
        ("a.json", '{"a": [{"text": "x"}], "b": [{"text": "x"}]}', ("under `data`",)),
        ("a.json", '"text"', ("holds no rows", "str")),
        ("a.json", '{"data": ["x"]}', ("a.json, row 1", "JSON object")),
        ("a.jsonl", "[" * 100_000, ("malformed JSON", "a.jsonl, line 1")),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "\\ud800", "label": 1}\n', ("line 2", "half of a character")),
        ("a.jsonl", '{"text": "x", "label": 99999999999999999999}\n', ("line 1", "too large")),
        ("a.csv", "text,label\nx,y\n".encode("utf-16"), ("a.csv", "UTF-16", "save it as UTF-8", "iconv")),
        ("a.csv", "text,label\nx,y\n".encode("utf-16-le"), ("a.csv", "UTF-16")),
        ("a.jsonl", '{"text": "x"}'.encode("utf-16-be"), ("a.jsonl", "UTF-16")),
        ("a.txt", "text".encode("utf-32"), ("a.txt", "UTF-32")),
        ("a.csv", "sep=;\ntext;label\nx;y\n", ("spreadsheet's note", "set `separator`")),
        ("a.csv", "text,label\na, b,y\n", ("row 1 (line 2)", "quotation marks")),
        ("a.csv", 'text,label\n"say "hi" now",y\n', ("after row 0", "doubled")),
    ],
)
def test_what_cannot_be_read_is_told_with_its_remedy(
    name: str, content: str | bytes, expected: tuple[str, ...], tmp_path: Path
) -> None:
    if "json" not in name and "txt" not in name:
        found = message(tmp_path, name, content)
    else:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(DataError) as caught:
            load_raw(DataConfig(source="files", files={"train": name}, text="text"), tmp_path)
        found = str(caught.value)
    assert all(part in found for part in expected), found


def test_nested_keys_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"pair": {"en": "x", "de": "y"}, "label": "z"}\n')
    for text, expected in (("pair.en", "copy their 'en'"), ("pair", "one of its keys (en, de)")):
        config = DataConfig(source="files", files={"train": "a.jsonl"}, text=text)
        with pytest.raises(DataError) as caught:
            load_raw(config, tmp_path).texts("train", text)
        assert expected in str(caught.value)


def test_dates_in_json_stay_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "2024-01-01", "label": "2024-01-01T00:00:00"}\n')
    assert rows_of(read(tmp_path, {"train": "a.jsonl"})) == [("2024-01-01", "2024-01-01T00:00:00")]
