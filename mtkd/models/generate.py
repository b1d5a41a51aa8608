"""Write: completions of a batch of prompts, token by token, with a key-value cache.

    session = Session(model, prompts)          # reads the prompts, padded on the left
    session.logits()                           # of the next token of every row, [B,V]
    session.take(columns)                      # each row goes on with a token
    write(model, prompts, how, noise)          # draws until every row has ended

Positions are those of the same text padded on the right, as training reads it. The model is in eval mode: no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from mtkd.data.device import moved
from mtkd.errors import UserError
from mtkd.models.attention import Recorder, recording
from mtkd.models.features import HeadLogits
from mtkd.models.forward import logits_of, number_format
from mtkd.models.inputs import few_tokens
from mtkd.models.sampling import Sampling, draw
from mtkd.models.taps import VERIFY_TOLERANCE, TappedModel, evaluating

_FEWER = 0.75  # rows that ended leave the batch when at most this share goes on: moving the cache costs a copy of it


@dataclass(frozen=True)
class Written:
    """Completions, in the order of their prompts, on the CPU.

    Attributes:
        ids: run ids, 0 after the end, [B,N] int64.
        lengths: tokens of each, the end token included, [B] int64.
        log_probs: of each token in the distribution that it was drawn from, nats, 0 after the end, [B,N] float32.
        cut: whether a text has no end: it is as long as it may be, [B] bool.
    """

    ids: Tensor
    lengths: Tensor
    log_probs: Tensor
    cut: Tensor

    def of(self, row: int) -> list[int]:
        """The tokens of a row."""
        return self.ids[row, : int(self.lengths[row])].tolist()


class Session:
    """Texts that a model goes on reading. Used inside `torch.no_grad`, eval mode and the number format.

    Args:
        prompts: run ids of each row, at least one.
        dtype: of the products.
    """

    def __init__(self, model: TappedModel, prompts: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        self._model, self._dtype, self._device = model, dtype, next(model.parameters()).device
        self._head: HeadLogits | None = None
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :], mask[row, longest - len(prompt) :] = torch.tensor(prompt), True
        self._padded = not bool(mask.all())
        self._mask = moved(mask, self._device)  # [B,P+t]
        self._positions = (self._mask.long().cumsum(-1) - 1).clamp_min(0)  # [B,P]
        self._cache = DynamicCache(config=model.model.config)
        self._read(moved(ids, self._device))

    def _read(self, ids: Tensor) -> None:
        """Read tokens [B,N], and keep the logits after the last of them."""
        model, recorder = self._model, Recorder(frozenset(), padded=self._padded)
        inputs = model.inputs.going_on(ids, self._mask, self._positions, self._cache)
        with recording(recorder):
            output = model.model.forward(**inputs)  # not a compiled one: every token would be another shape
        assert recorder.head_input is not None
        recorder.head_input = recorder.head_input[:, -1:]
        logits = model.predictions.logits(recorder, output)
        assert isinstance(logits, HeadLogits), "a causal language model has a head over its vocabulary"
        if self._head is None:
            self._head = logits.in_dtype(self._dtype)  # cast once for all tokens
        rows = torch.arange(len(ids), device=self._device)
        self._logits = replace(self._head, hidden=logits.hidden.to(self._dtype)).rows(rows)

    def logits(self) -> Tensor:
        """Logits of the next token, [B,V] float32; columns are those of the model."""
        return self._logits

    def take(self, ids: Tensor) -> None:
        """Go on with a token per row, run ids [B]."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], -1)
        self._positions = self._positions[:, -1:] + 1
        self._read(ids[:, None])

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows, [n] int64; the memory of the others is freed."""
        self._cache.batch_select_indices(rows)
        self._mask, self._positions, self._logits = self._mask[rows], self._positions[rows], self._logits[rows]


class _Together:
    """Sessions of several models over the same texts: the next token is drawn from the mean of their probabilities."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self._sessions = sessions

    def logits(self) -> Tensor:
        """Log of the mean probability, [B,V] float32."""
        logs = [torch.log_softmax(session.logits().float(), -1) for session in self._sessions]  # K of [B,V]
        return torch.stack(logs).logsumexp(0) - math.log(len(logs))

    def take(self, ids: Tensor) -> None:
        for session in self._sessions:
            session.take(ids)

    def keep(self, rows: Tensor) -> None:
        for session in self._sessions:
            session.keep(rows)


