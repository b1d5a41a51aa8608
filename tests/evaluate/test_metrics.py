"""Metrics against scikit-learn, closed forms and hand-made numbers."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from mtkd.errors import DataError
from mtkd.evaluate.metrics import by_domain, f1, matthews, pearson, spearman, summarise


def labelled(labels: np.ndarray, predictions: np.ndarray, classes: int) -> list[dict]:
    return [
        {"document": str(i), "label": int(a), "prediction": int(b), "probabilities": [1 / classes] * classes}
        for i, (a, b) in enumerate(zip(labels, predictions, strict=True))
    ]


def test_bits_per_byte_of_a_known_source():
    """Law: bits per byte is a ratio of sums, overall and per domain."""
    # A model that gives each of 100 tokens probability 1/8 spends 300 bits; over 200 bytes that is 1.5 bits per byte.
    scores = [
        {"document": "a", "domain": "prose", "nll": 60 * math.log(8), "tokens": 60, "bytes": 50},
        {"document": "b", "domain": "code", "nll": 40 * math.log(8), "tokens": 40, "bytes": 150},
    ]
    result = summarise("causal-lm", scores)
    assert result["bits_per_byte"] == pytest.approx(1.5)
    assert result["perplexity"] == pytest.approx(8.0)
    assert (result["documents"], result["bytes"], result["tokens"]) == (2, 200, 100)
    parts = by_domain("causal-lm", scores)
    assert list(parts) == ["prose", "code"]
    assert parts["prose"]["bits_per_byte"] == pytest.approx(180 / 50)
    assert parts["code"]["bits_per_byte"] == pytest.approx(120 / 150)


def test_masked_lm():
    """Law: loss and accuracy are per target, perplexity is exp(loss)."""
    scores = [
        {"document": "a", "domain": "x", "nll": 6.0, "tokens": 2, "correct": 1},
        {"document": "b", "domain": "x", "nll": 2.0, "tokens": 6, "correct": 5},
    ]
    result = summarise("masked-lm", scores)
    assert result["loss"] == pytest.approx(1.0)
    assert result["perplexity"] == pytest.approx(math.e)
    assert result["accuracy"] == pytest.approx(6 / 8)


def test_a_hopeless_model_has_infinite_perplexity_not_an_exception():
    """Law: an overflow is infinity."""
    scores = [{"document": "a", "nll": 1e6, "tokens": 1, "bytes": 1}]
    assert summarise("causal-lm", scores)["perplexity"] == math.inf


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_equals_scikit_learn(classes: int):
    """Law: accuracy, F1 and Matthews are scikit-learn's."""
    random = np.random.default_rng(classes)
    labels = random.integers(0, classes, 200)
    predictions = np.where(random.random(200) < 0.6, labels, random.integers(0, classes, 200))
    result = summarise("classify", labelled(labels, predictions, classes))
    average = "binary" if classes == 2 else "macro"
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predictions))
    assert result["f1"] == pytest.approx(sklearn_metrics.f1_score(labels, predictions, average=average))
    assert result["matthews"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, predictions))


@pytest.mark.parametrize(
    ("labels", "predictions"),
    [([1, 1, 0], [0, 0, 0]), ([0, 0, 0], [0, 0, 0]), ([0, 0], [1, 1]), ([1, 1, 0], [1, 1, 1])],
)
def test_degenerate_classification_equals_scikit_learn(labels: list[int], predictions: list[int]):
    """Law: they are scikit-learn's too where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected_f1 = sklearn_metrics.f1_score(labels, predictions, average="binary", zero_division=0)
        expected_matthews = sklearn_metrics.matthews_corrcoef(labels, predictions)
    assert f1(np.array(labels), np.array(predictions), binary=True) == pytest.approx(expected_f1)
    assert matthews(np.array(labels), np.array(predictions)) == pytest.approx(expected_matthews)


def test_a_class_nobody_predicts_counts_in_macro_f1():
    """Law: a class that is never predicted counts 0 in macro F1."""
    labels, predictions = np.array([0, 1, 2, 2]), np.array([0, 1, 1, 1])
    expected = sklearn_metrics.f1_score(labels, predictions, average="macro", zero_division=0)
    assert f1(labels, predictions, binary=False) == pytest.approx(expected)


def test_correlations():
    """Law: Pearson and Spearman are numpy's, of values and of ranks."""
    random = np.random.default_rng(0)
    x = random.normal(size=50)
    y = np.round(x + random.normal(size=50), 1)  # rounded: ties
    scores = [{"document": str(i), "label": a, "prediction": b} for i, (a, b) in enumerate(zip(x, y, strict=True))]
    result = summarise("classify", scores)
    assert result["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    ranks = stats.rankdata(x), stats.rankdata(y)
    assert result["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert set(result) == {"pearson", "spearman", "documents"}


def test_correlation_with_a_constant_is_undefined():
    """Law: a constant side gives NaN."""
    assert math.isnan(pearson(np.arange(3.0), np.ones(3)))
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))
    assert math.isnan(pearson(np.ones(1), np.ones(1)))


def test_records_without_a_domain_have_no_domains():
    """Law: without domains there are no parts."""
    assert by_domain("classify", labelled(np.array([1, 0]), np.array([1, 1]), 2)) == {}


def test_errors_name_what_is_missing():
    """Law: a missing field is refused with field and document."""
    with pytest.raises(DataError, match="no documents"):
        summarise("causal-lm", [])
    with pytest.raises(DataError, match="'bytes'") as caught:
        summarise("causal-lm", [{"document": "readme", "nll": 1.0, "tokens": 3}])
    assert "readme" in str(caught.value)
    with pytest.raises(DataError, match="no metrics"):
        summarise("juggling", [{"document": "a"}])
