"""The tiled pass against the whole one: what the laws of every loss do not cover."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtkd.losses.spec import LOSSES
from mtkd.models.features import HeadLogits
from mtkd.objective.tiles import tiled

POSITIONS, WIDTH, COLUMNS = 11, 6, 13
KL, CE = LOSSES["kl"], LOSSES["ce"]


class Problem:
    """A head with padded columns, two teachers and labels at some positions of a batch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(3)

        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = rand(3, 5, WIDTH).to(dtype).requires_grad_()
        self.weight = rand(COLUMNS + 3, WIDTH).to(dtype).requires_grad_()
        self.bias = rand(COLUMNS + 3).to(dtype).requires_grad_()
        self.weights = rand(2, POSITIONS).abs().requires_grad_()
        self.index = torch.randperm(15, generator=generator)[:POSITIONS].sort().values
        self.teachers = [2 * rand(POSITIONS, COLUMNS) for _ in range(2)]
        self.labels = torch.randint(COLUMNS, (POSITIONS,), generator=generator)
        self.mask = torch.arange(POSITIONS) % 4 != 1
        self.sizes: list[int] = []

    @property
    def parts(self) -> list[Tensor]:
        return [self.hidden, self.weight, self.bias, self.weights]

    def tile_loss(self, student: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(student))
        soft = sum((w * KL(student, t[at], self.mask[at])).sum() for w, t in zip(weights, self.teachers, strict=True))
        hard = CE(student, self.labels[at], self.mask[at]).sum()
        assert isinstance(soft, Tensor)
        return (soft + 0.5 * hard) / 9, torch.stack([soft.detach(), hard.detach()])

    def whole(self) -> tuple[Tensor, Tensor]:
        rows = self.hidden.reshape(-1, WIDTH)[self.index]
        logits = nn.functional.linear(rows, self.weight[:COLUMNS], self.bias[:COLUMNS])
        return self.tile_loss(logits, self.weights, slice(None))

    def in_tiles(self, tile: int = 4) -> tuple[Tensor, Tensor]:
        head = HeadLogits(self.hidden, self.weight, self.bias, COLUMNS)
        return tiled(head, self.index, self.weights, self.tile_loss, tile=tile, dtype=torch.float32)


