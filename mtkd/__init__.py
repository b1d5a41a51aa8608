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
    from mtkd.errors import UserError
    from mtkd.planning.plan import plan
    from mtkd.planning.table import Plan
    from mtkd.registry import LOSSES, METHODS, WEIGHTINGS, loss, method, weighting
    from mtkd.running.run import RunResult, run
    from mtkd.weightings import StageFacts, Traits, Weighting, trait

__version__ = "0.1.0"

_HOMES = {
    "LOSSES": "mtkd.registry",
    "METHODS": "mtkd.registry",
    "WEIGHTINGS": "mtkd.registry",
    "Match": "mtkd.config.match",
    "Plan": "mtkd.planning.table",
    "RunConfig": "mtkd.config",
    "RunResult": "mtkd.running.run",
    "StageFacts": "mtkd.weightings",
    "Traits": "mtkd.weightings",
    "UserError": "mtkd.errors",
    "Weighting": "mtkd.weightings",
    "load_config": "mtkd.config.read",
    "loss": "mtkd.registry",
    "method": "mtkd.registry",
    "plan": "mtkd.planning.plan",
    "run": "mtkd.running.run",
    "trait": "mtkd.weightings",
    "weighting": "mtkd.registry",
}

__all__ = [
    "LOSSES",
    "METHODS",
    "WEIGHTINGS",
    "Match",
    "Plan",
    "RunConfig",
    "RunResult",
    "StageFacts",
    "Traits",
    "UserError",
    "Weighting",
    "load_config",
    "loss",
    "method",
    "plan",
    "run",
    "trait",
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
