"""Beyond the teacher: away from what it was before it learnt, which counts negatively."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from mtkd.errors import UserError, nearest
from mtkd.weightings.base import Weighting
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits

_WHERE = "@weighting.options"


@weighting("exopd", reads=(), negative=True)
class ExtrapolatedTeachers(Weighting):
    """``w_T = scale / n`` for each of n teachers, ``w_ref = (1 - scale) / n`` for the model that each was made from.

    With rows that are linear in the teachers' log-probabilities (`reverse_kl`, `policy_gradient`) the student then
    maximises the reward ``scale log(p_T / p_ref)`` under ``KL(p_S || p_ref)``: its best distribution is
    ``p_ref (p_T / p_ref)^scale``, beyond the teacher for a scale above 1. Such weights make no mixture of other losses.

    Options: `reference` is the name of the teacher that is the others' base, or {teacher: its base}; `scale`, 1.25.

    Raises: UserError for an unknown name, a teacher without a base, or a scale that is not positive.
    Source: 2026, G-OPD: generalised on-policy distillation, arXiv 2602.12125 (ExOPD, reward scaling).
    """

    only_losses: ClassVar[frozenset[str]] = frozenset({"reverse_kl", "policy_gradient"})
    values: Tensor

    def __init__(self, teachers: tuple[str, ...], reference: str | Mapping[str, str], scale: float = 1.25) -> None:
        super().__init__()
        if not 0 < scale < float("inf"):
            raise UserError("the scale of the reward is positive", where=f"{_WHERE}.scale", found=scale)
        self.register_buffer("values", torch.tensor(_weights(teachers, reference, scale)))

    def forward(self, traits: Traits) -> Tensor:
        return self.values[:, None, None].expand(traits.shape)


def _weights(teachers: tuple[str, ...], reference: str | Mapping[str, str], scale: float) -> list[float]:
    if len(teachers) == 1:  # nothing to go away from
        return [1.0]
    bases = dict(reference) if isinstance(reference, Mapping) else {}
    if not isinstance(reference, Mapping):
        bases = {name: reference for name in teachers if name != reference}
    where = f"{_WHERE}.reference"
    for name in (*bases, *bases.values()):
        if name not in teachers:
            raise UserError("no teacher of the stage has this name", where=where, found=name, allowed=teachers,
                            todo=nearest(str(name), teachers))  # fmt: skip
    if missing := [name for name in teachers if name not in bases and name not in bases.values()]:
        raise UserError("a teacher has no base", where=where, found=missing[0], todo=f"{{{missing[0]}: BASE}}")
    if both := sorted(bases.keys() & set(bases.values())):
        raise UserError("a base has no base itself", where=where, found=both[0])
    weights = dict.fromkeys(teachers, 0.0)
    for name, base in bases.items():
        weights[name] += scale / len(bases)
        weights[base] += (1 - scale) / len(bases)
    return [weights[name] for name in teachers]
