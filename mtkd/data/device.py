"""From the host's memory to a device, and when asking a device costs nothing.

A value that the host reads of a GPU (`int(x)`, `x.nonzero()`, `x[mask]`) makes it wait for all that it has asked for,
and the GPU then waits for the host. So what is known of a batch when it is collated is worked out there and moved;
docs/waits.md lists the waits that are left.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moved(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on `device`; the host does not wait until they are there."""
    if device.type == "cuda" and values.device.type == "cpu":
        # What is not pinned goes through the driver's own buffer, and waits for room in it.
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def free_to_ask(values: Tensor) -> bool:
    """Whether the host reads a value without waiting for other work: it lies in its own memory."""
    return values.device.type == "cpu"
