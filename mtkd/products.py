"""Matrix products of vocabulary size: ``x @ w.t()`` in float32 on a CPU goes to oneDNN.

torch sends float32 products to MKL, which leaves half of the vector unit idle on CPUs of other makers (measured on an
AMD EPYC with AVX-512, 2 cores: 190 GFLOP/s, oneDNN 480); oneDNN is in every CPU build of torch. Forward only: the tiles
write their own backward pass. Other types and devices take torch's own product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.t()``: [n,k] and [m,k] -> [n,m]; either side may be a transposed view."""
    if not _onednn(left, right):
        return left @ right.t()
    return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")


def _onednn(left: Tensor, right: Tensor) -> bool:
    # The operator is the one that torch.compile emits for nn.Linear; a build without it takes the other way. It has no
    # gradient, and does not know empty products.
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad))
        and left.numel() > 0
        and right.numel() > 0
    )
