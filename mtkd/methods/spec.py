"""A registered method: its function, its steps and its paper; `METHODS` holds all of them.

    mtkd.METHODS["kd"](temperature=4.0)                             its rows, by label

Options are keywords, named as in the YAML; an unknown one is refused with the nearest known name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mtkd.registry import Decorated, Registry, check_options

STEPS = ("pre-train", "fine-tune", "prediction")
"""The distillations a method may consist of, in their order: on plain text; on the task's data; the task's labels."""


@dataclass(frozen=True)
class MethodSpec:
    """A method of the literature: a function from its options to its rows.

    Attributes:
        function: ``(**options) -> {label: Match}``; a method of several steps has an option ``step``.
        steps: those of `STEPS` that its paper distils at.
        must_be_equal: what its paper needs equal on both sides.
        variants: option sets that the paper tries side by side; the method table unites their rows.
    """

    name: str
    function: Callable[..., Any]
    steps: tuple[str, ...]
    source: str
    must_be_equal: tuple[str, ...] = field(default=())
    variants: tuple[Mapping[str, Any], ...] = field(default=({},))

    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters a stage may set under ``method.options``."""
        return dict(inspect.signature(self.function).parameters)

    def rows(self, options: Mapping[str, Any], step: str = "") -> dict[str, Any]:
        """Label -> Match row, at a step ("": the one that the options name, or the first).

        Raises:
            ValueError: a step the method does not have, or a value its function refuses.
        """
        step = step or options.get("step", self.steps[0])
        if step not in self.steps:
            raise ValueError(f"step is one of {', '.join(self.steps)}; found {step!r}")
        named = {"step": step} if "step" in self.options() else {}
        return dict(self.function(**{**options, **named}))

    def __call__(self, **named: Any) -> dict[str, Any]:
        """Label -> Match row, of these options.

        Raises:
            UserError: a keyword that is no option of it, or of the wrong type.
            ValueError: a value that the method refuses.
        """
        check_options(named, self.options(), f"method '{self.name}'")
        return self.rows(named)


METHODS: Registry[MethodSpec] = Registry("method", "mtkd.methods.papers")


def method(
    name: str,
    *,
    steps: tuple[str, ...],
    source: str,
    must_be_equal: tuple[str, ...] = (),
    variants: tuple[Mapping[str, Any], ...] = ({},),
) -> Callable[[Decorated], Decorated]:
    """Register a function ``(**options) -> {label: Match}`` as a method; see `MethodSpec`.

    Raises:
        ValueError: steps that are none of `STEPS`, or several of them and no option ``step`` to choose one by.
    """

    def decorate(function: Decorated) -> Decorated:
        spec = MethodSpec(name, function, steps, source, must_be_equal, variants)
        if not steps or not set(steps) <= set(STEPS) or (len(steps) > 1 and "step" not in spec.options()):
            raise ValueError(
                f"method '{name}': steps are of {', '.join(STEPS)}, and several need an option `step`; found {steps}"
            )
        METHODS.add(name, spec)
        return function

    return decorate
