"""Refuse an evaluation of answers that cannot be written, or not be scored."""

from __future__ import annotations

from collections.abc import Mapping

from mtkd.config import RunConfig
from mtkd.data.paths import find_files
from mtkd.errors import UserError
from mtkd.evaluate.answers import RougeL, make_extractor
from mtkd.planning.rollouts import check_can_write
from mtkd.planning.spec import StageSpec
from mtkd.planning.stages import model_name, scored_models
from mtkd.registry import TASKS

WHERE = "evaluate.answers"


def answers_data(config: RunConfig) -> tuple[str, str]:
    """The `data` entry and the split whose prompts are answered."""
    settings, asked = config.evaluate, config.evaluate.answers
    assert asked is not None
    return config.data_name(asked.data or settings.data), asked.split or settings.split


def check_answers(config: RunConfig) -> None:
    """Refuse it by the configuration and the files that it names.

    Raises:
        UserError: naming the field.
    """
    asked = config.evaluate.answers
    if asked is None:
        return
    name, split = answers_data(config)
    data, scored = config.data[name], config.data[config.data_name(config.evaluate.data)]
    for place, entry in ((name, data), (config.data_name(config.evaluate.data), scored)):
        task = TASKS.find(entry.task, f"data.{place}.task")
        if not task.left_to_right or (entry is data and not data.prompted):
            raise UserError(
                "only causal language models answer, and only prompts are answered",
                where=WHERE,
                found=f"data.{place}: task '{entry.task}'" + ("" if entry.prompted else " without prompt"),
                allowed="task causal-lm with prompt or messages",
                todo=f"set {WHERE}.data to data with prompts, or drop answers",
            )
    if data.prompts_only and asked.metrics:
        raise UserError(
            "these data are prompts alone: there is no answer to compare with",
            where=f"{WHERE}.metrics",
            found=list(asked.metrics),
            allowed="metrics: [] (length, share cut, and samples)",
            todo="set metrics: [], or name data with answers",
        )
    if asked.max_new_tokens > data.max_length:
        raise UserError(
            f"no prompt leaves room for so many new tokens within data.{name}.max_length",
            where=f"{WHERE}.max_new_tokens",
            found=asked.max_new_tokens,
            allowed=f"at most {data.max_length}, less the tokens of a prompt",
            todo="set fewer, or a larger data.NAME.max_length",
        )
    files = find_files(data, config.base, f"data.{name}") if data.source == "files" else {}
    held_out = split == "validation" and data.validation_share > 0
    if files and split not in files and not held_out:
        raise UserError(
            f"data '{name}' has no {split} split to answer", where=f"{WHERE}.split", found=split, allowed=list(files)
        )
    if "exact_match" in asked.metrics:
        make_extractor(asked.extract, config.base, f"{WHERE}.extract")
    if "rouge_l" in asked.metrics:
        RougeL(WHERE)


def check_writers(config: RunConfig, stages: Mapping[str, StageSpec]) -> None:
    """Refuse scored models of architectures that cannot write.

    Args:
        stages: the specs of all stages.
    Raises:
        UserError: naming the stage's model.
    """
    if config.evaluate.answers is None:
        return
    scored = scored_models(config)
    for name, spec in stages.items():
        for role, model in spec.trained.items():
            if model_name(name, spec.stage, role) in scored:
                todo = "leave it out of evaluate.stages, or drop evaluate.answers"
                check_can_write(model, spec.stage.place(name, role), todo)
