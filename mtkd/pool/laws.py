"""Laws of a plug-in's teacher: shape, finite numbers, a batch that stays as it is, the same answer twice, the order and
the cut of a batch, padding, no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.data.tokenizers import num_real_ids, train_tokenizer
from mtkd.errors import LawBroken, UserError
from mtkd.models.features import LAYERED
from mtkd.pool.backend import BACKENDS
from mtkd.pool.own import BatchChanged, Own, PluggedTeacher, TeacherFacts

TOLERANCE = 1e-4
"""Relative, of float32: for another shape of batch other kernels sum some hundred products in another order."""

_TEXTS = ("a teacher says much", "a student", "one word follows another one", "then")
_CLASSES = ("negative", "neutral", "positive")
_VOCABULARY = 300  # ids of the stand-in tokenizer: 256 bytes, special ones, and some merges


def check_teacher(teacher: str | Own, options: Mapping[str, Any] | None = None, *, folder: Path | None = None) -> None:
    """Every law of a teacher, for token tasks and for classes.

    A constructor that raises a ValueError does not answer for one of the two; it must for the other.

    Args:
        folder: of the model that it reads, for `TeacherFacts.folder`.
    Raises:
        LawBroken: at the first law that it does not keep.
        UserError: its constructor refuses both, or it needs a model and has no folder.
    """
    spec = BACKENDS.find(teacher) if isinstance(teacher, str) else teacher
    assert isinstance(spec, Own), "a built-in backend runs a model"
    if spec.needs_model and folder is None:
        where, todo = f"teacher '{spec.name}'", f'mtkd.check_teacher("{spec.name}", folder=PATH)'
        raise UserError("it reads a model, and there is no folder of one", where=where, todo=todo)
    refused: list[UserError] = []
    for token_level in (True, False):
        case = _Case(spec, options or {}, token_level, folder)
        try:
            case.fresh()
        except UserError as error:
            refused.append(error)
            continue
        for law in TEACHER_LAWS:
            law(case)
    if len(refused) == 2:
        raise refused[0]


@dataclass(frozen=True)
class _Case:
    """A teacher with options, for token tasks or for classes."""

    spec: Own
    options: Mapping[str, Any]
    token_level: bool
    folder: Path | None

    def fresh(self) -> PluggedTeacher:
        """A fresh teacher."""
        tokenizer = _tokenizer()
        classes = () if self.token_level else _CLASSES
        columns = num_real_ids(tokenizer) if self.token_level else len(_CLASSES)
        facts = TeacherFacts("teacher", tokenizer, columns, classes, self.token_level, torch.device("cpu"), self.folder)
        return self.spec.make(self.options, facts, 64, f"teacher '{self.spec.name}'")

    @property
    def wants(self) -> frozenset[str]:
        """Every feature that it says it gives; of hidden states the last."""
        return frozenset(f"{name}.{self.spec.layers}" if name in LAYERED else name for name in self.spec.gives)

    def batch(self, rows: slice | list[int] = slice(None), more: int = 0) -> Batch:
        """Some of the examples, in this order. Args: more: columns of padding."""
        tokenizer = _tokenizer()
        ids = [tokenizer(text)["input_ids"] for text in _TEXTS]
        length = max(map(len, ids)) + more
        tokens = torch.full((len(ids), length), int(tokenizer.pad_token_id or 0))  # [B,L]
        for row, own in zip(tokens, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        mask = torch.arange(length) < torch.tensor([[len(own)] for own in ids])  # [B,L]
        targets = torch.full((len(ids), length), NO_LABEL) if self.token_level else torch.arange(len(ids)) % 3
        return Batch(torch.arange(len(ids))[rows], tokens[rows], mask[rows], targets[rows])

    def answer(self, batch: Batch, wants: frozenset[str] | None = None) -> dict[str, Tensor]:
        """What a fresh teacher says, at real tokens: [n,V], or [B,C]."""
        try:
            features = self.fresh().answers(batch, self.wants if wants is None else wants)
        except BatchChanged as error:
            raise LawBroken("untouched", self.spec.name, f"it changes the batch's {error.found}") from error
        return self.at_tokens(features, batch)

    def at_tokens(self, features: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Features at real tokens; padding may have any."""
        return {key: x[batch.token_mask] if x.dim() == 3 else x for key, x in features.items()}


