"""Where a teacher's parameters are while another one runs: mapped from a file on a CPU, in pinned memory for a GPU.

Both replace the storage of a model's parameters and know four moments: `prefetch` (its turn comes soon), `arrive` (its
turn: the parameters are on the device), `leave` (its turn is over), and `keep_head`, for the output head, which is read
after the turn, tile by tile.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mtkd.engine.dist import Dist
from mtkd.errors import DataError

# Bytes. Matrix products may round differently at another alignment, so a mapped parameter keeps its own within a cache
# line (safetensors' files are mapped too, at any multiple of 8); on a device each begins as an allocation would.
_LINE, _ALLOCATION = 64, 512


class Waiting(Protocol):
    """The parameters of one teacher, and whether they are on the device."""

    @property
    def mapped(self) -> bool:
        """Whether a kept head is pages of a file, which `drop` gives back."""
        ...

    def prefetch(self) -> None:
        """Begin to bring them; returns at once."""
        ...

    def arrive(self) -> None:
        """The parameters may be read from here on."""
        ...

    def leave(self) -> None:
        """Give their memory back; what was computed from them stays."""
        ...

    def keep_head(self, head: Tensor) -> Tensor:
        """One of the output head's parameters as it may be read between turns; called between arrive and leave."""
        ...

    def drop(self) -> None:
        """Give the pages of kept heads back; they are read again when they are touched."""
        ...

    def hold(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Within it, and within a turn, these may be read by anybody and not only by their modules."""
        ...

    def close(self) -> None:
        """Free everything; the parameters must not be read any more."""
        ...


class MappedParameters:
    """Parameters in a file that is mapped into memory and has no name any more.

    Pages are read when they are touched, and given back with MADV_DONTNEED: the resident set holds one teacher at a
    time. They stay in the kernel's page cache while nothing else needs the memory, so a turn costs page faults,
    not reads. The file is written by the main rank from the model as it was built (loaded, cut, compressed, cast),
    mapped by every rank, and unlinked: none can change it, and it is gone with the last process however that ends.

    Args:
        parameters: float32 on the CPU; their storage is replaced.
        file: where to write; on a disk: files in a memory-backed file system are memory.
        dist: the ranks that share the file; making one is a collective.
    Raises:
        DataError: on every rank, if one of them cannot write or open the file.
    """

    mapped = True

    def __init__(self, parameters: Sequence[nn.Parameter], file: Path, dist: Dist) -> None:
        # The main rank's: it writes the file, and on another rank the same weights may lie at another alignment.
        starts = dist.broadcast_object(_starts(parameters, _LINE, [p.data_ptr() % _LINE for p in parameters]))
        self._size, self._parameters = max(starts[-1], 1), list(parameters)
        self._descriptor = _shared(parameters, starts, self._size, file, dist)
        # Private and writable only because torch warns about read-only buffers; a frozen teacher is never written.
        self._map = mmap.mmap(
            self._descriptor, self._size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        for parameter, start in zip(parameters, starts[:-1], strict=True):
            if parameter.numel():
                values = torch.frombuffer(self._map, dtype=parameter.dtype, count=parameter.numel(), offset=start)
                parameter.data = values.view(parameter.shape)
        _trim_heap()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mtkd-offload")
        self._ahead: Future[None] | None = None

    def prefetch(self) -> None:
        if self._ahead is None:
            # Into the page cache, not into this process: memory that the kernel takes back when it needs it.
            self._ahead = self._reader.submit(os.posix_fadvise, self._descriptor, 0, self._size, os.POSIX_FADV_WILLNEED)

    def arrive(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()  # raises what the thread raised

    def leave(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def keep_head(self, head: Tensor) -> Tensor:
        return head  # a mapped one may be read at any time

    def drop(self) -> None:
        self.leave()

    def hold(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        if self._descriptor >= 0:
            self._reader.shutdown(wait=True, cancel_futures=True)
            os.close(self._descriptor)
            self._descriptor = -1
            for parameter in self._parameters:
                parameter.data = torch.empty(0)  # read by mistake, it has the wrong shape
            with suppress(BufferError):  # logits that are still in use: the mapping goes with them
                self._map.close()


class PinnedParameters:
    """Parameters in pinned host memory that are copied to the device for each turn, on a stream of their own.

    The body (everything but the output head) is freed at the end of the turn. The head stays on the device as long as
    logits made from it are in use, normally until the micro-batch is done: copying V x H numbers once per tile
    would take longer than the tile's product. Device memory: the largest body, the next one where it is prefetched,
    and the heads of all teachers.

    Args:
        parameters: their storage is replaced. head: those among them that are read between turns.
        device: where turns are taken. On a CPU everything is as on a GPU, without pinning and streams.
    """

    mapped = False

    def __init__(self, parameters: Sequence[nn.Parameter], head: Sequence[nn.Parameter], device: torch.device) -> None:
        heads = {id(p) for p in head}
        self._body = [p for p in parameters if id(p) not in heads]
        self._head, self._device = list(head), device
        self._starts = _starts(self._body, _ALLOCATION, [0] * len(self._body))
        on_gpu = device.type == "cuda"
        # one buffer, so that a turn is one copy
        self._host = torch.empty(self._starts[-1], dtype=torch.uint8, pin_memory=on_gpu)
        for part, parameter in zip(self._views(self._host), self._body, strict=True):
            part.copy_(parameter.data)
        self._waiting = self._views(self._host)
        self._host_heads = [p.data.cpu().pin_memory() if on_gpu else p.data.clone() for p in self._head]
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._kept: list[weakref.ref[Tensor]] = []
        self._coming: tuple[Tensor, list[Tensor], torch.cuda.Event | None] | None = None
        self._here: dict[int, Tensor] = {}
        self._set(self._waiting, self._host_heads)

    def prefetch(self) -> None:
        if self._coming is None:
            self._coming = self._copied()

    def arrive(self) -> None:
        self.prefetch()
        assert self._coming is not None
        body, heads, event = self._coming
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            for tensor in (body, *heads):
                tensor.record_stream(stream)
        self._set(self._views(body), heads)
        self._here = {id(p): h for p, h in zip(self._head, heads, strict=True)}
        self._kept = [weakref.ref(h) for h in heads]

    def leave(self) -> None:
        if self._stream is not None:
            # The next copy may only take this memory when the kernels that read it are done.
            torch.cuda.current_stream(self._device).synchronize()
        self._set(self._waiting, self._host_heads)
        self._coming, self._here = None, {}

    def keep_head(self, head: Tensor) -> Tensor:
        return self._here[id(head)]

    def drop(self) -> None:
        """Nothing is mapped."""

    def hold(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self._coming, self._here, self._kept = None, {}, []

    def _copied(self) -> tuple[Tensor, list[Tensor], torch.cuda.Event | None]:
        heads = [head for head in (reference() for reference in self._kept) if head is not None]
        with torch.cuda.stream(self._stream):  # None: no stream is entered
            if len(heads) != len(self._head):
                heads = [self._on_device(h) for h in self._host_heads]
            body = self._on_device(self._host)
            return body, heads, None if self._stream is None else self._stream.record_event()

    def _on_device(self, host: Tensor) -> Tensor:
        return torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)

    def _views(self, flat: Tensor) -> list[Tensor]:
        return [
            flat[start : start + p.numel() * p.element_size()].view(p.dtype).view(p.shape)
            for start, p in zip(self._starts[:-1], self._body, strict=True)
        ]

    def _set(self, body: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        for parameter, values in zip((*self._body, *self._head), (*body, *heads), strict=True):
            parameter.data = values


def _starts(parameters: Sequence[nn.Parameter], unit: int, shifts: Sequence[int]) -> list[int]:
    """Offsets, each its shift above a multiple of `unit`, and the end of the last parameter; bytes."""
    starts, end = [], 0
    for parameter, shift in zip(parameters, shifts, strict=True):
        start = -(-(end - shift) // unit) * unit + shift
        starts.append(start)
        end = start + parameter.numel() * parameter.element_size()
    return [*starts, end]


def _shared(parameters: Sequence[nn.Parameter], starts: Sequence[int], size: int, file: Path, dist: Dist) -> int:
    """A descriptor of the written and unlinked file, on every rank."""
    problem, descriptor = "", -1
    if dist.is_main:
        try:
            _write(parameters, starts, size, file)
        except OSError as error:
            problem = str(error)
            with suppress(OSError):
                file.unlink()
    problem = dist.broadcast_object(problem)
    if not problem:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            problem = str(error)
        if not dist.all_ok(not problem):  # every rank has it open, or none goes on
            problem = problem or "another process cannot open the file"
        if dist.is_main:
            file.unlink(missing_ok=True)
    if problem:
        if descriptor >= 0:
            os.close(descriptor)
        raise DataError(
            f"an offloaded teacher cannot be put on disk: {problem}",
            where=str(file),
            found=f"{_free(file):,} bytes free",
            allowed=f"{size:,} bytes on a disk that all processes see",
            todo="make room, put `output` elsewhere, or use backend: resident",
        )
    return descriptor


def _write(parameters: Sequence[nn.Parameter], starts: Sequence[int], size: int, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        # Now, not at the first touch: a page that has no room on the disk would kill the process.
        os.posix_fallocate(stream.fileno(), 0, size)
        for parameter, start in zip(parameters, starts[:-1], strict=True):
            stream.seek(start)
            stream.write(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _trim_heap() -> None:
    """Give the pages of freed tensors back: glibc keeps blocks below 32 MB, about half of a small model, for itself."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # glibc has it, musl does not
        library.malloc_trim(0)


def _free(file: Path) -> int:
    folder = file.parent if file.parent.is_dir() else Path.cwd()
    return shutil.disk_usage(folder).free