def close(found: Tensor | None, wanted: Tensor | None) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 3, 11, 64])
def test_several_rows_share_the_pass(tile: int) -> None:
    """Loss, metrics and gradients of several rows in tiles of any size are those over all logits."""
    problem = Problem()
    loss, metrics = problem.in_tiles(tile)
    found = torch.autograd.grad(loss, problem.parts)
    assert max(problem.sizes) == min(tile, POSITIONS)  # no more logits than a tile's exist at one time
    assert sum(problem.sizes) == POSITIONS
    wanted_loss, wanted_metrics = problem.whole()
    close(loss, wanted_loss)
    close(metrics, wanted_metrics)
    for ours, theirs in zip(found, torch.autograd.grad(wanted_loss, problem.parts), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("logits", [1, 30, 60])  # chunks of 1, 2 and 4 rows: they divide a tile of 5 or do not
def test_chunks_inside_a_tile(logits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a tile's elementwise work is cut changes no value and no gradient."""
    problem = Problem()
    wanted_loss, wanted_metrics = problem.whole()
    wanted = torch.autograd.grad(wanted_loss, problem.parts)
    problem.sizes.clear()
    monkeypatch.setattr("mtkd.models.pieces._CHUNK_LOGITS", logits)
    loss, metrics = problem.in_tiles(5)
    assert max(problem.sizes) == max(1, logits // COLUMNS)
    close(loss, wanted_loss)
    close(metrics, wanted_metrics)
    for ours, theirs in zip(torch.autograd.grad(loss, problem.parts), wanted, strict=True):
        close(ours, theirs)
    with torch.no_grad():
        close(problem.in_tiles(5)[0], wanted_loss.detach())


def test_gradients_are_scaled_by_what_comes_after() -> None:
    """Of 3 x loss^2 the gradients are those of the dense formula: backward multiplies what forward has worked out."""
    problem = Problem()
    found = torch.autograd.grad(3 * problem.in_tiles()[0] ** 2, problem.parts)
    wanted = torch.autograd.grad(3 * problem.whole()[0] ** 2, problem.parts)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs)


def test_positions_that_are_not_read_have_no_gradient() -> None:
    problem = Problem()
    (found,) = torch.autograd.grad(problem.in_tiles()[0], problem.hidden)
    unread = torch.ones(15, dtype=torch.bool).index_fill(0, problem.index, False)
    unread[problem.index[~problem.mask]] = True  # read, but masked out of every row
    assert not bool(found.reshape(15, -1)[unread].any())
    assert bool(found.reshape(15, -1)[~unread].any(-1).all())


def test_what_stands_at_unread_positions_does_not_matter() -> None:
    problem, spoiled = Problem(), Problem()
    unread = torch.ones(15, dtype=torch.bool).index_fill(0, problem.index, False)
    with torch.no_grad():
        spoiled.hidden.view(15, -1)[unread] = torch.nan
    for ours, theirs in zip(
        torch.autograd.grad(spoiled.in_tiles()[0], spoiled.parts),
        torch.autograd.grad(problem.in_tiles()[0], problem.parts),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_a_frozen_part_gets_no_gradient_and_changes_no_other(frozen: int) -> None:
    problem = Problem()
    wanted = torch.autograd.grad(problem.in_tiles()[0], problem.parts)
    problem.parts[frozen].requires_grad_(False)
    problem.in_tiles()[0].backward()
    for i, part in enumerate(problem.parts):
        close(part.grad, None if i == frozen else wanted[i])


def test_without_bias() -> None:
    """A head without a bias is one whose bias is 0."""
    problem = Problem()
    problem.bias = torch.zeros(COLUMNS + 3, requires_grad=True)
    head = HeadLogits(problem.hidden, problem.weight, None, COLUMNS)
    loss, _ = tiled(head, problem.index, problem.weights, problem.tile_loss, tile=4, dtype=torch.float32)
    parts = [problem.hidden, problem.weight, problem.weights]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parts), torch.autograd.grad(problem.whole()[0], parts), strict=True
    ):
        close(ours, theirs)


def test_a_tied_head_adds_to_the_embeddings_gradient() -> None:
    ids, problem = torch.tensor([[1, 2, 3, 4, 5]] * 3), Problem()

    def gradient(loss_of: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        problem.hidden = nn.functional.embedding(ids, problem.weight)
        (found,) = torch.autograd.grad(loss_of()[0], problem.weight)
        return found

    close(gradient(problem.in_tiles), gradient(problem.whole))
    assert bool(gradient(problem.in_tiles)[1:6].any(-1).all())


def test_bfloat16_parts_get_gradients_of_their_own_dtype() -> None:
    problem = Problem(torch.bfloat16)
    head = HeadLogits(problem.hidden, problem.weight, problem.bias, COLUMNS)
    loss, _ = tiled(head, problem.index, problem.weights, problem.tile_loss, tile=4, dtype=torch.bfloat16)
    loss.backward()
    assert loss.dtype == torch.float32
    assert [part.grad.dtype for part in problem.parts] == [part.dtype for part in problem.parts]  # type: ignore[union-attr]


def test_a_tile_in_which_no_row_reads_the_logits() -> None:
    """It adds nothing to the loss and to no gradient."""
    problem = Problem()

    def only_some(student: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        if at.start >= 4:
            return torch.zeros(()), torch.zeros(1)
        loss = student.square().sum()
        return loss, loss.detach()[None]

    head = HeadLogits(problem.hidden, problem.weight, problem.bias, COLUMNS)
    loss, _ = tiled(head, problem.index, problem.weights, only_some, tile=4, dtype=torch.float32)
    found = torch.autograd.grad(loss, problem.parts)
    rows = problem.hidden.reshape(-1, WIDTH)[problem.index[:4]]
    wanted = nn.functional.linear(rows, problem.weight[:COLUMNS], problem.bias[:COLUMNS]).square().sum()
    close(loss, wanted)
    for ours, theirs in zip(found[:3], torch.autograd.grad(wanted, problem.parts[:3]), strict=True):
        close(ours, theirs)
    assert not bool(found[3].any())


def test_without_grad_mode_no_gradient_is_worked_out() -> None:
    problem = Problem()
    seen: list[bool] = []
    inner = problem.tile_loss

    def watched(student: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        seen.append(student.requires_grad)
        return inner(student, weights, at)

    head = HeadLogits(problem.hidden, problem.weight, problem.bias, COLUMNS)
    with torch.no_grad():
        loss, _ = tiled(head, problem.index, problem.weights, watched, tile=4, dtype=torch.float32)
    assert seen == [False] * 3
    assert not loss.requires_grad
    close(loss, problem.whole()[0].detach())


def test_a_second_backward_says_why_it_fails() -> None:
    problem = Problem()
    loss, _ = problem.in_tiles()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
