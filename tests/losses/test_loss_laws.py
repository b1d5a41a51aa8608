"""Every registered loss keeps every law; and every law catches a loss (or a tiled pass) made to break it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mtkd.objective.laws
from mtkd import LawBroken, check_loss, check_tiled
from mtkd.errors import UserError
from mtkd.losses.distributions import negative_entropy, no_term
from mtkd.losses.spec import LOSSES, LossSpec
from mtkd.registry import load_plugins

OPTIONS = {
    "kl": [
        {"temperature": 3.0},
        {"temperature": 0.5, "scale": False},
        {"top": 3, "temperature": 2.0},
        {"standardise": True, "temperature": 2.0},
    ],
    "reverse_kl": [{"temperature": 3.0}, {"top": 3}, {"standardise": True}],
    "soft_ce": [{"temperature": 3.0}, {"top": 3}, {"standardise": True}],
    "jsd": [
        {"beta": 0.1},
        {"beta": 0.9, "temperature": 2.0},
        {"beta": 0.0},
        {"beta": 1.0},
        {"top": 3},
        {"standardise": True},
    ],
    "skew_kl": [{"alpha": 0.5, "temperature": 2.0}, {"alpha": 0.0}, {"top": 3}],
    "reverse_skew_kl": [{"alpha": 0.5, "temperature": 2.0}, {"alpha": 0.0}, {"top": 3}],
    "total_variation": [{"temperature": 2.0}, {"top": 3}, {"standardise": True}],
    "adaptive_kl": [{"mu": 0.9, "temperature": 2.0}, {"standardise": True}],
    "todi": [{"beta": 3.0, "temperature": 2.0}, {"beta": 0.0}, {"top": 3}, {"standardise": True}],
    "dkd": [{"alpha": 0.5, "beta": 2.0, "temperature": 4.0}, {"standardise": True}, {"beta": 0.0}],
    "dist_inter": [{"temperature": 4.0}, {"scale": False}],
    "dist_intra": [{"temperature": 4.0}],
    "policy_gradient": [{"temperature": 2.0, "against": "writer"}],
    "ce": [{"smoothing": 0.1}],
    "normalized_mse": [{"sum_over_width": True}],
    "relation_kl": [{"heads": 2}, {"heads": 16}],
}
CASES = [(name, options) for name in LOSSES for options in ({}, *OPTIONS.get(name, []))]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_loss_keeps_the_laws(name: str, options: dict[str, object]) -> None:
    check_loss(name, options)


IN_TILES = [case for case in CASES if "logits" in LOSSES[case[0]].inputs and "batch" not in LOSSES[case[0]].needs]


# Logits: chunks of two rows of the law's 37 columns. Chunks cut rows whatever the options are, and the law's tiles of
# one row cut finer, with every option. So each loss is cut as it is, and once with options.
CHUNKED = [(*case, 2 * 37) for case in IN_TILES if case[1] in ({}, OPTIONS.get(case[0], [{}])[0])]


@pytest.mark.parametrize(("name", "options", "chunk"), [*((*case, None) for case in IN_TILES), *CHUNKED])
def test_every_loss_on_logits_is_the_same_in_tiles(
    name: str, options: dict[str, object], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr("mtkd.models.pieces._CHUNK_LOGITS", chunk)
    check_tiled(name, options)


def test_a_loss_over_the_batch_keeps_the_law_of_several_teachers_and_is_never_in_tiles() -> None:
    check_tiled("dist_intra")
    with pytest.raises(LawBroken, match="in tiles of 1"):
        check_tiled(replace(LOSSES["dist_intra"], needs=()))


def test_a_loss_without_logits_has_no_tiles() -> None:
    with pytest.raises(ValueError, match="does not read logits"):
        check_tiled("attention_mse")


def good(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def mean_of_all(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def mean_of_tokens(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).square().mean((1, 2))


def in_float64(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return good(student, teacher, mask).double()


def noisy(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return good(student, teacher, mask) * (1 + torch.rand(()))


def signed(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).mean(-1)


def offset(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return good(student, teacher, mask) + 1e-4


def over_all_positions(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return good(student, teacher, mask) / mask.numel()


def over_all_keys(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).square().sum((1, 3)) / student.shape[-1]


def logarithm_of_softmax(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    p, q = torch.softmax(teacher, -1), torch.softmax(student, -1)
    return (p * (p.log() - q.log())).sum(-1)


def root(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return (student - teacher).square().sum(-1).sqrt()  # its gradient at 0 is 0/0


def half_detached(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return ((student - teacher) * (student - teacher).detach()).mean(-1)


def detached(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return good(student.detach(), teacher, mask)


BROKEN = [
    ("shape", mean_of_all, ("logits",)),
    ("shape", mean_of_tokens, ("hidden",)),
    ("shape", in_float64, ("cls",)),
    ("repeatable", noisy, ("logits",)),
    ("non-negative", signed, ("hidden",)),
    ("zero at equality", offset, ("logits",)),
    ("padding", over_all_positions, ("logits",)),
    ("padding", over_all_positions, ("hidden",)),
    ("padding", over_all_keys, ("probs",)),
    ("finite", logarithm_of_softmax, ("logits",)),
    ("finite", root, ("hidden",)),
    ("gradient", half_detached, ("logits",)),
    ("gradient", detached, ("hidden",)),
]


def test_the_model_of_the_broken_losses_keeps_the_laws() -> None:
    check_loss(LossSpec("good", good, ("logits", "hidden", "embedding", "cls")))


@pytest.mark.parametrize(("law", "function", "inputs"), BROKEN)
def test_each_law_can_fail(law: str, function: object, inputs: tuple[str, ...]) -> None:
    with pytest.raises(LawBroken) as caught:
        check_loss(LossSpec("mine", function, inputs))  # type: ignore[arg-type]
    assert caught.value.law == law
    assert "'mine'" in str(caught.value)


def test_zero_at_equality_is_asked_only_where_declared() -> None:
    check_loss(LossSpec("mine", offset, ("logits",), zero_at_equality=False))


@dataclass(frozen=True)
class Unmasked(LossSpec):
    """A loss that is not masked before the arithmetic."""

    def __call__(self, student, teacher, mask, options=None):  # type: ignore[no-untyped-def]
        values = self.function(student.float(), teacher.float(), mask)
        return values * mask


@dataclass(frozen=True)
class Counting(LossSpec):
    """A loss whose padded positions are not 0, although nothing that stands there matters."""

    def __call__(self, student, teacher, mask, options=None):  # type: ignore[no-untyped-def]
        return super().__call__(student, teacher, mask, options) + (~mask).float()


@pytest.mark.parametrize("kind", [Unmasked, Counting])
def test_padding_law_catches_a_masking_that_leaks(kind: type[LossSpec]) -> None:
    with pytest.raises(LawBroken) as caught:
        check_loss(kind("mine", good, ("hidden",), zero_at_equality=False))
    assert caught.value.law == "padding"


def test_keys_of_attention_maps_are_padding_too() -> None:
    def all_keys(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return (student - teacher).square().sum((1, 3))

    with pytest.raises(LawBroken, match="nan at padded positions") as caught:
        check_loss(LossSpec("mine", all_keys, ("probs",)))
    assert caught.value.law == "padding"


def centred(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return good(student - student.mean(0), teacher, mask)


def test_tiled_law_catches_a_loss_that_mixes_positions() -> None:
    with pytest.raises(LawBroken, match="in tiles of 1") as caught:
        check_tiled(LossSpec("mine", centred, ("logits",)))
    assert caught.value.law == "tiled"


@pytest.mark.parametrize("term", [no_term, lambda logs, probs: 1.1 * negative_entropy(logs, probs)])
def test_ensemble_law_catches_a_teacher_term_of_another_loss(term: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(LawBroken, match="values of three teachers") as caught:
        check_tiled(replace(LOSSES["kl"], name="mine", teacher_term=term))
    assert caught.value.law == "ensemble"


def test_ensemble_law_catches_a_loss_that_is_not_of_the_declared_form() -> None:
    with pytest.raises(LawBroken) as caught:
        check_tiled(replace(LOSSES["reverse_kl"], name="mine", teacher_term=negative_entropy))
    assert caught.value.law == "ensemble"


def test_a_mean_over_positions_is_refused_without_a_mask_too() -> None:
    logits = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="one value per position"):
        LossSpec("mine", mean_of_all, ("logits",))(logits, logits, None)


def faulty_pass(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """Let the laws see a tiled pass whose loss went through ``change(loss, head, dtype)``."""
    correct = mtkd.objective.laws.tiled

    def tiled(head, index, weights, tile_loss, *, tile, dtype):  # type: ignore[no-untyped-def]
        loss, metrics = correct(head, index, weights, tile_loss, tile=tile, dtype=dtype)
        return change(loss, head, weights, dtype), metrics  # type: ignore[operator]

    monkeypatch.setattr(mtkd.objective.laws, "tiled", tiled)


def slope(values: Tensor, size: float) -> Tensor:
    """0, with a gradient of `size` at each of the values."""
    return size * (values - values.detach()).sum()


BF16 = torch.bfloat16
FAULTS = [
    ("tiled", lambda loss, head, weights, dtype: loss * (1 + 1e-4)),
    ("tiled", lambda loss, head, weights, dtype: loss + slope(head.hidden, 1e-4)),
    ("tiled", lambda loss, head, weights, dtype: loss + slope(head.weight[: head.columns], 1e-4)),
    ("tiled", lambda loss, head, weights, dtype: loss + slope(head.bias[: head.columns], 1e-4)),
    ("tiled", lambda loss, head, weights, dtype: loss + slope(weights, 1e-3)),
    ("tiled", lambda loss, head, weights, dtype: loss + slope(head.weight[head.columns :], 1e-12)),
    ("tiled", lambda loss, head, weights, dtype: loss + slope(head.bias[head.columns :], 1e-12)),
    ("tiled", lambda loss, head, weights, dtype: loss if weights.numel() else loss.detach()),
    ("tiled", lambda loss, head, weights, dtype: loss if weights.numel() else slope(head.hidden, 0.0)),
    ("tiled", lambda loss, head, weights, dtype: loss if weights.numel() else loss + 1),
    ("tiled in bfloat16", lambda loss, head, weights, dtype: loss * (1.1 if dtype == BF16 else 1)),
    ("tiled in bfloat16", lambda loss, head, weights, dtype: loss + slope(head.hidden, 0.1 * (dtype == BF16))),
    ("tiled in bfloat16", lambda loss, head, weights, dtype: loss + slope(head.weight, 0.1 * (dtype == BF16))),
]


@pytest.mark.parametrize(("law", "change"), FAULTS)
def test_each_tiled_law_can_fail(law: str, change: object, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty_pass(monkeypatch, change)
    with pytest.raises(LawBroken) as caught:
        check_tiled("kl")
    assert caught.value.law == law


def test_a_plug_ins_loss_is_checked_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "losses.py"
    file.write_text(
        "from mtkd.losses.spec import loss\n"
        "@loss('absolute')\n"
        "def absolute(student, teacher, mask):\n    return (student - teacher).abs().mean(-1)\n"
        "@loss('reduced')\n"
        "def reduced(student, teacher, mask):\n    return (student - teacher).abs().mean()\n"
    )
    load_plugins((str(file),))
    try:
        check_loss("absolute")
        check_tiled("absolute")
        with pytest.raises(LawBroken, match="'reduced' breaks the law 'shape'"):
            check_loss("reduced")
    finally:
        LOSSES.forget(str(file))
    with pytest.raises(UserError, match="unknown loss"):
        check_loss("absolute")
