"""Head and divergence alone, forward and backward from hidden states: N positions, V columns, widths 256 and 512."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sides.setting import STUDENT, TEACHER, Result, forget_peak, peak_mb, resident_mb


def measure(side: str, positions: int, columns: int, repeats: int) -> Result:
    """Loss, least seconds, and memory over inputs and gradients (MB) of one side.

    The sides load and warm up on a small problem first, so that libraries and threads do not count as memory.
    """
    run = SIDES[side]
    run(_inputs(64, 1_000))()
    inputs = _inputs(positions, columns)
    gradients = (inputs[0].numel() + inputs[1].numel()) * 4 / 1e6
    call = run(inputs)
    before = resident_mb()
    forget_peak()
    seconds, first = [], 0.0
    for number in range(repeats + 1):
        inputs[0].grad = inputs[1].grad = None
        begun = time.perf_counter()
        loss = call()
        loss.backward()
        seconds.append(time.perf_counter() - begun)
        first = first if number else float(loss.detach())
        del loss
    return {"first_loss": first, "best": min(seconds), "over_mb": peak_mb() - before - gradients}


def _inputs(positions: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of the student (with gradients) and of the teacher, and labels."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(positions, STUDENT["hidden_size"]), (columns, STUDENT["hidden_size"])]
    shapes += [(positions, TEACHER["hidden_size"]), (columns, TEACHER["hidden_size"])]
    hidden, head, theirs, their_head = (torch.randn(shape, generator=draw) for shape in shapes)
    head.mul_(0.05).requires_grad_()
    their_head.mul_(0.05)
    labels = torch.randint(columns, (positions,), generator=draw)
    return hidden.requires_grad_(), head, theirs, their_head, labels


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _mtkd(inputs: Inputs) -> Callable[[], Tensor]:
    """The objective of a stage, whose student is a bare output head on the given hidden states."""
    from mtkd.data.batch import Batch, position_counts
    from mtkd.models.features import HeadLogits
    from sides import ours

    hidden, head, theirs, their_head, labels = inputs
    whole = ours.objective(_Given(hidden, head), {"teacher": _Given(theirs, their_head)}, [ours.JSD])  # type: ignore
    ids = labels[None]
    batch = Batch(torch.zeros(1, dtype=torch.long), ids, torch.ones_like(ids, dtype=torch.bool), ids)
    counts = position_counts([batch])
    teacher = {"logits": HeadLogits(theirs[None], their_head, None, len(their_head))}
    return lambda: whole(batch, [dict(teacher)], counts)[0]


class _Given(nn.Module):
    """Looks like a TappedModel whose hidden states are given."""

    def __init__(self, hidden: Tensor, head: Tensor) -> None:
        from transformers import LlamaConfig

        from mtkd.models.info import model_info

        super().__init__()
        config = LlamaConfig(vocab_size=len(head), hidden_size=head.shape[1], num_hidden_layers=1)
        self.info, self.vocabulary, self.token_level = model_info(config, "AutoModelForCausalLM"), None, True
        self.hidden, self.head = hidden, head

    def forward(self, batch, wants: frozenset[str]):
        from mtkd.models.features import HeadLogits

        return {"logits": HeadLogits(self.hidden[None], self.head, None, len(self.head))}


def _peer(name: str, *more: bool) -> Callable[[Inputs], Callable[[], Tensor]]:
    def make(inputs: Inputs) -> Callable[[], Tensor]:
        from sides import trls

        hidden, head, theirs, their_head, labels = inputs
        shaped = (hidden[None], head, theirs[None], their_head, labels[None])
        return lambda: getattr(trls, name)(*shaped, *more)

    return make


SIDES: dict[str, Callable[[Inputs], Callable[[], Tensor]]] = {
    "mtkd": _mtkd,
    "trl": _peer("plain"),
    "trl-chunked": _peer("chunked"),
    "liger": _peer("liger", False),
    "liger-compiled": _peer("liger", True),
}
