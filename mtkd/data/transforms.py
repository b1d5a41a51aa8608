"""What a stage does to the micro-batches of a step, before its teachers read them and its positions are counted.

A transform is a function of a plug-in. `stages.NAME.transforms` names those of a stage; they run in that order:

    @mtkd.transform("shortened")
    def shortened(batches: list[Batch], at: StepFacts, *, tokens: int = 32) -> list[Batch]:

It gets this rank's micro-batches in main memory and gives back as many, none with more rows. It is a function of its
arguments alone: a resumed run calls it again for the same step, and must get the same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mtkd.data.batch import Batch, View
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
        # Copies: `batches` is what the result is compared with, so the function may change its list in place.
        own = [replace(batch) for batch in batches]
        after = spec.function(own, replace(facts, step=step), **setting.options)
        _check_batches(after, batches, facts.max_length, spec.name, where)
        return after

    return transformed


def _check_batches(after: object, before: Sequence[Batch], max_length: int, name: str, where: str) -> None:
    """Refuse what would stop other ranks, or fail far from here.

    Raises:
        UserError: another number of micro-batches (each one is a collective of all ranks), tensors that do not fit
            together, more rows or longer ones than the plan counted with, or a row without a token.
    """
    if not isinstance(after, list) or not all(isinstance(batch, Batch) for batch in after):
        raise UserError(f"transform '{name}' gives back no list of batches", where=where, found=type(after).__name__)
    if len(after) != len(before):
        raise UserError(
            f"transform '{name}' does not give back as many micro-batches as it gets",
            where=where,
            found=len(after),
            allowed=len(before),
        )
    for i, (batch, given) in enumerate(zip(after, before, strict=True)):
        fault = _fault(batch, given, max_length)
        if fault is not None:
            reason, found, allowed = fault
            raise UserError(
                f"transform '{name}' makes {reason}", where=where, found=f"batches[{i}].{found}", allowed=allowed
            )


_Fault = tuple[str, str, str]
"""What is wrong, what is there, and what is allowed."""


def _fault(batch: Batch, given: Batch, max_length: int) -> _Fault | None:
    """The first fault of a batch, its views included."""
    most = len(given.keys)
    if not isinstance(batch.keys, Tensor) or batch.keys.dim() != 1 or not 1 <= len(batch.keys) <= most:
        return "no rows, or more than the plan counted with", f"keys: {_form(batch.keys)}", f"int64, 1 to {most} rows"
    texts: dict[str, Batch | View] = {"": batch, **{f"views[{name!r}].": view for name, view in batch.views.items()}}
    faults = (_text_fault(text, place, len(batch.keys), given.targets, max_length) for place, text in texts.items())
    return next((fault for fault in faults if fault is not None), None)


def _text_fault(text: Batch | View, place: str, rows: int, targets: Tensor, max_length: int) -> _Fault | None:
    ids = getattr(text, "input_ids", None)  # None of a view of another type
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return "tensors that do not fit together", f"{place}input_ids: {_form(ids)}", f"int64 [{rows},tokens]"
    length = ids.shape[1]
    for field, allowed in _forms(rows, length, targets).items():
        x = getattr(text, field, None)
        absent = x is None and (field in _OPTIONAL or not hasattr(text, field))  # a view has no targets
        if _form(x) != allowed and not absent:
            return "tensors that do not fit together", f"{place}{field}: {_form(x)}", allowed
    if length > max_length:
        allowed = f"{max_length}, data.NAME.max_length"
        return "rows longer than the plan counted with", f"{place}input_ids: {length} tokens", allowed
    empty = (~text.attention_mask.any(1)).nonzero().flatten().tolist()
    if empty:
        return "a row without a token", f"{place}attention_mask: none True in row {empty[0]}", "one True at least"
    return None


_OPTIONAL = {field.name for field in fields(Batch) if field.default is None}


def _forms(rows: int, length: int, targets: Tensor) -> dict[str, str]:
    """Type and shape of each tensor of a batch with so many rows and tokens.

    Args:
        targets: those that the transform got: one a token, or one a row.
    """
    row, token = f"int64 [{rows}]", f"int64 [{rows},{length}]"
    kind, _ = _form(targets).split()
    return {
        "input_ids": token,
        "attention_mask": f"bool [{rows},{length}]",
        "targets": f"{kind} [{rows},{length}]" if targets.dim() == 2 else f"{kind} [{rows}]",
        "token_type_ids": token,
        "position_ids": f"int64 [{rows},2,{length}]",
        "written": f"bool [{rows}]",
        "behaviour": f"float32 [{rows},{length}]",
        **dict.fromkeys(("keys", "nsp_targets", "routes", "sep", "origin"), row),
    }


def _form(x: object) -> str:
    """Type and shape of a tensor: ``int64 [8,32]``."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return f"{str(x.dtype).removeprefix('torch.')} [{','.join(map(str, x.shape))}]"
