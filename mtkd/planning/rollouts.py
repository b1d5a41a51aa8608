"""Refuse a rollout that cannot write, be scored or be learned from; and count the memory of writing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from mtkd.config import DataConfig, RolloutConfig, StageConfig
from mtkd.config.match import Match
from mtkd.data.tasks import TaskSpec
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES
from mtkd.models.info import model_class
from mtkd.planning.footprint import Step
from mtkd.planning.spec import ModelSpec
from mtkd.pool import BACKENDS
from mtkd.weightings.make import stage_reads
from mtkd.weightings.spec import WEIGHTINGS
from mtkd.weightings.traits import TRAITS, reads_labels

_DRAWING = 24
"""Bytes per logit while a token is drawn: logits, log-probabilities, and float64 probabilities and sums."""


def check_rollout(stage: StageConfig, data: DataConfig, task: TaskSpec, rows: Mapping[str, Match], where: str) -> None:
    """Refuse a rollout by the configuration alone.

    Args:
        rows: of the stage, by their places.
        where: the stage.
    Raises:
        UserError: naming the field.
    """
    rollout = stage.rollout
    _check_written(stage, rows, where)
    if rollout is None:
        return
    place = f"{where}.rollout"
    if not task.left_to_right or not data.prompted:
        raise UserError(
            "a rollout answers prompts, and these data have none",
            where=place,
            found=f"task '{data.task}'" + ("" if data.prompted else " without prompt"),
            allowed="task causal-lm with prompt or messages",
            todo="set data.NAME.prompt or messages to the column of the prompts, or drop rollout",
        )
    if rollout.share == 0:
        return
    if rollout.max_new_tokens > data.max_length:
        raise UserError(
            "no prompt leaves room for so many new tokens: a row has at most data.NAME.max_length of them, prompt "
            "included",
            where=f"{place}.max_new_tokens",
            found=rollout.max_new_tokens,
            allowed=f"at most {data.max_length}, less the tokens of a prompt",
            todo="set fewer, or a larger data.NAME.max_length",
        )
    if stage.batch.sequences is None:
        raise UserError(
            "a budget of tokens counts the data's answers, and those of the student have other lengths",
            where=f"{where}.batch.tokens",
            found=stage.batch.tokens,
            todo="set batch.sequences",
        )
    _check_cached(stage, place)
    _check_labels(stage, rollout, rows, where)


def _check_written(stage: StageConfig, rows: Mapping[str, Match], where: str) -> None:
    """Refuse rows on written words without any, or with words of another distribution than the row's."""
    rollout = stage.rollout
    for place, row in rows.items():
        drawn_alone = "behaviour" in LOSSES[row.loss].needs
        if (drawn_alone or row.positions == "teachable") and row.weighted:
            _check_gradients(stage, row, where)
        if not drawn_alone:
            continue
        if rollout is None or rollout.share == 0:
            raise UserError(
                f"loss '{row.loss}' learns from words that the student writes, and this stage writes none",
                where=place,
                found="no rollout" if rollout is None else "rollout.share: 0",
                todo=f"give {where} a rollout: {{max_new_tokens: 64}}, or take a divergence, such as reverse_kl",
            )
        drawn = {"temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k}
        read = {"temperature": LOSSES[row.loss].temperature(row.options)[0], "top_p": 1.0, "top_k": 0}
        for name, value in drawn.items():
            if value != read[name]:
                raise UserError(
                    f"loss '{row.loss}' weighs words by how often the student writes them, and they are drawn from "
                    "another distribution than the row compares",
                    where=f"{where}.rollout.{name}",
                    found=value,
                    allowed=f"{read[name]:g}",
                    todo="set it so; or options: {temperature: ...} of the row to that of the rollout, or take "
                    "reverse_kl, which reads all words",
                )


def _check_gradients(stage: StageConfig, row: Match, where: str) -> None:
    """Refuse weights from the teachers' gradients of all words where a row has those of some."""
    if "gram" in stage_reads(stage, where, token_level=True).names:
        raise UserError(
            f"weighting '{stage.weighting.name}' compares the teachers' gradients at all targets and words, and this "
            "row has some of them",
            where=f"{where}.weighting",
            found=f"loss '{row.loss}'" + (", positions: teachable" if row.positions == "teachable" else ""),
            todo="take reverse_kl at all targets, or another weighting",
        )


def _check_cached(stage: StageConfig, where: str) -> None:
    stored = [teacher.name for teacher in stage.teachers if BACKENDS[teacher.backend].stored]
    if stored:
        raise UserError(
            "a cached teacher cannot score what is not written yet: it answered for the data's own text",
            where=where,
            found=f"teacher '{stored[0]}' is cached",
            todo="let the teacher run (drop backend: cached, and name its model), or set share: 0",
        )


def _check_labels(stage: StageConfig, rollout: RolloutConfig, rows: Mapping[str, Match], where: str) -> None:
    """Refuse readers of labels where every answer is the student's, and those that would take its words for labels."""
    named = stage.weighting.name
    spec, reads = WEIGHTINGS[named], stage_reads(stage, where, token_level=True)
    traits = [name for name in sorted(reads.names & TRAITS.keys()) if reads_labels(TRAITS[name])]
    undeclared = traits and not spec.needs_labels
    if rollout.share < 1 and undeclared:
        raise UserError(
            f"weighting '{named}' reads '{traits[0]}', which needs labels, and does not declare that it does: it would "
            "take what the student wrote for labels",
            where=f"{where}.weighting",
            found=named,
            todo="add needs_labels=True to its decorator",
        )
    readers = [f"row {row.feature}:{row.loss}, {place}" for place, row in rows.items() if row.target == "labels"]
    if spec.needs_labels or traits:
        readers.append(f"weighting '{named}'")
    if rollout.share == 1 and readers:
        raise UserError(
            "the student writes every answer, so there is no label to read",
            where=f"{where}.rollout.share",
            found=f"1 with {readers[0]}",
            allowed="below 1: labels count in the rest",
            todo="set a smaller share, or drop what reads labels (of method kd: options: {hard: 0}; weightings without "
            "labels: entropy, confidence, posterior, uniform)",
        )


def check_can_write(student: ModelSpec, where: str, todo: str = "choose another student, or drop rollout") -> None:
    """Refuse an architecture that cannot read a text token by token with a key-value cache.

    Args:
        todo: advice.
    Raises:
        UserError: naming it.
    """
    cls = model_class(student.config, student.auto_class)
    stateful = getattr(cls, "_is_stateful", False)
    if stateful or "past_key_values" not in inspect.signature(cls.forward).parameters:
        raise UserError(
            f"architecture '{student.info.architecture}' cannot write with a key-value cache",
            where=where,
            found="it keeps a state instead" if stateful else "it takes no cache",
            allowed="decoders such as llama, qwen2, gpt2 and glm_blocklm",
            todo=todo,
        )


def rows_written(rollout: RolloutConfig | None, sequences: int) -> int:
    """Most rows of a micro-batch of `sequences` examples: each prompt has several where it is answered."""
    return sequences * rollout.per_prompt if rollout is not None and rollout.share else sequences


def writing_bytes(step: Step, number: int) -> dict[str, float]:
    """Bytes on a rank while the student writes a step's answers, by part; {} where it writes none.

    Args:
        number: bytes of a number in the key-value cache.
    """
    stage = step.spec.stage
    if stage.rollout is None or not stage.rollout.share:
        return {}
    (student,) = step.spec.trained.values()
    rows, info = step.sequences * step.micro_batches, student.info
    kept = 2 * info.num_layers * info.num_kv_heads * info.head_width * number
    return {
        # a cache that grows is copied: the old one and the new one of a layer exist at the same time
        "key-value cache": float(rows * step.length * kept * (1 + 1 / info.num_layers)),
        "logits that tokens are drawn from": float(rows * (student.kept or info.vocabulary) * _DRAWING),
    }
