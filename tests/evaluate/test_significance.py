"""Paired tests against scipy, hand-worked examples and the laws that p-values and intervals obey."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from mtkd.config.run import EvaluateConfig
from mtkd.errors import DataError
from mtkd.evaluate import significance
from mtkd.evaluate.report.wording import p_text
from mtkd.evaluate.significance import (
    STATISTICS,
    Resampling,
    compare,
    correct,
    holm,
    mcnemar,
    paired_bootstrap,
    permutation_test,
)

BITS = STATISTICS["bits_per_byte"]


def language_scores(nll, size, domain="prose") -> list[dict]:
    return [
        {"document": f"d{i}", "domain": domain, "nll": float(a), "tokens": 10, "bytes": int(b)}
        for i, (a, b) in enumerate(zip(nll, size, strict=True))
    ]


def class_scores(labels, predictions) -> list[dict]:
    return [
        {"document": i, "label": int(a), "prediction": int(b), "probabilities": [0.5, 0.5]}
        for i, (a, b) in enumerate(zip(labels, predictions, strict=True))
    ]


def regression_scores(labels, predictions) -> list[dict]:
    return [
        {"document": i, "label": float(a), "prediction": float(b)}
        for i, (a, b) in enumerate(zip(labels, predictions, strict=True))
    ]


def bits_of(nll, size, axis=-1):
    return np.sum(nll, axis) / np.sum(size, axis) / math.log(2)


def corpus(seed: int, documents: int, gain: float = 0.0) -> tuple[list[dict], list[dict]]:
    """Two models with a shared difficulty per document; the candidate is `gain` nats per byte better."""
    random = np.random.default_rng(seed)
    size = random.integers(50, 4000, documents)
    base = size * (0.8 + 0.2 * random.random(documents))
    ours = base + size * random.normal(-gain, 0.02, documents)
    theirs = base + size * random.normal(0, 0.02, documents)
    return language_scores(ours, size), language_scores(theirs, size)


def test_bootstrap_equals_scipy_bca():
    """Law: from the same draws the interval is scipy's, to rounding."""
    ours, theirs = corpus(0, 40, gain=0.01)
    a, b = (np.array([score["nll"] for score in side]) for side in (ours, theirs))
    size = np.array([score["bytes"] for score in ours])

    def difference(x, y, z, axis=-1):
        return bits_of(x, z, axis) - bits_of(y, z, axis)

    expected = stats.bootstrap(
        (a, b, size), difference, paired=True, n_resamples=20_000, method="BCa", rng=np.random.default_rng([2, 0])
    ).confidence_interval
    found = paired_bootstrap(BITS, ours, theirs, Resampling(20_000, seed=2))
    assert found == pytest.approx((difference(a, b, size), expected.low, expected.high), rel=1e-9)


def test_bca_follows_the_skew():
    """On a skewed sample BCa and the plain percentiles differ; ours must agree with scipy's BCa."""
    loss = np.random.default_rng(3).lognormal(0, 1.5, 30)
    ours, theirs = language_scores(loss, [100] * 30), language_scores([0.0] * 30, [100] * 30)

    def scipy_interval(method):
        return stats.bootstrap(
            (loss / 100 / math.log(2),), np.mean, n_resamples=20_000, method=method, rng=0
        ).confidence_interval

    found = paired_bootstrap(BITS, ours, theirs, Resampling(20_000, seed=0))
    bca, plain = scipy_interval("BCa"), scipy_interval("percentile")
    assert abs(found.high - bca.high) < 0.3 * abs(plain.high - bca.high)
    assert abs(found.low - bca.low) < 0.3 * abs(plain.low - bca.low)


def test_exact_permutation_equals_scipy():
    """Law: with few documents p is that of all swaps, as scipy enumerates them."""
    random = np.random.default_rng(1)
    size = random.integers(50, 2000, 8)
    a, b = size * random.normal(0.8, 0.05, 8), size * random.normal(0.85, 0.05, 8)
    expected = stats.permutation_test(
        (a, b),
        lambda x, y, axis=-1: np.abs(bits_of(x, size, axis) - bits_of(y, size, axis)),
        permutation_type="samples",
        alternative="greater",
        n_resamples=10_000,
    ).pvalue
    assert permutation_test(BITS, language_scores(a, size), language_scores(b, size)) == pytest.approx(expected)


