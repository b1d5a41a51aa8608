"""ExOPD: the student's best distribution lies beyond the teacher, away from what the teacher was before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_weights import run_of

import mtkd
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES
from mtkd.weightings.spec import WEIGHTINGS


def weights(teachers: tuple[str, ...], **options: Any) -> dict[str, float]:
    found = WEIGHTINGS["exopd"](teachers=teachers, **options).values.tolist()
    return {name: pytest.approx(value) for name, value in zip(teachers, found, strict=True)}


def test_the_weights_are_the_rewards() -> None:
    """Law: scale on the teachers, 1 - scale on their bases, in any order; together 1."""
    assert weights(("math", "base"), reference="base", scale=2.0) == {"math": 2.0, "base": -1.0}
    assert weights(("base", "a", "b"), reference="base", scale=1.5) == {"base": -0.5, "a": 0.75, "b": 0.75}
    own = weights(("a", "x", "b", "y"), reference={"a": "x", "b": "y"}, scale=1.5)
    assert own == {"a": 0.75, "x": -0.25, "b": 0.75, "y": -0.25}
    assert weights(("alone",), reference="") == {"alone": 1.0}


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25, 3.0])
def test_the_best_student_lies_beyond_the_teacher(scale: float) -> None:
    """Law: the weighted reverse KLs are least, with gradient 0, at p_ref (p_T / p_ref)^scale: the paper's optimum."""
    draw = torch.Generator().manual_seed(0)
    teacher, base = torch.randn(2, 1, 7, generator=draw, dtype=torch.float64).log_softmax(-1)
    student = (base + scale * (teacher - base)).clone().requires_grad_()  # logits of the optimum
    both = weights(("t", "ref"), reference="ref", scale=scale)
    mask = torch.ones(1, dtype=torch.bool)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        divergence = LOSSES["reverse_kl"].function
        parts = {"t": divergence(logits, teacher, mask), "ref": divergence(logits, base, mask)}
        return sum(both[name].expected * part for name, part in parts.items()).sum()

    least = objective(student)
    least.backward()
    assert float(student.grad.abs().max()) < 1e-12
    for _ in range(20):
        other = student.detach() + 0.3 * torch.randn(1, 7, generator=draw, dtype=torch.float64)
        assert float(objective(other)) > float(least)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "bse"}, "no teacher of the stage has this name"),
        ({"reference": {"b": "a"}}, "a teacher has no base"),
        ({"reference": {"a": "b", "b": "c", "c": "a"}}, "a base has no base itself"),
        ({"reference": "a", "scale": 0.0}, "is positive"),
        ({"reference": "a", "scale": -1.0}, "is positive"),
    ],
)
def test_bases_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weights(("a", "b", "c"), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "kd"}, "has no meaning for this loss"),
        ({"method": None, "match": [{"feature": "logits", "loss": "reverse_kl"}], "domain": "x"}, "may be negative"),
    ],
)
def test_a_plan_refuses_rows_and_teachers_that_it_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    changes = dict(changes)
    named = {"domain": changes.pop("domain")} if "domain" in changes else {}
    teachers = [{"name": "a", "model": "stage:teacher", **named}, {"name": "b", "model": "stage:teacher"}]
    changes |= {"teachers": teachers, "weighting": {"name": "exopd", "options": {"reference": "b"}}}
    with pytest.raises(UserError, match=message):
        mtkd.plan(run_of(tmp_path, **changes))
