"""Refuse a stage whose teachers cannot write, and say in the plan what it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mtkd.config import DataConfig, StageConfig
from mtkd.errors import UserError
from mtkd.evaluate.answers import make_extractor
from mtkd.planning.rollouts import check_can_write
from mtkd.planning.spec import ModelSpec, StageSpec
from mtkd.registry import TASKS


def check_generate(stage: StageConfig, data: DataConfig, base: Path, where: str) -> None:
    """Refuse a generate stage by the configuration alone.

    Raises:
        UserError: naming the field.
    """
    if stage.write is None:
        return
    if not TASKS.find(data.task).left_to_right or not data.prompted:
        raise UserError(
            "teachers answer prompts, and these data have none",
            where=f"{where}.data",
            found=f"task '{data.task}'" + ("" if data.prompted else " without prompt"),
            allowed="task causal-lm with prompt or messages",
            todo="set data.NAME.prompt or messages to the column of the prompts",
        )
    if stage.write.max_new_tokens > data.max_length:
        raise UserError(
            "no prompt leaves room for so many new tokens",
            where=f"{where}.write.max_new_tokens",
            found=stage.write.max_new_tokens,
            allowed=f"at most data.NAME.max_length, {data.max_length}, less the tokens of a prompt",
        )
    if stage.batch.sequences is None:
        raise UserError("texts are written so many at a time", where=f"{where}.batch", todo="set batch.sequences")
    extract = stage.write.keep.extract
    if extract is not None:
        if data.prompts_only:
            raise UserError(
                "these data are prompts alone: there is no answer to keep texts by",
                where=f"{where}.write.keep.by",
                found="answer",
                allowed="none, agreement, length",
            )
        make_extractor(extract, base, f"{where}.write.keep.extract")


def with_texts(spec: StageSpec) -> StageSpec:
    """The stage with a line for the plan.

    Raises:
        UserError: a writer of an architecture that cannot write.
    """
    write = spec.stage.write
    assert write is not None, "a generate stage"
    names = write.writers or tuple(teacher.name for teacher in spec.teachers)
    for teacher in spec.teachers:
        if teacher.name in names and isinstance(teacher.gives, ModelSpec):
            check_can_write(teacher.gives, teacher.place, "take another writer: write.writers")
    who = f"the ensemble of {', '.join(names)}" if write.ensemble else ", ".join(names)
    best = f"the best {write.keep.best}" if write.keep.best else "all"
    prompts = spec.data.facts.rows.get("train")
    many = f" to {prompts:,} prompts" if prompts else ""
    by = "" if write.keep.by == "none" else f" by {write.keep.by}"
    line = f"{write.per_prompt} text(s) each of {who}{many}, at most {write.max_new_tokens} tokens; kept: {best}{by}"
    return replace(spec, cached=(line,))
