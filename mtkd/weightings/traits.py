"""Traits: facts about each teacher's prediction that a weighting may read. Nothing is computed that nobody reads.

Every trait is a tensor [T,B,L] in float32, detached: L = tokens with one weight per token, L = 1 with one weight per
example (then a token trait is its mean over the example's targets; 0 where an example has none).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from mtkd.features import Logits, SparseLogits

TraitFunction = Callable[[Tensor, Tensor | None], Tensor]
TRAITS: dict[str, TraitFunction] = {}


def trait(function: TraitFunction) -> TraitFunction:
    """Register ``(logits [n,V], labels [n] or None) -> [n]`` under its own name."""
    if function.__name__ in TRAITS:
        raise ValueError(f"trait {function.__name__!r} is already registered")
    TRAITS[function.__name__] = function
    return function


@trait
def ce(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Cross entropy of a teacher with the label, nats; squared error for a one-column output."""
    assert labels is not None
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels).square()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


@trait
def entropy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Entropy of a teacher's distribution at temperature 1, nats."""
    log_probs = torch.log_softmax(logits, -1)
    return -(log_probs.exp() * log_probs).sum(-1)


@trait
def confidence(logits: Tensor, labels: Tensor | None) -> Tensor:
    """A teacher's largest probability, 1/V to 1."""
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()


