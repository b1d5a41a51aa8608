"""Compute the identity of a stage, all values that determine its result, and compare DONE and checkpoints with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mtkd.config import ModelConfig, RunConfig, StageConfig, TeacherConfig
from mtkd.config.read import differences, fingerprint
from mtkd.data.segmentation import segmentation_digest
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.data.transforms import TRANSFORMS
from mtkd.engine.folder import StageDir
from mtkd.engine.notes import Done
from mtkd.errors import DataError
from mtkd.losses.spec import LOSSES
from mtkd.methods.rows import stage_rows
from mtkd.methods.spec import METHODS
from mtkd.models.digest import weights_digest
from mtkd.models.folder import check_folder
from mtkd.planning.locate import revision_of
from mtkd.planning.places import placed
from mtkd.planning.stages import redo_command, stage_seed, stage_values
from mtkd.pool import BACKENDS
from mtkd.pool.cache.folder import cache_digest, cache_folder
from mtkd.registry import SOURCES, TASKS, Registry, plugin_code
from mtkd.running.context import RunContext
from mtkd.weightings.spec import WEIGHTINGS

SEGMENTATION = "segmentation"
"""Key of an identity: how the tokenizer cuts a text. With the same token -> id, other merges give other ids."""


def stage_identity(context: RunContext, name: str) -> dict[str, Any]:
    """The identity of a stage, see `identity`; earlier stages must be done."""
    config, stage = context.config, context.config.stages[name]
    data = config.data_name(stage.data)
    models = {role: _placed_digest(context, m, stage.place(name, role)) for role, m in stage.trained.items()}
    models |= _vocabularies(context, stage)
    for i, teacher in enumerate(stage.teachers):
        where = f"stages.{name}.teachers[{i}].model"
        source = BACKENDS[teacher.backend].source(
            teacher,
            partial(_placed_digest, context, teacher.model, where),
            partial(_cache_digest, context, teacher.model, where),
            config.base,
        )
        models[f"teacher {teacher.name}"] = source
        if teacher.calibrate is not None and teacher.calibrate.data:
            models[f"teacher {teacher.name} calibration"] = _labels_digest(context, teacher.calibrate.data)
    return identity(
        config,
        name,
        data=context.raw(data).fingerprint,
        tokenizer=tokenizer_fingerprint(context.tokenizer, chat=config.data[data].templated),
        segmentation=segmentation_digest(context.tokenizer),
        models=models,
        steps=equal_time_steps(context, stage) if stage.equal_time else stage.steps or 0,
    )


def _vocabularies(context: RunContext, stage: StageConfig) -> dict[str, str]:
    """Digests of the texts in which the ids of compressed vocabularies are counted, by use."""
    digests = {}
    for role, model in stage.trained.items():
        if model.vocabulary is not None:
            counted = context.config.data_name(model.vocabulary.counts)
            texts = context.config.data[counted]
            written = [tokenizer_fingerprint(context.tokenizer, chat=True)] if texts.templated else []
            digests[f"{role} vocabulary"] = fingerprint([context.raw(counted).fingerprint, texts.values(), *written])
    return digests


def equal_time_steps(context: RunContext, stage: StageConfig) -> int:
    """Optimizer steps that take as many seconds as another stage trained, by the measured rate of a third."""
    assert stage.equal_time is not None
    target, rate = context.record(stage.equal_time.to), context.record(stage.equal_time.rate_of)
    return max(1, math.ceil(target.seconds / (rate.seconds / rate.steps)))  # rounded up: no less time than the other


def model_digest(context: RunContext, model: ModelConfig) -> str:
    """Digest of the weights that a model starts from, and of the cut."""
    whole, cut = _whole_digest(context, model), model.model_dump(mode="json", include={"keep_layers", "slice"})
    return fingerprint([whole, cut]) if model.is_cut else whole


def teacher_digest(context: RunContext, teacher: TeacherConfig) -> str:
    """Digest of a teacher's predictions: of its weights, and of `classes` and `calibrate` where the user sets them.

    A cache keeps this digest, for its logits are calibrated and in the order that `classes` gives.
    """
    config = context.config
    code = partial(plugin_code, {path: config.base / path for path in config.plugins})
    digest = BACKENDS[teacher.backend].digest(teacher, _read_digest(context, teacher), code, config.base)
    if (asked := teacher.calibrate) is None:
        return digest
    labels = _labels_digest(context, asked.data) if asked.data else ""
    return fingerprint([digest, asked.model_dump(mode="json"), labels])


def _read_digest(context: RunContext, teacher: TeacherConfig) -> str:
    """Digest of what a teacher answers from: weights, or the folder of a cache."""
    if BACKENDS[teacher.backend].stored and teacher.model.stage is None:
        return _cache_digest(context, teacher.model, "@stage.teachers")
    return model_digest(context, teacher.model)


def _labels_digest(context: RunContext, data: str) -> str:
    """Digest of a `data` entry that teachers are calibrated on."""
    return fingerprint([context.raw(data).fingerprint, context.config.data[data].values()])


def _placed_digest(context: RunContext, model: ModelConfig, where: str) -> str:
    with placed(model=where):
        return model_digest(context, model)


def _cache_digest(context: RunContext, model: ModelConfig, where: str) -> str:
    return cache_digest(cache_folder(model.path or "", context.config.base, where))


def _whole_digest(context: RunContext, model: ModelConfig) -> str:
    if model.path is None:
        return "fresh"
    if model.stage is not None:
        return context.record(model.stage.stage).fingerprint + model.stage.part
    folder = context.resolve(model.path)
    if not isinstance(folder, Path):
        return f"{folder}@{revision_of(model)}"
    check_folder(folder)  # a link could lead the digest to a file outside the folder
    return weights_digest(folder)


def identity(
    config: RunConfig, name: str, *, data: str, tokenizer: str, segmentation: str, models: Mapping[str, str], steps: int
) -> dict[str, Any]:
    """Everything that determines what a stage makes; equal identities make equal models.

    Args:
        data: fingerprint of the raw data.
        tokenizer: fingerprint of the tokenizer.
        segmentation: digest of the way it cuts a text.
        models: per use ("student", "teacher NAME") the digest of the weights it starts from.
        steps: the resolved number of optimizer steps.
    """
    stage = config.stages[name]
    values = {
        "stage": stage_values(stage),
        "plugins": _plugin_digests(config, name),
        "seed": stage_seed(config, stage),
        "steps": steps,
        "precision": config.engine.decided_precision,
        "compile": config.engine.compile,
        "attention": config.engine.attention,
        "data": {
            "config": config.data_of(stage).values(),
            "fingerprint": data,
        },
        "tokenizer": tokenizer,
        SEGMENTATION: segmentation,
        "models": dict(models),
    }
    if stage.kind == "cache":
        del values["compile"]  # a cache stage compiles no teacher
        if stage.cache.targets != "sampled":
            del values["seed"]  # only sampled targets are drawn
    if stage.kind == "generate":
        del values["compile"]
    return values


def _plugin_digests(config: RunConfig, name: str) -> dict[str, str]:
    """sha256 of every plug-in that the stage uses, and of the plug-ins these depend on."""
    stage = config.stages[name]
    data = config.data_of(stage)
    used: list[tuple[Registry[Any], str]] = [(WEIGHTINGS, stage.weighting.name), (TASKS, data.task)]
    used.append((SOURCES, data.source))
    if stage.method is not None:
        used.append((METHODS, stage.method.name))
    used += [(LOSSES, row.loss) for row in stage_rows(stage, data, f"stages.{name}")]
    used += [(TRANSFORMS, step.name) for step in stage.transforms]
    used += [(BACKENDS, teacher.backend) for teacher in stage.teachers]
    origins = {registry.origin(name) for registry, name in used}
    return plugin_code({path: config.base / path for path in config.plugins}, origins)


def finished(folder: StageDir, name: str, identity: dict[str, Any], redo: Sequence[str] = ()) -> Done | None:
    """The DONE record of a finished stage; None when it is not done.

    Args:
        redo: the stages to name in the error's advice; default: this one.

    Raises:
        DataError: its identity is another one; the message lists every difference.
    """
    record = folder.done()
    if record is None:
        return None
    identity = as_known(record.identity, identity)
    if record.fingerprint != fingerprint(identity):
        changed = differences(record.identity, identity)
        raise DataError(
            "this stage is finished, but with another configuration, teacher, data set or tokenizer",
            where=f"stages.{name}",
            found="\n           ".join([*changed, f"in {folder.path}"]),
            todo="undo the change, give the run another name, or redo this stage and what depends on it: "
            + redo_command(redo or [name]),
        )
    return record


def as_known(before: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without the keys that a record of an earlier release does not have."""
    return {key: value for key, value in identity.items() if key in before or key != SEGMENTATION}


