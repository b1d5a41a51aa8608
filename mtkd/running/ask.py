"""Have finished models of a run answer prompts, for `mtkd generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mtkd.config import ModelConfig, RunConfig, StageRef
from mtkd.config.rollout import SamplingConfig
from mtkd.data.chat import write_openings
from mtkd.data.encode import around_text, tokenize
from mtkd.data.tokenizers import num_real_ids
from mtkd.engine.folder import RunDir
from mtkd.errors import UserError
from mtkd.models.generate import check_writing, write
from mtkd.models.load import build_model
from mtkd.models.request import ModelRequest
from mtkd.models.sampling import Sampling
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import read_vocabulary
from mtkd.planning.locate import read_tokenizer, resolve_path
from mtkd.pool import BACKENDS
from mtkd.registry import TASKS
from mtkd.running.remember import reopen
from mtkd.running.rollout import sampling_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """What a model wrote.

    Attributes:
        model: STAGE, STAGE/MEMBER, or the name of a teacher that is no stage.
        prompt: as the user gave it. text: without special tokens. cut: it has no end.
    """

    model: str
    prompt: str
    text: str
    cut: bool


@dataclass(frozen=True)
class _Model:
    """A model that can be asked: its name, its folder, its place in the configuration."""

    name: str
    folder: Path | str
    where: str


def ask(
    path: Path, prompts: Sequence[str], how: SamplingConfig, *, teachers: bool = False, seed: int = 0
) -> list[Answer]:
    """Have a model of a run answer prompts; of language models written left to right.

    A prompt is what stands before an answer: where the stage's data are chats it becomes the user's turn, in the
    tokenizer's template; else it is read as it is.

    Args:
        path: RUN/STAGE or RUN/STAGE/MEMBER; RUN: its last stage that has teachers, else its last one.
        prompts: at least one, none of them empty.
        teachers: also ask the teachers of the stage that have weights here.
        seed: of the draws, at a temperature above 0: prompt number n of every model has the same noise.
    Raises:
        UserError: no run, no such stage, a stage that is not done or writes no text, or no prompt.
        DataError: a model's folder is damaged or not a model.
    """
    run, name = _find(path)
    config = reopen(run)
    part = name or _last(config)
    models = _models(config, run, part, teachers=teachers)
    data = config.data_of(config.stages[StageRef.named(part).stage])
    task = TASKS.find(data.task)
    if not task.left_to_right:
        raise UserError(
            f"stage '{part}' makes no model that writes text",
            where=str(run),
            found=f"task {data.task}",
            allowed=[n for n, s in config.stages.items() if TASKS.find(config.data_of(s).task).left_to_right] or "none",
        )
    if not prompts or not all(prompts):
        raise UserError("a prompt is empty", todo='give a text: mtkd generate RUN/STAGE "prompt"')
    tokenizer = _tokenizer(models[0])
    ids = _read(tokenizer, prompts, chat=data.templated)
    sampling = sampling_of(how, tokenizer, 0, "mtkd generate", chat=data.templated)
    answers = []
    for model in models:
        loaded = _load(model, config, tokenizer)
        answers += _answers(model.name, loaded, prompts, ids, sampling, tokenizer, seed)
    return answers


def _answers(
    name: str,
    model: TappedModel,
    prompts: Sequence[str],
    ids: list[list[int]],
    how: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> list[Answer]:
    rows, most = list(range(len(ids))), model.info.max_positions
    how = replace(how, max_length=most)
    if long := [row for row in rows if len(ids[row]) > most]:
        raise UserError(
            f"'{name}' cannot read so long a prompt",
            where=f"prompt {long[0] + 1}",
            found=f"{len(ids[long[0]])} tokens",
            allowed=f"at most {most}",
        )
    written = write(model, ids, how, how.noise(seed, 0, rows, [0] * len(rows)))
    texts = [str(tokenizer.decode(written.of(row), skip_special_tokens=True)) for row in rows]
    return [Answer(name, prompts[row], texts[row], bool(written.cut[row])) for row in rows]


def _find(path: Path) -> tuple[Path, str]:
    """The run's folder and STAGE or STAGE/MEMBER below it, "" for none."""
    path = path.resolve()
    for run in (path, *list(path.parents)[:2]):
        if (run / "run.yaml").is_file():
            return run, path.relative_to(run).as_posix().removeprefix(".")
    raise UserError(
        "not a run folder, and no stage of one (no run.yaml in it)",
        found=str(path),
        todo="give e.g. runs/instruct/student: the run's folder and the name of a stage",
    )


