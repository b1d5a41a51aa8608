"""Large products equal float64 ones, whichever library computes them, and so do the gradients of linear layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import mtkd.models.products
from mtkd.models.linear import speed_up_linears
from mtkd.models.products import linear, product


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtkd.models.products, "_WORTH", 0)


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


def test_small_products_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """At exactly the number of multiplications where the rule changes sides, counted where oneDNN is called."""
    calls, inner = [], mtkd.models.products._forward
    monkeypatch.setattr(mtkd.models.products, "_forward", lambda *sides: calls.append(1) or inner(*sides))
    inputs, weight = sides(4, 8, 16)
    for worth, wanted in ((4 * 8 * 16 + 1, 0), (4 * 8 * 16, 1)):
        monkeypatch.setattr(mtkd.models.products, "_WORTH", worth)
        calls.clear()
        linear(inputs, weight, None)
        assert len(calls) == wanted
    assert torch.equal(linear(inputs.double(), weight.double(), None), inputs.double() @ weight.double().t())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(inputs, weight, None), nn.functional.linear(inputs, weight))
    assert len(calls) == 1


def layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), Conv1D(5, 10), nn.Linear(5, 3, bias=False))


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6)])
@pytest.mark.parametrize("frozen", [(), ("0.weight", "2.bias"), ("0.weight", "0.bias", "2.weight", "2.bias")])
def test_linear_layers_and_their_gradients_equal_float64(shape: tuple[int, ...], frozen: tuple[str, ...]) -> None:
    plain, inputs = layers().double(), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    fast = copy.deepcopy(plain).float()
    speed_up_linears(fast)
    fast = copy.deepcopy(fast)  # a copy computes with its own weights
    found = []
    for model, given in ((fast, inputs), (plain, inputs.double())):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in frozen)
        given = given.clone().requires_grad_()
        output = model(given)
        output.square().sum().backward()
        found.append([output, given.grad, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(fast(inputs), found[0][0])
    assert list(fast.state_dict()) == list(plain.state_dict())


def test_a_layer_of_another_class_or_with_its_own_forward_is_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    model = nn.ModuleList([Doubled(2, 2), nn.Linear(2, 2)])
    model[1].forward = own = model[1].forward
    speed_up_linears(model)
    assert "forward" not in vars(model[0])
    assert model[1].forward is own


def test_checkpointed_layers_recompute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, inputs = layers(), torch.randn(4, 6).requires_grad_()
    speed_up_linears(model)
    whole = torch.autograd.grad(model(inputs).sum(), [inputs, *model.parameters()])
    again = torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(again.sum(), [inputs, *model.parameters()]), whole, strict=True):
        assert torch.equal(ours, theirs)
