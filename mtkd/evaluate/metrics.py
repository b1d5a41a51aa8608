"""Metrics of one model from its per-document scores: pure functions, no model and no files.

A score record is one line of a scores file. Its fields per task:
    causal-lm    document, domain, nll (nats, summed), tokens (targets), bytes
    masked-lm    document, domain, nll (nats, summed), tokens (targets), correct (targets predicted right)
                 both, where the vocabulary is compressed: removed (targets without a column of their own)
    classify     document, label, prediction, probabilities; without probabilities it is a regression
    glm-infill as masked-lm, glm-cloze as classify
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtkd.errors import DataError

Score = Mapping[str, Any]

# The metric by which two models are compared, and how the others read.
PRIMARY_METRIC = {
    "causal-lm": "bits_per_byte",
    "masked-lm": "loss",
    "classification": "accuracy",
    "regression": "pearson",
}
LOWER_IS_BETTER = frozenset({"bits_per_byte", "perplexity", "loss"})
HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "matthews", "pearson", "spearman", "exact_match", "rouge_l"})
COUNTS = frozenset({"documents", "tokens", "bytes"})


def summarise(task: str, scores: Sequence[Score]) -> dict[str, float]:
    """The metrics of one model over all given documents.

    Args:
        task: of the `data` block (also ``classification``, ``regression``).
        scores: one record per document.

    Returns:
        causal-lm: bits_per_byte (sum of nll / ln 2 / sum of bytes), perplexity (exp of nats per target), documents,
        bytes, tokens. masked-lm: loss (nats per target), perplexity, accuracy (share of targets), documents, tokens.
        Both with removed_share where the model's vocabulary is compressed.
        Classification: accuracy, f1 (binary: of class 1; else macro), matthews, documents. Regression: pearson,
        spearman (NaN where one side is constant), documents.

    Raises:
        DataError: without records, or when a record lacks a field.
    """
    kind = kind_of(task, scores)
    count = {"documents": float(len(scores))}
    if kind == "causal-lm":
        nll, tokens, size = (column(scores, field).sum() for field in ("nll", "tokens", "bytes"))
        bits = {"bits_per_byte": _ratio(nll, size) / math.log(2), "perplexity": _exp(_ratio(nll, tokens))}
        return bits | count | {"bytes": float(size), "tokens": float(tokens)} | _removed_share(scores, tokens)
    if kind == "masked-lm":
        nll, tokens, correct = (column(scores, field).sum() for field in ("nll", "tokens", "correct"))
        loss = _ratio(nll, tokens)
        values = {"loss": loss, "perplexity": _exp(loss), "accuracy": _ratio(correct, tokens)}
        return values | count | {"tokens": float(tokens)} | _removed_share(scores, tokens)
    label, prediction = column(scores, "label"), column(scores, "prediction")
    if kind == "regression":
        return {"pearson": pearson(label, prediction), "spearman": spearman(label, prediction)} | count
    classes = len(scores[0]["probabilities"])
    right = float(np.mean(label == prediction))
    return {
        "accuracy": right,
        "f1": f1(label, prediction, binary=classes == 2),
        "matthews": matthews(label, prediction),
    } | count


def _removed_share(scores: Sequence[Score], tokens: float) -> dict[str, float]:
    """{"removed_share"}: targets that a compressed vocabulary has no column for; {} for a whole vocabulary."""
    if any("removed" not in score for score in scores):
        return {}
    return {"removed_share": _ratio(column(scores, "removed").sum(), tokens)}


def by_domain(task: str, scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """`summarise` per value of the records' ``domain``, in order of first appearance; {} where records have none."""
    return {name: summarise(task, part) for name, part in split_domains(scores).items()}


def split_domains(scores: Sequence[Score]) -> dict[str, list[Score]]:
    """The records of each domain; records without one belong to none."""
    parts: dict[str, list[Score]] = {}
    for score in scores:
        if score.get("domain"):
            parts.setdefault(str(score["domain"]), []).append(score)
    return parts


def kind_of(task: str, scores: Sequence[Score]) -> str:
    """``causal-lm``, ``masked-lm``, ``classification`` or ``regression``; raises DataError without records."""
    if not scores:
        raise DataError("there is nothing to score: no documents", where=f"task {task}")
    if task in ("causal-lm", "masked-lm", "regression"):
        return task
    if task == "glm-infill":
        return "masked-lm"
    if task in ("classify", "classification", "glm-cloze"):
        return "classification" if scores[0].get("probabilities") is not None else "regression"
    raise DataError(
        "no metrics are known for this task",
        where="evaluate",
        found=task,
        allowed="causal-lm, masked-lm, classify, classification, regression, glm-infill, glm-cloze",
    )


def column(scores: Sequence[Score], field: str) -> NDArray[np.float64]:
    """One field of all records as float64, [documents]; raises DataError naming the document that lacks it."""
    for score in scores:
        if score.get(field) is None:
            raise DataError(
                f"a score has no '{field}'", where=f"document {score.get('document')!r}", found=sorted(score)
            )
    return np.array([float(score[field]) for score in scores])


def f1(label: NDArray[Any], prediction: NDArray[Any], *, binary: bool) -> float:
    """2 TP / (2 TP + FP + FN) of class 1, or its unweighted mean over the classes that occur on either side.

    A class that is never right counts 0.
    """
    classes = [1] if binary else np.union1d(label, prediction)
    values = []
    for each in classes:
        hits = np.sum((label == each) & (prediction == each))
        values.append(_ratio(2 * hits, np.sum(label == each) + np.sum(prediction == each), empty=0.0))
    return float(np.mean(values))


def matthews(label: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Matthews correlation for any number of classes; 0 where one side is constant.

    Source: Gorodkin 2004, Comparing two K-category assignments by a K-category correlation coefficient, eq. 8.
    """
    classes = np.union1d(label, prediction)
    true = np.array([np.sum(label == c) for c in classes], dtype=float)
    said = np.array([np.sum(prediction == c) for c in classes], dtype=float)
    n = float(len(label))
    product = float((n**2 - said @ said) * (n**2 - true @ true))
    return _ratio(float(np.sum(label == prediction)) * n - true @ said, math.sqrt(product), empty=0.0)


def pearson(label: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Linear correlation; NaN where one side is constant or there are fewer than two documents."""
    from scipy import stats

    return float(stats.pearsonr(label, prediction).statistic) if _varies(label, prediction) else math.nan


def spearman(label: NDArray[Any], prediction: NDArray[Any]) -> float:
    """Rank correlation, ties sharing their mean rank; NaN as in `pearson`."""
    from scipy import stats

    return float(stats.spearmanr(label, prediction).statistic) if _varies(label, prediction) else math.nan


def _varies(*sides: NDArray[Any]) -> bool:
    return all(len(side) > 1 and bool(np.any(side != side[0])) for side in sides)


def _ratio(above: float, below: float, empty: float = math.nan) -> float:
    return float(above) / float(below) if below else empty


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
