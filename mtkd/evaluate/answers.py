"""Score texts that models wrote against the data's answers: exact match of an extracted part, and ROUGE-L.

A record of a text has the fields: document, domain, answer, expected (the data's, extracted), found (the answer's,
extracted, or None), exact_match (0 or 1), rouge_l (0 to 1), length (tokens), cut (0 or 1: no end within the limit).
"""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from mtkd.config import Extract
from mtkd.errors import DataError, UserError, nearest
from mtkd.evaluate.metrics import Score, column, split_domains
from mtkd.registry import as_text

Extractor = Callable[[str], str | None]
"""Text -> the part that is compared; None where there is none."""

_NUMBER = re.compile(r"(?:(?<![\w.)])[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_WORD = re.compile(r"[^\W_]+")


def last_number(text: str) -> str | None:
    """The last number of a text in plain digits: "$1,234.50" is 1234.5, "5-3" ends with 3, "x = -3" with -3."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    value = Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    return format(value.normalize() if value else Decimal(0), "f")


def first_word(text: str) -> str | None:
    """The first run of letters and digits, in small letters."""
    found = _WORD.search(text)
    return None if found is None else found.group().casefold()


_BUILT_IN: dict[str, Extractor] = {"whole": str.strip, "last_number": last_number, "first_word": first_word}


def make_extractor(config: Extract, base: Path, where: str) -> Extractor:
    """The function that a configuration names; of a file its own, checked at every call.

    Args:
        base: that a relative path starts from. where: place of the configuration.
    Raises:
        UserError: the file or the function is not there.
    """
    if config.pattern is not None:
        pattern = re.compile(config.pattern)

        def matched(text: str) -> str | None:
            found = [match.group(1) for match in pattern.finditer(text)]
            return found[-1] if found else None

        return matched
    return _BUILT_IN[config.name] if config.path is None else _of_file(config.name, base / config.path, where)


def _of_file(name: str, file: Path, where: str) -> Extractor:
    if not file.is_file():
        raise UserError("there is no such Python file", where=f"{where}.path", found=str(file))
    try:
        names = runpy.run_path(str(file), run_name=f"mtkd_extract_{file.stem}")
    except (Exception, SystemExit) as error:
        raise UserError(f"{file.name} cannot be run: {as_text(error)}", where=f"{where}.path") from error
    function = names.get(name)
    if not callable(function):
        functions = sorted(n for n, each in names.items() if callable(each) and not n.startswith("_"))
        raise UserError(
            "the file has no such function",
            where=f"{where}.name",
            found=name,
            allowed=functions or "a file with a function",
            todo=nearest(name, functions),
        )

    def extracted(text: str) -> str | None:
        try:
            part = function(text)
        except Exception as error:  # a user's function may raise anything
            raise DataError(
                f"the function raises {as_text(error)}", where=f"{where}: {name} of {file.name}", found=_short(text)
            ) from error
        if part is not None and not isinstance(part, str):
            raise DataError(
                "the function gives neither a text nor None",
                where=f"{where}: {name} of {file.name}",
                found=f"{type(part).__name__} for {_short(text)}",
            )
        return part

    return extracted


def _short(text: str) -> str:
    return repr(text if len(text) <= 160 else text[:157] + "...")


class RougeL:
    """ROUGE-L, the F1 of the longest common subsequence of words, by the library `rouge-score`, without stemming.

    Words are runs of letters and digits of any script in small letters; the library's own are of a-z and 0-9 alone.
    Source: Lin 2004, ROUGE: a package for automatic evaluation of summaries, eq. 4.

    Raises:
        UserError: the library is not there.
    """

    def __init__(self, where: str) -> None:
        try:
            scorer = importlib.import_module("rouge_score.rouge_scorer")  # an extra: not a dependency
        except ImportError:
            raise UserError(
                "rouge_l is computed by the package rouge-score, which is not installed",
                where=f"{where}.metrics",
                todo="pip install 'mtkd[text]', or drop rouge_l",
            ) from None
        self._scorer = scorer.RougeScorer(["rougeL"], tokenizer=_Words())

    def __call__(self, expected: str, answer: str) -> float:
        return float(self._scorer.score(expected, answer)["rougeL"].fmeasure)


class _Words:
    def tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text.casefold())


def summarise_answers(metrics: Sequence[str], scores: Sequence[Score]) -> dict[str, float]:
    """Means over documents of `metrics` and of the tokens written (`length`), the share without an end (`cut`), and
    the number of `documents`."""
    means = {name: float(column(scores, name).mean()) for name in (*metrics, "length", "cut")}
    return {**means, "documents": float(len(scores))}


def answers_by_domain(metrics: Sequence[str], scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """`summarise_answers` per domain, in order of first appearance; {} where records have none."""
    return {name: summarise_answers(metrics, part) for name, part in split_domains(scores).items()}


def score_answer(
    record: Mapping[str, Any], reference: str, extract: Extractor | None, rouge: RougeL | None
) -> dict[str, Any]:
    """The record of a text with its scores.

    Args:
        record: with `answer` and, where `extract` is given, `expected`.
        reference: the data's answer.
    """
    scores: dict[str, Any] = {}
    if extract is not None:
        found = extract(record["answer"])
        scores |= {"found": found, "exact_match": int(found is not None and found == record["expected"])}
    if rouge is not None:
        scores["rouge_l"] = rouge(reference, record["answer"])
    return {**record, **scores}
