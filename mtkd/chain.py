"""The stages of a run in order: what each one depends on, what identifies it, and which are done already."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtkd.config import STAGE_PREFIX, ModelConfig, RunConfig, StageConfig
from mtkd.configfile import differences, fingerprint
from mtkd.errors import DataError
from mtkd.match import Match
from mtkd.models.folder import MAP_FILE
from mtkd.registry import METHODS, check_options
from mtkd.rundir import StageDir

# Fields that change when a stage is looked at or saved, not what it makes.
_BOOKKEEPING = {"evaluate_every", "save_every", "keep"}

# A weight file is identified by its size and this many evenly spread samples of this many bytes: a 20 GB teacher
# would take a minute to hash whole on every start.
_SAMPLES, _SAMPLE_BYTES = 64, 65_536


def stage_of(path: str | None) -> str | None:
    """ "stage:x" -> "x"; None for any other path."""
    return path.removeprefix(STAGE_PREFIX) if path and path.startswith(STAGE_PREFIX) else None


def used_stages(stage: StageConfig) -> list[str]:
    """Names of the earlier stages whose models this one loads."""
    paths = [stage.student.path, *(teacher.model.path for teacher in stage.teachers)]
    return [name for name in map(stage_of, paths) if name is not None]


def stage_rows(stage: StageConfig, where: str, regression: bool = False) -> tuple[Match, ...]:
    """The Match rows of a stage: its method's, then its own; for a finetune stage the label row alone.

    Raises:
        UserError: unknown method or option.
    """
    if stage.kind == "finetune":
        return (Match(feature="logits", loss="label_mse" if regression else "ce", target="labels"),)
    if stage.method is None:
        return stage.match
    spec = METHODS.find(stage.method.name, f"{where}.method")
    check_options(stage.method.options, spec.options(), f"{where}.method")
    try:
        rows = spec.function(**stage.method.options)
    except ValueError as error:
        raise DataError(str(error), where=f"{where}.method.options") from error
    return (*rows, *stage.match)


def stage_values(stage: StageConfig) -> dict[str, Any]:
    """The fields of a stage that determine what it makes, as plain values."""
    return stage.model_dump(mode="json", exclude=_BOOKKEEPING)


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


def finished(folder: StageDir, name: str, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The DONE record of a stage that need not be redone; None when it is not done.

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
            todo="give the run another name, or remove this stage's folder and those of the stages that use it",
        )
    return record


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