def test_permutation_of_a_simple_mean_by_hand():
    """Law: four equal differences are matched by 2 of 16 swaps."""
    # Differences 1, 1, 1, 1 (equal bytes): of 16 swaps only none and all reach |mean| = 1.
    p = permutation_test(BITS, language_scores([2] * 4, [10] * 4), language_scores([1] * 4, [10] * 4))
    assert p == 2 / 16


def test_sampled_permutation_approaches_the_exact_one():
    """Law: sampled p is exact p up to four standard errors."""
    random = np.random.default_rng(5)
    size = random.integers(50, 500, 12)
    a, b = size * random.normal(0.8, 0.05, 12), size * random.normal(0.83, 0.05, 12)
    ours, theirs = language_scores(a, size), language_scores(b, size)
    gap, bits = a - b, size.sum()
    swaps = np.array(list(itertools.product((1, -1), repeat=12)))
    exact = np.mean(np.abs(swaps @ gap / bits) >= abs(gap.sum() / bits) * (1 - 1e-12))
    assert permutation_test(BITS, ours, theirs, Resampling(4096)) == pytest.approx(exact)
    sampled = permutation_test(BITS, ours, theirs, Resampling(4000, seed=3))  # below 2**12: sampled
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))
    assert sampled != exact


def test_p_is_uniform_when_there_is_no_difference():
    """Law: without a difference p is uniform, so that 5% are below 0.05."""
    found = np.array([permutation_test(BITS, *corpus(seed, 30), Resampling(199, seed=seed)) for seed in range(400)])
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert abs(np.mean(found <= 0.05) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Gains are -0.01 nats per byte whatever the document's size, so the corpus difference is known."""
    truth = -0.01 / math.log(2)
    covered = 0
    for seed in range(300):
        interval = paired_bootstrap(BITS, *corpus(seed, 60, gain=0.01), Resampling(400, 0.9, seed))
        covered += interval.low <= truth <= interval.high
    # Bootstrap intervals of 60 unequal documents cover a little less than nominal.
    assert 0.83 <= covered / 300 <= 0.95


def test_a_real_gain_is_found():
    """Law: a gain gives a claim, and swapping the models its opposite."""
    row = compare("causal-lm", "student", "labels", *corpus(0, 50, gain=0.02), Resampling(2000))[0]
    assert row["better"] is True
    assert row["p"] == 1 / 2001
    assert row["high"] < 0
    assert row["difference"] == pytest.approx(row["candidate_value"] - row["baseline_value"])
    reverse = compare("causal-lm", "labels", "student", *corpus(0, 50, gain=0.02)[::-1], Resampling(2000))[0]
    assert reverse["better"] is False
    assert reverse["difference"] == pytest.approx(-row["difference"])


def test_a_ratio_is_not_the_mean_of_ratios():
    """Nine tiny documents get better and one huge one gets worse: the corpus is worse, the mean of ratios better."""
    size = np.array([100] * 9 + [100_000])
    baseline = size * 0.7
    candidate = baseline - np.array([10] * 9 + [-2000])
    rows = compare("causal-lm", "c", "b", language_scores(candidate, size), language_scores(baseline, size))
    assert np.mean(candidate / size) < np.mean(baseline / size)
    assert rows[0]["difference"] == pytest.approx(bits_of(candidate, size) - bits_of(baseline, size))
    assert rows[0]["difference"] > 0
    # The sign of the whole depends on one document of ten: nothing can be claimed.
    assert rows[0]["better"] is None
    assert rows[0]["low"] < 0 < rows[0]["high"]


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch):
    """Law: the size of a chunk changes draws, not the distribution."""
    ours, theirs = corpus(4, 40)
    whole = (
        permutation_test(BITS, ours, theirs, Resampling(1000)),
        paired_bootstrap(BITS, ours, theirs, Resampling(1000)),
    )
    monkeypatch.setattr(significance, "PAIRS_AT_ONCE", 40 * 64)
    parts = (
        permutation_test(BITS, ours, theirs, Resampling(1000)),
        paired_bootstrap(BITS, ours, theirs, Resampling(1000)),
    )
    assert parts[0] == pytest.approx(whole[0], abs=0.05)
    assert parts[1] == pytest.approx(whole[1], rel=0.2)
    counts = list(significance._document_counts(np.random.default_rng(0), 1000, 40))
    assert sum(len(c) for c in counts) == 1000
    assert all(len(c) <= 64 for c in counts)
    assert all(np.all(c.sum(axis=1) == 40) for c in counts)


