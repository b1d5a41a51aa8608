"""Whole optimizer steps of mtkd: with K teachers, and taken apart into what no step can do without."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mtkd.models.linear import speed_up_linears
from mtkd.models.products import product
from sides import ours
from sides.setting import (
    BATCH,
    LEARNING_RATE,
    LENGTH,
    STUDENT,
    TEACHER,
    Result,
    llama,
    measured_steps,
    resident_mb,
    timed,
    token_ids,
)

POSITIONS = BATCH * (LENGTH - 1)
"""With a target; each row of the batch has one token that predicts nothing."""


def mtkd(teachers: int, repeats: int) -> Result:
    """Steps with K teachers in one process."""
    student, pool = ours.student_and_teachers(teachers)
    size = sum(p.numel() * p.element_size() for p in pool[0].parameters()) / 1e6
    loaded = resident_mb()
    step = ours.distil(student, pool, [ours.JSD], ours.text_batch())
    return {**measured_steps(step, repeats, loaded), "teacher_mb": size}


def slope(repeats: int) -> Result:
    """Seconds of steps with 1 to 4 of the same teachers, and of one bare forward, all alternating in one process.

    Under KL the teachers meet in one mixture before the student is read; under JSD each is compared by itself.
    """
    student, pool = ours.student_and_teachers(4)
    batch = ours.text_batch()
    work = {f"step_{k}": ours.distil(student, pool[:k], [ours.JSD], batch) for k in range(1, 5)}
    work |= {f"kl_{k}": ours.distil(student, pool[:k], [ours.KL], batch) for k in range(1, 5)}
    work |= {f"bare_{name}": call for name, call in _bare_teacher(pool[0]).items()}
    for function in work.values():
        function()
    return {name: min(seconds) for name, seconds in timed(work, repeats).items()}


def _bare_teacher(teacher) -> dict[str, Callable[[], object]]:
    """Backbone and whole head of one teacher without gradients: the head by mtkd's product, and by torch's."""
    ids = token_ids()
    model, plain = teacher.model.eval(), llama(TEACHER, 1).eval()
    head = model.lm_head.weight.detach()

    @torch.no_grad()
    def ours_() -> object:
        hidden = model.model(ids, use_cache=False).last_hidden_state
        return [product(rows, head) for rows in hidden[:, :-1].reshape(POSITIONS, -1).split(256)]

    @torch.no_grad()
    def torchs() -> object:
        return plain.model(ids, use_cache=False).last_hidden_state[:, :-1] @ head.t()

    return {"product": ours_, "torch": torchs}


def floor(repeats: int) -> Result:
    """The step and its parts, alternating in one process; the parts are what no implementation can leave out.

    Keys: `step`; `student` forward and backward below the head; `teacher` forward below the head, both as mtkd runs
    them and (`_torch`) as transformers does; `head_product` and
    `head_torch`, the four products of vocabulary size (student's logits, their gradient to the hidden states and to the
    head, teacher's logits) by mtkd's routine in tiles and by torch's whole; `optimizer`: clipping and AdamW.
    """
    student, (teacher,) = ours.student_and_teachers(1)
    step = ours.distil(student, [teacher], [ours.JSD], ours.text_batch())
    bare, (bare_teacher,) = ours.student_and_teachers(1)
    for each in (bare, bare_teacher):
        speed_up_linears(each)  # as the engine and the pool do
    ids, model = token_ids(), bare.model.train()
    plain_student, plain_teacher = llama(STUDENT, 0).train(), llama(TEACHER, 1)
    backbone_grad = torch.randn(BATCH, LENGTH, 256) * 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
    heads = _Heads(model.lm_head.weight.detach(), bare_teacher.model.lm_head.weight.detach())
    gradients = [torch.randn_like(p) * 1e-4 for p in model.parameters()]

    def student_alone(model=model) -> None:
        model.model.zero_grad()
        model.model(ids, use_cache=False).last_hidden_state.backward(backbone_grad)

    @torch.no_grad()
    def teacher_alone(model=bare_teacher.model) -> None:
        model.eval().model(ids, use_cache=False)

    def update_alone() -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    work: dict[str, Callable[[], object]] = {
        "step": step,
        "student": student_alone,
        "teacher": teacher_alone,
        "student_torch": partial(student_alone, plain_student),
        "teacher_torch": partial(teacher_alone, plain_teacher),
        "head_product": heads.tiled,
        "head_torch": heads.whole,
        "optimizer": update_alone,
    }
    for function in work.values():
        function()
    found = timed(work, repeats)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


class _Heads:
    """The products of both heads, [n,H] x [H,V] and back, on random inputs."""

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student, self.teacher = student, teacher
        self.hidden = torch.randn(POSITIONS, student.shape[1])
        self.teacher_hidden = torch.randn(POSITIONS, teacher.shape[1])

    @torch.no_grad()
    def tiled(self) -> Tensor:
        """By mtkd's product, 256 positions at a time: the logits stay in the allocator's hands."""
        total = self.student.new_zeros(self.student.shape[::-1])
        for hidden, theirs in zip(self.hidden.split(256), self.teacher_hidden.split(256), strict=True):
            product(theirs, self.teacher)
            logits = product(hidden, self.student)
            product(logits, self.student.t())
            total += product(hidden.t(), logits.t())
        return total

    @torch.no_grad()
    def whole(self) -> Tensor:
        """As torch computes them, all positions at once."""
        self.teacher_hidden @ self.teacher.t()
        logits = self.hidden @ self.student.t()
        logits @ self.student
        return logits.t() @ self.hidden
