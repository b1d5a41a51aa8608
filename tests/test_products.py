"""Products of vocabulary size equal float64 ones, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtkd.products import product


def sides(n: int, k: int, m: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator), torch.randn(m, k, generator=generator)


@pytest.mark.parametrize(("n", "k", "m"), [(1, 1, 1), (3, 5, 7), (64, 33, 130), (0, 4, 5), (4, 5, 0)])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
def test_product_equals_float64(n: int, k: int, m: int, transposed: tuple[bool, bool]) -> None:
    left, right = (x.t().contiguous().t() if t else x for x, t in zip(sides(n, k, m), transposed, strict=True))
    torch.testing.assert_close(product(left, right), (left.double() @ right.double().t()).float(), rtol=1e-4, atol=1e-5)


def test_other_types_and_gradients_take_torchs_product() -> None:
    left, right = sides(3, 4, 5)
    assert torch.equal(product(left.double(), right.double()), left.double() @ right.double().t())
    assert product(left.bfloat16(), right.bfloat16()).dtype == torch.bfloat16
    left.requires_grad_()
    product(left, right).sum().backward()
    torch.testing.assert_close(left.grad, right.sum(0).expand(3, 4))


def test_rows_of_a_view_are_read_at_their_place() -> None:
    left, right = sides(6, 4, 8)
    torch.testing.assert_close(product(left[2:5], right[:3]), left[2:5] @ right[:3].t())
