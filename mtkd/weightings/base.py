"""The base class of every weighting, built-in or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.weightings.traits import FACTS, TRAITS, Traits

ReadsRule = Callable[[Mapping[str, Any], int], Collection[str]]
"""``(options, number of teachers) -> names`` of `TRAITS` and `FACTS`, for a weighting that does not always read all.

Options that are left out are absent; of a weighting that Python code makes directly none is known.
"""


def names_of(asks: Collection[str] | ReadsRule, options: Mapping[str, Any], num_teachers: int) -> frozenset[str]:
    """The names that a declaration gives with these options."""
    return frozenset(asks(options, num_teachers) if callable(asks) else asks)


@dataclass(frozen=True)
class StageFacts:
    """The facts of a stage that a weighting may know before the first batch.

    Attributes:
        teachers: names, in pool order.
        sizes: their parameter counts.
        width: of the student's hidden states.
        classes: columns of a classifier's logits; 0 for token tasks.
        seed: of the stage.
    """

    teachers: tuple[str, ...]
    sizes: tuple[int, ...]
    width: int
    classes: int
    seed: int

    @classmethod
    def stand_in(cls, teachers: tuple[str, ...]) -> StageFacts:
        """For trying a weighting before any model is known."""
        return cls(teachers, (1,) * len(teachers), width=1, classes=0, seed=0)


class Weighting(nn.Module):
    """Maps facts about the teachers on a batch to their weights.

    A subclass implements `forward(traits) -> [T,B,L]`, where L is 1 for one weight per example. The constructor's
    parameters are the options of the YAML; one called `teachers` receives the teachers' names instead, and one called
    `facts` the `StageFacts`. Parameters and buffers are trained, sharded and saved with the student, because the
    weighting is a part of the objective.

    What it reads is declared in the decorator, `@mtkd.weighting("name", reads=("ce", "pooled"))`: names of traits and
    facts (`mtkd.weightings.facts`). Without that, the plan runs it once on made-up teachers and notes which traits it
    reads; facts that the stage must prepare are then named in the attribute `reads`, or declared by a class that it
    extends.

    Attributes, set by a subclass (or by its constructor, where they depend on options):
        reads: the facts that the stage prepares for it; not looked at where the decorator declares what it reads.
        per_token: False: `per: token` is refused, because a weight per token is not defined.
        lr: peak learning rate of its own parameters, on the stage's schedule; None: the optimizer's.
        after_prompt: under `per: example` its weights are those after the prompt; the plan refuses texts without one.
        rewarded: after every optimizer step `judged` and `reward` are called.
        sums_to_one, negative, needs_labels: over the teachers its weights sum to 1 (a constructor may say so, where it
            depends on options); they may be negative, or depend on labels. From the decorator's flags of these names.

        only_losses: losses that its weighted rows may have; none named: any.

    Attributes that mtkd sets:
        declared_reads: `reads` of the decorator of this class, or of the nearest one that it extends.
        declared_per_token: likewise its `per_token`.
        served_names: the result of `may_read`; None of an instance that Python code makes directly.
    """

    reads: frozenset[str] = frozenset()
    per_token: bool = True
    lr: float | None = None
    after_prompt: bool = False
    rewarded: bool = False
    sums_to_one: bool = True
    negative: bool = False
    needs_labels: bool = False
    only_losses: ClassVar[frozenset[str]] = frozenset()
    declared_reads: ClassVar[Collection[str] | ReadsRule | None] = None
    declared_per_token: ClassVar[Callable[[Mapping[str, Any]], bool] | None] = None
    served_names: frozenset[str] | None = None

    def may_read(self, options: Mapping[str, Any] | None = None) -> frozenset[str]:
        """The names that training serves.

        Without a declaration of its own these are `reads`, what the classes that it extends declare, and all that
        costs nothing before the step: a trial may have missed a trait.
        """
        if self.served_names is not None:
            return self.served_names
        inherited = names_of(type(self).declared_reads or (), options or {}, 2)  # one alone reads no more than two
        free = {name for name, fact in FACTS.items() if not fact.asked}
        return frozenset(self.reads) | inherited | TRAITS.keys() | free

    def forward(self, traits: Traits) -> Tensor:
        """Weights, [T,B,L], float32, finite, not all 0; non-negative unless declared."""
        raise NotImplementedError

    def penalty(self, traits: Traits) -> Tensor | None:
        """A scalar that learned and reinforced weightings add to the loss of a micro-batch, or None; after `forward`.

        Over the micro-batches and ranks of a step it must add up to the step's value: a sum over examples is divided
        by a number of `traits.counts`, a number that does not depend on the batch is multiplied with `traits.share`.
        """
        return None

    def counts(self, batch: Batch) -> Mapping[str, int]:
        """Numbers to be summed over the micro-batches and ranks of a step; `traits.counts` then has the sums."""
        return {}

    def judged(self, losses: Sequence[Tensor]) -> Tensor:
        """This rank's reward for one step, flattened; summed over ranks, then given to `reward`.

        Args:
            losses: per micro-batch, in the order of `forward`, the student's mean loss on each example's labels *after*
                the step, [B]; 0 where an example has none.
        """
        raise NotImplementedError

    def reward(self, total: Tensor) -> None:
        """Learn from a step: the sum of `judged` over ranks."""
        raise NotImplementedError
