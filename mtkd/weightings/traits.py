"""Traits: facts about each teacher's prediction that a weighting may read. Nothing is computed that nobody reads.

Every trait is a tensor [T,B,L] in float32, detached: L = tokens with one weight per token, L = 1 with one weight per
example (then a token trait is its mean over the example's targets).

A trait exists wherever a weight is read, not at targets alone: a row over all positions, or on hidden states, reads
weights at every token. A trait that needs no label is computed there too; one that does, such as `ce`, has the
example's mean. So has every trait where a teacher is cached, since a cache knows targets only. In an example without
any target the first kind is the mean over its tokens; `ce` is that of guessing, log V, for all teachers alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from mtkd.models.features import Logits, SparseLogits
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.registry import note_everywhere

TraitFunction = Callable[[Tensor, Tensor | None], Tensor]
"""``(logits [n,V], labels [n] or None) -> [n]``."""

TRAITS: dict[str, TraitFunction] = {}


def trait(function: TraitFunction) -> TraitFunction:
    """Register ``(logits [n,V], labels [n] or None) -> [n]`` under its own name.

    One that needs labels raises where they are None. It is then computed at positions with a label only.
    """
    if function.__name__ in TRAITS:
        raise ValueError(f"trait {function.__name__!r} is already registered")
    TRAITS[function.__name__] = function
    note_everywhere()
    return function


@cache
def reads_labels(function: TraitFunction) -> bool:
    """Whether a trait cannot be told without labels: it is asked once for one position that has none."""
    try:
        function(torch.zeros(1, 2, device="cpu"), None)
    except Exception:  # a trait of a user's own may refuse in any way
        return True
    return False


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
        keys: what the rows are called where something is drawn, [B]; -1 in filler rows. See `Batch.keys`.
        counts: positions of the whole optimizer step over all ranks: `tokens`, `targets`, `sequences`, and what the
            weighting's own `counts` adds.
        step: number of the optimizer step, from 0.
        student: the student's logits.
        pooled: mean of the student's last hidden states over unpadded tokens, detached, [B,H].
        routes: number of the teacher that the data names for each example, [B]; -1 in filler rows.
        gram: inner products of the teachers' loss gradients over a step, [T,T] float64; see `mtkd.objective.gram`.
        tokens: where weights are read, [B,L] bool, where that is more than the targets; None: at targets alone.
    """

    keys: Tensor
    counts: Mapping[str, int] = field(default_factory=dict)
    step: int = 0
    student: Logits | None = None
    pooled: Tensor | None = None
    routes: Tensor | None = None
    gram: Tensor | None = None
    tokens: Tensor | None = None