def _last(config: RunConfig) -> str:
    taught = [name for name, stage in config.stages.items() if stage.kind == "distill"]
    return (taught or [name for name, stage in config.stages.items() if stage.trained] or [*config.stages])[-1]


def _models(config: RunConfig, run: Path, part: str, *, teachers: bool) -> list[_Model]:
    """The model of a stage, then its teachers."""
    models = [_Model(part, _export(config, run, StageRef.named(part)), str(run))]
    if not teachers:
        return models
    name = StageRef.named(part).stage
    for number, teacher in enumerate(config.stages[name].teachers):
        where = f"stages.{name}.teachers[{number}]"
        if not BACKENDS[teacher.backend].runs or teacher.model.path is None:
            continue  # a cache, or a teacher of the user's own: nothing here can write
        if teacher.model.stage is not None:
            models.append(_Model(teacher.name, _export(config, run, teacher.model.stage), where))
        else:
            models.append(_Model(teacher.name, resolve_path(teacher.model.path, config.base), where))
    if len(models) == 1:
        raise UserError(
            f"stage '{name}' has no teacher with weights here",
            where=str(run),
            found=[teacher.name for teacher in config.stages[name].teachers] or "no teachers",
            todo="name the stages that made them: mtkd generate RUN/STAGE",
        )
    return models


def _export(config: RunConfig, run: Path, ref: StageRef) -> Path:
    """The folder of a finished stage's model."""
    makers = {
        name: [name] if stage.student is not None else [f"{name}/{member}" for member in stage.members]
        for name, stage in config.stages.items()
    }
    every = [model for models in makers.values() for model in models]
    if ref.model not in every:
        raise UserError("the run makes no such model", where=str(run), found=ref.model, allowed=every)
    folder = RunDir(run).stage([*config.stages].index(ref.stage) + 1, ref.stage)
    if folder.done() is None:
        raise UserError(
            f"stage '{ref.stage}' is not finished: it has no model yet",
            where=str(run),
            todo=f"go on with it first: mtkd resume {run}",
        )
    return folder.export / ref.part if ref.part else folder.export


def _tokenizer(model: _Model) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(model.folder)
    if tokenizer is None:
        raise UserError("the stage's model has no tokenizer beside it", where=str(model.folder))
    return tokenizer


def _read(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """The tokens of prompts as training reads them."""
    if chat:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return list(tokenize(tokenizer, write_openings(tokenizer, turns, lambda row: f"prompt {row + 1}")))
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else around_text(tokenizer)[0]
    return [[*before, *ids] for ids in tokenize(tokenizer, prompts)]


def _load(model: _Model, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TappedModel:
    vocabulary = read_vocabulary(model.folder, tokenizer, model.where)
    num_ids, head = num_real_ids(tokenizer), "AutoModelForCausalLM"
    request = ModelRequest(
        head, num_ids if vocabulary is None else vocabulary.num_kept, 1, tokenizer, Path, where=model.where
    )
    built = build_model(ModelConfig(path=str(model.folder)), request)
    loaded = TappedModel(built, head, num_ids, vocabulary)
    if torch.cuda.is_available():
        loaded = loaded.to("cuda")
    loaded.eval()
    check_writing(loaded, model.where, todo="ask another model of the run")
    return loaded