@trait
def margin(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Difference of a teacher's two largest probabilities, 0 to 1 (1 when there is only one column)."""
    if logits.shape[-1] == 1:
        return torch.ones_like(logits[:, 0])
    top = (logits.topk(2, -1).values - logits.logsumexp(-1, keepdim=True)).exp()
    return top[:, 0] - top[:, 1]


@trait
def choice(logits: Tensor, labels: Tensor | None) -> Tensor:
    """A teacher's most probable column, as a float (exact up to 16.7 million columns)."""
    return logits.argmax(-1).float()


@dataclass(frozen=True)
class Around:
    """What a weighting may know beside the teachers' predictions; what nobody reads is None.

    Attributes:
        ids: example numbers, [B]; -1 for filler rows.
        counts: positions of the whole optimizer step over all ranks: `tokens`, `targets`, `sequences`, and what the
            weighting's own `counts` adds.
        step: number of the optimizer step, from 0.
        student: the student's logits.
        pooled: mean of the student's last hidden states over unpadded tokens, detached, [B,H].
        routes: number of the teacher that the data names for each example, [B]; -1 in filler rows.
        gram: inner products of the teachers' loss gradients over the whole step, [T,T] float64; see `mtkd.gram`.
    """

    ids: Tensor
    counts: Mapping[str, int] = field(default_factory=dict)
    step: int = 0
    student: Logits | None = None
    pooled: Tensor | None = None
    routes: Tensor | None = None
    gram: Tensor | None = None


class Traits:
    """Lazy traits of one micro-batch.

    Args:
        logits: one `Logits` per teacher.
        targets: [B,L] or [B]; what `ce` is measured against.
        mask: positions that count, shaped like `targets`, bool.
        per: "example" or "token".
        tile: positions whose logits exist at one time.
        around: what else there is to know; by default the numbers of the rows.
    """

    def __init__(
        self,
        logits: Sequence[Logits],
        targets: Tensor,
        mask: Tensor,
        per: str,
        tile: int,
        around: Around | None = None,
    ) -> None:
        self.around = around or Around(torch.arange(len(mask), device=mask.device))
        self.per = per
        self.tile = tile
        self._logits = logits
        self._targets = targets
        self._mask = mask
        self._known: dict[str, Tensor] = {}
        self._known_positions: dict[str, Tensor] = {}

    @property
    def num_teachers(self) -> int:
        return len(self._logits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, B, L), L = 1 when there is one weight per example."""
        per_token = self.per == "token" and self._mask.dim() == 2
        return self.num_teachers, self._mask.shape[0], self._mask.shape[1] if per_token else 1

    def full(self, value: float) -> Tensor:
        """A constant, [T,B,L]."""
        return torch.full(self.shape, value, dtype=torch.float32, device=self._mask.device)

    @property
    def ce(self) -> Tensor:
        """Cross entropy with the labels, nats, [T,B,L]."""
        return self.read("ce")

    @property
    def entropy(self) -> Tensor:
        """Entropy of the teacher's distribution, nats, [T,B,L]."""
        return self.read("entropy")

    @property
    def confidence(self) -> Tensor:
        """Largest probability, [T,B,L]."""
        return self.read("confidence")

    @property
    def margin(self) -> Tensor:
        """Difference of the two largest probabilities, [T,B,L]."""
        return self.read("margin")

    @property
    def agreement(self) -> Tensor:
        """Share of the other teachers whose most probable column is the same, [T,B,L]; 1 for a single teacher."""
        if "agreement" not in self._known:
            choices = self.positions("choice")
            same = (choices[:, None] == choices[None]).float().sum(1) - 1
            others = max(self.num_teachers - 1, 1)
            values = same / others if self.num_teachers > 1 else torch.ones_like(same)
            # Choices are 0 at positions that do not count: teachers would seem to agree there.
            self._known["agreement"] = self._averaged(values.masked_fill(~self._counted("choice"), 0))
        return self._known["agreement"]

    def read(self, name: str) -> Tensor:
        """A registered trait by name, [T,B,L]."""
        if name not in self._known:
            self._known[name] = self._averaged(self.positions(name))
        return self._known[name]

    def positions(self, name: str) -> Tensor:
        """A registered trait at every position that counts, 0 elsewhere, [T,*targets.shape], whatever `per` is."""
        if name not in self._known_positions:
            self._known_positions[name] = torch.stack([self._of(logits, name) for logits in self._logits])
        return self._known_positions[name]

    @property
    def mask(self) -> Tensor:
        """Positions with a target, [B,L] or [B], bool."""
        return self._mask

    @property
    def real(self) -> Tensor:
        """Examples that are no filler, [B] bool."""
        return self.around.ids >= 0

    @property
    def share(self) -> float:
        """This micro-batch's share of the step's examples: over micro-batches and ranks it adds up to 1."""
        return int(self.real.sum()) / max(self.around.counts.get("sequences", 0), 1)

    @property
    def student_uncertainty(self) -> Tensor:
        """Entropy of the student's distribution as a share of the largest one, log V: 0 to 1, [B,L]; detached."""
        if "student_uncertainty" not in self._known:
            student = _given(self.around.student, "student_uncertainty")
            largest = math.log(max(student.num_columns, 2))
            values = self._averaged(self._of(student, "entropy")[None])[0] / largest
            self._known["student_uncertainty"] = values.clamp(0, 1)
        return self._known["student_uncertainty"]

    @property
    def student_loss(self) -> Tensor:
        """The student's mean loss on each example's labels before the step, [B]; 0 without labels; detached."""
        values = self._of(_given(self.around.student, "student_loss"), "ce")
        return values.sum(-1) / self._mask.sum(-1).clamp_min(1) if values.dim() == 2 else values

    @property
    def pooled(self) -> Tensor:
        """Mean of the student's last hidden states over an example's tokens, [B,H]; detached."""
        return _given(self.around.pooled, "pooled")

    @property
    def route(self) -> Tensor:
        """Number of the teacher that the data names for each example, [B]; -1 in filler rows."""
        return _given(self.around.routes, "route")

    @property
    def gram(self) -> Tensor:
        """Inner products of the teachers' loss gradients with respect to the student's logits, [T,T] float64.

        Of the whole optimizer step, all micro-batches and ranks together: the same for every micro-batch.
        """
        return _given(self.around.gram, "gram")

    @property
    @torch.no_grad()
    def class_probabilities(self) -> Tensor:
        """The teachers' probabilities of the classes, [T,B,C]; C = 0 for token tasks."""
        if self._mask.dim() == 2:
            return torch.zeros(self.num_teachers, len(self._mask), 0, device=self._mask.device)
        every = torch.arange(len(self._mask), device=self._mask.device)
        return torch.stack([torch.softmax(logits.rows(every), -1) for logits in self._logits])

    def _counted(self, name: str) -> Tensor:
        """Where a trait is computed: at targets; classes also without a label, which `ce` alone needs."""
        return self.real if name != "ce" and self._mask.dim() == 1 else self._mask

    @torch.no_grad()
    def _of(self, logits: Logits, name: str) -> Tensor:
        """A trait of some logits at every position that counts, 0 elsewhere, shaped like the targets."""
        function = TRAITS[name]
        index = self._counted(name).reshape(-1).nonzero().squeeze(-1)
        values = self._mask.new_zeros(self._mask.numel(), dtype=torch.float32)
        labels = self._targets.reshape(-1)
        if isinstance(logits, SparseLogits):
            values[index] = logits.trait(name, index).float()
            return values.reshape(self._mask.shape)
        for tile in index.split(self.tile):
            values[tile] = function(logits.rows(tile), labels[tile]).float()
        return values.reshape(self._mask.shape)

    def _averaged(self, values: Tensor) -> Tensor:
        if values.dim() == 2:
            return values[..., None]
        if self.per == "token":
            return values
        return (values.sum(-1) / self._mask.sum(-1).clamp_min(1))[..., None]


Given = TypeVar("Given")


def _given(value: Given | None, name: str) -> Given:
    if value is None:
        raise ValueError(f"'{name}' is not provided: a weighting names it in its attribute `reads`")
    return value
