"""Score the models of a run on held-out data, compare them with paired tests, and write results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtkd.config import ENSEMBLE_PREFIX, EvaluateConfig, ModelConfig, StageRef, ensemble_of
from mtkd.config.read import fingerprint
from mtkd.data.load import LoadedData
from mtkd.data.progress import say
from mtkd.data.sampler import evaluation_batches
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.engine.dist import on_main
from mtkd.engine.jsonlines import finite, read_jsonl, to_json
from mtkd.engine.notes import Results, write_scores_note
from mtkd.engine.record import read_record, write_atomic, write_record
from mtkd.errors import DataError
from mtkd.evaluate.metrics import by_domain, summarise
from mtkd.evaluate.score import Reader, Scorer
from mtkd.evaluate.significance import Resampling, compare, correct, num_rows
from mtkd.models.forward import LOGITS
from mtkd.models.taps import TappedModel
from mtkd.planning.stages import scored_models
from mtkd.running.answers import Answers, answers_of, log_samples
from mtkd.running.build import tile_of
from mtkd.running.calibrate import fits_of
from mtkd.running.context import RunContext
from mtkd.running.models import load_model
from mtkd.running.questions import Texts
from mtkd.running.scored import fingerprints, is_scored
from mtkd.running.teachers import open_teacher

Scores = list[dict[str, Any]]


def judge(context: RunContext) -> dict[str, Any]:
    """Score the models that `evaluate` names and compare them; scores with unchanged inputs are kept.

    Returns:
        The content of results.json: task, split, models with overall and per-domain metrics, comparisons; where
        teachers were calibrated, by stage what was fitted for each.
    """
    settings = context.config.evaluate
    name = context.config.data_name(settings.data)
    names = [*scored_models(context.config), *(ENSEMBLE_PREFIX + s for s in settings.ensembles)]
    shared = {
        "data": context.raw(name).fingerprint,
        "config": context.config.data[name].values(),
        "split": settings.split,
        "tokenizer": tokenizer_fingerprint(context.tokenizer, chat=context.config.data[name].templated),
        "precision": context.config.engine.decided_precision,
    }
    keys = {model: fingerprint([shared, fingerprints(context, model)]) for model in names}
    facts = {model: _shown(context, model) for model in names if ensemble_of(model) is None}
    fitted = on_main(context.dist, lambda: {s: found for s in context.config.stages if (found := fits_of(context, s))})
    # What `ablate` adds are stages and comparisons; what is said at a start changes no score.
    asked = settings.model_dump(mode="json", exclude={"ablate", "agreement", "answers"})
    answers = answers_of(context)
    inputs = fingerprint([keys, asked, facts, *([fitted] if fitted else []), *(answers.inputs if answers else [])])
    path = context.run.path / "results.json"
    former = on_main(context.dist, lambda: _former(path))
    if (
        former.get("inputs") == inputs
        and on_main(context.dist, lambda: all(is_scored(*_files(context, model), keys[model]) for model in names))
        and (answers is None or answers.kept())
    ):
        return former
    scores = {model: _scores(context, model, keys[model], name) for model in names}
    texts = {model: answers.texts(model) for model in answers.models} if answers else {}
    context.dist.barrier()
    results: dict[str, Any] = {}
    if context.dist.is_main:
        written = {model: each for model, each in texts.items() if each is not None}
        results = _results(
            context, settings, name, {m: s for m, s in scores.items() if s is not None}, answers, written
        )
        results |= {"calibration": fitted} if fitted else {}
        results["inputs"] = inputs
        results = finite(results)
        write_record(path, results)
    return dict(context.dist.broadcast_object(results))


def _former(path: Path) -> dict[str, Any]:
    """The results in the run folder; {} where they are missing or damaged."""
    try:
        return read_record(path, Results, old=False)
    except FileNotFoundError:
        return {}
    except DataError as error:
        say(f"computed again: {error.where}: {error.message}")
        return {}


def _files(context: RunContext, model: str) -> tuple[Path, Path]:
    """The file of a model's scores, and the note with the key of their inputs."""
    together = ensemble_of(model)
    ref = StageRef.named(together or model)
    stem = "ensemble-scores" if together else f"scores-{ref.part}" if ref.part else "scores"
    return context.folder(ref.stage).path / f"{stem}.jsonl", context.folder(ref.stage).path / f"{stem}.key"


