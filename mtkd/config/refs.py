"""Read references to the models of earlier stages: `stage:NAME` for the only one, `stage:NAME/PART` for one of several.

`StageRef.parse` takes such a string apart, and `ModelConfig.stage` has the result: no code outside `config/` does it.
"""

from __future__ import annotations

from dataclasses import dataclass

STAGE_PREFIX = "stage:"
ENSEMBLE_PREFIX = "ensemble:"
"""Prefix of a name in `evaluate`, for the uniform ensemble of a stage's teachers."""


@dataclass(frozen=True)
class StageRef:
    """A model or a cache that a stage of this run makes.

    Attributes:
        stage: name of the stage.
        part: member or cached teacher; "" for a stage that makes one model.
    """

    stage: str
    part: str = ""

    @classmethod
    def parse(cls, path: str | None) -> StageRef | None:
        """The reference in `stage:NAME` or `stage:NAME/PART`; None for any other path, and for no path."""
        return cls.named(path.removeprefix(STAGE_PREFIX)) if path and path.startswith(STAGE_PREFIX) else None

    @classmethod
    def named(cls, model: str) -> StageRef:
        """The reference to a model by its name in `evaluate` and the results: `NAME` or `NAME/PART`."""
        stage, _, part = model.partition("/")
        return cls(stage, part)

    @property
    def model(self) -> str:
        """`NAME`, or `NAME/PART`."""
        return f"{self.stage}/{self.part}" if self.part else self.stage

    def __str__(self) -> str:
        return STAGE_PREFIX + self.model


def ensemble_of(name: str) -> str | None:
    """The stage of `ensemble:STAGE`; None for the name of a model."""
    return name.removeprefix(ENSEMBLE_PREFIX) if name.startswith(ENSEMBLE_PREFIX) else None
