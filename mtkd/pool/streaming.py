"""Parameters that stay in their own safetensors files: each layer's are in memory while that layer runs.

For a teacher that is larger than memory. The files are mapped read-only and never copied to another place: a layer's
pages are read into the kernel's page cache by a second thread while the layer before it runs, become this process's
memory when the layer touches them, and are given back after it. A forward pass so reads every weight once, at any
size of its batch: a large batch is what makes it cheap.

Values are those of a resident teacher. That one has every weight in float32, and autocast rounds it to bfloat16 again
where a product asks for it; here a product of that kind takes a weight as it is stored, and what else a layer has
is made float32 while it runs.
"""

from __future__ import annotations

import math
import mmap
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mtkd.errors import DataError
from mtkd.models.attention import active_recorder
from mtkd.models.broken import broken_weights
from mtkd.models.stored import StoredWeight


class WeightFiles:
    """Safetensors files mapped into memory.

    Args:
        weights: all that will be read; they tell the files.
    Raises:
        DataError: a file cannot be opened, or is shorter than it was when its header was read.
    """

    def __init__(self, weights: Sequence[StoredWeight]) -> None:
        ends: dict[Path, int] = {}
        for weight in weights:
            ends[weight.file] = max(ends.get(weight.file, 0), weight.end)
        self._maps: dict[Path, mmap.mmap] = {}
        self._descriptors: dict[Path, int] = {}
        for file, end in ends.items():
            try:
                self._open(file, end)
            except OSError as error:
                self.close()
                raise DataError(f"the weights cannot be mapped: {error}", where=str(file)) from error

    def _open(self, file: Path, end: int) -> None:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        self._descriptors[file] = descriptor
        if os.fstat(descriptor).st_size < end:
            raise OSError("it was cut short since its header was read")
        self._maps[file] = mmap.mmap(descriptor, end, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)

    def read(self, weight: StoredWeight) -> Tensor:
        """The values, mapped where they are aligned: never to be written to, and valid until `close`."""
        count = weight.num_bytes // weight.dtype.itemsize
        if not count:
            return torch.empty(weight.shape, dtype=weight.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # a frozen teacher is never written
            if weight.start % weight.dtype.itemsize:  # files of old writers; a product of such operands may crash
                raw = torch.frombuffer(self._maps[weight.file], dtype=torch.uint8, count=weight.num_bytes,
                                       offset=weight.start).clone().view(weight.dtype)  # fmt: skip
            else:
                raw = torch.frombuffer(self._maps[weight.file], dtype=weight.dtype, count=count, offset=weight.start)
        return raw.view(weight.shape)

    def fetch(self, weights: Sequence[StoredWeight]) -> None:
        """Read into the page cache: memory that the kernel takes back when it needs it."""
        for weight in weights:
            os.posix_fadvise(self._descriptors[weight.file], weight.start, weight.num_bytes, os.POSIX_FADV_WILLNEED)

    def drop(self, weights: Sequence[StoredWeight]) -> None:
        """Give the pages back that this process has of them; a page at a border is read again when it is touched."""
        for weight in weights:
            if weight.num_bytes:
                start = weight.start - weight.start % mmap.PAGESIZE
                self._maps[weight.file].madvise(mmap.MADV_DONTNEED, start, weight.end - start)

    def drop_all(self) -> None:
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        for mapped in self._maps.values():
            with suppress(BufferError):  # logits that are still in use: the mapping goes with them
                mapped.close()
        self._descriptors, self._maps = {}, {}


@dataclass(frozen=True)
class _Slot:
    """A parameter and what is stored of it; `product`: a matrix that only products read, which autocast casts."""

    parameter: nn.Parameter
    weight: StoredWeight
    product: bool


@dataclass
class _Unit:
    """What comes and goes together: a layer, or a module outside the layers with its own parameters."""

    module: nn.Module
    slots: list[_Slot]
    coming: Future[None] | None = field(default=None, repr=False)

    @property
    def weights(self) -> list[StoredWeight]:
        return [slot.weight for slot in self.slots]


class StreamedParameters:
    """Parameters in the files of a model's folder; a `Waiting` (`mtkd.pool.waiting`) that goes layer by layer.

    A layer is an element of an outermost `ModuleList`. Outside of layers every module with parameters of its own comes
    by itself; of an embedding only the rows that are looked up. Between times every parameter is NaN, so that what
    would read it then is noticed (`OffloadedModel.verify` runs once).

    Args:
        model: its parameters may be on the meta device; they are replaced, and its persistent buffers filled.
        weights: per name of its state, as `mtkd.models.weights.find_weights` has it.
        head: module of the output head, read by `keep_head` and not by its forward pass; None for a classifier.
        device: where layers run.
    Raises:
        DataError: files that cannot be mapped.
    """

    def __init__(
        self, model: PreTrainedModel, weights: Mapping[str, StoredWeight], head: nn.Module | None, device: torch.device
    ) -> None:
        self._files = WeightFiles(list(weights.values()))
        self._device = device
        self._unchecked = set(weights.values())
        self._stored: dict[int, StoredWeight] = {}  # by the id of the parameter
        self._kept: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._held: set[int] = set()
        self._parameters: list[nn.Parameter] = []
        self._place(model, weights)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="mtkd-stream")
        self._units: list[_Unit] = []
        self._hooks: list[Any] = []
        for unit in self._units_of(model):
            if type(unit.module) is nn.Embedding and unit.module.max_norm is None:
                unit.module.forward = MethodType(partial(_look_up, self), unit.module)  # type: ignore[method-assign]
            elif unit.slots:
                self._hook(unit, by_tap=unit.module is head)

    @property
    def mapped(self) -> bool:
        return self._device.type == "cpu"

    def prefetch(self) -> None:
        self._announce(0)

    def arrive(self) -> None:
        self._announce(0)

    def leave(self) -> None:
        for unit in self._units:
            self._free(unit)
        self._files.drop_all()
        for unit in self._units:
            self._finish(unit)

    def keep_head(self, head: Tensor) -> Tensor:
        weight = self._stored[id(head)]
        if head.dim() < 2:  # a bias
            return self._read(weight).to(self._device, torch.float32, copy=True)
        if self._device.type == "cpu":
            return self._read(weight)  # mapped: read at any time, by `MappedLogits`
        whole = self._kept.get(id(head))
        if whole is None:
            whole = self._here(weight, torch.float32)
            self._kept[id(head)] = whole
        return whole

    def drop(self) -> None:
        self._files.drop_all()

    @contextmanager
    def hold(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Within it these may be read outside their modules' forward passes, in float32."""
        for parameter in parameters:
            self._held.add(id(parameter))
            parameter.data = self._here(self._stored[id(parameter)], torch.float32)
        try:
            yield
        finally:
            for parameter in parameters:
                self._held.discard(id(parameter))
                parameter.data = self._absent(parameter)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.data = torch.empty(0)  # read by mistake, it has the wrong shape
        self._hooks, self._units, self._parameters = [], [], []
        self._files.close()

    def look_up(self, ids: Tensor, parameter: Tensor) -> Tensor:
        """Rows of an embedding in float32, [..., H] for ids [...]."""
        weight = self._stored[id(parameter)]
        rows = nn.functional.embedding(ids.to("cpu"), self._read(weight)).to(self._device).float()
        self._files.drop([weight])
        return rows

    def _place(self, model: PreTrainedModel, weights: Mapping[str, StoredWeight]) -> None:
        """A stand-in for every parameter, one for tied ones, and the values of persistent buffers."""
        stand_ins: dict[int, nn.Parameter] = {}
        for path, module in model.named_modules():
            for name, old in list(module._parameters.items()):
                if old is None:
                    continue
                if id(old) not in stand_ins:
                    stand_ins[id(old)] = nn.Parameter(self._absent(old), requires_grad=False)
                    self._stored[id(stand_ins[id(old)])] = weights[f"{path}.{name}" if path else name]
                    self._parameters.append(stand_ins[id(old)])
                module._parameters[name] = stand_ins[id(old)]
            for name, buffer in module._buffers.items():
                stored = weights.get(f"{path}.{name}" if path else name)
                if buffer is not None:
                    value = buffer if stored is None else self._read(stored).to(buffer.dtype, copy=True)
                    module._buffers[name] = value.to(self._device)

    def _absent(self, parameter: Tensor) -> Tensor:
        # one number seen in every place
        return torch.full((1,), torch.nan, device=self._device).expand(parameter.shape)

    def _units_of(self, module: nn.Module) -> Iterator[_Unit]:
        if isinstance(module, nn.ModuleList):
            for layer in module:
                if isinstance(layer, nn.ModuleList):  # is not called itself
                    yield from self._units_of(layer)
                else:
                    yield _Unit(layer, [s for inner in layer.modules() for s in self._slots(inner)])
            return
        yield _Unit(module, self._slots(module))
        for child in module.children():
            yield from self._units_of(child)

    def _slots(self, module: nn.Module) -> list[_Slot]:
        multiplies = type(module) in (nn.Linear, Conv1D)
        own = module.named_parameters(recurse=False)
        return [_Slot(p, self._stored[id(p)], multiplies and name == "weight") for name, p in own]

    def _hook(self, unit: _Unit, *, by_tap: bool) -> None:
        number = len(self._units) if not by_tap else -1
        if not by_tap:
            self._units.append(unit)
        self._hooks.append(unit.module.register_forward_pre_hook(partial(self._before, unit, number)))
        self._hooks.append(unit.module.register_forward_hook(partial(self._after, unit), always_call=True))

    def _before(self, unit: _Unit, number: int, *_: Any) -> None:
        if number < 0 and active_recorder() is not None:
            return  # the head hands its input on; its weights are read later, by `keep_head`
        self._finish(unit)
        self._announce(number + 1)
        cast = torch.is_autocast_enabled(self._device.type)
        for slot in unit.slots:
            if id(slot.parameter) not in self._held:
                stored = slot.weight.dtype
                as_stored = cast and slot.product and stored != torch.float64  # autocast leaves that one alone
                as_stored = as_stored or not stored.is_floating_point  # whole numbers of a number format
                slot.parameter.data = self._here(slot.weight, stored if as_stored else torch.float32)

    def _after(self, unit: _Unit, *_: Any) -> None:
        self._free(unit)
        self._files.drop(unit.weights)

    def _free(self, unit: _Unit) -> None:
        for slot in unit.slots:
            if id(slot.parameter) not in self._held:
                slot.parameter.data = self._absent(slot.parameter)

    def _announce(self, number: int) -> None:
        """Begin to read a unit."""
        if number < len(self._units) and self._units[number].coming is None:
            unit = self._units[number]
            unit.coming = self._reader.submit(self._files.fetch, unit.weights)

    def _finish(self, unit: _Unit) -> None:
        coming, unit.coming = unit.coming, None
        if coming is not None:
            coming.result()  # raises what the thread raised

    def _here(self, weight: StoredWeight, dtype: torch.dtype) -> Tensor:
        """The values on the device: mapped where they can be, else a copy."""
        raw = self._read(weight)
        values = raw.to(self._device).to(dtype)  # the smaller form goes to the device
        if values is not raw:
            self._files.drop([weight])
        return values

    def _read(self, weight: StoredWeight) -> Tensor:
        """The values as they are stored, mapped; looked at when they are read for the first time."""
        values = self._files.read(weight)
        if weight in self._unchecked:
            self._unchecked.discard(weight)
            # NaN passes through both; a hundred times as fast as `isfinite` in bfloat16 on a CPU, and without copies
            if values.numel() and not all(math.isfinite(end) for end in torch.aminmax(values)):
                raise broken_weights(str(weight.file), weight.name)
        return values


def _look_up(streamed: StreamedParameters, embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """Forward of an embedding without its table."""
    return streamed.look_up(ids, embedding.weight)
