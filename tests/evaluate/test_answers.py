"""What is compared of an answer, ROUGE-L, and the means of scored texts."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from mtkd.config import AnswersConfig, Extract
from mtkd.errors import DataError, UserError
from mtkd.evaluate.answers import (
    RougeL,
    answers_by_domain,
    first_word,
    last_number,
    make_extractor,
    score_answer,
    summarise_answers,
)
from mtkd.evaluate.significance import Resampling, compare_by


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("she pays $1,234.50 in all", "1234.5"),
        ("5-3", "3"),
        ("x = -3", "-3"),
        ("it is \u22127.", "-7"),
        ("12 + 30 = 42.", "42"),
        ("007 and -0.0", "0"),
        ("1e5 is 100,000", "100000"),
        ("1,2,3", "3"),
        ("a2b", "2"),
        ("(5)-2", "2"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_in_plain_digits(text: str, number: str | None) -> None:
    """Equal numbers are equal texts, however they were written."""
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "word"), [(" Yes, it is", "yes"), ("*No*", "no"), ("\u00c4pfel!", "\u00e4pfel"), (" .", None)]
)
def test_the_first_word_in_small_letters(text: str, word: str | None) -> None:
    """Punctuation around it and capitals do not count."""
    assert first_word(text) == word


def test_a_pattern_gives_the_group_of_its_last_match() -> None:
    """The answer comes last, after the steps."""
    extract = make_extractor(Extract(pattern=r"#### (\w+)"), Path(), "here")
    assert extract("#### one, no: #### two") == "two"
    assert extract("two") is None


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"pattern": "no group"}, "0 groups"),
        ({"pattern": "(a)(b)"}, "2 groups"),
        ({"pattern": "(a"}, "no regular expression"),
        ({"pattern": "(a)", "name": "whole"}, "stands alone"),
        ("last_word", "none of whole"),
        ({"path": "file.py"}, "name that of a function"),
        ({"path": "file.py", "name": "a.b"}, "name that of a function"),
    ],
)
def test_a_wrong_extractor_is_refused_where_it_stands(value: Any, says: str) -> None:
    """Every kind of mistake in `extract` is named."""
    with pytest.raises(ValidationError, match=says):
        AnswersConfig.model_validate({"max_new_tokens": 4, "extract": value})


def test_extract_without_exact_match_and_doubled_metrics_are_refused() -> None:
    """What would not be read is not accepted."""
    with pytest.raises(ValidationError, match="extract is for exact_match"):
        AnswersConfig.model_validate({"max_new_tokens": 4, "extract": "whole", "metrics": []})
    with pytest.raises(ValidationError, match="names one twice"):
        AnswersConfig.model_validate({"max_new_tokens": 4, "metrics": ["exact_match", "exact_match"]})


_FUNCTIONS = """
def doubled(text): return text * 2
def raises(text): return 1 / 0
def number(text): return 3
value = 5
"""


def test_a_function_of_a_file(tmp_path: Path) -> None:
    """It is called with the text; what it raises, and what is no text, is an error with its name and the text."""
    (tmp_path / "own.py").write_text(_FUNCTIONS)

    def extract(name: str, path: str = "own.py") -> Any:
        return make_extractor(Extract(path=path, name=name), tmp_path, "evaluate.answers.extract")

    assert extract("doubled")("ab") == "abab"
    with pytest.raises(DataError, match=r"ZeroDivisionError") as raised:
        extract("raises")("ab")
    assert "raises of own.py" in str(raised.value)
    assert "'ab'" in str(raised.value)
    with pytest.raises(DataError, match="neither a text nor None"):
        extract("number")("ab")
    for name in ("value", "missing"):
        with pytest.raises(UserError, match="no such function"):
            extract(name)
    with pytest.raises(UserError, match="no such Python file"):
        extract("doubled", "other.py")
    (tmp_path / "broken.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match="cannot be run"):
        extract("doubled", "broken.py")


def _longest_common(a: list[str], b: list[str]) -> int:
    @lru_cache(None)
    def length(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + length(i + 1, j + 1) if a[i] == b[j] else max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    """P = LCS / words of the answer, R = LCS / words of the reference, F1 = 2PR / (P + R); in any script."""
    pytest.importorskip("rouge_score")
    rouge, chance = RougeL("here"), np.random.default_rng(0)
    for _ in range(50):
        sides = [list(chance.choice(["a", "b", "\u00e4\u00df", "7"], size=chance.integers(1, 9))) for _ in range(2)]
        common = _longest_common(*sides)
        precision, recall = common / len(sides[1]), common / len(sides[0])
        f1 = 2 * precision * recall / (precision + recall) if common else 0.0
        assert rouge(", ".join(sides[0]), " ".join(sides[1]).upper()) == pytest.approx(f1)
    assert rouge("a b", "") == 0


def test_rouge_l_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install 'mtkd\[text\]'"):
        RougeL("evaluate.answers")


def test_means_overall_and_per_domain_and_the_share_cut() -> None:
    """By hand: one of three right, two of three cut, 2 + 4 + 6 tokens."""
    rows = [("a", "x", "1", 2, 1), ("b", "x", "2", 4, 0), ("c", "y", "1", 6, 1)]
    records = []
    for document, domain, answer, length, cut in rows:
        record = {"document": document, "domain": domain, "answer": answer, "expected": "2"}
        records.append(score_answer({**record, "length": length, "cut": cut}, "2", str.strip, None))
    assert summarise_answers(["exact_match"], records) == pytest.approx(
        {"exact_match": 1 / 3, "length": 4.0, "cut": 2 / 3, "documents": 3.0}
    )
    assert answers_by_domain(["exact_match"], records)["x"]["exact_match"] == 0.5
    assert answers_by_domain(["exact_match"], records)["y"]["exact_match"] == 0


def test_exact_match_is_compared_by_mcnemars_test() -> None:
    """p is the two-sided binomial one of the documents that only one model has right, written out."""
    right = [(1, 0)] * 9 + [(0, 1)] * 2 + [(1, 1)] * 4 + [(0, 0)] * 5
    sides = [
        [{"document": str(i), "exact_match": pair[side], "reference": "r"} for i, pair in enumerate(right)]
        for side in (0, 1)
    ]
    (row,) = compare_by("exact_match", ("new", "old"), sides[0], sides[1], Resampling(200))
    assert row["test"] == "mcnemar"
    assert row["p"] == pytest.approx(binomtest(9, 11, 0.5).pvalue)
    assert (row["candidate_value"], row["baseline_value"]) == (13 / 20, 6 / 20)
