"""Traits against closed forms, their laziness, and each weighting against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.errors import UserError
from mtkd.models.features import DenseLogits
from mtkd.weightings import TRAITS, Around, Traits, trait
from mtkd.weightings.constant import Fixed
from mtkd.weightings.spec import WEIGHTINGS

NAMES = ("ce", "entropy", "confidence", "margin", "agreement")


class Counted:
    """Logits that count how many positions were read."""

    def __init__(self, values: Tensor) -> None:
        self.dense, self.positions = DenseLogits(values), 0

    @property
    def num_columns(self) -> int:
        return self.dense.num_columns

    def rows(self, index: Tensor) -> Tensor:
        self.positions += len(index)
        return self.dense.rows(index)

    def in_dtype(self, dtype: torch.dtype) -> Counted:
        return self


def traits_of(logits: Tensor, targets: Tensor, per: str = "example", tile: int = 2) -> Traits:
    return Traits([DenseLogits(x) for x in logits], Around(batch_of(targets)), per, tile)


def batch_of(targets: Tensor, ids: Tensor | None = None, routes: Tensor | None = None) -> Batch:
    """Examples with these targets; the tokens mean nothing."""
    tokens = torch.zeros((*targets.shape, 1)[:2], dtype=torch.int64)
    ids = torch.arange(len(targets)) if ids is None else ids
    return Batch(ids, tokens, torch.ones_like(tokens).bool(), targets, routes=routes)


def by_hand(row: list[float], label: int) -> dict[str, float]:
    total = sum(math.exp(x) for x in row)
    probs = [math.exp(x) / total for x in row]
    top = sorted(probs)[::-1]
    return {
        "ce": -math.log(probs[label]),
        "entropy": -sum(p * math.log(p) for p in probs),
        "confidence": top[0],
        "margin": top[0] - top[1],
    }


LOGITS = 2 * torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))  # T=3, B=2, L=4, V=5
TARGETS = torch.tensor([[1, NO_LABEL, 4, 0], [NO_LABEL, 2, NO_LABEL, NO_LABEL]])


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("tile", [1, 2, 100])
def test_traits_against_closed_forms(name: str, tile: int) -> None:
    """Every trait is the number worked out by hand, for tiles of any size."""
    per_token = getattr(traits_of(LOGITS, TARGETS, "token", tile), name)
    per_example = getattr(traits_of(LOGITS, TARGETS, "example", tile), name)
    assert per_token.shape == (3, 2, 4)
    assert per_example.shape == (3, 2, 1)
    for k in range(3):
        for b in range(2):
            held = []
            for i in range(4):
                label = int(TARGETS[b, i])
                wanted = by_hand(LOGITS[k, b, i].tolist(), label)[name] if label != NO_LABEL else 0.0
                assert float(per_token[k, b, i]) == pytest.approx(wanted, abs=1e-5)
                held += [wanted] if label != NO_LABEL else []
            assert float(per_example[k, b, 0]) == pytest.approx(sum(held) / len(held), abs=1e-5)


def test_traits_of_classes_have_one_value_per_example() -> None:
    """Classes have [T,B,1], with and without a label."""
    logits, targets = LOGITS[:, :, 0], torch.tensor([3, NO_LABEL])
    for per in ("example", "token"):
        traits = traits_of(logits, targets, per)
        assert traits.shape == (3, 2, 1)
        assert float(traits.ce[1, 0, 0]) == pytest.approx(by_hand(logits[1, 0].tolist(), 3)["ce"], abs=1e-5)
        # an example without a label is predicted all the same: a weighting that needs no labels works on it
        wanted = [[by_hand(logits[k, 1].tolist(), 0)["entropy"]] for k in range(3)]
        torch.testing.assert_close(traits.entropy[:, 1], torch.tensor(wanted))
        # whose error nobody knows: all teachers are as wrong as a guess, none is as right as can be
        assert traits.ce[:, 1].flatten().tolist() == pytest.approx([math.log(5)] * 3)


def test_agreement_is_the_share_of_the_others_with_the_same_choice() -> None:
    """Agreement counts the other teachers; a single one agrees with itself."""
    choices = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 3, 2]], [[0, 2, 4, 3]]])  # [T,B,L]
    logits = torch.nn.functional.one_hot(choices, 5).float()
    targets = torch.tensor([[1, 1, 1, NO_LABEL]])
    per_token = traits_of(logits, targets, "token").agreement
    assert per_token[:, 0].tolist() == [[1.0, 0.5, 0.0, 0.0], [1.0, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    per_example = traits_of(logits, targets).agreement
    torch.testing.assert_close(per_example[:, 0, 0], torch.tensor([0.5, 0.5, 1 / 3]))
    assert traits_of(logits[:1], targets).agreement.tolist() == [[[1.0]]]


def test_agreement_of_an_example_without_targets_is_zero() -> None:
    """Where nothing is asked, no teacher agrees with another."""
    targets = torch.tensor([[1, 2, 3, 4], [NO_LABEL] * 4])
    assert traits_of(LOGITS, targets).agreement[:, 1].tolist() == [[0.0]] * 3
    assert float(traits_of(LOGITS, targets).agreement.max()) <= 1


def test_regression_teachers_have_a_squared_error() -> None:
    """The cross entropy of one column is (y - t)^2."""
    logits, targets = torch.tensor([[[1.0], [2.0]], [[0.0], [5.0]]]), torch.tensor([0.5, torch.nan])
    assert traits_of(logits, targets).ce.tolist() == [[[0.25], [0.0]], [[0.25], [0.0]]]
    assert traits_of(logits, targets).margin[:, 0].tolist() == [[1.0], [1.0]]


def test_nothing_is_computed_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the traits that are read are computed, each once."""
    calls: list[str] = []
    for name, function in list(TRAITS.items()):
        monkeypatch.setitem(
            TRAITS, name, lambda x, y, name=name, function=function: calls.append(name) or function(x, y)
        )
    logits = [Counted(x) for x in LOGITS]
    traits = Traits(logits, Around(batch_of(TARGETS)), "example", 100)
    WEIGHTINGS["uniform"].cls()(traits)
    assert calls == []
    assert [x.positions for x in logits] == [0, 0, 0]
    WEIGHTINGS["entropy"].cls()(traits)
    assert set(calls) == {"entropy"}
    assert [x.positions for x in logits] == [4, 4, 4]  # positions with a target, and no other
    assert traits.entropy is traits.entropy
    assert [x.positions for x in logits] == [4, 4, 4]