class Traits:
    """Lazy traits of one micro-batch.

    Args:
        logits: one `Logits` per teacher.
        targets: [B,L] or [B]; what `ce` is measured against.
        mask: positions that count, shaped like `targets`, bool.
        per: "example" or "token".
        tile: positions whose logits exist at one time.
        around: what else there is to know; by default the numbers of the rows.
        pieces: how positions are cut into tiles.
    """

    def __init__(
        self,
        logits: Sequence[Logits],
        targets: Tensor,
        mask: Tensor,
        per: str,
        tile: int,
        around: Around | None = None,
        pieces: Pieces = EVERY_PIECE,
    ) -> None:
        self.around = around or Around(torch.arange(len(mask), device=mask.device))
        self.per = per
        self.tile = tile
        self._pieces = pieces
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
            choices = self._computed("choice")
            same = (choices[:, None] == choices[None]).float().sum(1) - 1
            others = max(self.num_teachers - 1, 1)
            values = same / others if self.num_teachers > 1 else torch.ones_like(same)
            # Choices are 0 at positions that do not count: teachers would seem to agree there.
            known = self._where("choice")
            self._known["agreement"] = self._averaged(self._filled(values.masked_fill(~known, 0), known), known)
        return self._known["agreement"]

    def read(self, name: str) -> Tensor:
        """A registered trait by name, [T,B,L]."""
        if name not in self._known:
            self._known[name] = self._averaged(self.positions(name), self._where(name))
        return self._known[name]

    def positions(self, name: str) -> Tensor:
        """A registered trait wherever a weight is read, 0 elsewhere, [T,*targets.shape], whatever `per` is."""
        if name not in self._known_positions:
            unknown = math.log(max(self._logits[0].num_columns, 1)) if name == "ce" else 0.0
            values = self._filled(self._computed(name), self._where(name), unknown)
            self._known_positions[name] = values
        return self._known_positions[name]

    @property
    def mask(self) -> Tensor:
        """Positions with a target, [B,L] or [B], bool."""
        return self._mask

    @property
    def real(self) -> Tensor:
        """Examples that are no filler, [B] bool."""
        return self.around.keys >= 0

    @property
    def sound(self) -> Tensor:
        """Whether all that was read so far is finite, [] bool."""
        read = [*self._known.values(), *self._known_positions.values(), self.around.gram, self.around.pooled]
        known = [values.isfinite().all().to(self._mask.device) for values in read if values is not None]
        return torch.stack(known).all() if known else self._mask.new_ones(())

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
            known = self._where("entropy", cached=isinstance(student, SparseLogits))
            values = self._averaged(self._filled(self._of(student, "entropy", known)[None], known), known)[0] / largest
            self._known["student_uncertainty"] = values.clamp(0, 1)
        return self._known["student_uncertainty"]

    @property
    def student_loss(self) -> Tensor:
        """The student's mean loss on each example's labels before the step, [B]; 0 without labels; detached."""
        values = self._of(_given(self.around.student, "student_loss"), "ce", self._mask)
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

    def _where(self, name: str, cached: bool | None = None) -> Tensor:
        """Where a trait is computed, shaped like the targets.

        Args: cached: nothing is known but at targets; by default, whether any teacher is cached: the others' traits are
            then compared with those of a cache.
        """
        if reads_labels(TRAITS[name]):
            return self._mask
        if self._mask.dim() == 1:
            return self.real
        cached = any(isinstance(x, SparseLogits) for x in self._logits) if cached is None else cached
        if self.around.tokens is None or cached:
            return self._mask
        if self.per == "token":
            return self._mask | self.around.tokens
        return self._mask | (self.around.tokens & ~self._mask.any(-1, keepdim=True))

    def _computed(self, name: str) -> Tensor:
        """A trait of every teacher where it is computed, 0 elsewhere, [T,*targets.shape]."""
        return torch.stack([self._of(logits, name, self._where(name)) for logits in self._logits])

    @torch.no_grad()
    def _of(self, logits: Logits, name: str, where: Tensor) -> Tensor:
        """A trait of some logits at the positions `where`, 0 elsewhere, shaped like the targets."""
        function = TRAITS[name]
        index = where.reshape(-1).nonzero().squeeze(-1)
        values = self._mask.new_zeros(self._mask.numel(), dtype=torch.float32)
        labels = self._targets.reshape(-1)
        if isinstance(logits, SparseLogits):
            values[index] = logits.trait(name, index).float()
            return values.reshape(self._mask.shape)
        for piece in self._pieces.of(len(index), self.tile):
            tile = index[piece]
            values[tile] = function(logits.rows(tile), labels[tile]).float()
        return values.reshape(self._mask.shape)

    def _filled(self, values: Tensor, known: Tensor, unknown: float = 0.0) -> Tensor:
        """[T,*targets.shape] with the example's mean where a weight is read and nothing is known.

        Args: unknown: what stands where nothing is known in the whole example.
        """
        if values.dim() == 2:
            return values.masked_fill(self.real & ~known, unknown)
        if self.around.tokens is None:
            return values
        means = self._mean(values, known).masked_fill(~known.any(-1), unknown)
        return torch.where(self.around.tokens & ~known, means[..., None], values)

    def _averaged(self, values: Tensor, known: Tensor) -> Tensor:
        """[T,B,L] of a filled trait: per example its mean over the targets, or over what is known without any."""
        if values.dim() == 2:
            return values[..., None]
        if self.per == "token":
            return values
        counted = known if self.around.tokens is None else known | (self.around.tokens & ~known.any(-1, keepdim=True))
        return self._mean(values, counted)[..., None]

    @staticmethod
    def _mean(values: Tensor, where: Tensor) -> Tensor:
        """Per example over the positions `where`, [T,B]; 0 of none."""
        return (values * where).sum(-1) / where.sum(-1).clamp_min(1)


Given = TypeVar("Given")


def _given(value: Given | None, name: str) -> Given:
    if value is None:
        raise ValueError(f"'{name}' is not provided: a weighting names it in its attribute `reads`")
    return value
