"""Which of the texts that teachers wrote to a prompt are kept: pure functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Text = Mapping[str, Any]
"""A written text: example (number of its prompt), text, writer, draw, cut, length (tokens), log_probs (teacher -> mean
log-probability per token, nats), and, where it is read, matches (its extract is that of the data's answer)."""


def agreement(text: Text) -> float:
    """Mean over all teachers but the writer of the mean log-probability per token, nats."""
    others = [value for teacher, value in text["log_probs"].items() if teacher != text["writer"]]
    return sum(others) / len(others)


_ORDER: dict[str, Callable[[Text], float]] = {
    "none": lambda text: 0.0,
    "answer": lambda text: 0.0,
    "agreement": lambda text: -agreement(text),
    "length": lambda text: float(text["length"]),
}


def choose(texts: Iterable[Text], by: str, best: int) -> list[Text]:
    """The texts that are kept, prompt by prompt; of equal ones the first.

    Texts without an end, blank ones and doubles of a prompt are left out.

    Args:
        by: none, agreement, answer or length. best: texts per prompt; 0 = all.
    """
    of_prompt: dict[int, dict[str, Text]] = {}
    for text in texts:
        if text["cut"] or not text["text"].strip() or (by == "answer" and not text["matches"]):
            continue
        of_prompt.setdefault(text["example"], {}).setdefault(text["text"], text)
    kept: list[Text] = []
    for _, distinct in sorted(of_prompt.items()):
        ordered: Sequence[Text] = sorted(distinct.values(), key=_ORDER[by])
        kept += ordered[: best or None]
    return kept
