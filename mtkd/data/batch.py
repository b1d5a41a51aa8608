"""One micro-batch of token ids, the same for every task, model and engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mtkd.data.device import moved
from mtkd.errors import UserError

NO_LABEL = -100
"""A target with this id is not a target (the convention of torch's cross entropy)."""

STUDENT = ""
"""The view of every batch: its text in the run's tokenizer."""


@dataclass(frozen=True)
class View:
    """The text of a batch in one tokenizer: what a model reads.

    Attributes:
        input_ids: [B,L] int64.
        attention_mask: [B,L] bool, True at real tokens. Filler rows keep one True so that attention stays finite.
        token_type_ids: [B,L] int64 or None.
        position_ids: where examples bring their own, GLM's: row 0 index in part A, or of the blank that a piece fills;
            row 1 0 in part A, 1, 2, ... in a piece; [B,2,L] int64, 0 at padding. None: tokens are counted.
        sep: tokens of part A, which is seen in both directions, [B] int64; None where there are no parts.
    """

    input_ids: Tensor  # [B,L]
    attention_mask: Tensor  # [B,L]
    token_type_ids: Tensor | None = None  # [B,L]
    position_ids: Tensor | None = None  # [B,2,L]
    sep: Tensor | None = None  # [B]

    def to(self, device: torch.device) -> View:
        """The same view on `device`."""
        return replace(self, **_moved(self, device))


@dataclass
class Batch:
    """Rows of text, and what is asked of them.

    Attributes:
        keys: what the rows are called where something is looked up or drawn: the cache of a teacher, the draws of a
            weighting. Example numbers in the split, unless a transform wrote other text; [B] int64, -1 for a filler
            row (all of its masks are empty).
        input_ids, attention_mask, token_type_ids, position_ids, sep: as `View` has them, in the run's tokenizer.
        targets: token tasks: [B,L] int64, the id that position l must predict, `NO_LABEL` where nothing is asked
            (already shifted for causal models); classification: [B] int64; regression: [B] float32.
        nsp_targets: 0 where the second segment follows the first, 1 where it is another document's, `NO_LABEL` in
            filler rows; [B] int64, or None when nothing is asked.
        routes: number of the teacher that the data names for each example, or of its domain where teachers have some,
            [B] int64 (-1 in filler rows), or None.
        origin: number of the document that each row is of, in its split, [B] int64 (-1 in filler rows); None for a
            batch that no split made.
        written: rows whose answer the student wrote: their targets are no labels, [B] bool; None where it wrote none.
        behaviour: log-probability of each target of a written row in the distribution that it was drawn from, nats, 0
            elsewhere, [B,L] float32, or None.
        views: the same rows in other tokenizers, by a name of the tokenizer; STUDENT only in what `read_by` gives.
        host: the batch before `to` moved it to a device. Its keys and masks are this one's; of no other field is that
            so (targets may since number other columns).
    """

    keys: Tensor  # [B]
    input_ids: Tensor  # [B,L]
    attention_mask: Tensor  # [B,L]
    targets: Tensor  # [B,L] or [B]
    token_type_ids: Tensor | None = None  # [B,L]
    nsp_targets: Tensor | None = None  # [B]
    routes: Tensor | None = None  # [B]
    position_ids: Tensor | None = None  # [B,2,L]
    sep: Tensor | None = None  # [B]
    origin: Tensor | None = None  # [B]
    written: Tensor | None = None  # [B]
    behaviour: Tensor | None = None  # [B,L]
    views: Mapping[str, View] = field(default_factory=dict)
    host: Batch | None = field(default=None, repr=False)

    @property
    def on_host(self) -> Batch:
        """Where keys and masks are read without waiting for a device."""
        return self.host or self

    def where(self, mask: Callable[[Batch], Tensor]) -> Tensor:
        """Flat positions at which a mask holds, [n] int64, on the batch's device; nothing waits for that.

        Args:
            mask: of a batch, which is `on_host`; any shape.
        """
        return moved(mask(self.on_host).reshape(-1).nonzero().squeeze(-1), self.keys.device)

    @property
    def real(self) -> Tensor:
        """Rows that count, [B] bool."""
        return self.keys >= 0

    @property
    def token_mask(self) -> Tensor:
        """Unpadded tokens of rows that count, [B,L] bool."""
        return self.attention_mask & self.real[:, None]

    @property
    def target_mask(self) -> Tensor:
        """Positions (or rows) with a target, shaped like `targets`, bool."""
        if self.targets.is_floating_point():
            return self.real & ~self.targets.isnan()
        has = self.targets != NO_LABEL
        return has & (self.real[:, None] if self.targets.dim() == 2 else self.real)

    @property
    def label_mask(self) -> Tensor:
        """Positions (or rows) with a label: a target of the data, shaped like `targets`, bool."""
        return self.target_mask if self.written is None else self.target_mask & ~self.written[:, None]

    def labelled(self) -> Batch:
        """The batch for who learns from labels: rows that the student wrote have no targets."""
        if self.written is None:
            return self
        host = None if self.host is None else self.host.labelled()
        return replace(self, targets=self.targets.masked_fill(self.written[:, None], NO_LABEL), host=host)

    def view(self, tokenizer: str = STUDENT) -> View:
        """The text as a tokenizer cuts it.

        Raises:
            UserError: the batch has no such view.
        """
        if tokenizer in self.views:
            return self.views[tokenizer]
        if tokenizer != STUDENT:
            raise UserError(
                "the batch has no view of this name",
                found=tokenizer,
                allowed=sorted(self.views) or "the student's alone",
                todo="a transform of the stage adds it to `Batch.views`",
            )
        return View(self.input_ids, self.attention_mask, self.token_type_ids, self.position_ids, self.sep)

    def read_by(self, tokenizer: str) -> Batch:
        """The batch for a model with this tokenizer: the same rows, and its view in the place of the student's.

        Targets of token tasks are ids and places of the student's text: in another view nothing is asked. `view()` is
        the student's text still: there the features of the model must stand in the end.
        """
        if tokenizer == STUDENT:
            return self
        view = self.view(tokenizer)
        targets = torch.full_like(view.input_ids, NO_LABEL) if self.targets.dim() == 2 else self.targets
        fields = {f.name: getattr(view, f.name) for f in dataclasses.fields(view)}
        host = None if self.host is None else self.host.read_by(tokenizer)
        return replace(self, targets=targets, views={**self.views, STUDENT: self.view()}, host=host, **fields)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        views = {name: view.to(device) for name, view in self.views.items()}
        values = _moved(self, device)
        return replace(self, views=views, host=None if values["keys"] is self.keys else self.on_host, **values)


def _moved(tensors: View | Batch, device: torch.device) -> dict[str, Tensor]:
    """The tensors among the fields, on `device`."""
    values = {f.name: getattr(tensors, f.name) for f in dataclasses.fields(tensors)}
    return {name: moved(x, device) for name, x in values.items() if isinstance(x, Tensor)}


def position_counts(batches: list[Batch]) -> dict[str, int]:
    """Valid positions of every kind over some micro-batches: `tokens`, `targets`, `sequences`, `labels`, `written`.

    `labels` are the targets that the data gave, `written` those that the student wrote.
    """
    batches = [batch.on_host for batch in batches]
    return {
        "tokens": sum(int(b.token_mask.sum()) for b in batches),
        "targets": sum(int(b.target_mask.sum()) for b in batches),
        "sequences": sum(int(b.real.sum()) for b in batches),
        "labels": sum(int(b.label_mask.sum()) for b in batches),
        "written": sum(int((b.target_mask & ~b.label_mask).sum()) for b in batches),
    }
