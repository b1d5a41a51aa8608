"""What is known of a registered weighting, and how one is made from Python.

    mtkd.WEIGHTINGS["fixed"](teachers=("a", "b"), weights={"a": 3.0, "b": 1.0})      a `Weighting`

Options are keywords, named as in the YAML; an unknown one is refused with the nearest known name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtkd.errors import UserError
from mtkd.registry import Decorated, Registry, check_options

GIVEN = ("teachers", "facts")
"""Parameters of a weighting's constructor that mtkd fills in: the teachers' names; the stage's `StageFacts`."""


@dataclass(frozen=True)
class WeightingSpec:
    """A weighting class and the laws it declares.

    Attributes:
        sums_to_one: over the teachers, at every position.
        needs_labels: the weights depend on labels.
        negative: a weight may be negative: then a teacher is one to move away from.
    """

    name: str
    cls: type
    sums_to_one: bool = True
    needs_labels: bool = False
    negative: bool = False

    def options(self) -> dict[str, inspect.Parameter]:
        """The parameters of its constructor that a stage may set; those of `GIVEN` come from mtkd."""
        given = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)  # not nn.Module's *args
        parameters = inspect.signature(self.cls).parameters
        return {n: p for n, p in parameters.items() if n not in GIVEN and p.kind in given}

    def __call__(self, **named: Any) -> Any:
        """The weighting, of these options; `teachers` (names) and `facts` (`StageFacts`) where it asks for them.

        Raises:
            UserError: a keyword that is no option of it, or of the wrong type, or one of the two that it lacks.
        """
        where = f"weighting '{self.name}'"
        asked = [name for name in GIVEN if name in inspect.signature(self.cls).parameters]
        check_options({n: v for n, v in named.items() if n not in asked}, self.options(), where)
        if missing := [name for name in asked if name not in named]:
            raise UserError(
                "it is made for the teachers of a stage",
                where=where,
                found=f"no {' and no '.join(missing)}",
                todo="give teachers=(names, in order), or facts=mtkd.weightings.StageFacts(...)",
            )
        made = self.cls(**named)
        made.negative = self.negative
        return made


WEIGHTINGS: Registry[WeightingSpec] = Registry("weighting", "mtkd.weightings")


def weighting(
    name: str, *, sums_to_one: bool = True, needs_labels: bool = False, negative: bool = False
) -> Callable[[Decorated], Decorated]:
    """Register a `Weighting` class under `name`; see `WeightingSpec` for the flags."""

    def decorate(cls: Decorated) -> Decorated:
        WEIGHTINGS.add(name, WeightingSpec(name, cls, sums_to_one, needs_labels, negative))  # type: ignore[arg-type]
        return cls

    return decorate