class _Texts:
    """The completions of a batch while they are written; what is asked of them is known on the host.

    Args:
        limits: most tokens of each, [B].
        device: of the model.
    """

    def __init__(self, limits: Tensor, ends: Sequence[int], device: torch.device) -> None:
        self._limits, self._ends = limits, torch.tensor(ends, dtype=torch.int64)
        shape = (len(limits), int(limits.max()) if len(limits) else 0)
        self._ids, self._log_probs = torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape)
        self._log_probs = self._log_probs.to(device)
        self._ended, self._lengths = torch.zeros(len(limits), dtype=torch.bool), torch.zeros_like(limits)

    def going(self, rows: Tensor) -> Tensor:
        """Which of these rows go on, bool."""
        return ~self._ended[rows] & (self._lengths[rows] < self._limits[rows])

    def add(self, rows: Tensor, tokens: Tensor, log_probs: Tensor, position: int) -> None:
        """A token per row, run ids; rows that ended before keep what they have."""
        going = self.going(rows)
        on_device, where = moved(going, tokens.device), moved(rows, tokens.device)
        self._ids[where, position] = tokens.masked_fill(~on_device, 0)
        self._log_probs[where, position] = log_probs.masked_fill(~on_device, 0)
        self._lengths[rows] += going
        self._ended[rows] |= going & torch.isin(tokens.cpu(), self._ends)

    @property
    def count(self) -> int:
        """Tokens of all of them so far."""
        return int(self._lengths.sum())

    def written(self) -> Written:
        """All of them, as long as the longest."""
        longest = int(self._lengths.max()) if len(self._lengths) else 0
        ids, log_probs = self._ids[:, :longest].cpu(), self._log_probs[:, :longest].cpu()
        return Written(ids, self._lengths, log_probs, ~self._ended)


@torch.no_grad()
def write(
    models: TappedModel | Sequence[TappedModel],
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    noise: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    watch: Callable[[int, int], None] | None = None,
) -> Written:
    """Complete every prompt.

    A row's text is a function of its own prompt and noise; the other rows change it by rounding at most.

    Args:
        models: a causal language model with whole weights on this rank, whose mode is as before afterwards. Several
            with the same columns, on one device, write together: from the mean of their probabilities.
        prompts: run ids, at least one per row.
        noise: `how.noise(...)`, [B,max_new_tokens]; None at temperature 0.
        dtype: bfloat16 runs the model under autocast.
        watch: called after each token of a text with the length of the longest one so far, and all tokens so far.
    """
    writers = [models] if isinstance(models, TappedModel) else [*models]
    device, vocabulary = next(writers[0].parameters()).device, writers[0].vocabulary
    room = [how.max_length + 1 - len(prompt) if how.max_length else how.max_new_tokens for prompt in prompts]
    limits = torch.tensor(room, dtype=torch.int64).clamp(0, how.max_new_tokens)  # [B]
    texts = _Texts(limits, how.ends, device)
    live, position = limits.nonzero().squeeze(-1), 0  # numbers of the session's rows among all
    noise = None if noise is None else moved(noise, device)
    # one context for the whole text: autocast then casts the weights once, and not once per token
    with ExitStack() as modes:
        for model in writers:
            modes.enter_context(evaluating(model))
        modes.enter_context(number_format(device.type, dtype))
        session = _session(writers, [prompts[row] for row in live.tolist()], dtype) if len(live) else None
        while session is not None:
            drawn = None if noise is None else noise[moved(live, device), position]
            columns, log_probs = draw(session.logits(), how, drawn)
            tokens = columns if vocabulary is None else vocabulary.kept[columns]
            texts.add(live, tokens, log_probs, position)
            going, position = texts.going(live), position + 1
            if watch is not None:
                watch(position, texts.count)
            if not going.any():
                break
            if going.sum() <= _FEWER * len(live):
                chosen = going.nonzero().squeeze(-1)
                live, rows = live[chosen], moved(chosen, device)
                session.keep(rows)
                tokens = tokens[rows]
            session.take(tokens)
    return texts.written()


def _session(
    models: Sequence[TappedModel], prompts: Sequence[Sequence[int]], dtype: torch.dtype
) -> Session | _Together:
    sessions = [Session(model, prompts, dtype) for model in models]
    return sessions[0] if len(sessions) == 1 else _Together(sessions)


@torch.no_grad()
def check_writing(
    model: TappedModel,
    where: str,
    tolerance: float = VERIFY_TOLERANCE,
    todo: str = "drop rollout for this student",
) -> None:
    """Refuse a model that does not write what it reads; for a whole one, before an engine shards it.

    A few tokens are written after prompts of different lengths, and read again as training reads them: without a cache,
    padded on the right.

    Args:
        where: place of what asks it to write, for messages.
        tolerance: of log-probabilities, relative to the largest.
        todo: advice.
    Raises:
        UserError: naming the architecture.
    """
    batch = few_tokens(model.model, model.info.vocabulary, (3, 1, 2))
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    written = write(model, prompts, Sampling(3, temperature=0.0))
    whole = few_tokens(model.model, model.info.vocabulary, (6, 4, 5))
    for row, prompt in enumerate(prompts):
        whole.input_ids[row, : len(prompt) + 3] = torch.tensor([*prompt, *written.of(row)])
    with evaluating(model):
        logits = logits_of(model, whole, torch.float32).in_dtype(torch.float32)
        positions = [row * 6 + len(prompt) - 1 + i for row, prompt in enumerate(prompts) for i in range(3)]
        read = torch.log_softmax(logits.rows(torch.tensor(positions, device=whole.input_ids.device)), -1).amax(-1).cpu()
    difference = float((read - written.log_probs.flatten()).abs().max() / read.abs().max().clamp_min(1e-30))
    if not difference <= tolerance:
        raise UserError(
            f"architecture '{model.info.architecture}' does not write with a key-value cache what it reads without one",
            where=where,
            found=f"relative difference {difference:.2g}",
            allowed=f"at most {tolerance}",
            todo=todo,
        )
