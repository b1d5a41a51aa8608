"""The stages of a run in order: what each one depends on, what identifies it, and which are done already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtkd.config import RunConfig, StageConfig, StageRef
from mtkd.config.read import differences, fingerprint
from mtkd.data.transforms import TRANSFORMS
from mtkd.engine.folder import StageDir
from mtkd.errors import DataError, UserError, nearest
from mtkd.losses.spec import LOSSES
from mtkd.methods.rows import stage_rows
from mtkd.methods.spec import METHODS
from mtkd.models.info import CAUSAL_LM, MASKED_LM, PRE_TRAINING
from mtkd.pool import BACKENDS
from mtkd.registry import SOURCES, TASKS, Registry, plugin_code
from mtkd.weightings.spec import WEIGHTINGS

CLOZE = "cloze"
"""The head of a model that scores classes by their words: that of the language model (GLM)."""

SEGMENTATION = "segmentation"
"""Of an identity: how the tokenizer cuts a text; with the same token -> id, other merges give other ids."""

# Fields that change when a stage is saved, not what it makes.
_BOOKKEEPING = {"save_every", "keep"}


def model_name(stage_name: str, stage: StageConfig, role: str) -> str:
    """Name of what a stage trains under a role of `StageConfig.trained`: its own, or NAME/MEMBER."""
    return StageRef(stage_name, role if stage.members else "").model


def used_stages(stage: StageConfig) -> list[str]:
    """Names of the earlier stages whose models this one loads."""
    models = [*stage.trained.values(), *(teacher.model for teacher in stage.teachers)]
    return list(dict.fromkeys(model.stage.stage for model in models if model.stage is not None))


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
        if record is None or name in gone or record["identity"].get("stage") == stage_values(stage):
            continue
        found.append(name)
        gone |= set(to_redo(config, [name]))
    return found


def scored_models(config: RunConfig) -> list[str]:
    """The models that are scored at the end: those that `evaluate` names, else all that learn to do its task."""
    if config.evaluate.stages:
        return config.scored
    return [model for model in config.models if does_task(config, model) and not never_trained(config, model)]


def learns_to_predict(config: RunConfig, name: str) -> bool:
    """Whether a stage trains its models' heads: some row compares logits."""
    stage = config.stages[name]
    rows = stage_rows(stage, config.data_of(stage), f"stages.{name}")
    return any(row.feature == "logits" and row.weight for row in rows)


def never_trained(config: RunConfig, model: str) -> bool:
    """Whether a stage's model has the head that it was drawn with: from its first stage on, no row compares logits.

    A model that is loaded from a folder may bring its head along; the plan looks.

    Args: model: STAGE or STAGE/MEMBER.
    """
    name = StageRef.named(model).stage
    stage: StageConfig = config.stages[name]
    if stage.kind == "cache" or learns_to_predict(config, name):
        return False
    origins = {model_name(name, stage, role): made for role, made in stage.trained.items()}
    origin = origins[model]
    return origin.path is None if origin.stage is None else never_trained(config, origin.stage.model)


def does_task(config: RunConfig, stage: str) -> bool:
    """Whether a stage's models have the head for the data of `evaluate`."""
    ours, theirs = config.stages[StageRef.named(stage).stage].data, config.evaluate.data
    labels = [config.data[config.data_name(name)].classes for name in (ours, theirs)]
    if all(labels) and labels[0] != labels[1]:  # found in the data, they are compared when the models are loaded
        return False
    return head_fits(head_for(config, ours), head_for(config, theirs))


def head_for(config: RunConfig, data_name: str) -> str:
    """The auto class of the models that are trained on a `data` entry, or `CLOZE`."""
    name = config.data_name(data_name)
    data = config.data[name]
    task = TASKS.find(data.task, f"data.{name}.task")
    return CLOZE if task.cloze else str(task.class_for(data))


def head_fits(model: str, task: str) -> bool:
    """Whether a model of one auto class has the head of another: both heads of pre-training include masked tokens'."""
    return model == task or (model, task) == (PRE_TRAINING, MASKED_LM)


def can_teach(model: str, task: str) -> bool:
    """Whether what a model of one head predicts means something with another: a cloze is a language model's reading."""
    return head_fits(model, task) or {model, task} == {CAUSAL_LM, CLOZE}


