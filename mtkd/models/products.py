"""Large matrix products: ``x @ w.t()`` in float32 on a CPU goes to oneDNN.

torch sends float32 products to MKL, which leaves half of the vector unit idle on CPUs of other makers (measured on an
AMD EPYC with AVX-512, 2 cores: 190 GFLOP/s, oneDNN 480); oneDNN is in every CPU build of torch. Other types and devices
and small products take torch's own way. Which library computes a product is a matter of its shape alone, never of a
measurement: the two differ in the last bit, and a resumed run must repeat every bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Multiplications from which oneDNN is the faster one; below, its fixed cost of some 10 microseconds per call is more
# than it saves (measured: equal at 64 x 256 x 256, twice as fast from 256 x 256 x 256 on in all three products).
_WORTH = 2**24


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.t()``: [n,k] and [m,k] -> [n,m]; either side may be a transposed view."""
    if not _onednn(left, right):
        return left @ right.t()
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear`, [..., k] and [m,k] -> [..., m], with its gradients' products through `product`."""
    # A compiler has its own choice of library; autocast casts inside torch's own function.
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(inputs.device.type)
    size = inputs.numel() * weight.shape[0]
    if plain or not _large(inputs, weight, size):
        return torch.nn.functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and (
        inputs.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        output: Tensor = _Linear.apply(inputs, weight, bias)
        return output
    return _forward(inputs, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return _forward(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        flat, rows = grad.reshape(-1, grad.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
        to_inputs, to_weight, to_bias = ctx.needs_input_grad
        return (
            product(flat, weight.t()).reshape(inputs.shape) if to_inputs else None,
            product(flat.t(), rows.t()) if to_weight else None,
            flat.sum(0) if to_bias else None,
        )


def _forward(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _onednn(left: Tensor, right: Tensor) -> bool:
    # The operator has no gradient.
    graph = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
    return not graph and _large(left, right, left.numel() * right.shape[0])


def _large(left: Tensor, right: Tensor, size: int) -> bool:
    # The operator is the one that torch.compile emits for nn.Linear; a build without it takes the other way. It does
    # not know empty products.
    return (
        size >= _WORTH
        and size > 0
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
