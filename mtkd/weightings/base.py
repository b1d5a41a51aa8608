"""The base class of every weighting, built-in or a user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.weightings.traits import Traits


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
    reads; facts that the stage must prepare are then named in the attribute `reads`.

    Attributes, set by a subclass (or by its constructor, where they depend on options):
        reads: the names that it may read; the decorator's, where it declares them.
        per_token: False: `per: token` is refused, because a weight per token is not defined.
        lr: peak learning rate of its own parameters, on the stage's schedule; None: the optimizer's.
        rewarded: after every optimizer step `judged` and `reward` are called.
        negative: its weights may be negative; set from the decorator's flag of this name.
    """

    reads: frozenset[str] = frozenset()
    per_token: bool = True
    lr: float | None = None
    rewarded: bool = False
    negative: bool = False

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