def stage_values(stage: StageConfig) -> dict[str, Any]:
    """The fields of a stage that determine what it makes, as plain values."""
    if stage.kind == "cache":  # how many examples share a forward pass rounds the last bits, and decides nothing
        return _without_places(stage.model_dump(mode="json", include={"kind", "data", "teachers", "cache"}))
    # Looking at a stage changes nothing, unless what is seen decides where it ends or which step is kept.
    looking = set() if stage.selects else {"evaluate_every"}
    values = stage.model_dump(mode="json", exclude=_BOOKKEEPING | looking | {"cache"})
    values = _without_places(values)
    if not stage.transforms:  # finished stages may not know the field
        del values["transforms"]
    # The members' order decides their seeds, and whose head is shared: canonical JSON would sort it away.
    return {**values, "member_order": list(stage.members)} if stage.members else values


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    """Stage values in which live teachers are all resident: where their weights are changes no numbers.

    (A sharded teacher's are those of a resident one to rounding.)
    """
    for teacher in values["teachers"]:
        teacher["backend"] = teacher["backend"] if not BACKENDS[teacher["backend"]].runs else "resident"
        teacher.pop("sharded", None)
        if teacher.get("classes") is None:  # finished stages may not know the field
            teacher.pop("classes", None)
    return values


def stage_seed(config: RunConfig, stage: StageConfig) -> int:
    """The stage's seed, or the run's."""
    return config.seed if stage.seed is None else stage.seed


def identity(
    config: RunConfig, name: str, *, data: str, tokenizer: str, segmentation: str, models: Mapping[str, str], steps: int
) -> dict[str, Any]:
    """Everything that determines what a stage makes; equal identities make equal models.

    Args:
        data: fingerprint of the raw data. tokenizer: its fingerprint. segmentation: digest of how it cuts a text.
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
        del values["compile"]  # its teachers never are
        if stage.cache.targets != "sampled":
            del values["seed"]  # nothing else is drawn
    return values


def _plugin_digests(config: RunConfig, name: str) -> dict[str, str]:
    """sha256 of every plug-in that the stage takes something from, and of what these depend on."""
    stage = config.stages[name]
    data = config.data_of(stage)
    used: list[tuple[Registry[Any], str]] = [(WEIGHTINGS, stage.weighting.name), (TASKS, data.task)]
    used.append((SOURCES, data.source))
    if stage.method is not None:
        used.append((METHODS, stage.method.name))
    used += [(LOSSES, row.loss) for row in stage_rows(stage, data, f"stages.{name}")]
    used += [(TRANSFORMS, step.name) for step in stage.transforms]
    origins = {registry.origin(name) for registry, name in used}
    return plugin_code({path: config.base / path for path in config.plugins}, origins)


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
    wanted = as_known(record["identity"], wanted)
    if record["fingerprint"] != fingerprint(wanted):
        changed = differences(record["identity"], wanted)
        raise DataError(
            "this stage is finished, but with another configuration, teacher, data set or tokenizer",
            where=f"stages.{name}",
            found="\n           ".join([*changed, f"in {folder.path}"]),
            todo="undo the change, give the run another name, or redo this stage and what depends on it: "
            + redo_command(redo or [name]),
        )
    return record


def as_known(before: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what the one that was written before, by an earlier release, may not know."""
    return {key: value for key, value in identity.items() if key in before or key != SEGMENTATION}


def check_checkpoint(
    name: str, manifest: Mapping[str, Any], identity: Mapping[str, Any], layout: Mapping[str, Any]
) -> None:
    """Refuse to go on with a checkpoint of another stage than `identity`, or of other processes than `layout`.

    Without ZeRO every process holds all of it: then their number may be another one.

    Args: layout: engine, world_size and zero_stage of this run.
    Raises:
        DataError: with every difference, and the command that goes on.
    """
    saved = {key: manifest[key] for key in layout}
    cut = differences(saved, layout)
    if changed := differences(manifest["identity"], as_known(manifest["identity"], identity)):
        raise DataError(
            "the checkpoint belongs to another configuration, teacher, data set or tokenizer",
            where=f"stages.{name}",
            found="\n           ".join(changed + cut),
            todo="undo the change, give the run another name, or begin this stage again: " + redo_command([name]),
        )
    whole = [(values["engine"], values["zero_stage"]) == ("deepspeed", 0) for values in (saved, layout)]
    if cut and not all(whole):
        raise DataError(
            "the checkpoint was cut for other processes",
            where=f"stages.{name}",
            found="\n           ".join(cut),
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


def redo_command(names: Sequence[str]) -> str:
    """The command that redoes these stages, for advice."""
    return " ".join(["mtkd run FILE", *(f"--redo {name}" for name in names)])
