"""What a stage does to the micro-batches of a step, before its teachers read them and its positions are counted.

A transform is a function of a plug-in. `stages.NAME.transforms` names those of a stage; they run in that order:

    @mtkd.transform("shortened")
    def shortened(batches: list[Batch], at: StepFacts, *, tokens: int = 32) -> list[Batch]:

It gets this rank's micro-batches in main memory and gives back as many. It is a function of its arguments alone: a
resumed run calls it again for the same step, and must get the same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.registry import Decorated, Registry, check_options, keyword_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.config import Named
    from mtkd.data.split import Split

Transform = Callable[[list[Batch], int], list[Batch]]
"""Micro-batches of a rank and the number of the optimizer step, from 0 -> as many micro-batches."""


@dataclass(frozen=True)
class StepFacts:
    """What a transform may know.

    Attributes:
        step: number of the optimizer step, from 0.
        seed: of the stage; draws are functions of it, of `step` and of `Batch.keys`, the same on any number of ranks.
        tokenizer: of the run.
        split: that the stage trains on; ``split.document_names[batch.origin[b]]`` names the document of row b.
        max_length: most tokens of a row.
    """

    step: int
    seed: int
    tokenizer: PreTrainedTokenizerBase
    split: Split
    max_length: int


@dataclass(frozen=True)
class TransformSpec:
    """A registered transform."""

    name: str
    function: Callable[..., list[Batch]]

    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters that a stage may set."""
        return keyword_parameters(self.function)

    def check(self, options: Mapping[str, Any], where: str) -> None:
        """Refuse options that it does not have.

        Raises:
            UserError: naming the option.
        """
        check_options(options, self.options(), where)


TRANSFORMS: Registry[TransformSpec] = Registry("transform", "mtkd.data.transforms")


def transform(name: str) -> Callable[[Decorated], Decorated]:
    """Register a function ``(batches, at, *, options) -> batches`` under `name`."""

    def decorate(function: Decorated) -> Decorated:
        TRANSFORMS.add(name, TransformSpec(name, function))
        return function

    return decorate


def make_transforms(settings: Sequence[Named], facts: StepFacts, where: str) -> tuple[Transform, ...]:
    """The transforms of a stage, in order; what each gives back is checked.

    Args:
        facts: of any step.
        where: the stage's list of them.
    """
    return tuple(_made(setting, facts, f"{where}[{i}]") for i, setting in enumerate(settings))


def _made(setting: Named, facts: StepFacts, where: str) -> Transform:
    spec = TRANSFORMS.find(setting.name, f"{where}.name")

    def transformed(batches: list[Batch], step: int) -> list[Batch]:
        after = spec.function(batches, replace(facts, step=step), **setting.options)
        _check_batches(after, batches, facts.max_length, where)
        return after

    return transformed


def _check_batches(after: object, before: Sequence[Batch], max_length: int, where: str) -> None:
    """Refuse what would stop other ranks, or fail far from here.

    Raises:
        UserError: another number of micro-batches (each one is a collective of all ranks), or shapes that do not fit.
    """
    if not isinstance(after, list) or not all(isinstance(batch, Batch) for batch in after):
        raise UserError("a transform gives back a list of batches", where=where, found=type(after).__name__)
    if len(after) != len(before):
        raise UserError(
            "a transform gives back as many micro-batches as it gets",
            where=where,
            found=len(after),
            allowed=len(before),
        )
    for batch in after:
        rows, length = batch.input_ids.shape
        shapes = {"attention_mask": batch.attention_mask, "token_type_ids": batch.token_type_ids}
        wrong = [name for name, x in shapes.items() if x is not None and x.shape != batch.input_ids.shape]
        each = {"keys": batch.keys, "origin": batch.origin, "routes": batch.routes, "nsp_targets": batch.nsp_targets}
        wrong += [name for name, x in each.items() if x is not None and x.shape != (rows,)]
        wrong += [] if batch.targets.shape in ((rows,), (rows, length)) else ["targets"]
        wrong += [f"views[{name!r}]" for name, view in batch.views.items() if len(view.input_ids) != rows]
        if wrong:
            raise UserError(
                "the tensors of a batch do not fit together",
                where=where,
                found=", ".join(wrong),
                allowed=f"{rows} rows of {length} tokens, as input_ids has",
            )
        if length > max_length:
            raise UserError(
                "a transform made rows longer than the plan counted with",
                where=where,
                found=f"{length} tokens",
                allowed=f"{max_length}, data.NAME.max_length",
            )
