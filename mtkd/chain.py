"""The stages of a run in order: what each one depends on, what identifies it, and which are done already."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtkd.config import STAGE_PREFIX, ModelConfig, RunConfig, StageConfig
from mtkd.configfile import differences, fingerprint
from mtkd.data.tasks import TaskSpec
from mtkd.errors import DataError, UserError, nearest
from mtkd.models.folder import MAP_FILE
from mtkd.registry import TASKS
from mtkd.rundir import StageDir

# Fields that change when a stage is saved, not what it makes.
_BOOKKEEPING = {"save_every", "keep"}

# A weight file is identified by its size and this many evenly spread samples of this many bytes: a 20 GB teacher
# would take a minute to hash whole on every start.
_SAMPLES, _SAMPLE_BYTES = 64, 65_536


def stage_of(path: str | None) -> str | None:
    """ "stage:x" and "stage:x/member" -> "x"; None for any other path."""
    return path.removeprefix(STAGE_PREFIX).partition("/")[0] if path and path.startswith(STAGE_PREFIX) else None


def member_of(path: str | None) -> str:
    """ "stage:x/member" -> "member"; empty for any other path."""
    return path.partition("/")[2] if path and path.startswith(STAGE_PREFIX) else ""


def used_stages(stage: StageConfig) -> list[str]:
    """Names of the earlier stages whose models this one loads."""
    models = [*stage.trained.values(), *(teacher.model for teacher in stage.teachers)]
    return list(dict.fromkeys(name for name in (stage_of(model.path) for model in models) if name is not None))


def needed_stages(stage: StageConfig) -> list[str]:
    """Names of the earlier stages that this one cannot be made without: their models, or how long they took."""
    timed = [stage.equal_time.to, stage.equal_time.rate_of] if stage.equal_time else []
    return list(dict.fromkeys([*used_stages(stage), *timed]))


def to_redo(config: RunConfig, names: Sequence[str]) -> list[str]:
    """These stages and all that depend on them, the last of the run first.

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
        if stale.intersection(needed_stages(stage)):
            stale.add(name)
    return [name for name in reversed(config.stages) if name in stale]


def changed_stages(config: RunConfig, folders: Mapping[str, StageDir]) -> list[str]:
    """Finished stages whose own configuration is another now, without those that go with an earlier one of them."""
    found: list[str] = []
    gone: set[str] = set()
    for name, stage in config.stages.items():
        record = folders[name].done()
        if record is None or name in gone or record["identity"]["stage"] == stage_values(stage):
            continue
        found.append(name)
        gone |= set(to_redo(config, [name]))
    return found


def scored_models(config: RunConfig) -> list[str]:
    """The models that are scored at the end: those that `evaluate` names, else all that can do its task."""
    if config.evaluate.stages:
        return config.scored
    return [model for model in config.models if _does_task(config, model)]


def check_evaluation(config: RunConfig) -> None:
    """Refuse to score a model on a task that its stage gave it no head for.

    Raises:
        UserError: naming the stage and its data.
    """
    settings = config.evaluate
    name = config.data_name(settings.data)
    named = [("stages", s) for s in settings.stages] + [("ensembles", s) for s in settings.ensembles]
    for place, stage in named:
        if not _does_task(config, stage):
            raise UserError(
                f"the models of stage '{stage}' cannot be scored on data '{name}' (task {config.data[name].task})",
                where=f"evaluate.{place}",
                found=f"trained on data '{config.data_name(config.stages[stage].data)}'",
                allowed=[s for s in config.stages if _does_task(config, s)] or "no stage of this run",
                todo="drop the stage, or set evaluate.data to data of its task",
            )
    scored = scored_models(config)
    if not scored:
        raise UserError(f"no stage of this run does the task of data '{name}'", where="evaluate.data", found=name)
    for i, pair in enumerate(settings.comparisons):
        for side in (pair.candidate, pair.baseline):
            if side.partition("/")[0] in config.stages and side not in scored:
                raise UserError(
                    f"'{side}' is not scored: its task is not that of evaluate.data",
                    where=f"evaluate.comparisons[{i}]",
                    allowed=scored,
                )


