"""The python-docstrings source: the label is not in the text, and nothing of a test module is in training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from data_examples import load_raw

from mtkd.config import DataConfig
from mtkd.data import docstrings
from mtkd.data.docstrings import Docstring, docstring_rows
from mtkd.errors import DataError, UserError

COPIED = "A paragraph that was copied from one package into another, as vendored code is, says nothing of its origin."
PACKAGES = {"torch": 40, "numpy": 30, "rich": 20, "few": 3}
"""Package -> number of modules, two docstrings each; a third is in all of them."""


def _about(package: str, number: int) -> str:
    words = " ".join(
        f"{package[0]}{letter}" * 4 for letter in f"abcdefgh{chr(97 + number % 26)}{chr(97 + number // 26)}"
    )
    return f"""See {package}.core.thing{number} and {package.upper()}, https://{package}.org/{package}: {words}."""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(docstrings, "LEAST_PER_CLASS", 10)
    for package, count in PACKAGES.items():
        (tmp_path / package / "inner").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text(f'"""{COPIED}"""\n')
        for number in range(count):
            source = f'"""{_about(package, 2 * number)}"""\ndef f():\n    """{_about(package, 2 * number + 1)}"""\n'
            (tmp_path / package / "inner" / f"part{number}.py").write_text(source)
    return {package: tmp_path / package for package in PACKAGES}


@pytest.fixture
def rows(folders: dict[str, Path]) -> list[Docstring]:
    return docstring_rows(folders)


def test_classes_are_the_packages_with_enough_docstrings(rows: list[Docstring]) -> None:
    """Law: counting alone chooses the classes."""
    assert Counter(row.label for row in rows) == {"numpy": 60, "rich": 40, "torch": 80}
    assert {row.label: row.domain for row in rows} == {"numpy": "numbers", "rich": "tools", "torch": "learning"}


def test_no_name_of_a_package_is_in_a_text(rows: list[Docstring]) -> None:
    """Law: neither a package's own name nor another's, in any case, in dotted names and addresses too."""
    for row in rows:
        assert not [package for package in PACKAGES if package in row.text.lower()], row.text
        assert "thing" in row.text  # what a dotted name ends with stays
        assert "http" not in row.text


def test_a_short_name_within_a_word_stays() -> None:
    """Law: "rich" is no package in "enriched"; a long name is one anywhere."""
    hidden = docstrings._names({"rich": Path(), "deepspeed": Path()})
    text = docstrings._without_names("An enriched DeepSpeedEngine, np.array of rich_text and numpydoc", hidden)
    assert text == "An enriched Engine, array of _text and numpydoc"


def test_a_module_is_in_one_split_and_a_text_is_there_once(rows: list[Docstring]) -> None:
    """Law: train and test share no module and no text; a text of two packages is nowhere."""
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.name.split("#")[0], set()).add(row.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {"train", "validation", "test"} == {row.split for row in rows}
    assert len({row.text for row in rows}) == len({row.name for row in rows}) == len(rows)
    assert not [row for row in rows if "copied" in row.text]


def test_a_class_has_no_more_rows_than_allowed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the rows of a class, of a module, and the classes are limited."""
    monkeypatch.setattr(docstrings, "MOST_PER_CLASS", 25)
    monkeypatch.setattr(docstrings, "MOST_PER_MODULE", 1)
    assert Counter(row.label for row in docstring_rows(folders)) == {"numpy": 25, "rich": 20, "torch": 25}
    monkeypatch.setattr(docstrings, "MOST_CLASSES", 2)
    assert {row.label for row in docstring_rows(folders)} == {"numpy", "torch"}


def test_order_and_rows_are_the_same_every_time(folders: dict[str, Path]) -> None:
    """Law: a pure function of the files."""
    assert docstring_rows(folders) == docstring_rows(dict(reversed(folders.items())))


def test_packages_without_docstrings_are_refused(tmp_path: Path) -> None:
    """Law: an installation without sources gets a message, not a run of one class."""
    with pytest.raises(DataError, match="without enough docstrings"):
        docstring_rows({"torch": tmp_path, "numpy": tmp_path / "missing"})


def test_domains_choose_rows_and_all_classes_stay(rows: list[Docstring], monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a specialist's entry has the classes of all, so that its outputs are those of the others."""
    monkeypatch.setattr("mtkd.data.sources.docstring_rows", lambda: rows)
    config = DataConfig(source="python-docstrings", task="classify")
    every = load_raw(config, Path.cwd())
    some = load_raw(config.model_copy(update={"domains": ("numbers",)}), Path.cwd())
    assert every.labels is not None
    assert every.labels.names == ("numpy", "rich", "torch")
    assert some.labels is not None
    assert some.labels.names == every.labels.names
    assert set(some.splits["train"]["domain"]) == {"numbers"}
    assert every.fingerprint != some.fingerprint
    for domain in ("prose", "numbesr"):
        with pytest.raises(UserError, match="unknown domain"):
            load_raw(config.model_copy(update={"domains": (domain,)}), Path.cwd())


def test_the_requirements_are_found_with_those_that_they_need() -> None:
    """Law: the packages are those of the distribution's requirements, at any depth, and not the distribution's own."""
    found = docstrings._packages("mtkd")
    assert {"torch", "transformers", "numpy", "PIL", "huggingface_hub"} <= set(found)
    assert not {"mtkd", "pytest", "ruff"} & set(found)
    assert all((folder / "__init__.py").is_file() for folder in found.values())
    assert docstrings._packages("no-such-distribution") == {}