def test_the_seed_decides():
    """Law: equal seeds give equal rows, another seed other draws."""
    pair = corpus(1, 30)
    first, again, other = (compare("causal-lm", "c", "b", *pair, Resampling(300, seed=s))[0] for s in (0, 0, 1))
    assert first == again
    assert (first["low"], first["p"]) != (other["low"], other["p"])


def test_identical_models_do_not_differ():
    """Law: equal scores give difference 0 and p 1."""
    scores, _ = corpus(2, 30)
    row = compare("causal-lm", "c", "b", scores, scores, Resampling(200))[0]
    assert (row["difference"], row["low"], row["high"], row["p"], row["better"]) == (0, 0, 0, 1, None)


def exact_binomial(few: int, many: int) -> float:
    total = few + many
    return float(min(Fraction(1), 2 * sum(Fraction(math.comb(total, k), 2**total) for k in range(few + 1))))


@pytest.mark.parametrize(("only_candidate", "only_baseline"), [(0, 0), (5, 5), (1, 9), (9, 1), (0, 6), (3, 20)])
def test_mcnemar_by_hand(only_candidate: int, only_baseline: int):
    """Law: p is the two-sided binomial over documents that one model alone has right."""
    candidate = np.array([True] * only_candidate + [False] * only_baseline + [True] * 7 + [False] * 4)
    baseline = np.array([False] * only_candidate + [True] * only_baseline + [True] * 7 + [False] * 4)
    expected = exact_binomial(min(only_candidate, only_baseline), max(only_candidate, only_baseline))
    assert mcnemar(candidate, baseline) == pytest.approx(expected)


def test_mcnemar_is_never_zero():
    """Law: p stays positive where the binomial underflows."""
    assert 0 < mcnemar(np.ones(5000, bool), np.zeros(5000, bool)) < 1e-300


def test_holm_worked_example():
    """Law: the k-th smallest p is multiplied by what is left, and never falls below the one before."""
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_correction_over_several_comparisons_takes_claims_back():
    """Law: in a larger family p_holm grows, and a claim may fall."""
    rows = compare("causal-lm", "c", "b", *corpus(7, 12, gain=0.012), Resampling(5000))
    assert rows[0]["better"] is True
    assert 0.001 < rows[0]["p"] < 0.05
    family = correct(rows * 60)
    assert family[0]["p"] == rows[0]["p"]
    assert family[0]["p_holm"] == pytest.approx(min(1, 60 * rows[0]["p"]))
    assert family[0]["better"] is None
    assert rows[0]["better"] is True, "the rows given are left alone"


def test_domains_are_tested_apart_and_corrected_together():
    """Law: one row per domain and one overall, corrected as a family."""
    prose = corpus(0, 40, gain=0.05)
    code = tuple([s | {"domain": "code"} for s in side] for side in corpus(1, 40))
    # The same document names in both domains, in another order for the baseline.
    ours, theirs = [*prose[0], *code[0]], [*code[1], *prose[1]][::-1]
    rows = compare("causal-lm", "student", "labels", ours, theirs, Resampling(999))
    assert [r["domain"] for r in rows] == ["overall", "prose", "code"]
    assert [r["n"] for r in rows] == [80, 40, 40]
    assert [r["better"] for r in rows] == [True, True, None]
    assert [r["p_holm"] for r in rows] == pytest.approx(holm([r["p"] for r in rows]))
    assert rows[1]["candidate_value"] == pytest.approx(
        bits_of([s["nll"] for s in prose[0]], [s["bytes"] for s in prose[0]])
    )


def test_classification_uses_mcnemar_and_higher_is_better():
    """Law: accuracy is compared by McNemar's test, and more is better."""
    labels = np.zeros(60, int)
    ours = class_scores(labels, [0] * 50 + [1] * 10)
    theirs = class_scores(labels, [0] * 35 + [1] * 25)
    (row,) = compare("classify", "c", "b", ours, theirs, Resampling(500))
    assert (row["metric"], row["test"], row["domain"]) == ("accuracy", "mcnemar", "overall")
    assert row["difference"] == pytest.approx(0.25)
    assert row["p"] == pytest.approx(exact_binomial(0, 15))
    assert row["better"] is True
    assert 0 < row["low"] < 0.25 < row["high"]