def _does_task(config: RunConfig, stage: str) -> bool:
    """Whether a stage's models have the head for the data of `evaluate`."""
    heads = []
    for name in (config.stages[stage.partition("/")[0]].data, config.evaluate.data):
        data = config.data[config.data_name(name)]
        heads.append(TASKS.find(data.task, f"data.{name}.task").class_for(data))
    # A model with both heads of pre-training has the one for masked tokens.
    return heads[0] == heads[1] or heads == ["AutoModelForPreTraining", "AutoModelForMaskedLM"]


def check_selection(config: RunConfig) -> None:
    """The metric that stops a stage or chooses its step exists, and so does the validation split, as far as known.

    Raises:
        UserError: naming what is missing.
    """
    for name, stage in config.stages.items():
        if not stage.selects:
            continue
        data_name = config.data_name(stage.data)
        data = config.data[data_name]
        task: TaskSpec = TASKS.find(data.task, f"data.{data_name}.task")
        if stage.selects not in (allowed := ("loss", *task.metrics, *task.regression_metrics)):
            raise UserError(
                f"task '{data.task}' has no such metric",
                where=f"stages.{name}.{'early_stop.metric' if stage.early_stop else 'export_metric'}",
                found=stage.selects,
                allowed=allowed,
            )
        if data.source == "files" and "validation" not in data.files and not data.validation_share:
            raise UserError(
                "there is no validation split to choose by",
                where=f"data.{data_name}.files",
                found=", ".join(data.files),
                todo="add files.validation or validation_share, or drop early_stop and export: best",
            )


def stage_values(stage: StageConfig) -> dict[str, Any]:
    """The fields of a stage that determine what it makes, as plain values."""
    # Looking at a stage changes nothing, unless what is seen decides where it ends or which step is kept.
    looking = set() if stage.selects else {"evaluate_every"}
    return stage.model_dump(mode="json", exclude=_BOOKKEEPING | looking)


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """The stage's seed, or the run's."""
    return config.seed if stage.seed is None else stage.seed


def identity(
    config: RunConfig, name: str, *, data: str, tokenizer: str, models: Mapping[str, str], steps: int
) -> dict[str, Any]:
    """Everything that determines what a stage makes; equal identities make equal models.

    Args:
        data: fingerprint of the raw data. tokenizer: its fingerprint.
        models: per use ("student", "teacher NAME") the digest of the weights it starts from.
        steps: the resolved number of optimizer steps.
    """
    stage = config.stages[name]
    return {
        "stage": stage_values(stage),
        "seed": stage_seed(config, stage),
        "steps": steps,
        "precision": config.engine.precision,
        "data": {
            "config": config.data[config.data_name(stage.data)].model_dump(mode="json"),
            "fingerprint": data,
        },
        "tokenizer": tokenizer,
        "models": dict(models),
    }


def finished(folder: StageDir, name: str, wanted: dict[str, Any], redo: Sequence[str] = ()) -> dict[str, Any] | None:
    """The DONE record of a stage that need not be redone; None when it is not done.

    Args:
        redo: the stages to name in the error's advice; default: this one.

    Raises:
        DataError: it is done, but as something else; the message lists every difference.
    """
    record = folder.done()
    if record is None:
        return None
    if record["fingerprint"] != fingerprint(wanted):
        changed = differences(record["identity"], wanted)
        raise DataError(
            "this stage is finished, but with another configuration, teacher, data set or tokenizer",
            where=f"stage '{name}' in {folder.path}",
            found="\n           ".join(changed),
            todo="undo the change, give the run another name, or redo this stage and what depends on it: "
            + redo_command(redo or [name]),
        )
    return record


def redo_command(names: Sequence[str]) -> str:
    """The command that redoes these stages, for advice."""
    return " ".join(["mtkd run FILE", *(f"--redo {name}" for name in names)])


def weights_digest(model: ModelConfig, folder: Path) -> str:
    """Digest of a model folder: config.json and vocabulary map whole, size and samples of every safetensors file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if (folder / MAP_FILE).is_file():
        digest.update((folder / MAP_FILE).read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
