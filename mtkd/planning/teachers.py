"""What the plan asks of the backends of a run's teachers."""

from __future__ import annotations

from mtkd.config import RunConfig
from mtkd.pool import BACKENDS


def check_backends(config: RunConfig) -> None:
    """Refuse a teacher whose backend is not registered.

    Raises:
        UserError: with the nearest known name.
    """
    places = {f"stages.{name}.teachers": stage.teachers for name, stage in config.stages.items()}
    if config.chain is not None:
        places["chain.teachers"] = config.chain.teachers
    for place, teachers in places.items():
        for i, teacher in enumerate(teachers):
            BACKENDS.find(teacher.backend, f"{place}[{i}].backend")
