"""The offload backend: teachers wait outside the device's memory and take turns on it.

On a CPU a waiting teacher is a mapped file whose pages are given back after its turn, so that the resident set holds
the largest teacher and not the sum; its output head is read tile by tile after the turn, and given back after each
tile. On a GPU it waits in pinned host memory. Values are bit-equal to the resident backend's: the same float32
weights, equally aligned, go through the same kernels.

A streamed teacher's parameters stay in the safetensors files of its folder and are in memory layer by layer
(`mtkd.pool.streaming`).
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtkd.config import TeacherConfig
from mtkd.data.batch import Batch
from mtkd.engine.disk import free_disk
from mtkd.engine.dist import Dist
from mtkd.errors import DataError, UserError
from mtkd.models.broken import Overflow
from mtkd.models.features import Features, HeadLogits
from mtkd.models.taps import TappedModel
from mtkd.models.weights import find_weights
from mtkd.pool.backend import Stock
from mtkd.pool.base import ElsewhereModel, LiveModel, move_buffers
from mtkd.pool.live import ModelBackend, check_finite
from mtkd.pool.sizes import Place, Share, TeacherSize
from mtkd.pool.streaming import StreamedParameters
from mtkd.pool.waiting import MappedParameters, PinnedParameters, Waiting


@dataclass
class MappedLogits:
    """`HeadLogits` of a mapped head: what is made of the head is made for the rows that are read, and dropped.

    Selecting columns or casting once, as `HeadLogits` does, would keep a copy of every teacher's head; one per tile is
    a few per cent of the tile's product.

    Attributes:
        head: on the mapped weight; its `hidden` is cast already.
        drop: gives the mapping's pages back.
        chosen: columns, or None for all. dtype: of the product, or None for the weight's.
    """

    head: HeadLogits
    drop: Callable[[], None]
    chosen: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def num_columns(self) -> int:
        return self.head.num_columns if self.chosen is None else len(self.chosen)

    def rows(self, index: Tensor) -> Tensor:
        head = self.head if self.chosen is None else self.head.select(self.chosen)
        values = (head if self.dtype is None else head.in_dtype(self.dtype)).rows(index)
        self.drop()
        return values

    def select(self, columns: Tensor) -> MappedLogits:
        return replace(self, chosen=columns if self.chosen is None else self.chosen[columns])

    def in_dtype(self, dtype: torch.dtype) -> MappedLogits:
        return replace(self, head=replace(self.head, hidden=self.head.hidden.to(dtype)), dtype=dtype)


class OffloadedModel(ElsewhereModel):
    """A frozen `TappedModel` that takes its turn on the device.

    Args:
        model: its parameters lose `requires_grad`.
        waiting: where its parameters are between turns.
    """

    def __init__(self, model: TappedModel, waiting: Waiting) -> None:
        super().__init__(model)
        self.waiting = waiting

    def enable_packing(self, where: str) -> None:
        # Two forward passes compare packed with padded rows.
        with self._turn():
            self.model.enable_packing(where)

    @property
    def embedding_table(self) -> Tensor:
        table = self.model.model.get_input_embeddings().weight
        assert isinstance(table, nn.Parameter)
        with self._turn(), self.waiting.hold([table]):
            return self.model.embedding_table.detach().clone()

    def verify(self, dtype: torch.dtype) -> None:
        """Check a model whose weights were never whole in memory, in its first turn; see `TappedModel.verify`.

        Raises:
            DataError: weights that are not finite.
            UserError: also an architecture whose modules read each other's weights outside of layers.
        """
        head = [p for p in self.model.output_head or () if p is not None]
        try:
            with self._turn(), self.waiting.hold(head):
                self.model.verify(dtype)
        except Overflow as error:  # a weight that is not in memory is NaN too
            error.message += f"; or '{self.info.architecture}' cannot run with one layer in memory at a time"
            error.todo = f"try backend: resident, which tells these apart; {error.todo}"
            raise
        except DataError:
            raise
        except (UserError, RuntimeError) as error:
            raise UserError(
                f"architecture '{self.info.architecture}' cannot run with one layer in memory at a time",
                where="@teacher.backend",
                found=str(error).splitlines()[0],
                todo="use backend: offload or resident",
            ) from error

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features: one turn. The features outlive it."""
        with self._turn():
            features = self.model(batch, wants)
            return {key: self._outliving(value) for key, value in features.items()}

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self.waiting.arrive()
        try:
            yield
        finally:
            self.waiting.leave()

    def _outliving(self, value: Any) -> Any:
        if not isinstance(value, HeadLogits):
            return value
        weight = self.waiting.keep_head(value.weight)
        bias = None if value.bias is None else self.waiting.keep_head(value.bias)
        head = replace(value, weight=weight, bias=bias)
        if not self.waiting.mapped:
            return head
        return MappedLogits(head, self.waiting.drop, dtype=None if weight.dtype == torch.float32 else torch.float32)

    def ahead(self) -> None:
        self.waiting.prefetch()

    def close(self) -> None:
        # Ends the reading thread too.
        self.waiting.close()