def check_checkpoint(
    name: str,
    manifest: Mapping[str, Any],
    identity: Mapping[str, Any],
    layout: Mapping[str, Any],
    folder: Path | None = None,
) -> None:
    """Refuse to go on with a checkpoint of another identity, or of other processes than `layout`.

    Without ZeRO every process holds the whole state, so the number of processes may change.

    Args:
        layout: engine, world_size and zero_stage of this run.
        folder: of the checkpoint, for the message: it may lie in the wrong stage's folder.
    Raises:
        DataError: with every difference, and the command that goes on.
    """
    saved = {key: manifest[key] for key in layout}
    cut, place = differences(saved, layout), [f"in {folder}"] if folder else []
    if changed := differences(manifest["identity"], as_known(manifest["identity"], identity)):
        raise DataError(
            "the checkpoint belongs to another configuration, teacher, data set or tokenizer",
            where=f"stages.{name}",
            found="\n           ".join(changed + cut + place),
            todo="undo the change, give the run another name, or begin this stage again: " + redo_command([name]),
        )
    whole = [(values["engine"], values["zero_stage"]) == ("deepspeed", 0) for values in (saved, layout)]
    if cut and not all(whole):
        raise DataError(
            "the checkpoint was cut for other processes",
            where=f"stages.{name}",
            found="\n           ".join(cut + place),
            todo=f"go on as it was begun: {_command_for(saved)}\n"
            f"           or begin this stage again (earlier ones stay): {redo_command([name])}",
        )


def _command_for(layout: Mapping[str, Any]) -> str:
    """The command that goes on with a checkpoint of this layout."""
    options = [f"engine.kind={layout['engine']}"]
    if layout["engine"] == "deepspeed":
        options += [f"engine.processes={layout['world_size']}", f"engine.zero_stage={layout['zero_stage']}"]
    several = " (or a hostfile with as many slots)" if layout["world_size"] > 1 else ""
    return " ".join(["mtkd run FILE", *(f"-o {option}" for option in options)]) + several
