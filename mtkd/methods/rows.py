"""The Match rows of a stage: those of its method, then those in `match:`, which override by label.

A method has steps (pre-training, fine-tuning, prediction); the one that fits the stage's data is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from mtkd.config import DataConfig, Named, StageConfig
from mtkd.config.match import Match
from mtkd.errors import UserError, nearest
from mtkd.methods.spec import METHODS, MethodSpec
from mtkd.registry import TASKS, check_options

_ORDER = {True: ("pre-train", "fine-tune", "prediction"), False: ("fine-tune", "prediction", "pre-train")}


def stage_rows(stage: StageConfig, data: DataConfig, where: str, regression: bool = False) -> tuple[Match, ...]:
    """The Match rows of a stage: its method's, then its own; without teachers the label rows alone; of a cache none.

    Args:
        data: its `data` block; whether targets are tokens chooses the default step of a method.
        regression: labels are numbers.

    Raises:
        UserError: unknown method, step, option or label, or no row that is left.
    """
    return tuple(placed_rows(stage, data, where, regression).values())


def placed_rows(stage: StageConfig, data: DataConfig, where: str, regression: bool = False) -> Mapping[str, Match]:
    """`stage_rows`, each under the place it has from the user: ``WHERE.match[0]``, ``WHERE.method: hidden``.

    The text after the place of a method's row is its label. The place of label rows is the stage's own.
    """
    return _rows(_Asked(stage, data, where, regression and stage.kind != "distill"))


@dataclass(frozen=True, eq=False)
class _Asked:
    """A stage and its data. Both are frozen, so the same objects have the same rows."""

    stage: StageConfig
    data: DataConfig
    where: str
    regression: bool

    def _key(self) -> tuple[int, int, str, bool]:
        return id(self.stage), id(self.data), self.where, self.regression

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self._key() == other._key()


# Ten places of plan and run read the rows of a stage; methods are called and labels resolved once. An entry keeps its
# stage alive, so that no other object can have its id. All callers share it, so that none may change it.
@lru_cache(maxsize=256)
def _rows(asked: _Asked) -> Mapping[str, Match]:
    stage, data, where = asked.stage, asked.data, asked.where
    if not stage.trained:
        return MappingProxyType({})
    if stage.kind != "distill":
        return MappingProxyType({f"{where}: {row.feature}": row for row in label_rows(data, asked.regression)})
    named = method_rows(stage.method, TASKS.find(data.task).token_level, f"{where}.method") if stage.method else {}
    rows = mixed(named, stage.match, where)
    _check_some(tuple(rows.values()), where)
    return MappingProxyType(rows)


def _check_some(rows: tuple[Match, ...], where: str) -> None:
    if not rows:
        raise UserError("no row is left", where=f"{where}.match", todo="drop a row of weight 0 that replaces another")
    if not any(row.weight > 0 for row in rows):
        raise UserError(
            "every row weighs 0: the student would learn nothing",
            where=f"{where}.match",
            found=", ".join(f"{row.feature}:{row.loss}" for row in rows),
            todo="give at least one row a weight above 0",
        )


def label_rows(data: DataConfig, regression: bool = False) -> tuple[Match, ...]:
    """Cross entropy (squared error for numbers) with the task's labels, and with those of the next sentence."""
    labels = Match(feature="logits", loss="label_mse" if regression else "ce", target="labels")
    follows = Match(feature="nsp_logits", loss="ce", target="labels")
    return (labels, follows) if data.next_sentence else (labels,)


def method_rows(named: Named, token_level: bool, where: str) -> dict[str, Match]:
    """Label -> row of a method, at the step its options name or the one that fits the targets.

    Raises:
        UserError: unknown method, option or step, or a value the method refuses.
    """
    spec = METHODS.find(named.name, where)
    check_options(named.options, spec.options(), where)
    try:
        return spec.rows(named.options, default_step(spec, named.options, token_level))
    except ValueError as error:
        raise UserError(str(error), where=f"{where}.options") from error


def default_step(spec: MethodSpec, options: Mapping[str, object], token_level: bool) -> str:
    """The step that `options` name; else the earliest that the targets allow.

    Token targets: pre-train before fine-tune before prediction. Class targets: fine-tune, then prediction, and none
    whose rows ask for token positions.
    """
    if "step" in options:
        return str(options["step"])
    steps = [step for step in _ORDER[token_level] if step in spec.steps]
    for step in steps:
        if token_level or all(row.positions is None for row in spec.rows(options, step).values()):
            return step
    return steps[0]


def mixed(named: Mapping[str, Match], own: tuple[Match, ...], where: str) -> dict[str, Match]:
    """A method's rows, those that a row of the stage replaces exchanged in their place, then the stage's others.

    A replacement of weight 0 drops the row. Places are those of `placed_rows`.

    Raises:
        UserError: a label the method does not have, or one that is replaced twice.
    """
    there = {label: (f"{where}.method: {label}", row) for label, row in named.items()}
    added: dict[str, Match] = {}
    for position, row in enumerate(own):
        if row.replace is None:
            added[f"{where}.match[{position}]"] = row
            continue
        place = f"{where}.match[{position}].replace"
        if row.replace not in named:
            raise UserError(
                "the method has no row of this label",
                where=place,
                found=row.replace,
                allowed=list(named) or "none: the stage has no method",
                todo=nearest(row.replace, named),
            )
        if there[row.replace][1] is not named[row.replace]:
            raise UserError("this row is replaced twice", where=place, found=row.replace)
        there[row.replace] = (place.removesuffix(".replace"), row)
    replaced = {place: row for place, row in there.values() if row.weight > 0 or row.replace is None}
    return replaced | added
