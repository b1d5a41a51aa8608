"""Have the models of a run answer held-out prompts, and score what they write (`evaluate.answers`).

Every scored model answers, and every teacher that is no stage of the run. A text is a function of the model, the
prompt and the seed: not of the number of processes, and of the batch by rounding at most. Texts of a model that is
not changed are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtkd.config import AnswersConfig, ModelConfig, StageRef, TeacherConfig
from mtkd.config.plugincode import depends_on
from mtkd.config.read import fingerprint
from mtkd.data.progress import Working, say
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.engine.dist import on_main
from mtkd.engine.jsonlines import read_jsonl, to_json
from mtkd.engine.notes import file_digest, write_scores_note
from mtkd.engine.record import write_atomic
from mtkd.evaluate.answers import RougeL, answers_by_domain, make_extractor, score_answer, summarise_answers
from mtkd.evaluate.significance import Resampling, compare_by, num_rows
from mtkd.models.classes import Meaning
from mtkd.models.forward import LOGITS
from mtkd.models.generate import check_writing, write
from mtkd.models.request import Taught
from mtkd.models.sampling import Sampling
from mtkd.models.taps import TappedModel
from mtkd.planning.answers import WHERE, answers_data
from mtkd.planning.stages import scored_models
from mtkd.pool import BACKENDS
from mtkd.running.context import RunContext
from mtkd.running.identity import teacher_digest
from mtkd.running.models import load_model
from mtkd.running.questions import Prompts, Texts, read_prompts
from mtkd.running.rollout import sampling_of
from mtkd.running.sample import spread
from mtkd.running.scored import fingerprints, is_scored

_SHOWN = 300  # characters of a text in the log


@dataclass(frozen=True)
class _Foreign:
    """A teacher that is no stage of the run: of `stage`, at `where` in the configuration."""

    stage: str
    where: str
    teacher: TeacherConfig


class Answers:
    """The answers of a run's models.

    Args:
        asked: what `evaluate.answers` says.
    """

    def __init__(self, context: RunContext, asked: AnswersConfig) -> None:
        self._context, self._asked = context, asked
        self._name, self._split = answers_data(context.config)
        self._foreign = _foreign_teachers(context)
        self.models = [*scored_models(context.config), *self._foreign]

    @cached_property
    def keys(self) -> dict[str, str]:
        """By model, what its texts are made of."""
        config, asked = self._context.config, self._asked
        data = config.data[self._name]
        file = None if asked.extract.path is None else config.base / asked.extract.path
        shared = {
            "data": self._context.raw(self._name).fingerprint,
            "config": data.values(),
            "split": self._split,
            "tokenizer": tokenizer_fingerprint(self._context.tokenizer, chat=data.templated),
            "precision": config.engine.decided_precision,
            "asked": asked.model_dump(mode="json", exclude={"samples", "data", "split"}),
            "function": None if file is None else [file_digest(file), depends_on(file)],
            "seed": config.seed if asked.temperature else None,
        }
        return {model: fingerprint([shared, self._digests(model)]) for model in self.models}

    def _digests(self, model: str) -> list[str]:
        if model in self._foreign:
            return [teacher_digest(self._context, self._foreign[model].teacher)]
        return fingerprints(self._context, model)

    @property
    def inputs(self) -> list[Any]:
        """What the results are made of."""
        return [self.keys, self._asked.samples]

    def kept(self) -> bool:
        """Whether all texts are there. A collective."""
        return on_main(
            self._context.dist, lambda: all(is_scored(*self._files(model), self.keys[model]) for model in self.models)
        )

    @cached_property
    def prompts(self) -> Prompts:
        """See `read_prompts`."""
        return read_prompts(self._context, self._asked, self._sampling)

    @cached_property
    def _sampling(self) -> Sampling:
        data = self._context.config.data[self._name]
        return sampling_of(self._asked, self._context.tokenizer, data.max_length, WHERE, chat=data.templated)

    def texts(self, model: str) -> Texts | None:
        """What a model answers, scored, on the main rank; from its file where that is of the same inputs."""
        context, key = self._context, self.keys[model]
        file, note = self._files(model)
        if on_main(context.dist, lambda: is_scored(file, note, key)):
            return read_jsonl(file) if context.dist.is_main else None
        written = self._written(self._load(model), f"{model} answers {len(self.prompts.ids):,} prompts")
        if written is not None:
            write_atomic(file, "".join(to_json(record) + "\n" for record in written))
            write_scores_note(note, key, file)
        return written

    def _load(self, model: str) -> TappedModel:
        context, data = self._context, self._context.data(self._name)
        if model in self._foreign:
            where, teacher = self._foreign[model].where, self._foreign[model].teacher
            taught = Taught(LOGITS, Meaning.of(teacher))
            loaded = load_model(context, teacher.model, data, where=where, taught=taught)
        else:
            where, loaded = WHERE, load_model(context, ModelConfig(path=str(StageRef.named(model))), data)
        loaded = loaded.to(context.device).eval()
        check_writing(loaded, where, todo="leave it out of evaluate.stages, or drop evaluate.answers")
        return loaded

    def _written(self, model: TappedModel, what: str) -> Texts | None:
        """Texts and scores of all prompts, on the main rank; every rank writes its part."""
        dist, prompts, tokenizer = self._context.dist, self.prompts, self._context.tokenizer
        say(what, main=dist.is_main)
        mine: list[tuple[int, dict[str, Any]]] = []
        parts = list(self._batches(range(dist.rank, len(prompts.ids), dist.world_size)))
        with Working(what, sum(map(len, parts)), "prompts") as working:
            for rows in parts:
                noise = self._sampling.noise(self._context.config.seed, 0, rows, [0] * len(rows))
                ids = [prompts.ids[row] for row in rows]
                texts = write(model, ids, self._sampling, noise, self._context.dtype)
                for number, row in enumerate(rows):
                    answer = str(tokenizer.decode(texts.of(number), skip_special_tokens=True))
                    facts = {"length": int(texts.lengths[number]), "cut": int(texts.cut[number])}
                    mine.append((row, {**prompts.records[row], "answer": answer, **facts}))
                working.at(len(mine))
        gathered = dist.gather_objects(mine)
        if gathered is None:
            return None
        every = dict(pair for part in gathered for pair in part)
        return self._scored([every[row] for row in range(len(every))])

    def _batches(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows that are written together, those with prompts of about one length."""
        ordered = sorted(rows, key=lambda row: (len(self.prompts.ids[row]), row))
        batch = self._context.config.evaluate.batch
        size = batch.sequences or max(1, (batch.tokens or 0) // self._context.config.data[self._name].max_length)
        for begin in range(0, len(ordered), size):
            yield ordered[begin : begin + size]

    def _scored(self, records: Texts) -> Texts:
        metrics, asked = self._asked.metrics, self._asked.extract
        base = self._context.config.base
        extract = make_extractor(asked, base, f"{WHERE}.extract") if "exact_match" in metrics else None
        rouge = RougeL(WHERE) if "rouge_l" in metrics else None
        return [score_answer(record, record["reference"], extract, rouge) for record in records]

    def _files(self, model: str) -> tuple[Path, Path]:
        if model in self._foreign:
            stage, stem = self._foreign[model].stage, f"teacher-answers-{model}"
        else:
            ref = StageRef.named(model)
            stage, stem = ref.stage, f"answers-{ref.part}" if ref.part else "answers"
        folder = self._context.folder(stage).path
        return folder / f"{stem}.jsonl", folder / f"{stem}.key"

    def num_comparisons(self, texts: dict[str, Texts]) -> int:
        """Rows of `comparisons`."""
        pairs = [pair for pair in self._context.config.evaluate.comparisons if pair.candidate in texts]
        return len(self._asked.metrics) * sum(num_rows(texts[pair.candidate]) for pair in pairs)

    def comparisons(self, texts: dict[str, Texts], resampling: Resampling) -> list[dict[str, Any]]:
        """The pairs of `evaluate.comparisons` both of which answered, by every metric; uncorrected."""
        rows: list[dict[str, Any]] = []
        for pair in self._context.config.evaluate.comparisons:
            names = pair.candidate, pair.baseline
            if texts.keys() >= set(names):
                for metric in self._asked.metrics:
                    rows += compare_by(metric, names, texts[names[0]], texts[names[1]], resampling)
        return rows

    def results(self, texts: dict[str, Texts], comparisons: list[dict[str, Any]]) -> dict[str, Any]:
        """What stands in results.json: data, split, metrics, extract, models, comparisons, samples.

        Args:
            comparisons: corrected.
        """
        metrics = self._asked.metrics
        models = {
            model: {"overall": summarise_answers(metrics, each), "domains": answers_by_domain(metrics, each)}
            for model, each in texts.items()
        }
        return {
            "data": self._name,
            "split": self._split,
            "metrics": list(metrics),
            "extract": self._asked.extract.model_dump(mode="json"),
            "models": models,
            "comparisons": comparisons,
            "left_out": self.prompts.left_out,
            "samples": self._samples(texts),
        }

    def _samples(self, texts: dict[str, Texts]) -> list[dict[str, Any]]:
        """Prompts from all over the split with every model's answer."""
        samples = []
        for row in spread(np.arange(len(self.prompts.ids)), self._asked.samples).tolist():
            record = self.prompts.records[row]
            prompt = str(self._context.tokenizer.decode(self.prompts.ids[row], skip_special_tokens=True))
            answers = {model: each[row]["answer"] for model, each in texts.items()}
            part = {name: record[name] for name in ("document", "domain", "reference")}
            samples.append({**part, "prompt": prompt, "answers": answers})
        return samples


def answers_of(context: RunContext) -> Answers | None:
    """The answers that `evaluate` asks for; None where it asks for none."""
    asked = context.config.evaluate.answers
    return None if asked is None or not context.config.models else Answers(context, asked)


def check_answered(context: RunContext) -> None:
    """Refuse prompts that cannot be answered or compared before anything is trained; nothing where nothing is to do.

    Raises:
        DataError, UserError: see `Answers.prompts`.
    """
    done = on_main(context.dist, lambda: all(context.folder(name).done() for name in context.config.stages))
    answers = None if done else answers_of(context)
    if answers is not None:
        _ = answers.prompts


def log_samples(results: dict[str, Any]) -> None:
    """Show the samples of results to the person."""
    for sample in results["samples"]:
        say(f"prompt {sample['document']}: {_shown(sample['prompt'])}")
        for name, text in (("data", sample["reference"]), *sample["answers"].items()):
            say(f"  {name}: {_shown(text)}")


def _shown(text: str) -> str:
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def _foreign_teachers(context: RunContext) -> dict[str, _Foreign]:
    """Teachers of scored stages that are no stage of the run, by name; each model once."""
    config = context.config
    seen: set[str] = set()
    found: dict[str, _Foreign] = {}
    for stage in dict.fromkeys(StageRef.named(model).stage for model in scored_models(config)):
        for i, teacher in enumerate(config.stages[stage].teachers):
            if teacher.model.stage is not None or not BACKENDS[teacher.backend].runs:
                continue
            of = teacher.model.model_dump_json()
            if of not in seen:
                name = teacher.name if teacher.name not in {*config.models, *found} else f"{stage}-{teacher.name}"
                found[name] = _Foreign(stage, f"stages.{stage}.teachers[{i}]", teacher)
            seen.add(of)
    return found
