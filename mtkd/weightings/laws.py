"""Laws of weightings: what is read, shape, sign, sum, one teacher, order of teachers, labels, positions without a
target, detachment, state, the cut into micro-batches, penalty.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.errors import LawBroken
from mtkd.losses.laws import TOLERANCE, difference
from mtkd.models.features import DenseLogits
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.spec import GIVEN, WEIGHTINGS, WeightingSpec
from mtkd.weightings.traits import FACTS, Around, Traits

OptionsOf = Callable[[tuple[str, ...]], Mapping[str, Any]]
"""A weighting's options, given its teachers' names."""

LOSS_SCALES = (0.0, 1.0, 1e4, 1e15)  # factors of the teachers' logits: their cross entropy is up to 1e15

_EVERY = slice(None)
_CUTS = (slice(0, 1), slice(1, None))  # micro-batches of a step
_ORDER = (0, 1, 2)
_WIDTH = 5  # of the student's hidden states
_MASK = torch.arange(6) < torch.tensor([[6], [2], [4]])  # three sequences of 6, 2 and 4 tokens
_TEACHERS = ("t0", "t1", "t2")
_NEEDED_OPTIONS: dict[str, OptionsOf] = {
    "fixed": lambda teachers: {"weights": {name: 1.0 + _TEACHERS.index(name) for name in teachers}},
    "exopd": lambda teachers: {"reference": _TEACHERS[1]},
}


def check_weighting(weighting: str | WeightingSpec, options: OptionsOf | None = None) -> None:
    """Every law of a weighting; `options` makes its options from the teachers' names where defaults are not enough.

    Raises:
        LawBroken: at the first law it does not keep.
    """
    spec = WEIGHTINGS.find(weighting) if isinstance(weighting, str) else weighting
    make = options or _NEEDED_OPTIONS.get(spec.name, lambda teachers: {})
    reads_text = _reads_text(spec, make)
    for law in WEIGHTING_LAWS:
        for case in _teacher_bank():
            if reads_text and (case.targets.dim() == 1 or case.alike):
                continue  # a class has no text before it, and at equal positions there is more text each time
            if case.per == "example" or _made(spec, make, case).per_token:
                law(spec, make, case)


def _reads_text(spec: WeightingSpec, make: OptionsOf) -> bool:
    """Whether it reads facts of causal texts, which no other task has."""
    case = next(case for case in _teacher_bank() if case.targets.dim() == 2)
    module = _made(spec, make, case)
    traits = case.traits(_ORDER, module, all_names=True)
    with suppress(Exception):  # the laws show what is wrong with it
        module(traits)
    return any(FACTS[name].text for name in traits.names & FACTS.keys())


@dataclass(frozen=True)
class Teachers:
    """Logits of some teachers on one batch."""

    what: str
    logits: Tensor  # [T,B,V] or [T,B,L,V]
    targets: Tensor
    mask: Tensor
    per: str
    tokens: Tensor | None = None  # where weights are read, if that is more than the targets
    alike: bool = False  # all positions of an example are the same

    def traits(self, order: tuple[int, ...], of: Weighting, rows: slice = _EVERY, *, all_names: bool = False) -> Traits:
        """Fresh traits of the teachers in this order; `rows` are one micro-batch of a step.

        Args:
            all_names: serve names that the weighting does not declare, too.
        """
        logits = [DenseLogits(self.logits[k, rows]) for k in order]
        reads = None if all_names else of.may_read()
        return Traits(logits, self._around(order, of, rows), self.per, tile=4, reads=reads)

    def batch(self, order: tuple[int, ...] = _ORDER, rows: slice = _EVERY) -> Batch:
        """The examples as a batch; the tokens are drawn. Routes are by the teachers' names."""
        shape = (*self.targets.shape, 3)[:2]  # [B,L]
        tokens = torch.randint(self.logits.shape[-1], shape, generator=torch.Generator().manual_seed(3))
        routes = torch.tensor([order.index(i % len(order)) for i in range(len(tokens))])
        ids, mask = torch.arange(len(tokens)), torch.ones_like(tokens).bool()
        return Batch(ids[rows], tokens[rows], mask[rows], self.targets[rows], routes=routes[rows])

    def _around(self, order: tuple[int, ...], of: Weighting, rows: slice) -> Around:
        """A student and gradients, the same in every order; the counts are those of all examples."""
        generator = torch.Generator().manual_seed(1)
        whole = self.batch()
        student = torch.randn(self.logits.shape[1:], generator=generator)
        student = student[:, :1].expand_as(student) if self.alike else student
        hidden = torch.randn(len(whole.keys), 1, _WIDTH, generator=generator).expand(-1, whole.input_ids.shape[1], -1)
        gradients = (self.logits.detach() - student).flatten(1).double()[list(order)]  # [T,n]
        return Around(
            self.batch(order, rows),
            {**position_counts([whole]), **of.counts(whole)},
            step=3,
            student={"logits": DenseLogits(student[rows]), "hidden": hidden[rows]},
            gram=gradients @ gradients.t(),
            tokens=None if self.tokens is None else self.tokens[rows],
        )


