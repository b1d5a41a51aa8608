"""Laws of weightings: shape, sign, sum, one teacher, order of teachers, labels, detachment, state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtkd.features import NO_LABEL, DenseLogits
from mtkd.laws.broken import TOLERANCE, LawBroken, difference
from mtkd.registry import WEIGHTINGS, WeightingSpec
from mtkd.weightings.base import Weighting
from mtkd.weightings.traits import Traits

OptionsOf = Callable[[tuple[str, ...]], Mapping[str, Any]]
"""A weighting's options, given its teachers' names."""

LOSS_SCALES = (0.0, 1.0, 1e4, 1e15)  # factors of the teachers' logits: their cross entropy is up to 1e15

_MASK = torch.arange(6) < torch.tensor([[6], [2], [4]])  # three sequences of 6, 2 and 4 tokens
_TEACHERS = ("t0", "t1", "t2")
_NEEDED_OPTIONS: dict[str, OptionsOf] = {
    "fixed": lambda teachers: {"weights": {name: 1.0 + _TEACHERS.index(name) for name in teachers}}
}


def check_weighting(weighting: str | WeightingSpec, options: OptionsOf | None = None) -> None:
    """Every law of a weighting; `options` makes its options from the teachers' names where defaults are not enough.

    Raises:
        LawBroken: at the first law it does not keep.
    """
    spec = WEIGHTINGS.find(weighting) if isinstance(weighting, str) else weighting
    make = options or _NEEDED_OPTIONS.get(spec.name, lambda teachers: {})
    for law in WEIGHTING_LAWS:
        for case in _teacher_bank():
            law(spec, make, case)


@dataclass(frozen=True)
class Teachers:
    """Logits of some teachers on one batch."""

    what: str
    logits: Tensor  # [T,B,V] or [T,B,L,V]
    targets: Tensor
    mask: Tensor
    per: str

    def traits(self, order: tuple[int, ...] = (0, 1, 2)) -> Traits:
        """Fresh traits of the teachers in this order."""
        return Traits([DenseLogits(self.logits[k]) for k in order], self.targets, self.mask, self.per, 4)


def _teacher_bank() -> Iterator[Teachers]:
    """Classes, one number per example, tokens (one example without targets), at every scale, and equal teachers."""
    generator = torch.Generator().manual_seed(0)
    tokens, classes = torch.randint(11, (3, 6), generator=generator), torch.tensor([0, 2, 1, 2, NO_LABEL])
    tokens = tokens.masked_fill(~_MASK, NO_LABEL).index_fill(0, torch.tensor([1]), NO_LABEL)
    numbers = torch.tensor([0.5, -1.0, torch.nan])
    shapes = {"classes": (3, 5, 3), "numbers": (3, 3, 1), "tokens": (3, 3, 6, 11)}
    targets = {"classes": classes, "numbers": numbers, "tokens": tokens}
    for kind, shape in shapes.items():
        held = targets[kind]
        mask = ~held.isnan() if kind == "numbers" else held != NO_LABEL
        drawn = torch.randn(shape, generator=generator)
        scaled = {f"{kind} at scale {scale:g}": scale * drawn for scale in LOSS_SCALES}
        scaled[f"{kind} of equal teachers"] = drawn[:1].expand_as(drawn)
        for what, logits in scaled.items():
            for per in ("example", "token") if kind == "tokens" else ("example",):
                yield Teachers(f"{what} per {per}", logits, held, mask, per)


def _made(spec: WeightingSpec, make: OptionsOf, order: tuple[int, ...] = (0, 1, 2), seed: int = 0) -> Weighting:
    """A fresh weighting; `seed` is of what its constructor draws."""
    names = tuple(_TEACHERS[k] for k in order)
    options = dict(make(names))
    if "teachers" in inspect.signature(spec.cls).parameters:
        options["teachers"] = names
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return spec.cls(**options)


def _values_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """[T,B,1] per example, [T,B,L] per token, float32; finite, non-negative, and of sum 1 where declared."""
    traits = case.traits()
    weights = _made(spec, make)(traits)
    if weights.shape != traits.shape or weights.dtype != torch.float32:
        found = f"{list(weights.shape)} {weights.dtype} instead of {list(traits.shape)} float32"
        raise LawBroken("shape", spec.name, f"{found} for {case.what}")
    if not bool(weights.isfinite().all()):
        raise LawBroken("finite", spec.name, f"a weight is not finite for {case.what}")
    if not bool((weights >= 0).all()):
        raise LawBroken("non-negative", spec.name, f"a weight of {float(weights.min())} for {case.what}")
    sums = weights.sum(0)
    if spec.sums_to_one and difference(sums, torch.ones_like(sums)) > TOLERANCE:
        found = f"weights sum to {float(sums.min())} .. {float(sums.max())}"
        raise LawBroken("sums to one", spec.name, f"{found} for {case.what}")


def _one_teacher_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """One teacher has weight 1 exactly: the path of several teachers is then bit-identical to that of one."""
    if not spec.sums_to_one:
        return
    weights = _made(spec, make, (0,))(case.traits((0,)))
    if not torch.equal(weights, torch.ones_like(weights)):
        raise LawBroken("one teacher", spec.name, f"weights {weights.flatten()[:3].tolist()} for {case.what}")


def _order_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """Teachers in another order have the same weights in that order."""
    order = (2, 0, 1)
    found, wanted = _made(spec, make, order)(case.traits(order)), _made(spec, make)(case.traits())[list(order)]
    if difference(found, wanted) > TOLERANCE:
        raise LawBroken("order", spec.name, f"weights follow the teachers' positions for {case.what}")


def _labels_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """A weighting that does not declare `needs_labels` gives the same weights whatever the labels are."""
    if spec.needs_labels:
        return
    other = case.targets.flip(-1) + 1 if case.targets.is_floating_point() else (case.targets + 1) % 3
    relabelled = replace(case, targets=torch.where(case.mask, other, case.targets))
    if not torch.equal(_made(spec, make)(relabelled.traits()), _made(spec, make)(case.traits())):
        raise LawBroken("labels", spec.name, f"labels change the weights for {case.what}, needs_labels is not declared")


def _detached_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """Weights require a gradient only of the weighting's own parameters, never of the teachers' logits."""
    logits = case.logits.clone().requires_grad_()
    module = _made(spec, make)
    weights = module(replace(case, logits=logits).traits())
    if not weights.requires_grad:
        return
    if not list(module.parameters()):
        raise LawBroken("detached", spec.name, f"weights require a gradient, but there are no parameters ({case.what})")
    if torch.autograd.grad(weights.sum(), logits, allow_unused=True)[0] is not None:
        raise LawBroken("detached", spec.name, f"a gradient reaches the teachers for {case.what}")


def _state_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """A fresh weighting that loads the state of a used one gives its weights, bit by bit."""
    used, fresh = _made(spec, make), _made(spec, make, seed=1)
    for _ in range(2):
        used(case.traits())
    for value in fresh.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value))
    fresh.load_state_dict(copy.deepcopy(used.state_dict()))
    if not torch.equal(fresh(case.traits()), used(case.traits())):
        raise LawBroken("state", spec.name, f"state_dict does not hold everything ({case.what})")


WEIGHTING_LAWS = (
    _values_law,
    _one_teacher_law,
    _order_law,
    _labels_law,
    _detached_law,
    _state_law,
)
