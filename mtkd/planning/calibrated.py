"""Check what teachers are calibrated on, before anything is loaded, and say it in the plan."""

from __future__ import annotations

from collections.abc import Callable

from mtkd.config import RANDOM_TOKENS, CalibrateConfig, DataConfig, RunConfig, TeacherConfig
from mtkd.data.batch import STUDENT
from mtkd.errors import UserError
from mtkd.models.calibrated import drawn
from mtkd.planning.data import DataFacts
from mtkd.planning.spec import StageSpec, TeacherSpec
from mtkd.pool import BACKENDS
from mtkd.pool.cache.folder import CacheFacts

_ELSE = "or give a number: calibrate: {temperature: 0.5}"


def check_calibrated(config: RunConfig, spec: StageSpec, facts_of: Callable[[DataConfig], DataFacts]) -> None:
    """Refuse a teacher that cannot be calibrated as its configuration asks.

    Raises:
        UserError: it has no predictions of classes or tokens that the stage reads; there are no labels to fit on; it
            is a cache of draws, or of a calibrated teacher.
    """
    for teacher in spec.teachers:
        asked = teacher.config.calibrate
        if asked is None:
            continue
        _check_predicts(spec, teacher)
        if isinstance(teacher.gives, CacheFacts):
            _check_cache(teacher, teacher.gives)
        if asked.fits:
            _check_fit(config, spec, teacher, asked, facts_of)


def _check_predicts(spec: StageSpec, teacher: TeacherSpec) -> None:
    where = f"{teacher.place}.calibrate"
    if spec.data.regression:
        raise UserError(
            "a teacher that predicts a number has no confidence to calibrate",
            where=where,
            found=f"data '{spec.data.name}' is a regression",
            todo="drop calibrate",
        )
    if "logits" not in spec.heads:
        raise UserError(
            f"no row, weighting, cache or score reads the predictions of teacher '{teacher.name}'",
            where=where,
            todo="drop calibrate: hidden states and attention are not changed by it",
        )


def _check_cache(teacher: TeacherSpec, facts: CacheFacts) -> None:
    where = f"{teacher.place}.calibrate"
    if facts.content.targets == "sampled":
        raise drawn(teacher.name, where)
    if facts.calibrated:
        raise UserError(
            f"the cache of teacher '{teacher.name}' was made of a calibrated teacher",
            where=where,
            found=teacher.config.model.path,
            todo="drop calibrate here, or where the cache is made",
        )


def _check_fit(
    config: RunConfig,
    spec: StageSpec,
    teacher: TeacherSpec,
    asked: CalibrateConfig,
    facts_of: Callable[[DataConfig], DataFacts],
) -> None:
    where = f"{teacher.place}.calibrate"
    if asked.bias and spec.token_level:
        raise UserError("a bias is fitted per class; tokens have too few labels each", where=f"{where}.bias",
                        found=f"task {spec.data.config.task}", todo="drop bias")  # fmt: skip
    if (view := BACKENDS[teacher.config.backend].view_of(teacher.config)) != STUDENT:
        raise UserError(
            f"teacher '{teacher.name}' reads the view '{view}', which labelled texts outside of training do not have",
            where=where,
            todo="give a number: calibrate: {temperature: 0.5}",
        )
    name = asked.data or spec.data.name
    data = config.data[name]
    facts = facts_of(data) if asked.data else spec.data.facts
    if BACKENDS[teacher.config.backend].stored and (asked.split != "train" or name != spec.data.name):
        raise UserError(
            f"the cache of teacher '{teacher.name}' has the train split of data '{spec.data.name}' alone",
            where=where,
            found=f"split: {asked.split}" if name == spec.data.name else f"data: {name}",
            todo=f"calibrate it where the cache is made, set split: train if it was not trained on that, {_ELSE}",
        )
    if asked.data:
        _check_same_task(spec, name, data, facts, f"{where}.data")
    _check_labels(name, data, facts, asked, where)


def _check_same_task(spec: StageSpec, name: str, data: DataConfig, facts: DataFacts, where: str) -> None:
    own = spec.data
    if data.task != own.config.task:
        raise UserError(
            "a teacher is calibrated on labels of the task that it teaches",
            where=where,
            found=f"task {data.task} of data '{name}'",
            allowed=f"task {own.config.task}, as data '{own.name}'",
        )
    if facts.known and own.facts.known and facts.classes != own.facts.classes:
        raise UserError(
            "a teacher is calibrated on the classes that it teaches, in their order",
            where=where,
            found=list(facts.classes),
            allowed=list(own.facts.classes),
            todo=f"set data.{name}.labels to them",
        )


def _check_labels(name: str, data: DataConfig, facts: DataFacts, asked: CalibrateConfig, where: str) -> None:
    made_up = data.source == RANDOM_TOKENS or (asked.split == "train" and not data.labelled)
    empty = bool(facts.rows) and not facts.rows.get(asked.split)
    unlabelled = bool(facts.labelled) and not facts.labelled.get(asked.split)
    if made_up or empty or unlabelled:
        splits = {split: facts.labelled.get(split, rows) for split, rows in facts.rows.items()}
        others = ", ".join(f"{split} ({count:,})" for split, count in splits.items() if count)
        raise UserError(
            "there are no labels to calibrate on: the best temperature cannot be told without them, and 1 is as wrong "
            "as the teacher is unsure",
            where=where,
            found=f"data '{name}' has {'made-up tokens' if made_up else f'no labelled {asked.split} split'}"
            + (f"; labels: {others}" if others and not made_up else ""),
            todo=f"name labelled data (data: NAME, split: ...), hold some out (data.{name}.validation_share), {_ELSE}",
        )


def fitted_on_scored(config: RunConfig, spec: StageSpec) -> tuple[str, ...]:
    """A sentence per teacher whose temperature is fitted on the very texts that `evaluate` scores."""
    scored = (config.data_name(config.evaluate.data), config.evaluate.split)
    fits = [(t.place, t.config.calibrate) for t in spec.teachers if t.config.calibrate is not None]
    return tuple(
        f"{place}.calibrate: fitted on the texts that are scored, data '{scored[0]}', {scored[1]}: the score of this "
        "teacher and of its ensemble is a little too good; hold out others (split, data)"
        for place, asked in fits
        if asked.fits and (asked.data or spec.data.name, asked.split) == scored
    )


def calibration_text(teacher: TeacherConfig, data: str) -> str:
    """How a teacher is calibrated, for the plan; "" where it is not."""
    asked = teacher.calibrate
    if asked is None:
        return ""
    if not asked.fits:
        return f"calibrated: temperature {asked.temperature:g}"
    bias = " and a bias per class" if asked.bias else ""
    return f"calibrated: temperature{bias} fitted on {asked.data or data}, {asked.split}, <= {asked.examples:,} texts"
