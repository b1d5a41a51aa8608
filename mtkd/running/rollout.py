"""Rollouts: the student answers a part of a step's prompts itself, before teachers and student read the batch.

Which examples it answers, and every drawn token, are functions of the seed, the step and the example. So a resumed run
writes the same text. A batch that several steps learn from (`reuse`) is part of a checkpoint: the student that wrote
it is gone by then.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtkd.config import RolloutConfig, SamplingConfig
from mtkd.data.batch import Batch
from mtkd.data.chat_templates import turn_end
from mtkd.data.completions import Completion, completed, prompts_of
from mtkd.engine.base import Engine, load_plain
from mtkd.engine.dist import Dist
from mtkd.engine.jsonlines import ROLLOUT
from mtkd.errors import DataError, UserError, on_every_rank
from mtkd.models.generate import Written, write
from mtkd.models.sampling import CHOOSING, Sampling, uniforms
from mtkd.planning.spec import StageSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TENSORS = tuple(field.name for field in dataclasses.fields(Batch) if field.name not in ("views", "host"))


class Rollout:
    """The micro-batches of a rank, with the student's own answers in them.

    Args:
        stream: of the rank's micro-batches, a step at a time.
        engine: whose objective has the one model that writes.
        sampling: how it draws.
        seed: of the stage.
        pad_id: at padding.

    Attributes:
        watch: called while a text is written: tokens of the longest one so far, their limit, and all tokens so far.
    """

    def __init__(
        self,
        stream: Iterator[list[Batch]],
        engine: Engine,
        config: RolloutConfig,
        sampling: Sampling,
        seed: int,
        pad_id: int,
    ) -> None:
        self._stream, self._engine, self._config, self._sampling = stream, engine, config, sampling
        self._seed, self._pad_id = seed, pad_id
        self._window: list[Batch] = []
        self.facts: dict[str, float] = {}
        self.watch: Callable[[int, int, int], None] | None = None

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of an optimizer step; new ones in every `reuse`-th step. A collective.

        Afterwards `facts` has the sums of this rank for `mtkd.running.metrics.Meter.note`.
        """
        self.facts = dict.fromkeys(_FACTS, 0.0)
        if step % self._config.reuse == 0:
            begun = time.monotonic()
            self._window = self._written(next(self._stream), step)
            self.facts["writing"] = time.monotonic() - begun
        return self._window

    def _written(self, batches: list[Batch], step: int) -> list[Batch]:
        chosen = self._chosen(batches, step)
        prompts = [prompts_of(batch) for batch in batches]
        # (micro-batch, row, number of the draw), all of the step at one time: a larger batch costs little more
        places = [
            (i, row, number)
            for i, rows in enumerate(chosen)
            for row in rows
            for number in range(self._config.per_prompt)
        ]
        keys = [int(batches[i].keys[row]) for i, row, _ in places]
        noise = uniforms(self._seed, step, keys, [n for _, _, n in places], self._sampling.max_new_tokens)
        with self._engine.whole_student():
            texts = self._write([prompts[i][row] for i, row, _ in places], noise)
        completions: list[list[Completion]] = [[] for _ in batches]
        for number, (i, row, _) in enumerate(places):
            ids = texts.of(number)
            completions[i].append(Completion(row, prompts[i][row], ids, texts.log_probs[number, : len(ids)]))
        self.facts |= {
            "completions": float(len(places)),
            "tokens": float(texts.lengths.sum()),
            "cut": float(texts.cut.sum()),
        }
        return [
            completed(batch, [row for row in range(len(batch.keys)) if row not in rows], written, self._pad_id)
            for batch, rows, written in zip(batches, chosen, completions, strict=True)
        ]

    def _write(self, prompts: list[list[int]], noise: Tensor) -> Written:
        objective = self._engine.objective
        (student,) = objective.models.values()
        watch, limit = self.watch, self._sampling.max_new_tokens
        told = None if watch is None else lambda longest, tokens: watch(longest, limit, tokens)
        return write(student, prompts, self._sampling, noise, objective.dtype, told)

    def _chosen(self, batches: list[Batch], step: int) -> list[list[int]]:
        """Per micro-batch the rows that the student answers: the same examples on any number of ranks. A collective."""
        real = [batch.real.nonzero().squeeze(-1).tolist() for batch in batches]
        if self._config.share == 1:
            return real
        dist = self._engine.dist
        mine = [int(batch.keys[row]) for batch, rows in zip(batches, real, strict=True) for row in rows]
        gathered = dist.broadcast_object(dist.gather_objects(mine)) or []
        every = sorted(key for keys in gathered for key in keys)
        noise = uniforms(self._seed, step, every, [0] * len(every), 1, CHOOSING).squeeze(-1).tolist()
        odd = float(
            uniforms(self._seed, step, [0], [1], 1, CHOOSING)
        )  # 2.5 examples of a step: 2 or 3, 2.5 in the mean
        number = math.floor(self._config.share * len(every) + odd)
        answered = {key for _, key in sorted(zip(noise, every, strict=True))[:number]}
        return [
            [row for row in rows if int(batch.keys[row]) in answered] for batch, rows in zip(batches, real, strict=True)
        ]

    def save(self, folder: Path, step: int) -> None:
        """Write this rank's batches into a checkpoint after `step` steps, where later steps learn from them."""
        if step % self._config.reuse:
            torch.save([_plain(batch) for batch in self._window], _file(folder, self._engine.dist))

    def load(self, folder: Path, step: int) -> None:
        """Go on in the middle of a window.

        Raises:
            DataError: the checkpoint was written by another number of processes.
        """
        if step % self._config.reuse == 0:
            return
        dist = self._engine.dist
        files = sorted(folder.glob("rollout-rank-*.pt"))
        if not dist.all_ok(len(files) == dist.world_size):
            error = DataError(
                "the checkpoint holds texts that are still to be learned from, one file per process",
                where=str(folder),
                found=f"{len(files)} files, {dist.world_size} processes",
                todo=f"go on with {len(files)} processes, or from a checkpoint at a multiple of "
                f"rollout.reuse = {self._config.reuse} steps",
            )
            raise on_every_rank(error)
        saved: Any = load_plain(_file(folder, dist))
        self._window = [Batch(**tensors) for tensors in saved]


