"""mtkd: multi-teacher ensemble distillation for language models.

    config = mtkd.load_config("configs/quickstart.yaml", ["stages.student.steps=50"])
    result = mtkd.run(config)

Names are imported when they are first used, so that `mtkd --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtkd.config import RunConfig
    from mtkd.config.match import Match
    from mtkd.config.read import load_config
    from mtkd.data.batch import Batch, View
    from mtkd.data.transforms import TRANSFORMS, StepFacts, transform
    from mtkd.errors import LawBroken, UserError
    from mtkd.losses.laws import check_loss
    from mtkd.losses.spec import LOSSES, loss
    from mtkd.methods.spec import METHODS, method
    from mtkd.models.formats import number_format
    from mtkd.objective.laws import check_tiled
    from mtkd.planning.plan import plan
    from mtkd.planning.table import Plan
    from mtkd.pool.laws import check_teacher
    from mtkd.pool.own import TeacherFacts, teacher
    from mtkd.running.run import RunResult, run
    from mtkd.weightings import StageFacts, Traits, Weighting, trait
    from mtkd.weightings.laws import check_weighting
    from mtkd.weightings.spec import WEIGHTINGS, weighting

__version__ = "0.1.0"

_HOMES = {
    "Batch": "mtkd.data.batch",
    "LOSSES": "mtkd.losses.spec",
    "METHODS": "mtkd.methods.spec",
    "WEIGHTINGS": "mtkd.weightings.spec",
    "LawBroken": "mtkd.errors",
    "Match": "mtkd.config.match",
    "Plan": "mtkd.planning.table",
    "RunConfig": "mtkd.config",
    "RunResult": "mtkd.running.run",
    "StageFacts": "mtkd.weightings",
    "StepFacts": "mtkd.data.transforms",
    "TRANSFORMS": "mtkd.data.transforms",
    "TeacherFacts": "mtkd.pool.own",
    "Traits": "mtkd.weightings",
    "UserError": "mtkd.errors",
    "View": "mtkd.data.batch",
    "Weighting": "mtkd.weightings",
    "check_loss": "mtkd.losses.laws",
    "check_teacher": "mtkd.pool.laws",
    "check_tiled": "mtkd.objective.laws",
    "check_weighting": "mtkd.weightings.laws",
    "load_config": "mtkd.config.read",
    "loss": "mtkd.losses.spec",
    "method": "mtkd.methods.spec",
    "number_format": "mtkd.models.formats",
    "plan": "mtkd.planning.plan",
    "run": "mtkd.running.run",
    "teacher": "mtkd.pool.own",
    "trait": "mtkd.weightings",
    "transform": "mtkd.data.transforms",
    "weighting": "mtkd.weightings.spec",
}

__all__ = [
    "LOSSES",
    "METHODS",
    "TRANSFORMS",
    "WEIGHTINGS",
    "Batch",
    "LawBroken",
    "Match",
    "Plan",
    "RunConfig",
    "RunResult",
    "StageFacts",
    "TeacherFacts",
    "StepFacts",
    "Traits",
    "UserError",
    "View",
    "Weighting",
    "check_loss",
    "check_teacher",
    "check_tiled",
    "check_weighting",
    "load_config",
    "loss",
    "method",
    "number_format",
    "plan",
    "run",
    "teacher",
    "trait",
    "transform",
    "weighting",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mtkd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
