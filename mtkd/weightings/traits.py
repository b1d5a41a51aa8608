"""Traits of the teachers' predictions, and facts besides them, as a weighting reads them.

Nothing is computed before it is read. `TRAITS` and `FACTS` (see `mtkd.weightings.facts`) are the two tables of names.

Every trait is a tensor [T,B,L] in float32, detached: L = tokens with one weight per token, L = 1 with one weight per
example (then a token trait is its mean over the example's targets).

A trait exists wherever a weight is read, not at targets alone: a row over all positions, or on hidden states, reads
weights at every token. A trait that needs no label is computed there too; one that does, such as `ce`, has the
example's mean. So has every trait where a teacher is cached, since a cache knows targets only. In an example without
any target the first kind is the mean over its tokens; `ce` is that of guessing, log V, for all teachers alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.data.device import moved
from mtkd.errors import UserError, nearest
from mtkd.models.features import Features, Logits, SparseLogits
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
    """Whether a trait needs labels: it is asked once for one position that has none."""
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
def energy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Log of the sum of exp of a teacher's logits, nats: minus its free energy, high where it has seen such examples.

    Over the classes alone: an output `other` is not a part of it. Of one column it is that number.
    """
    return logits.logsumexp(-1)


@trait
def choice(logits: Tensor, labels: Tensor | None) -> Tensor:
    """A teacher's most probable column, as a float (exact up to 16.7 million columns)."""
    return logits.argmax(-1).float()


@dataclass(frozen=True)
class Around:
    """A micro-batch and its step: what facts are made of.

    Attributes:
        batch: the micro-batch; its targets number the columns of the logits.
        counts: positions of the whole optimizer step over all ranks: `tokens`, `targets`, `sequences`, and what the
            weighting's own `counts` adds.
        step: number of the optimizer step, from 0.
        student: the features of the student that the facts ask for: `logits`; `hidden`, the last layer's [B,L,H].
        gram: inner products of the teachers' loss gradients over a step, [T,T] float64; see `mtkd.objective.gram`.
        tokens: where weights are read, [B,L] bool, where that is more than the targets; None: at targets alone.
    """

    batch: Batch
    counts: Mapping[str, int] = field(default_factory=dict)
    step: int = 0
    student: Features = field(default_factory=dict)
    gram: Tensor | None = None
    tokens: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Names of the rows for draws, [B] int64; -1 in filler rows. See `Batch.keys`."""
        return self.batch.keys


@dataclass(frozen=True)
class Fact:
    """Something that a weighting may read besides single traits.

    Attributes:
        function: its value; called at most once per micro-batch, without gradients.
        student: features of the student that it is made of; see `Around.student`.
        traits: of the teachers that it is made of.
        teachers: it is made of the teachers' predictions.
        prepared: the stage prepares it (a column of the data, a pass before the step), so it must be asked for.
        text: it is made of what the teachers, causal language models, say of the text itself. A cache must hold it by
            its own name.
    """

    function: Callable[[Traits], Tensor]
    student: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()
    teachers: bool = False
    prepared: bool = False
    text: bool = False

    @property
    def asked(self) -> bool:
        """Whether a weighting must name it before the step; the others cost nothing until they are read."""
        return self.prepared or bool(self.student)

    @property
    def own(self) -> bool:
        """Whether a user wrote it."""
        return not self.function.__module__.startswith("mtkd.")


FACTS: dict[str, Fact] = {}


def fact(
    *,
    student: tuple[str, ...] = (),
    traits: tuple[str, ...] = (),
    teachers: bool = False,
    prepared: bool = False,
    text: bool = False,
) -> Callable[[Callable[[Traits], Tensor]], Callable[[Traits], Tensor]]:
    """Register ``(traits) -> Tensor`` under its own name; see `Fact` for the flags."""

    def decorate(function: Callable[[Traits], Tensor]) -> Callable[[Traits], Tensor]:
        if function.__name__ in FACTS or function.__name__ in TRAITS:
            raise ValueError(f"fact {function.__name__!r} is already registered")
        FACTS[function.__name__] = Fact(function, student, traits, teachers, prepared, text)
        note_everywhere()
        return function

    return decorate


class _Named:
    """An attribute that reads the trait or fact of its own name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, traits: Traits, owner: type) -> Tensor:
        return traits.read(self._name)


