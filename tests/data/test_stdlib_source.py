"""The python-stdlib source: nothing of a test document is anywhere in training, and the pieces are what they claim."""

from __future__ import annotations

import ast
import gc
from collections import Counter
from pathlib import Path

import pytest
from data_examples import load_raw

from mtkd.config import DataConfig
from mtkd.data.stdlib import Document, docstrings, split_of, stdlib_documents, strip_docstrings
from mtkd.errors import DataError, UserError


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return stdlib_documents()


def test_every_domain_has_enough_documents_in_every_split(documents: list[Document]) -> None:
    counts = Counter((d.domain, d.split) for d in documents)
    assert set(counts) == {(d, s) for d in ("prose", "code") for s in ("train", "validation", "test")}
    assert counts["prose", "test"] >= 150
    assert counts["code", "test"] >= 150
    assert all(counts[d, "train"] > 3 * counts[d, "test"] for d in ("prose", "code"))
    assert all(len(d.text) >= 200 - 2 for d in documents)


def test_a_module_is_in_one_split_in_both_domains(documents: list[Document]) -> None:
    splits: dict[str, set[str]] = {}
    for document in documents:
        splits.setdefault(document.name.split("#")[0], set()).add(document.split)
    assert all(len(found) == 1 for found in splits.values())
    both = {d.name.split("#")[0] for d in documents if d.domain == "code"} & {
        d.name.split("#")[0] for d in documents if d.domain == "prose"
    }
    assert len(both) > 200
    names = [(d.domain, d.name) for d in documents]
    assert len(set(names)) == len(names)


def test_no_document_and_no_longer_paragraph_is_in_two_splits(documents: list[Document]) -> None:
    where: dict[str, set[str]] = {}
    for document in documents:
        for text in [document.text, *document.text.split("\n\n")]:
            key = " ".join(text.split())
            if len(key) >= 60:
                where.setdefault(document.domain + key, set()).add(document.split)
    assert [key for key, splits in where.items() if len(splits) > 1] == []


def test_tests_tables_and_machine_specific_modules_are_left_out(documents: list[Document]) -> None:
    modules = {d.name.split("#")[0] for d in documents}
    assert {"json.decoder", "argparse", "topic assignment"} <= modules
    parts = {part for module in modules for part in module.split(".")}
    assert not parts & {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages"}
    assert not [m for m in modules if m.startswith("_sysconfigdata")]


def test_the_split_depends_on_the_name_alone() -> None:
    assert [split_of("json.decoder") for _ in range(3)] == [split_of("json.decoder")] * 3
    shares = Counter(split_of(f"module{i}") for i in range(10_000))
    assert 0.73 < shares["train"] / 10_000 < 0.77
    assert 0.08 < shares["validation"] / 10_000 < 0.12


SOURCE = '''"""Module, """
import os  # kept
class Empty:
    """Only a docstring."""
def f(x): "same line"; return x
def g():
    """Ünïcode docstring
    over lines."""
    # a comment
    text = """not a docstring"""
    def inner(): """nested"""
    return text
if os:
    async def h():
        "in a block"
'''


def test_docstrings_are_taken_out_and_nothing_else() -> None:
    stripped = strip_docstrings(SOURCE, ast.parse(SOURCE))
    tree = ast.parse(stripped)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    assert not [n for n in ast.walk(tree) if isinstance(n, documented) and ast.get_docstring(n)]
    assert '"""not a docstring"""' in stripped
    assert "# kept" in stripped
    assert "    # a comment\n" in stripped
    scope: dict = {}
    exec(stripped, scope)
    assert scope["f"](3) == 3
    assert scope["g"]() == "not a docstring"


def test_prose_is_the_long_docstrings_without_examples() -> None:
    long = "It says at some length what the function is for, so that it counts as prose and not as a caption."
    source = f'def f():\n    """{long}\n\n    >>> f()\n    1\n\n    Second paragraph.\n    """\ndef g():\n    "short"\n'
    assert docstrings(ast.parse(source)) == [long, "Second paragraph."]


def test_order_and_fingerprint_are_the_same_every_time(documents: list[Document]) -> None:
    config = DataConfig(source="python-stdlib", domains=("prose",), limit={"train": 20})
    first, second = load_raw(config, Path.cwd()), load_raw(config, Path.cwd())
    assert first.fingerprint == second.fingerprint
    assert first.splits["train"]["text"] == second.splits["train"]["text"]
    assert len(first.splits["train"]) == 20
    assert set(first.splits["test"]["domain"]) == {"prose"}
    assert list(first.splits["test"]["text"]) == [d.text for d in documents if (d.domain, d.split) == ("prose", "test")]
    assert gc.isenabled()


def test_an_installation_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without the sources"):
        stdlib_documents(("code",), tmp_path)


def test_an_unknown_domain_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        load_raw(DataConfig(source="python-stdlib", domains=("poetry",)), Path.cwd())
    assert "poetry" in str(caught.value)
    assert "prose, code" in str(caught.value)