def offload(model: TappedModel, device: torch.device, file: Path, dist: Dist) -> OffloadedModel:
    """The model with its parameters outside the device's memory; what it occupied is free. A collective.

    Args:
        model: float32, on the CPU.
        device: where it runs.
        file: where a CPU's mapped file is written, for the length of this call; not used for a GPU.
        dist: the ranks that build it together.
    Raises:
        DataError: there is no room for the file.
    """
    parameters = list(model.parameters())  # a tied one once
    if device.type == "cpu":
        return OffloadedModel(model, MappedParameters(parameters, file, dist))
    move_buffers(model, device)
    head = [p for p in model.output_head or () if p is not None]
    return OffloadedModel(model, PinnedParameters(parameters, head, device))


def stream(model: TappedModel, folder: Path, device: torch.device, dtype: torch.dtype) -> OffloadedModel:
    """The model with its parameters in the files of its folder; it runs once, on two tokens, to be verified.

    Args:
        model: on the CPU, its parameters on the meta device (`mtkd.models.create.empty_model`).
        folder: a checked model folder with the weights.
        device: where it runs. dtype: bfloat16 verifies it under autocast, as it will run.
    Raises:
        DataError: weights that are missing, unexpected, of another shape, truncated or not finite.
        UserError: an architecture that cannot be streamed.
    """
    weights = find_weights(model.model, folder)
    head = model.model.get_output_embeddings() if model.token_level else None
    streamed = OffloadedModel(model, StreamedParameters(model.model, weights, head, device))
    try:
        streamed.verify(dtype)
    except BaseException:
        streamed.close()
        raise
    return streamed


class Offload(ModelBackend):
    """The weights wait outside the device's memory: on a CPU in a mapped file, for a GPU in pinned host memory."""

    shown = True

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        """The largest one counts.

        Of a GPU in pinned memory; the heads stay until a micro-batch is done. Of a CPU in a file, whose pages in the
        kernel's cache belong to no process.
        """
        whole, heads = sum(t.weights for t in teachers), sum(t.head for t in teachers)
        if not place.on_gpu:
            largest, head = max(t.weights for t in teachers), max(t.head for t in teachers)
            return Share(largest, head, disk=whole, passing=largest)
        bodies = sorted((t.weights - t.head for t in teachers), reverse=True)
        turn = sum(bodies[: 1 + place.prefetch]) + heads
        # Each is copied to where it waits before the next one is loaded: for a moment there are two of it.
        copied = 2 * max(t.weights for t in teachers)
        return Share(turn, heads, host=whole * place.local, passing=copied)

    def check_room(self, teachers: Sequence[TeacherSize], place: Place, folder: Path, where: str) -> None:
        if place.on_gpu:
            return
        _check_maps(where)
        needed = sum(t.weights for t in teachers)
        there, free = free_disk(folder)
        if needed > free:
            raise UserError(
                "the disk has no room for the offloaded teachers, which are written there in float32",
                where=where,
                found=f"{free / 1e9:.1f} GB free in {there}",
                allowed=f"at least {needed / 1e9:.1f} GB",
                todo="make room, put `output` on another disk, or use backend: resident",
            )

    def place(self, model: TappedModel, teacher: TeacherConfig, stock: Stock) -> LiveModel:
        site = stock.site
        check_finite(model, site.where)
        model.verify()
        # Before the next one is loaded: there is never memory for two.
        return offload(model, site.device, site.file, site.dist)


class Streamed(ModelBackend):
    """The weights stay in the files of the model's folder and are in memory a layer at a time."""

    in_files = shown = True

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        """The layer that runs; the heads, of a CPU one at a time. Weights stay in their own files."""
        heads = sum(t.head for t in teachers) if place.on_gpu else max(t.head for t in teachers)
        return Share(max(t.layer for t in teachers) + heads, heads)

    def remark(self, tokens: int) -> str:
        return f"all its weights are read from disk for every batch of <= {tokens:,} tokens"

    def check_room(self, teachers: Sequence[TeacherSize], place: Place, folder: Path, where: str) -> None:
        _check_maps(where)

    def place(self, model: TappedModel, teacher: TeacherConfig, stock: Stock) -> LiveModel:
        return stream(model, stock.folder(), stock.site.device, stock.site.dtype)


def _check_maps(where: str) -> None:
    """Refuse to map weights on a system that cannot give pages back."""
    if not (hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise")):
        raise UserError(
            "streamed teachers, and offloaded ones on a CPU, need Linux: this system cannot give mapped pages back",
            where=where,
            todo="use backend: resident",
        )