@cache
def _tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(_TEXTS, _VOCABULARY)


def _differ(law: str, case: _Case, one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Break a law where two answers differ by more than rounding."""
    for key, values in one.items():
        gap = (values - other[key]).abs().max() if values.numel() else torch.zeros(())
        if not float(gap) <= TOLERANCE * max(1.0, float(values.abs().max()) if values.numel() else 0.0):
            raise LawBroken(law, case.spec.name, f"'{key}' differs by up to {float(gap):g} {what}")


def _shape_law(case: _Case) -> None:
    """Every feature that it gives has its shape, for any batch, and when it is asked for alone."""
    for wants in (case.wants, *(frozenset({key}) for key in case.wants)):
        for rows in (slice(None), slice(0, 1)):
            try:
                case.answer(case.batch(rows), wants)
            except UserError as error:
                raise LawBroken("shape", case.spec.name, f"{error.found} instead of {error.allowed}") from error


def _finite_law(case: _Case) -> None:
    """Every number at a real token is finite."""
    for key, values in case.answer(case.batch()).items():
        if not bool(values.isfinite().all()):
            raise LawBroken("finite", case.spec.name, f"'{key}' is not finite")


def _repeatable_law(case: _Case) -> None:
    """The same batch has the same answer, bit by bit: of the same teacher, and of another one with its options."""
    teacher, batch = case.fresh(), case.batch()
    first, second = (case.at_tokens(teacher.answers(batch, case.wants), batch) for _ in range(2))
    for other in (second, case.answer(batch)):
        for key, values in first.items():
            if not torch.equal(values, other[key]):
                raise LawBroken("repeatable", case.spec.name, f"'{key}' is another one at the second call")


def _order_law(case: _Case) -> None:
    """An example has the same answer wherever it stands in a batch."""
    order = [2, 0, 3, 1]
    batch, moved = case.batch(), case.batch(order)
    whole = case.fresh().answers(batch, case.wants)
    here = {key: value[order] for key, value in whole.items()}
    _differ("order", case, case.at_tokens(here, moved), case.answer(moved), "with the examples' order")


def _cut_law(case: _Case) -> None:
    """An example has the same answer next to any other examples: ranks and micro-batches cut a step anywhere."""
    batch = case.batch()
    parts = [case.answer(case.batch(rows)) for rows in (slice(0, 1), slice(1, None))]
    joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    _differ("cut", case, case.answer(batch), joined, "with the other examples of the batch")


def _padding_law(case: _Case) -> None:
    """How many columns of padding a batch has changes nothing at real tokens."""
    _differ("padding", case, case.answer(case.batch()), case.answer(case.batch(more=3)), "with more padding")


def _untouched_law(case: _Case) -> None:
    """The batch is as it was before: other teachers and the student read it too."""
    batch, before = case.batch(), case.batch()
    case.answer(batch)
    for name in ("keys", "input_ids", "attention_mask", "targets"):
        if not torch.equal(getattr(batch, name), getattr(before, name)):
            raise LawBroken("untouched", case.spec.name, f"it changes the batch's {name}")


def _gradient_law(case: _Case) -> None:
    """Nothing that it gives has a gradient: a graph behind it would stay in memory until the step ends."""
    with torch.no_grad():
        answer = case.fresh().own.forward(case.batch(), case.wants)
    for key in case.wants:
        if answer[key].requires_grad:
            raise LawBroken("gradient", case.spec.name, f"'{key}' requires a gradient")


TEACHER_LAWS: tuple[Callable[[_Case], None], ...] = (
    _shape_law,
    _finite_law,
    _untouched_law,
    _repeatable_law,
    _order_law,
    _cut_law,
    _padding_law,
    _gradient_law,
)