def test_no_more_than_a_tile_of_logits_exists_at_one_time() -> None:
    """Logits are asked for in pieces of at most `tile` positions."""
    sizes: list[int] = []

    class Watched(Counted):
        def rows(self, index: Tensor) -> Tensor:
            sizes.append(len(index))
            return super().rows(index)

    assert Traits([Watched(LOGITS[0])], Around(batch_of(TARGETS)), "token", 3).ce.shape == (1, 2, 4)
    assert sizes == [3, 1]


def test_traits_are_detached() -> None:
    """No trait requires a gradient."""
    logits = LOGITS.clone().requires_grad_()
    for name in NAMES:
        assert not getattr(traits_of(logits, TARGETS), name).requires_grad


def test_a_trait_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registered function is read by its name."""
    monkeypatch.setitem(TRAITS, "largest", TRAITS["ce"])  # so that it is dropped at the end
    del TRAITS["largest"]

    @trait
    def largest(logits: Tensor, labels: Tensor | None) -> Tensor:
        return logits.amax(-1)

    found = traits_of(LOGITS, TARGETS, "token").read("largest")
    torch.testing.assert_close(found, LOGITS.amax(-1) * (TARGETS != NO_LABEL))
    with pytest.raises(ValueError, match="already registered"):
        trait(largest)


def weights(name: str, logits: Tensor, targets: Tensor, per: str = "example", **options: object) -> Tensor:
    return WEIGHTINGS[name].cls(**options)(traits_of(logits, targets, per))


def test_uniform() -> None:
    """w = 1/T."""
    assert torch.equal(weights("uniform", LOGITS, TARGETS, "token"), torch.full((3, 2, 4), 1 / 3))


def test_fixed_weights_follow_names_and_are_normalised() -> None:
    """Weights belong to names, not to places, and sum to 1."""
    module = Fixed(("b", "a"), {"a": 1, "b": 3.0})
    assert module(traits_of(LOGITS[:2], TARGETS))[:, 0, 0].tolist() == [0.75, 0.25]
    assert module.to("meta").values.is_meta  # it moves to the student's device with the objective


@pytest.mark.parametrize(
    "given",
    [
        {"a": 1.0},
        {"a": 1.0, "b": 1.0, "c": 1.0},
        {"a": 0.0, "b": 0.0},
        {"a": -1.0, "b": 2.0},
        {"a": math.inf, "b": 1.0},
        [1.0, 2.0],
    ],
)
def test_fixed_weights_that_mean_nothing_are_refused(given: object) -> None:
    """Unknown or missing names, negative numbers and all zeros are refused."""
    with pytest.raises(UserError, match="fixed weights"):
        Fixed(("a", "b"), given)  # type: ignore[arg-type]


@pytest.mark.parametrize("per", ["example", "token"])
@pytest.mark.parametrize("normalise", [False, True])
def test_mt_bert_against_its_formula(per: str, normalise: bool) -> None:
    """w = 1 / (1 + CE), by hand."""
    found = weights("mt_bert", LOGITS, TARGETS, per, normalise=normalise)
    for b in range(2):
        for i in range(found.shape[2]):
            at = [i] if per == "token" else [j for j in range(4) if TARGETS[b, j] != NO_LABEL]
            wanted = []
            for k in range(3):
                ces = [by_hand(LOGITS[k, b, j].tolist(), int(TARGETS[b, j]))["ce"] for j in at if TARGETS[b, j] >= 0]
                wanted.append(1 / (1 + (sum(ces) / len(ces) if ces else 0)))
            scale = sum(wanted) if normalise else 1
            assert found[:, b, i].tolist() == pytest.approx([w / scale for w in wanted], abs=1e-5)


def test_entropy_against_its_formula() -> None:
    """w = (1 - H / sum H) / (T - 1), by hand."""
    found = weights("entropy", LOGITS, TARGETS, "token")
    for b, i in (TARGETS != NO_LABEL).nonzero().tolist():
        entropies = [by_hand(LOGITS[k, b, i].tolist(), 0)["entropy"] for k in range(3)]
        wanted = [(1 - h / sum(entropies)) / 2 for h in entropies]
        assert found[:, b, i].tolist() == pytest.approx(wanted, abs=1e-5)
    assert found[:, 0, 1].tolist() == pytest.approx([1 / 3] * 3)  # no target there


def test_entropy_of_very_sure_teachers_sums_to_one() -> None:
    """Entropies near 0 still compare."""
    # A gap of 75 nats has an entropy of 2e-31, of 80 nats 1e-33: small, but not equal.
    logits = torch.tensor([[[75.0, 0.0]], [[80.0, 0.0]]])
    found = weights("entropy", logits, torch.tensor([0]))[:, 0, 0]
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)
    assert float(found[1]) > 0.98


def test_confidence_against_its_formula() -> None:
    """w = softmax of the largest probabilities over tau, by hand."""
    found = weights("confidence", LOGITS, TARGETS, "token", tau=0.5)
    for b, i in (TARGETS != NO_LABEL).nonzero().tolist():
        powers = [math.exp(by_hand(LOGITS[k, b, i].tolist(), 0)["confidence"] / 0.5) for k in range(3)]
        assert found[:, b, i].tolist() == pytest.approx([p / sum(powers) for p in powers], abs=1e-5)
    with pytest.raises(ValueError, match="tau"):
        weights("confidence", LOGITS, TARGETS, tau=0.0)


def test_weightings_without_labels_ignore_them() -> None:
    """Other labels give the same weights."""
    other = TARGETS.where(TARGETS == NO_LABEL, (TARGETS + 1) % 5)
    for name in ("uniform", "entropy", "confidence"):
        assert torch.equal(weights(name, LOGITS, TARGETS), weights(name, LOGITS, other))
    assert not torch.equal(weights("mt_bert", LOGITS, TARGETS), weights("mt_bert", LOGITS, other))


def test_ca_mkd_of_two_teachers_is_the_softmax_of_minus_ce() -> None:
    """For T = 2 the paper's weights are softmax(-CE)."""
    import torch

    from mtkd.models.features import DenseLogits
    from mtkd.weightings import Traits
    from mtkd.weightings.correctness import CAMKD

    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 4), torch.randint(0, 4, (5,))
    traits = Traits([DenseLogits(x) for x in logits], Around(batch_of(labels)), "example", 3)
    ce = torch.stack([-torch.log_softmax(x, -1)[torch.arange(5), labels] for x in logits])
    torch.testing.assert_close(CAMKD()(traits)[..., 0], torch.softmax(-ce, 0))