def _scores(context: RunContext, model: str, key: str, data_name: str) -> Scores | None:
    """Scores of one model, on the main rank; from its file where the inputs are the same."""
    file, note = _files(context, model)
    if on_main(context.dist, lambda: is_scored(file, note, key)):
        return read_jsonl(file) if context.dist.is_main else None
    say(f"scoring {model}", main=context.dist.is_main)
    data = context.data(data_name)
    split = data.splits.get(context.config.evaluate.split)
    if split is None:
        raise DataError(
            "there is no such split to evaluate on", where=f"data.{data_name}", found=context.config.evaluate.split
        )
    models = _models(context, model, data)
    batches = evaluation_batches(split, context.config.evaluate.batch, context.dist.rank, context.dist.world_size)
    scorer = Scorer(context.device, context.dtype, context.dist, tile_of(context, models))
    records = scorer.records(models, data, split, batches)
    for each in models:
        if not isinstance(each, TappedModel):
            each.close()
    if records is not None:
        write_atomic(file, "".join(to_json(record) + "\n" for record in records))
        write_scores_note(note, key, file)
    return records


def _models(context: RunContext, model: str, data: LoadedData) -> list[Reader]:
    stage = ensemble_of(model)
    if stage is None:
        trained = load_model(context, ModelConfig(path=str(StageRef.named(model))), data)
        return [trained.to(context.device).eval()]
    where, reads = f"stages.{stage}.teachers", LOGITS
    teachers = context.config.stages[stage].teachers
    return [open_teacher(context, t, data, f"{where}[{i}]", reads, stage=stage) for i, t in enumerate(teachers)]


def _shown(context: RunContext, model: str) -> dict[str, Any]:
    """Facts of a stage's model that the results show next to its scores."""
    ref = StageRef.named(model)
    done = context.record(ref.stage)
    return {
        "kind": done.kind,
        "parameters": done.members[ref.part] if ref.part else done.parameters,
        "steps": done.steps,
        "seconds": done.seconds,
        "tokens": done.tokens,
    }


def _results(
    context: RunContext,
    settings: EvaluateConfig,
    data: str,
    scores: dict[str, Scores],
    answers: Answers | None,
    texts: dict[str, Texts],
) -> dict[str, Any]:
    task = context.config.data[data].task
    models = {}
    for model, records in scores.items():
        facts: dict[str, Any] = {"overall": summarise(task, records), "domains": by_domain(task, records)}
        if (together := ensemble_of(model)) is not None:
            facts |= {"kind": "ensemble", "members": [t.name for t in context.config.stages[together].teachers]}
        else:
            facts |= _shown(context, model)
        models[model] = facts
    rows = sum(num_rows(scores[pair.candidate]) for pair in settings.comparisons)
    rows += answers.num_comparisons(texts) if answers else 0
    resamples = settings.enough_resamples(rows)
    if resamples > settings.resamples:
        say(f"evaluate.resamples: {settings.resamples:,} are too few for {rows} comparisons: {resamples:,} are taken")
    how = Resampling(resamples, settings.confidence, context.config.seed)
    comparisons: list[dict[str, Any]] = []
    for pair in settings.comparisons:
        first, second = pair.candidate, pair.baseline
        comparisons += compare(task, first, second, scores[first], scores[second], how)
    of_texts = answers.comparisons(texts, how) if answers else []
    corrected = correct([*comparisons, *of_texts])  # one family: of scores and of texts
    results: dict[str, Any] = {
        "task": task,
        "split": settings.split,
        "data": data,
        "models": models,
        "comparisons": corrected[: len(comparisons)],
        "resamples": resamples,
    }
    if answers:
        results["answers"] = answers.results(texts, corrected[len(comparisons) :])
        log_samples(results["answers"])
    return results