def _teacher_bank() -> Iterator[Teachers]:
    """Classes, one number per example, tokens (one example without targets), at every scale, and equal teachers.

    Tokens also with every other one a target, while weights are read at all of them; once with equal positions.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, classes = torch.randint(11, (3, 6), generator=generator), torch.tensor([0, 2, 1, 2, NO_LABEL])
    tokens = tokens.masked_fill(~_MASK, NO_LABEL).index_fill(0, torch.tensor([1]), NO_LABEL)
    numbers = torch.tensor([0.5, -1.0, torch.nan])
    shapes = {"classes": (3, 5, 3), "numbers": (3, 3, 1), "tokens": (3, 3, 6, 11)}
    targets = {"classes": classes, "numbers": numbers, "tokens": tokens}
    for kind, shape in shapes.items():
        kind_targets = targets[kind]
        mask = ~kind_targets.isnan() if kind == "numbers" else kind_targets != NO_LABEL
        drawn = torch.randn(shape, generator=generator)
        scaled = {f"{kind} at scale {scale:g}": scale * drawn for scale in LOSS_SCALES}
        scaled[f"{kind} of equal teachers"] = drawn[:1].expand_as(drawn)
        for what, logits in scaled.items():
            for per in ("example", "token") if kind == "tokens" else ("example",):
                yield Teachers(f"{what} per {per}", logits, kind_targets, mask, per)
    sparse = tokens.masked_fill(torch.arange(6) % 2 == 1, NO_LABEL)
    drawn = 2 * torch.randn(3, 3, 6, 11, generator=generator)
    same = drawn[:, :, :1].expand_as(drawn), torch.where(sparse == NO_LABEL, NO_LABEL, sparse[:, :1])
    for per in ("example", "token"):
        yield Teachers(f"all tokens per {per}", drawn, sparse, sparse != NO_LABEL, per, _MASK)
        yield Teachers(f"equal tokens per {per}", same[0], same[1], same[1] != NO_LABEL, per, _MASK, alike=True)


def _made(
    spec: WeightingSpec, make: OptionsOf, case: Teachers, order: tuple[int, ...] = _ORDER, seed: int = 0
) -> Weighting:
    """A fresh weighting for the case; `seed` is of what its constructor draws."""
    names = tuple(_TEACHERS[k] for k in order)
    classes = 0 if case.targets.dim() == 2 else case.logits.shape[-1]
    facts = StageFacts(names, tuple(10 + 10 * k for k in order), _WIDTH, classes, seed=0)
    facts_of = {"teachers": names, "facts": facts}
    asked = [name for name in GIVEN if name in inspect.signature(spec.cls).parameters]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weighting: Weighting = spec.construct({**make(names), **{name: facts_of[name] for name in asked}})
        return weighting


def _trained(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> Weighting:
    """A weighting as it is after some steps: other parameters than it began with, and two rewards."""
    module = _made(spec, make, case)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for _ in range(2 if module.rewarded else 0):
        module(case.traits(_ORDER, module))
        module.reward(module.judged([torch.rand(len(case.targets), generator=generator)]))
    return module


def _weights(spec: WeightingSpec, make: OptionsOf, case: Teachers, order: tuple[int, ...] = _ORDER) -> Tensor:
    """The weights of a fresh weighting, [T,B,L]."""
    module = _made(spec, make, case, order)
    weights: Tensor = module(case.traits(order, module))
    return weights


def _reads_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """It reads the names that it declares; facts that a stage must prepare are named in any case."""
    module = _made(spec, make, case)
    traits = case.traits(_ORDER, module, all_names=True)
    module(traits)
    module.penalty(traits)
    if more := sorted(traits.names - module.may_read()):
        text = f"it reads {', '.join(more)}, which its `reads` does not name, for {case.what}"
        raise LawBroken("reads", spec.name, text)


def _values_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """[T,B,1] per example, [T,B,L] per token, float32; finite, non-negative, and of sum 1 where declared.

    Negative ones must be declared.
    """
    module = _made(spec, make, case)
    traits = case.traits(_ORDER, module)
    weights = module(traits)
    if weights.shape != traits.shape or weights.dtype != torch.float32:
        text = f"{list(weights.shape)} {weights.dtype} instead of {list(traits.shape)} float32"
        raise LawBroken("shape", spec.name, f"{text} for {case.what}")
    if not bool(weights.isfinite().all()):
        raise LawBroken("finite", spec.name, f"a weight is not finite for {case.what}")
    if not spec.negative and not bool((weights >= 0).all()):
        raise LawBroken("non-negative", spec.name, f"a weight of {float(weights.min())} for {case.what}")
    sums = weights.sum(0)
    if spec.sums_to_one and difference(sums, torch.ones_like(sums)) > TOLERANCE:
        text = f"weights sum to {float(sums.min())} .. {float(sums.max())}"
        raise LawBroken("sums to one", spec.name, f"{text} for {case.what}")


def _one_teacher_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """One teacher has weight 1 exactly: the path of several teachers is then bit-identical to that of one."""
    if not spec.sums_to_one:
        return
    weights = _weights(spec, make, case, (0,))
    if not torch.equal(weights, torch.ones_like(weights)):
        raise LawBroken("one teacher", spec.name, f"weights {weights.flatten()[:3].tolist()} for {case.what}")


def _order_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """Teachers in another order have the same weights in that order."""
    order = (2, 0, 1)
    weights, wanted = _weights(spec, make, case, order), _weights(spec, make, case)[list(order)]
    if difference(weights, wanted) > TOLERANCE:
        raise LawBroken("order", spec.name, f"weights follow the teachers' positions for {case.what}")


def _labels_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """A weighting that does not declare `needs_labels` gives the same weights for any labels."""
    if spec.needs_labels:
        return
    other = case.targets.flip(-1) + 1 if case.targets.is_floating_point() else (case.targets + 1) % 3
    relabelled = replace(case, targets=torch.where(case.mask, other, case.targets))
    if not torch.equal(_weights(spec, make, relabelled), _weights(spec, make, case)):
        raise LawBroken("labels", spec.name, f"labels change the weights for {case.what}, needs_labels is not declared")


def _detached_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """Weights require a gradient only of the weighting's own parameters, never of the teachers' logits."""
    logits = case.logits.clone().requires_grad_()
    module = _made(spec, make, case)
    weights = module(replace(case, logits=logits).traits(_ORDER, module))
    if not weights.requires_grad:
        return
    if not list(module.parameters()):
        raise LawBroken("detached", spec.name, f"weights require a gradient, but there are no parameters ({case.what})")
    if torch.autograd.grad(weights.sum(), logits, allow_unused=True)[0] is not None:
        raise LawBroken("detached", spec.name, f"a gradient reaches the teachers for {case.what}")


def _state_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """A fresh weighting that loads the state of a used one gives its weights, bit by bit."""
    used, fresh = _made(spec, make, case), _made(spec, make, case, seed=1)
    for _ in range(2):
        used(case.traits(_ORDER, used))
    for value in fresh.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value))
    fresh.load_state_dict(copy.deepcopy(used.state_dict()))
    if not torch.equal(fresh(case.traits(_ORDER, fresh)), used(case.traits(_ORDER, used))):
        raise LawBroken("state", spec.name, f"state_dict does not hold everything ({case.what})")


def _cut_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """An example has the same weights however the step is cut into micro-batches and ranks.

    So nothing is decided by one rank alone, and a batch statistic must come from `traits.around.counts` or a Gram.
    """
    module = _trained(spec, make, case)
    whole = module(case.traits(_ORDER, module)).detach()
    parts = [module(case.traits(_ORDER, module, rows)).detach() for rows in _CUTS]
    if difference(torch.cat(parts, 1), whole) > TOLERANCE:
        raise LawBroken("cut", spec.name, f"weights depend on the other examples of a micro-batch for {case.what}")


def _everywhere_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """A position has its weights whether it is a target or not: weights are read outside the targets too.

    Of an example whose positions are all the same, all have the same weights. Without `needs_labels` they are also
    those that the position would have as a target.
    """
    if case.tokens is None or case.per != "token":
        return
    weights = _weights(spec, make, case)
    if case.alike:
        first = weights[..., :1].expand_as(weights)
        if difference(weights.where(case.tokens, 0), first.where(case.tokens, 0)) > TOLERANCE:
            text = f"equal positions have other weights where there is no target ({case.what})"
            raise LawBroken("everywhere", spec.name, text)
    elif not spec.needs_labels:
        asked = replace(case, targets=case.targets.masked_fill(case.tokens, 1), mask=case.tokens)
        if difference(_weights(spec, make, asked).where(case.tokens, 0), weights.where(case.tokens, 0)) > TOLERANCE:
            text = f"a position has other weights when it is no target, and needs_labels is not declared ({case.what})"
            raise LawBroken("everywhere", spec.name, text)


def _penalty_law(spec: WeightingSpec, make: OptionsOf, case: Teachers) -> None:
    """The penalty of a step is the sum over its micro-batches; finite; its gradient stays within the weighting."""
    module = _trained(spec, make, case)
    logits = case.logits.clone().requires_grad_()
    penalties: list[Tensor | None] = []
    for rows in (_EVERY, *_CUTS):
        traits = replace(case, logits=logits).traits(_ORDER, module, rows)
        module(traits)
        penalties.append(module.penalty(traits))
    if penalties[0] is None:
        return
    values = [float(value.detach()) for value in penalties if value is not None]
    if not all(map(math.isfinite, values)):
        raise LawBroken("finite", spec.name, f"a penalty of {values[0]} for {case.what}")
    gap = abs(sum(values[1:]) - values[0])
    if len(values) != len(penalties) or gap > TOLERANCE * max(abs(values[0]), 1):
        text = f"{values[1:]} of the micro-batches do not add up to {values[0]} of the step for {case.what}"
        raise LawBroken("penalty", spec.name, text)
    if penalties[0].requires_grad and torch.autograd.grad(penalties[0], logits, allow_unused=True)[0] is not None:
        raise LawBroken("detached", spec.name, f"the penalty's gradient reaches the teachers for {case.what}")


WEIGHTING_LAWS = (
    _reads_law,
    _values_law,
    _one_teacher_law,
    _order_law,
    _labels_law,
    _detached_law,
    _state_law,
    _cut_law,
    _everywhere_law,
    _penalty_law,
)
