"""What the scores of a model were computed from, and whether a file still holds them."""

from __future__ import annotations

from pathlib import Path

from mtkd.config import ModelConfig, StageRef, ensemble_of
from mtkd.data.progress import say
from mtkd.engine.notes import file_digest, read_scores_note
from mtkd.running.context import RunContext
from mtkd.running.identity import model_digest, teacher_digest


def fingerprints(context: RunContext, model: str) -> list[str]:
    """Digests of the models of a name and of their stages' exports: a stage that is redone may round differently."""
    if (together := ensemble_of(model)) is not None:
        teachers = context.config.stages[together].teachers
        models, digests = [t.model for t in teachers], [teacher_digest(context, t) for t in teachers]
    else:
        models = [ModelConfig(path=str(StageRef.named(model)))]
        digests = [model_digest(context, models[0])]
    stages = dict.fromkeys(each.stage.stage for each in models if each.stage is not None)
    exports = [digest for stage in stages for digest in context.record(stage).manifests.values()]
    return digests + exports


def is_scored(file: Path, note: Path, key: str) -> bool:
    """Whether a file holds the undamaged scores of these inputs."""
    record = read_scores_note(note)
    if record is None or record["key"] != key:
        return False
    if record["scores"] != file_digest(file):
        say(f"scored again: {file}: the file is damaged, or was changed")
        return False
    return True
