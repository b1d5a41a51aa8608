"""The laws, run over everything that a plug-in file registers: what `mtkd check FILE` does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtkd.data.transforms import TRANSFORMS
from mtkd.errors import LawBroken, UserError
from mtkd.losses.laws import LOSS_LAWS, check_loss
from mtkd.losses.spec import LOSSES
from mtkd.methods.spec import METHODS, MethodSpec
from mtkd.models.features import FEATURE_NAMES
from mtkd.models.formats import FORMATS
from mtkd.models.info import ModelInfo
from mtkd.objective.compile import compile_rows
from mtkd.objective.laws import TILED_LAWS, check_tiled
from mtkd.pool.backend import BACKENDS
from mtkd.pool.laws import TEACHER_LAWS, check_teacher
from mtkd.pool.own import Own
from mtkd.registry import SOURCES, TASKS, Registry, load_plugins, plugin_origin
from mtkd.weightings.laws import WEIGHTING_LAWS, check_weighting
from mtkd.weightings.spec import WEIGHTINGS


@dataclass(frozen=True)
class Kept:
    """One family of laws that a registered thing keeps.

    Attributes:
        laws: their names; empty where there are none to keep, or none were run.
        skipped: why none were run; "" where they were, or there are none.
    """

    kind: str
    name: str
    family: str
    laws: tuple[str, ...]
    skipped: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.kind} '{self.name}': loaded; its laws are not run: {self.skipped}"
        if not self.laws:
            return f"{self.kind} '{self.name}': loaded; there are no laws for it"
        return f"{self.kind} '{self.name}': keeps the {self.family} laws ({', '.join(self.laws)})"


def check_plugin(path: Path) -> Iterator[Kept]:
    """Load a plug-in file and run the laws over all that it registers, one family after the other.

    Raises:
        UserError: it cannot be loaded, registers nothing, or something breaks a law, which is named.
    """
    load_plugins((str(path),))
    origin = plugin_origin(path)
    found = [(i, name) for i, (kind, _) in enumerate(_CHECKS) for name in kind if kind.origin(name) == origin]
    if not found:
        raise UserError(
            "the plug-in registers nothing",
            where=str(path),
            todo="use @mtkd.loss, @mtkd.weighting, @mtkd.method, @mtkd.transform, @mtkd.teacher or "
            "@mtkd.number_format in it",
        )
    for i, name in found:
        registry, check = _CHECKS[i]
        for kept in check(name, f"{path}: {registry.kind} '{name}'"):
            yield Kept(registry.kind, name, *kept)


Families = Iterator[tuple[str, tuple[str, ...]] | tuple[str, tuple[str, ...], str]]


def _names(laws: tuple[Callable[..., None], ...]) -> tuple[str, ...]:
    return tuple(law.__name__.strip("_").removesuffix("_law").replace("_", " ") for law in laws)


def _checked(check: Callable[[], None], where: str, how: str = "mtkd.check_loss and the like") -> None:
    """Run some laws; every error in them becomes one of the plug-in. Args: how: they are run in a test."""
    try:
        check()
    except LawBroken as error:
        raise UserError(
            f"breaks the law '{error.law}'",
            where=where,
            found=error.found,
            todo=f"laws.py of mtkd says what the law asks; in a test of yours it is run by {how}",
        ) from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"cannot be run: {type(error).__name__}: {error}",
            where=where,
            todo=f"a traceback: {how} in a test",
        ) from error


def _defaults(options: dict[str, inspect.Parameter], where: str, how: str) -> None:
    """Refuse options without a default: the laws would not know what to give."""
    for name, parameter in options.items():
        if parameter.default is inspect.Parameter.empty:
            raise UserError(
                "an option has no default, so the laws cannot be run",
                where=where,
                found=name,
                todo=f"give it one, or run them in a test: {how}",
            )


def _check_loss(name: str, where: str) -> Families:
    spec = LOSSES[name]
    _defaults(spec.options(), where, f'mtkd.check_loss("{name}", {{...}})')
    _checked(lambda: check_loss(spec), where)
    yield "loss", _names(LOSS_LAWS)
    if "logits" in spec.inputs:
        _checked(lambda: check_tiled(spec), where)
        yield "tiled", _names(TILED_LAWS)


def _check_weighting(name: str, where: str) -> Families:
    spec = WEIGHTINGS[name]
    _defaults(spec.options(), where, f'mtkd.check_weighting("{name}", lambda teachers: {{...}})')
    _checked(lambda: check_weighting(spec), where)
    yield "weighting", _names(WEIGHTING_LAWS)


# Two encoders that every feature can come from; the teacher's depth is a multiple of the student's.
_STUDENT = ModelInfo("stand-in", 4, 64, 4, 4, 16, 100, 0, 64, False, frozenset(FEATURE_NAMES))
_TEACHER = ModelInfo("stand-in", 12, 64, 4, 4, 16, 100, 0, 64, False, _STUDENT.taps)


def _check_teacher(name: str, where: str) -> Families:
    spec = BACKENDS[name]
    assert isinstance(spec, Own)
    if spec.needs_model:
        yield "teacher", (), f'it reads a model; in a test: mtkd.check_teacher("{name}", folder=PATH)'
        return
    _defaults(spec.options(), where, f'mtkd.check_teacher("{name}", {{...}})')
    _checked(lambda: check_teacher(spec), where, f'mtkd.check_teacher("{name}")')
    yield "teacher", _names(TEACHER_LAWS)


def _check_method(name: str, where: str) -> Families:
    """Its rows at every step and variant, otherwise with default options, between two encoders.

    Valid for a token task or for a classification.
    """
    spec = METHODS[name]
    _defaults(spec.options(), where, "a run file of yours")
    for variant in spec.variants:
        for step in spec.steps:
            _check_rows(spec, variant, step, where)
    yield "rows", ("features", "losses", "options", "layers")


def _check_rows(spec: MethodSpec, options: Mapping[str, Any], step: str, where: str) -> None:
    made: list[Any] = []
    _checked(lambda: made.extend(spec.rows(options, step).values()), where)
    if not made:
        raise UserError("the method has no rows", where=where, found=f"step {step}")
    try:
        _compile(made, where, token_level=True)
    except UserError:
        _compile(made, where, token_level=False)


def _compile(rows: list[Any], where: str, *, token_level: bool) -> None:
    classes = 0 if token_level else 3
    sides = [ModelInfo(**{**asdict(info), "num_labels": classes}) for info in (_STUDENT, _TEACHER)]
    compile_rows(
        rows, sides[0], {"teacher": sides[1]}, token_level=token_level, regression=False, where=f"{where}: rows"
    )


def _no_laws(name: str, where: str) -> Families:
    yield "", ()


_CHECKS: tuple[tuple[Registry[Any], Callable[[str, str], Families]], ...] = (
    (LOSSES, _check_loss),
    (WEIGHTINGS, _check_weighting),
    (METHODS, _check_method),
    (BACKENDS, _check_teacher),
    (SOURCES, _no_laws),
    (TASKS, _no_laws),
    (TRANSFORMS, _no_laws),
    (FORMATS, _no_laws),
)
