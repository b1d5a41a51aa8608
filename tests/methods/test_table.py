"""The printed method table is the source deck's, written out here: a changed row shows as a difference."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from rich.console import Console

from mtkd.cli.listing import listing, tables
from mtkd.config.match import Match
from mtkd.methods.spec import METHODS, MethodSpec
from mtkd.methods.table import COLUMNS, FEATURES, method_table

# name | stages | embedding | A-scores | A-probs | query | key | value | layers | last layer | logits | MLM | NSP |
# soft | hard | must be equal. The deck writes CE for KD's soft labels; our KL has the same gradient.
DECK = """
kd          | fine-tune               |     |     |    |    |    |    |     |        |    |   | |KL | CE | -
pkd         | fine-tune               |     |     |    |    |    |    | MSE | MSE    |    |   | |KL | CE | hidden width
distilbert  | pre-train               |     |     |    |    |    |    |     | cosine | KL | CE| |   |    | hidden width
minilm      | pre-train               |     |     | KL |    |    | KL |     |        |    |   | |   |    | heads
minilmv2    | pre-train               |     |     |    | KL | KL | KL |     |        |    |   | |   |    | -
tinybert    | pre-train, fine-tune x2 | MSE | MSE |    |    |    |    | MSE | MSE    |    |   | |CE |    | heads
mixbaseline | pre-train, fine-tune x2 | MSE | MSE | KL | KL | KL | KL | MSE | MSE    | KL | CE| |KL | CE | heads
glmd        | pre-train, fine-tune x2 |     |     |    |    |    |    |     |        | KL |   | |CE |    | -
"""
# Beside the deck's: pre-trained distillation, its best mix (no attention, no hard label in fine-tuning), MT-BERT, DKD,
# DIST.
MORE = """
pd          | pre-train, fine-tune    |     |     |    |    |    |    |     |        |    | CE| |KL |    | -
best_mix    | pre-train, fine-tune x2 | MSE |     |    |    |    |    | MSE | MSE    | KL | CE| |KL |    | -
dkd         | fine-tune               |     |     |    |    |    |    |     |        |    |   | |DKD | CE | -
dist        | fine-tune               |     |     |    |    |    |    |     |        |    |   | |corr| CE | -
mt_bert     | fine-tune               |     |     |    |    |    |    | MSE | MSE    |    |   | |CE | CE | -
"""


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line]


def printed(width: int) -> str:
    console = Console(width=width, file=None, record=True, force_terminal=False)
    with console.capture() as captured:
        for table in tables("methods", listing("methods"), width):
            console.print(table)
    return captured.get()


def test_the_table_is_the_decks() -> None:
    found = {row["name"]: [row[column] for column in COLUMNS] for row in method_table()}
    assert {row[0]: row for row in cells(DECK + MORE)} == found


def test_it_is_printed_whole_at_160_columns() -> None:
    """Columns are found by the places of their headers, as a reader would."""
    lines = printed(160).splitlines()
    header = next(line for line in lines if "A-scores" in line)
    starts = [header.index(column) for column in COLUMNS]
    assert starts == sorted(starts)
    for wanted in cells(DECK + MORE):
        first = next(i for i, line in enumerate(lines) if line.split()[:1] == [wanted[0]])
        row = lines[first : first + (2 if "," in wanted[1] else 1)]
        parts = [
            " ".join(line[start:end].strip() for line in row).strip()
            for start, end in zip(starts, [*starts[1:], None], strict=True)
        ]
        assert parts == wanted
    assert max(map(len, lines)) <= 160


@pytest.mark.parametrize("width", [80, 110])
def test_a_narrow_terminal_gets_the_same_cells_one_after_the_other(width: int) -> None:
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = text.split()
    for name, *_ in cells(DECK):
        assert name in words
    assert "A-scores MSE" in " ".join(words)


def test_a_changed_row_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = MethodSpec("kd", lambda: {"soft": Match(feature="probs", loss="attention_kl")}, ("fine-tune",), "arXiv")
    monkeypatch.setitem(METHODS._values, "kd", spec)
    row = next(row for row in method_table() if row["name"] == "kd")
    assert {feature: row[feature] for feature in FEATURES if row[feature]} == {"A-probs": "KL"}


def test_json_holds_the_table_the_labels_and_the_options() -> None:
    command = [sys.executable, "-m", "mtkd", "ls", "methods", "--json"]
    rows = {row["name"]: row for row in json.loads(subprocess.run(command, check=True, capture_output=True).stdout)}
    assert [rows["tinybert"][column] for column in COLUMNS] == next(r for r in cells(DECK) if r[0] == "tinybert")
    assert rows["tinybert"]["rows"] == {
        "pre-train": ["embedding", "hidden", "scores"],
        "fine-tune": ["embedding", "hidden", "scores"],
        "prediction": ["soft"],
    }
    assert "temperature=15.0" in rows["glmd"]["options"]
    assert "2306.06625" in rows["glmd"]["source"]