def test_regression_compares_correlations_whatever_the_scale():
    """Law: correlations and their interval are numpy's and scipy's."""
    random = np.random.default_rng(0)
    labels = random.normal(size=80)
    good, bad = labels + 0.3 * random.normal(size=80), labels + 2.0 * random.normal(size=80)
    (row,) = compare(
        "classify", "c", "b", regression_scores(labels, 100 * good + 7), regression_scores(labels, bad), Resampling(500)
    )
    assert row["candidate_value"] == pytest.approx(np.corrcoef(labels, good)[0, 1])
    assert row["baseline_value"] == pytest.approx(np.corrcoef(labels, bad)[0, 1])
    assert row["better"] is True
    expected = stats.bootstrap(
        (labels, good, bad),
        lambda x, y, z, axis=-1: stats.pearsonr(x, y, axis=axis).statistic - stats.pearsonr(x, z, axis=axis).statistic,
        paired=True,
        n_resamples=2000,
        rng=0,
    ).confidence_interval
    width = expected.high - expected.low
    assert row["low"] == pytest.approx(expected.low, abs=0.15 * width)
    assert row["high"] == pytest.approx(expected.high, abs=0.15 * width)


def test_regression_p_does_not_depend_on_the_scale_of_the_predictions():
    """Law: p(a * x + b) = p(x) for predictions x."""
    random = np.random.default_rng(2)
    labels = random.normal(size=40)
    ours, theirs = labels + random.normal(size=40), labels + 1.3 * random.normal(size=40)
    baseline = regression_scores(labels, theirs)
    plain, scaled = (
        compare("regression", "c", "b", regression_scores(labels, values), baseline, Resampling(500))[0]
        for values in (ours, 1000 * ours - 3)
    )
    assert 0.05 < plain["p"] < 1
    assert scaled["p"] == plain["p"]
    assert scaled["low"] == pytest.approx(plain["low"])


def test_a_diverged_model_is_not_compared_to_a_claim():
    """Law: NaN scores give p 1, no claim and no interval."""
    ours, theirs = corpus(0, 20)
    theirs[3]["nll"] = math.nan
    row = compare("causal-lm", "c", "b", ours, theirs, Resampling(100))[0]
    assert row["p"] == 1
    assert row["better"] is None
    assert math.isnan(row["low"])


def test_one_document_gives_no_interval():
    """Law: one document gives p 1 and no interval."""
    row = compare("causal-lm", "c", "b", *corpus(0, 1, gain=1.0))[0]
    assert row["p"] == 1
    assert math.isnan(row["low"])


def test_unequal_documents_are_refused():
    """Law: models must have scored the same documents with equal sizes and labels, once each."""
    ours, theirs = corpus(0, 5)
    with pytest.raises(DataError, match="same documents: 1") as caught:
        compare("causal-lm", "c", "b", ours[:4], theirs)
    assert "d4" in str(caught.value)
    with pytest.raises(DataError, match="twice"):
        compare("causal-lm", "c", "b", [*ours, ours[0]], theirs)
    theirs[2] = theirs[2] | {"bytes": 7}
    with pytest.raises(DataError, match="another 'bytes'"):
        compare("causal-lm", "c", "b", ours, theirs)
    with pytest.raises(DataError, match="another 'label'"):
        compare("classify", "c", "b", class_scores([0, 1], [0, 0]), class_scores([1, 1], [0, 0]))


@pytest.mark.parametrize("rows", [1, 2, 18, 125])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
def test_a_verdict_can_be_reached_in_every_comparison(rows: int, confidence: float) -> None:
    """The least p of enough resamples, corrected for all rows, is below the level: 200 could not do it for 18 rows."""
    enough = EvaluateConfig(resamples=200, confidence=confidence).enough_resamples(rows)
    assert holm([1 / (enough + 1)] * rows)[0] < 1 - confidence
    assert EvaluateConfig(resamples=10_000_000, confidence=confidence).enough_resamples(rows) == 10_000_000


def test_a_p_at_its_least_says_so() -> None:
    """A thousand documents that are all better: no swap comes near, whatever their number."""
    nll, size = 10.0 + np.arange(1000) % 3, np.full(1000, 10)
    better, worse = language_scores(nll, size), language_scores(nll + 5, size)
    (row,) = compare("causal-lm", "a", "b", better, worse, Resampling(99))
    assert (row["p"], row["p_at_most"]) == (0.01, True)
    assert p_text(row["p"], row["p_at_most"]) == "≤ 0.0100"
    (same,) = compare("causal-lm", "a", "b", better, better, Resampling(99))
    assert (same["p"], same["p_at_most"]) == (1.0, False)
    assert p_text(same["p"], same["p_at_most"]) == "1.00"
