"""A GPU that is pretended on the CPU: which calls would make the host wait for it, and which tensors would not meet.

Tensors carry no mark of their own. A tensor is "on the device" when its storage is: parameters that the test names,
what is made with `device=` or moved with `.to(device)`, and every result of an operation with such a tensor. All
others are the host's. `torch.device` objects mean the device, the text "cpu" the host.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtkd

_LIBRARY = Path(mtkd.__file__).parent
_READ = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique", "_unique2"}
"""Operations whose result, or its size, the host reads."""
_MASKABLE = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


@dataclass
class PretendGPU:
    """What would have happened on a GPU within `with gpu:`.

    Attributes:
        waits: (kind, file:function of the library) of every call at which the host waits, by step.
        apart: (operation, place) of operations on tensors of both sides, which fail there.
        step: number that waits are counted under.
    """

    waits: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    apart: list[tuple[str, str]] = field(default_factory=list)
    step: int = -1

    def __post_init__(self) -> None:
        # By the address of a storage. A weak reference keeps it from being another one's.
        self._there: dict[int, StorageWeakRef] = {}
        self._modes = (_Calls(self), _Operations(self))

    def __enter__(self) -> PretendGPU:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def take(self, modules: Iterable[nn.Module]) -> None:
        """Put the parameters and buffers of modules on the device."""
        for module in modules:
            self.put([*module.parameters(), *module.buffers()], there=True)

    def has(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._there

    def put(self, values: Any, *, there: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._there.pop(storage._cdata, None)
                if there:
                    self._there[storage._cdata] = StorageWeakRef(storage)

    def note(self, kind: str) -> None:
        self.waits.setdefault(self.step, []).append((kind, _place()))

    def note_apart(self, operation: str) -> None:
        self.apart.append((operation, _place()))


def _place() -> str:
    """The innermost function of the library that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if _LIBRARY in file.parents:
            return f"{file.relative_to(_LIBRARY).as_posix()}:{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "outside"


class _Operations(TorchDispatchMode):
    """Sees every operation, of backward passes too."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, name = self._gpu, func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        there = [gpu.has(x) for x in given]
        if any(there):
            self._look(name, args, given, there)
        result = func(*args, **(kwargs or {}))
        gpu.put(result, there=any(there) and name != "_local_scalar_dense")
        return result

    def _look(self, name: str, args: Any, given: list[Tensor], there: list[bool]) -> None:
        gpu = self._gpu
        masks = name in _MASKABLE and any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1]))
        if masks and len(args) > 2 and args[2].numel() == 1:
            masks = False  # one value at a mask: torch fills
        if name in _READ or masks:
            gpu.note(f"{name} of a mask" if masks else name)
        hosts = [x for x, is_there in zip(given, there, strict=True) if not is_there and x.dim() > 0]
        if not hosts:
            return
        if name in _MASKABLE and all(any(x is y for y in tree_leaves(args[1])) for x in hosts):
            gpu.note(f"{name} with the host's positions")
        elif name == "copy_":
            if not (len(args) > 2 and args[2]):
                gpu.note("copy_")
        else:
            gpu.note_apart(name)


class _Calls(TorchFunctionMode):
    """Sees what no operation shows: values that Python reads, and the device that a tensor is made on or moved to."""

    def __init__(self, gpu: PretendGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gpu, named = self._gpu, kwargs or {}
        if func is Tensor.to or func is Tensor.cpu:
            return self._moved(func, args, named)
        if func in (Tensor.tolist, Tensor.numpy) and gpu.has(args[0]):
            gpu.note(func.__name__)
        if func is Tensor.pin_memory:
            return args[0].clone()
        if func in (Tensor.__getitem__, Tensor.__setitem__) and gpu.has(args[0]):
            args = (args[0], self._index(args[1]), *args[2:])
        result = func(*args, **named)
        if isinstance(named.get("device"), torch.device):
            if func in (torch.tensor, torch.as_tensor):
                gpu.note("values of Python")
            gpu.put(result, there=True)
        return result

    def _index(self, index: Any) -> Any:
        """An index without lists, which become tensors on the device out of sight of any operation."""
        if isinstance(index, tuple):
            return tuple(self._index(part) for part in index)
        if not isinstance(index, list):
            return index
        self._gpu.note("index with a list")
        positions = torch.tensor(index)
        self._gpu.put(positions, there=True)
        return positions

    def _moved(self, func: Callable[..., Any], args: Any, named: dict[str, Any]) -> Any:
        gpu, values = self._gpu, args[0]
        targets = [x for x in (*args[1:], *named.values()) if isinstance(x, (str, torch.device))]
        to_host = func is Tensor.cpu or "cpu" in targets
        to_device = any(isinstance(x, torch.device) for x in targets)
        result = func(*args, **named)
        if to_host and gpu.has(values):
            gpu.note("cpu")
            result = result.clone()
            gpu.put(result, there=False)
        elif to_device and not gpu.has(values):
            if not named.get("non_blocking"):
                gpu.note("to")
            result = result.clone()
            gpu.put(result, there=True)
        return result