class Traits:
    """Lazy traits and facts of one micro-batch, each computed when it is first read.

    Args:
        logits: one `Logits` per teacher.
        around: the micro-batch, its step and its student.
        per: "example" or "token".
        tile: positions whose logits exist at one time.
        pieces: how positions are cut into tiles.
        reads: the names that may be read; None: all.

    Attributes, each a shortcut for `read`: per trait [T,B,L]; facts have shapes of their own (`mtkd.weightings.facts`).
    """

    ce, entropy, confidence, margin, agreement = _Named(), _Named(), _Named(), _Named(), _Named()
    student_uncertainty, student_loss, pooled = _Named(), _Named(), _Named()
    route, gram, class_probabilities = _Named(), _Named(), _Named()
    own_mass, energy, token_log_probs = _Named(), _Named(), _Named()

    def __init__(
        self,
        logits: Sequence[Logits],
        around: Around,
        per: str,
        tile: int,
        pieces: Pieces = EVERY_PIECE,
        reads: Collection[str] | None = None,
    ) -> None:
        self.logits, self.around, self.per, self.tile = logits, around, per, tile
        self.names: set[str] = set()  # what was read so far
        self.pieces, self._allowed = pieces, reads
        self._mask = around.batch.target_mask
        self._known: dict[str, Tensor] = {}
        self._known_positions: dict[str, Tensor] = {}
        self._places: dict[str, tuple[Tensor, Tensor]] = {}  # a mask of `where` and its positions

    @property
    def num_teachers(self) -> int:
        return len(self.logits)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, B, L), L = 1 when there is one weight per example."""
        per_token = self.per == "token" and self._mask.dim() == 2
        return self.num_teachers, self._mask.shape[0], self._mask.shape[1] if per_token else 1

    @property
    def mask(self) -> Tensor:
        """Positions with a target, [B,L] or [B], bool."""
        return self._mask

    @property
    def real(self) -> Tensor:
        """Examples that are no filler, [B] bool."""
        return self.around.batch.real

    @property
    def share(self) -> float:
        """This micro-batch's share of the step's examples: over micro-batches and ranks it adds up to 1."""
        return int(self.around.batch.on_host.real.sum()) / max(self.around.counts.get("sequences", 0), 1)

    @property
    def sound(self) -> Tensor:
        """Whether all that was read so far is finite but for a user's facts, [] bool.

        Such a fact may be at fault itself: then the weighting that reads it is to blame, not the teachers.
        """
        known = [values for name, values in self._known.items() if name not in FACTS or not FACTS[name].own]
        read = [*known, *self._known_positions.values()]
        finite = [moved(values.isfinite().all(), self._mask.device) for values in read]
        return torch.stack(finite).all() if finite else self._mask.new_ones(())

    def full(self, value: float) -> Tensor:
        """A constant, [T,B,L]."""
        return torch.full(self.shape, value, dtype=torch.float32, device=self._mask.device)

    def read(self, name: str) -> Tensor:
        """A trait, [T,B,L], or a fact.

        Raises:
            UserError: there is none of this name, or the weighting does not declare that it reads it.
        """
        self._note(name)
        if name not in self._known:
            if name in FACTS:
                with torch.no_grad():
                    self._known[name] = FACTS[name].function(self)
            else:
                self._known[name] = self.averaged(self.positions(name), self.where(name))
        return self._known[name]

    def positions(self, name: str) -> Tensor:
        """A trait wherever a weight is read, 0 elsewhere, [T,*targets.shape], for both values of `per`."""
        self._note(name)
        if name not in self._known_positions:
            # An example without any label: every teacher is as wrong as a guess among V columns.
            unknown = math.log(max(self.logits[0].num_columns, 1)) if name == "ce" else 0.0
            self._known_positions[name] = self.filled(self.computed(name), self.where(name), unknown)
        return self._known_positions[name]

    def _note(self, name: str) -> None:
        if name not in TRAITS and name not in FACTS:
            known = [*TRAITS, *FACTS]
            raise UserError("there is no trait or fact of this name", where="@stage.weighting", found=name,
                            allowed=sorted(known), todo=nearest(name, known))  # fmt: skip
        if self._allowed is not None and name not in self._allowed:
            raise undeclared(name, self._allowed, "@stage.weighting")
        self.names.add(name)

    def where(self, name: str, cached: bool | None = None) -> Tensor:
        """Where a trait is computed, [*targets.shape] bool.

        Args:
            cached: nothing is known but at targets. By default, whether any teacher is cached: the others' traits are
                then compared with those of a cache.
        """
        if reads_labels(TRAITS[name]):
            return self._place("targets")[0]
        if self._mask.dim() == 1:
            return self._place("examples")[0]
        cached = any(isinstance(x, SparseLogits) for x in self.logits) if cached is None else cached
        if self.around.tokens is None or cached:
            return self._place("targets")[0]
        return self._place("tokens" if self.per == "token" else "tokens or targets")[0]

    def _place(self, kind: str) -> tuple[Tensor, Tensor]:
        """A mask, [*targets.shape] bool, and the flat positions where it holds, [n]; nothing waits for the device."""

        def mask(batch: Batch) -> Tensor:
            targets = self._mask if batch is self.around.batch else batch.target_mask
            tokens = self.around.tokens if batch is self.around.batch else batch.token_mask
            if kind == "examples":
                return batch.real
            if kind == "targets" or tokens is None:
                return targets
            return targets | tokens if kind == "tokens" else targets | (tokens & ~targets.any(-1, keepdim=True))

        if kind not in self._places:
            self._places[kind] = mask(self.around.batch), self.around.batch.where(mask)
        return self._places[kind]

    def computed(self, name: str) -> Tensor:
        """A trait of every teacher where it is computed, 0 elsewhere, [T,*targets.shape]."""
        return torch.stack([self.of(logits, name, self.where(name)) for logits in self.logits])

    @torch.no_grad()
    def of(self, logits: Logits, name: str, where: Tensor) -> Tensor:
        """A trait of some logits at the positions `where`, 0 elsewhere, [*targets.shape] float32.

        Args:
            where: `mask` or a result of `where`; the positions of any other mask are asked of the device.
        """
        known = [self._place("targets") if where is self._mask else (None, None), *self._places.values()]
        found = [index for mask, index in known if mask is where and index is not None]
        index = found[0] if found else where.reshape(-1).nonzero().squeeze(-1)  # [n]
        values = self._mask.new_zeros(self._mask.numel(), dtype=torch.float32)  # [B*L] or [B]
        if isinstance(logits, SparseLogits):
            values[index] = logits.trait(name, index).float()
            return values.reshape(self._mask.shape)
        labels = self.around.batch.targets.reshape(-1)
        # A tile of [tile,V] at a time: all positions of a vocabulary would be the largest tensor of the step.
        for piece in self.pieces.of(len(index), self.tile):
            tile = index[piece]
            values[tile] = TRAITS[name](logits.rows(tile), labels[tile]).float()
        return values.reshape(self._mask.shape)

    def filled(self, values: Tensor, known: Tensor, unknown: float = 0.0) -> Tensor:
        """`values` [T,*targets.shape] with the example's mean where a weight is read and nothing is known.

        Args:
            unknown: stands where nothing is known in the whole example.
        """
        if values.dim() == 2:
            return values.masked_fill(self.real & ~known, unknown)
        if self.around.tokens is None:
            return values
        means = self._mean(values, known).masked_fill(~known.any(-1), unknown)  # [T,B]
        return torch.where(self.around.tokens & ~known, means[..., None], values)

    def averaged(self, values: Tensor, known: Tensor) -> Tensor:
        """[T,B,L] of filled values: per example the mean over its targets, or over what is known without any."""
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


def undeclared(name: str, declared: Collection[str], where: str) -> UserError:
    """The error for a weighting that reads a name outside its declaration."""
    return UserError(
        f"the weighting reads '{name}' and does not declare it",
        where=where,
        found=name,
        allowed=sorted(declared) or "nothing",
        todo=f"add it to the decorator: @mtkd.weighting(..., reads=('{name}', ...)); where that has no `reads`, "
        f"add it to the class: reads = frozenset({{'{name}', ...}})",
    )