_FACTS = ("writing", "completions", "tokens", "cut")


def _file(folder: Path, dist: Dist) -> Path:
    return folder / f"rollout-rank-{dist.rank}.pt"


def _plain(batch: Batch) -> dict[str, Tensor | None]:
    """The tensors of a batch, without memory that they share with others."""
    tensors = {name: getattr(batch, name) for name in _TENSORS}
    return {name: None if x is None else x.clone() for name, x in tensors.items()}


def sampling_of(
    config: SamplingConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str, *, chat: bool = False
) -> Sampling:
    """How to draw and where to end, with the run's tokenizer.

    Args:
        chat: whether the chat template writes the prompts: what it writes behind an answer ends a text too.
        where: place of `config`.
    Raises:
        UserError: a `stop` text that is not one token, or nothing that ends a text.
    """
    ends = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    ends += [end] if chat and (end := turn_end(tokenizer)) is not None else []
    for i, text in enumerate(config.stop):
        ids = _one_token(tokenizer, text)
        if len(ids) != 1:
            raise UserError(
                "a stop text is not one token of the run's tokenizer",
                where=f"{where}.stop[{i}]",
                found=f"{text!r}: {len(ids)} tokens",
                allowed="a token as the tokenizer has it, or a text that it reads as one token",
            )
        ends += ids
    return Sampling(
        config.max_new_tokens, config.temperature, config.top_p, config.top_k, tuple(dict.fromkeys(ends)), max_length
    )


def _one_token(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    known = tokenizer.get_vocab().get(text)
    return list(tokenizer.encode(text, add_special_tokens=False)) if known is None else [known]


def rollout_metrics(means: Mapping[str, float], ranks: int) -> dict[str, float]:
    """The metrics of a log line, with sums over rollouts as what a person asks of them.

    Args:
        means: per optimizer step, summed over ranks; sums of rollouts under `ROLLOUT`.
    """
    facts = {name.removeprefix(ROLLOUT): value for name, value in means.items() if name.startswith(ROLLOUT)}
    rest = {name: value for name, value in means.items() if not name.startswith(ROLLOUT)}
    if not facts:
        return rest
    seconds = {f"{name}_seconds": facts[name] / ranks for name in ("writing", "scoring", "learning")}
    shown = dict(seconds)
    if facts["completions"]:
        shown["length"] = facts["tokens"] / facts["completions"]
        shown["cut"] = facts["cut"] / facts["completions"]
        shown["tokens_per_second"] = facts["tokens"] / max(seconds["writing_seconds"], 1e-9)
    return rest | {ROLLOUT + name: value for name, value in shown.items()}


def make_rollout(spec: StageSpec, stream: Iterator[list[Batch]], engine: Engine, tokenizer: PreTrainedTokenizerBase,
                 pad_id: int) -> Rollout | None:  # fmt: skip
    """The rollout of a stage; None where the student writes nothing."""
    config = spec.stage.rollout
    if config is None or config.share == 0:
        return None
    data = spec.data.config
    sampling = sampling_of(config, tokenizer, data.max_length, f"{spec.where}.rollout", chat=data.templated)
    return Rollout(stream, engine, config, sampling, spec.seed, pad_id)
