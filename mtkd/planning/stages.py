"""Answer questions about the stages of a run: dependencies, heads, identifying values, stages to redo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtkd.config import DataConfig, RunConfig, StageConfig, StageRef
from mtkd.engine.folder import StageDir
from mtkd.errors import UserError, nearest
from mtkd.methods.rows import stage_rows
from mtkd.models.info import CAUSAL_LM, MASKED_LM, PRE_TRAINING
from mtkd.pool import BACKENDS
from mtkd.registry import TASKS

CLOZE = "cloze"
"""The head of a model that scores classes by their words: that of the language model (GLM)."""

# Fields that change when a stage is saved, not what it makes.
_BOOKKEEPING = {"save_every", "keep"}


def model_name(stage_name: str, stage: StageConfig, role: str) -> str:
    """The name of a model that a stage trains: the stage's own, or NAME/MEMBER."""
    return StageRef(stage_name, role if stage.members else "").model


def used_stages(stage: StageConfig) -> list[str]:
    """Names of the earlier stages whose models this one loads."""
    models = [*stage.trained.values(), *(teacher.model for teacher in stage.teachers)]
    return list(dict.fromkeys(model.stage.stage for model in models if model.stage is not None))


def needed_stages(stage: StageConfig, data: DataConfig) -> list[str]:
    """Names of the earlier stages whose models, texts or training times this one needs.

    Args:
        data: of the stage.
    """
    timed = [stage.equal_time.to, stage.equal_time.rate_of] if stage.equal_time else []
    return list(dict.fromkeys([*used_stages(stage), *data.made_by, *timed]))


def to_redo(config: RunConfig, names: Sequence[str]) -> list[str]:
    """These stages and those that depend on them, the last of the run first.

    Raises:
        UserError: there is no stage of this name.
    """
    for name in names:
        if name not in config.stages:
            raise UserError(
                "no stage of this name",
                where="--redo",
                found=name,
                allowed=list(config.stages),
                todo=nearest(name, config.stages),
            )
    stale = set(names)
    for name, stage in config.stages.items():
        if stale.intersection(needed_stages(stage, config.data_of(stage))):
            stale.add(name)
    return [name for name in reversed(config.stages) if name in stale]


def changed_stages(config: RunConfig, folders: Mapping[str, StageDir]) -> list[str]:
    """Finished stages whose own configuration changed, without those that depend on an earlier one of them."""
    names: list[str] = []
    later: set[str] = set()
    for name, stage in config.stages.items():
        record = folders[name].done()
        if record is None or name in later or record.identity.get("stage") == stage_values(stage):
            continue
        names.append(name)
        later |= set(to_redo(config, [name]))
    return names


def scored_models(config: RunConfig) -> list[str]:
    """The models that are scored at the end: those that `evaluate` names, otherwise all that learn its task."""
    if config.evaluate.stages:
        return config.scored
    return [model for model in config.models if does_task(config, model) and not never_trained(config, model)]


def learns_to_predict(config: RunConfig, name: str) -> bool:
    """Whether a stage trains its models' heads: some row compares logits."""
    stage = config.stages[name]
    rows = stage_rows(stage, config.data_of(stage), f"stages.{name}")
    return any(row.feature == "logits" and row.weight for row in rows)


def never_trained(config: RunConfig, model: str) -> bool:
    """Whether a stage's model still has its random head: since its first stage no row compared logits.

    A model from a folder may bring a trained head; the plan checks that.

    Args:
        model: STAGE or STAGE/MEMBER.
    """
    name = StageRef.named(model).stage
    stage: StageConfig = config.stages[name]
    if not stage.trained or learns_to_predict(config, name):
        return False
    origins = {model_name(name, stage, role): each for role, each in stage.trained.items()}
    origin = origins[model]
    return origin.path is None if origin.stage is None else never_trained(config, origin.stage.model)


def does_task(config: RunConfig, stage: str) -> bool:
    """Whether a stage's models have the head for the data of `evaluate`."""
    source, target = config.stages[StageRef.named(stage).stage].data, config.evaluate.data
    labels = [config.data[config.data_name(name)].classes for name in (source, target)]
    if all(labels) and labels[0] != labels[1]:  # classes from the data are compared when the models are loaded
        return False
    return head_fits(head_for(config, source), head_for(config, target))


def head_for(config: RunConfig, data_name: str) -> str:
    """The auto class of the models that are trained on a `data` entry, or `CLOZE`."""
    name = config.data_name(data_name)
    data = config.data[name]
    task = TASKS.find(data.task, f"data.{name}.task")
    return CLOZE if task.cloze else str(task.class_for(data))


def head_fits(model: str, task: str) -> bool:
    """Whether a model of one auto class has the head of another: pre-training includes the head for masked tokens."""
    return model == task or (model, task) == (PRE_TRAINING, MASKED_LM)


def can_teach(model: str, task: str) -> bool:
    """Whether a student with the head `task` can learn from a `model` head: a cloze reads a language model's head."""
    return head_fits(model, task) or {model, task} == {CAUSAL_LM, CLOZE}


def stage_values(stage: StageConfig) -> dict[str, Any]:
    """The fields of a stage that determine its result, as plain values."""
    if stage.kind == "cache":  # without the batch, which changes the rounding of the last bits alone
        return _without_places(stage.model_dump(mode="json", include={"kind", "data", "teachers", "cache"}))
    if stage.kind == "generate":
        return _without_places(stage.model_dump(mode="json", include={"kind", "data", "teachers", "write"}))
    # Validation changes nothing, unless its score decides where the stage ends or which step is exported.
    validation = set() if stage.selects else {"evaluate_every"}
    values = stage.model_dump(mode="json", exclude=_BOOKKEEPING | validation | {"cache", "write"})
    values = _without_places(values)
    for name in ("transforms", "rollout"):  # finished stages may not know these fields
        if not getattr(stage, name):
            del values[name]
    for row in values["match"]:  # likewise
        if row["positions"] != "teachable":
            del row["candidates"]
    # The members' order decides their seeds, and whose head is shared: canonical JSON would sort it away.
    return {**values, "member_order": list(stage.members)} if stage.members else values


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    """Ignore the backend of live teachers: where weights are stored does not change the results.

    (A sharded teacher's results are those of a resident one up to rounding.)
    """
    for teacher in values["teachers"]:
        teacher["backend"] = teacher["backend"] if not BACKENDS[teacher["backend"]].runs else "resident"
        teacher.pop("sharded", None)
        for name in ("classes", "other", "calibrate", "domain"):  # finished stages may not know these fields
            if not teacher.get(name):
                teacher.pop(name, None)
    return values


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """The stage's seed, or the run's."""
    return config.seed if stage.seed is None else stage.seed


def redo_command(names: Sequence[str]) -> str:
    """The command that redoes these stages, for advice."""
    return " ".join(["mtkd run FILE", *(f"--redo {name}" for name in names)])
