"""Check the labels of a run as a whole, and take classes from the teachers where the texts have no labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mtkd.config import RunConfig, StageConfig, StageRef, TeacherConfig
from mtkd.data.labelkinds import in_order
from mtkd.data.sources import has_labels
from mtkd.errors import UserError
from mtkd.methods.rows import stage_rows
from mtkd.models.folder import find_folder
from mtkd.planning.data import DataFacts, DataReader
from mtkd.planning.locate import missing, resolve_path, revision_of
from mtkd.planning.places import placed
from mtkd.planning.stages import scored_models
from mtkd.pool import BACKENDS
from mtkd.weightings.spec import WEIGHTINGS


def with_teachers_classes(config: RunConfig, reader: DataReader) -> RunConfig:
    """The run with the teachers' classes as `labels` of every data entry that names none and has none in its rows.

    Raises:
        UserError: the teachers' classes differ, or none are named.
        DataError: as for `DataReader.facts`.
    """
    data = dict(config.data)
    for name, entry in config.data.items():
        if entry.classes or not has_labels(entry):
            continue
        facts = reader.facts(name, entry)
        if facts.known or facts.not_here:
            continue
        so_far = config.model_copy(update={"data": data})
        teachers = {
            f"stages.{stage_name}.teachers[{i}]": teacher
            for stage_name, stage in config.stages.items()
            if config.data_name(stage.data) == name
            for i, teacher in enumerate(stage.teachers)
        }
        every = {place: _classes_of(teacher, place, name, so_far, reader) for place, teacher in teachers.items()}
        classes = {place: names for place, names in every.items() if names}
        partly = any(teacher.others for teacher in teachers.values())
        labels = _together(classes) if partly else _common(classes, f"data.{name}.labels", facts.why)
        data[name] = entry.model_copy(update={"labels": labels})
    return config.model_copy(update={"data": data})


def _common(classes: Mapping[str, tuple[str, ...]], where: str, why: str) -> tuple[str, ...]:
    todo = "set `labels` to the class names in order"
    if not classes:
        raise UserError(f"nothing names the classes: {why}, and no teacher does", where=where, found="[]", todo=todo)
    first = next(iter(classes.values()))
    if any(set(names) != set(first) for names in classes.values()):
        text = "; ".join(f"{place}: {', '.join(names)}" for place, names in classes.items())
        raise UserError(f"the teachers have different classes, and {why}", where=where, found=text, todo=todo)
    return first


def _together(classes: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """All classes of specialists, in the order that labels would give them."""
    return tuple(in_order({name for names in classes.values() for name in names}))


def _classes_of(
    teacher: TeacherConfig, where: str, name: str, config: RunConfig, reader: DataReader
) -> tuple[str, ...]:
    """The class names of a teacher in order, from its stage's data or its folder; () for none."""
    if teacher.classes is not None:  # the user maps its outputs to the data's classes
        names = teacher.classes.values() if isinstance(teacher.classes, dict) else teacher.classes
        return tuple(dict.fromkeys(name for name in names if name is not None))
    path, ref = teacher.model.path, teacher.model.stage
    if ref is not None:
        other = config.data_name(config.stages[ref.stage].data)
        return () if other == name else _own(reader.facts(other, config.data[other]).classes, teacher)
    if path is None or not BACKENDS[teacher.backend].runs or missing(path, config.base) is not None:
        return ()
    with placed(model=f"{where}.model"):
        folder = find_folder(path, revision_of(teacher.model), lambda p: resolve_path(p, config.base), weights=False)
    return _own(_names_in(folder / "config.json"), teacher)


def _own(names: tuple[str, ...], teacher: TeacherConfig) -> tuple[str, ...]:
    """The outputs of a teacher that are classes."""
    return tuple(name for i, name in enumerate(names) if name not in teacher.others and str(i) not in teacher.others)


def _names_in(file: Path) -> tuple[str, ...]:
    names = json.loads(file.read_text(encoding="utf-8")).get("id2label")
    if not isinstance(names, dict) or not all(str(number).isdecimal() for number in names):
        return ()
    return tuple(str(name) for _, name in sorted(names.items(), key=lambda item: int(item[0])))


def check_labelled(config: RunConfig, facts: Mapping[str, DataFacts]) -> None:
    """Refuse to learn, choose or score by the labels of a split that has none.

    Args:
        facts: of the data entries.

    Raises:
        UserError: naming the stage, what reads labels, and the data.
    """
    for name, stage in config.stages.items():
        data = config.data_name(stage.data)
        labelled = facts[data].labelled
        if not labelled:
            continue
        if labelled.get("train") == 0 and config.data[data].labelled:
            _check_readers(config, name, stage, facts[data].kind == "number")
        if stage.selects and labelled.get("validation") == 0:
            raise UserError(
                f"the validation split of data '{data}' has no labels to choose by",
                where=f"stages.{name}.{'early_stop' if stage.early_stop else 'export'}",
                found=stage.selects,
                todo="drop early_stop and export: best, or give the validation split labels",
            )
    _check_scored(config, facts)
    scored = config.data_name(config.evaluate.data)
    split = config.evaluate.split
    if facts[scored].labelled.get(split) == 0 and (scored_models(config) or config.evaluate.ensembles):
        raise UserError(
            f"the {split} split of data '{scored}' has no labels to score on",
            where="evaluate.split",
            found=split,
            allowed=[s for s, count in facts[scored].labelled.items() if count and s != "train"] or "a labelled split",
            todo="set evaluate.split, or evaluate.data to an entry with labels",
        )


def _check_readers(config: RunConfig, name: str, stage: StageConfig, regression: bool) -> None:
    data_name, where = config.data_name(stage.data), f"stages.{name}"
    rows = stage_rows(stage, config.data[data_name], where, regression)
    readers = [f"row {row.feature}:{row.loss}" for row in rows if row.target == "labels" and row.weight]
    if WEIGHTINGS.find(stage.weighting.name, f"{where}.weighting.name").needs_labels and stage.teachers:
        readers.append(f"weighting '{stage.weighting.name}'")
    if not readers:
        return
    distils = stage.kind == "distill"
    raise UserError(
        f"the train split of data '{data_name}' has no labels",
        where=f"{where}.{'method' if stage.method else 'match'}" if distils else where,
        found=", ".join(readers) if distils else f"kind: {stage.kind}, which learns from labels",
        allowed="rows and weightings that need no labels" if distils else "data with labels",
        todo="drop the label rows (method options: {hard: 0}) and choose a weighting that needs no labels"
        if distils
        else f"set stages.{name}.data to an entry with labels",
    )


def _check_scored(config: RunConfig, facts: Mapping[str, DataFacts]) -> None:
    """Refuse to score a classifier on data of other classes than its stage learned."""
    name = config.data_name(config.evaluate.data)
    target = facts[name]
    for model in scored_models(config):
        other = config.data_name(config.stages[StageRef.named(model).stage].data)
        source = facts[other]
        if target.known and source.known and (target.kind, target.classes) != (source.kind, source.classes):
            raise UserError(
                f"'{model}' has other classes than the data it is to be scored on",
                where="evaluate.data",
                found=f"data '{name}': {', '.join(target.classes) or 'numbers'}",
                allowed=f"as in data '{other}': {', '.join(source.classes) or 'numbers'}",
                todo="name the same `labels` in both entries, or leave the model out of evaluate.stages",
            )
