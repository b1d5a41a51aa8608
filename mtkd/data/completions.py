"""Prompts of a batch, and batches in which some answers are replaced by completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL, Batch


@dataclass(frozen=True)
class Completion:
    """What was written after the prompt of a row.

    Attributes:
        row: of the batch that has the prompt.
        prompt: its ids, at least one.
        ids: the written ones, at least one; an end token is one of them.
        log_probs: of each in the distribution that it was drawn from, nats, [len(ids)] float32.
    """

    row: int
    prompt: Sequence[int]
    ids: Sequence[int]
    log_probs: Tensor


def prompts_of(batch: Batch) -> list[list[int]]:
    """The tokens of each row before its last answer: up to the position that predicts the answer's first token.

    [] for a filler row. With several answers (turns of a chat) the earlier ones belong to the prompt. A row in which
    nothing is asked is a prompt alone.
    """
    prompts: list[list[int]] = []
    lengths = batch.attention_mask.sum(1).tolist()
    rows = zip(batch.real.tolist(), batch.input_ids.tolist(), batch.target_mask.tolist(), lengths, strict=True)
    for real, ids, asked, length in rows:
        if not real:
            prompts.append([])
            continue
        if not any(asked):
            prompts.append(ids[:length])
            continue
        last = len(asked) - 1 - asked[::-1].index(True)
        first = last - asked[: last + 1][::-1].index(False) + 1 if False in asked[:last] else 0
        prompts.append(ids[: first + 1])
    return prompts


def completed(batch: Batch, kept: Sequence[int], completions: Sequence[Completion], pad_id: int) -> Batch:
    """The rows `kept` of a batch as they are, then one per completion, padded on the right.

    The prompt's last position predicts the first written token, the last written token is a target and no input.

    Args:
        batch: on the host; without parts. Views in other tokenizers are dropped: they are of the old text.
        kept: numbers of rows, filler rows among them.
    """
    rows = torch.tensor([*kept, *(c.row for c in completions)], dtype=torch.int64)
    first = len(kept)
    lengths = [len(c.prompt) + len(c.ids) - 1 for c in completions]
    old = batch.attention_mask[torch.tensor(kept, dtype=torch.int64)].sum(1).tolist() if kept else []
    longest = max([*lengths, *old])
    ids = _padded(batch.input_ids, rows, longest, pad_id)
    mask, targets = _padded(batch.attention_mask, rows, longest, False), _padded(batch.targets, rows, longest, NO_LABEL)
    behaviour = torch.zeros(len(rows), longest)
    for row, (completion, length) in enumerate(zip(completions, lengths, strict=True), first):
        begin = len(completion.prompt) - 1
        ids[row], mask[row], targets[row] = pad_id, False, NO_LABEL
        ids[row, :length] = torch.tensor([*completion.prompt, *completion.ids[:-1]])
        mask[row, :length] = True
        targets[row, begin:length] = torch.tensor(completion.ids)
        behaviour[row, begin:length] = completion.log_probs
    types = batch.token_type_ids
    return replace(
        batch,
        **{name: x[rows] for name in ("keys", "routes", "origin") if (x := getattr(batch, name)) is not None},
        input_ids=ids,
        attention_mask=mask,
        targets=targets,
        token_type_ids=None if types is None else _padded(types, rows, longest, 0),
        written=torch.arange(len(rows)) >= first,
        behaviour=behaviour,
        views={},
    )


def _padded(values: Tensor, rows: Tensor, length: int, fill: int | bool) -> Tensor:
    """Rows of [B,L], cut or filled up on the right, [len(rows),length]."""
    made = values.new_full((len(rows), length), fill)
    shared = min(length, values.shape[1])
    made[:, :shared] = values[rows, :shared]
    return made
