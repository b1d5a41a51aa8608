"""The end of a run: score its models on held-out data, compare them with paired tests, write results.json."""

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
from mtkd.engine.notes import Results, file_digest, read_scores_note, write_scores_note
from mtkd.engine.record import read_record, write_atomic, write_record
from mtkd.errors import DataError
from mtkd.evaluate.metrics import by_domain, summarise
from mtkd.evaluate.score import Scorer
from mtkd.evaluate.significance import Resampling, compare, correct, num_rows
from mtkd.models.forward import LOGITS
from mtkd.models.taps import TappedModel
from mtkd.planning.stages import scored_models
from mtkd.pool import LiveModel
from mtkd.running.build import Workshop

Scores = list[dict[str, Any]]


def judge(shop: Workshop) -> dict[str, Any]:
    """Score every model that `evaluate` names and compare them; nothing is redone whose inputs are unchanged.

    Returns:
        What results.json holds: task, split, models with overall and per-domain metrics, comparisons.
    """
    settings = shop.config.evaluate
    name = shop.config.data_name(settings.data)
    wanted = [*scored_models(shop.config), *(ENSEMBLE_PREFIX + s for s in settings.ensembles)]
    context = {
        "data": shop.raw(name).fingerprint,
        "config": shop.config.data[name].values(),
        "split": settings.split,
        "tokenizer": tokenizer_fingerprint(shop.tokenizer, chat=shop.config.data[name].chat),
        "precision": shop.config.engine.decided_precision,
    }
    keys = {model: fingerprint([context, _fingerprints(shop, model)]) for model in wanted}
    shown = {model: _shown(shop, model) for model in wanted if ensemble_of(model) is None}
    inputs = fingerprint([keys, settings.model_dump(mode="json"), shown])
    path = shop.run.path / "results.json"
    known = on_main(shop.dist, lambda: _known(path))
    if known.get("inputs") == inputs and on_main(
        shop.dist, lambda: all(_is_scored(*_files(shop, model), keys[model]) for model in wanted)
    ):
        return known
    scores = {model: _scores(shop, model, keys[model], name) for model in wanted}
    shop.dist.barrier()
    results: dict[str, Any] = {}
    if shop.dist.is_main:
        results = _results(shop, settings, name, {m: s for m, s in scores.items() if s is not None})
        results["inputs"] = inputs
        results = finite(results)
        write_record(path, results)
    return dict(shop.dist.broadcast_object(results))


def _known(path: Path) -> dict[str, Any]:
    """The results that are there, if they are what was written; else they are computed again."""
    try:
        return read_record(path, Results, old=False)
    except FileNotFoundError:
        return {}
    except DataError as error:
        say(f"computed again: {error.where}: {error.message}")
        return {}


def _fingerprints(shop: Workshop, model: str) -> list[str]:
    """Digests of the models behind a name and of their stages' exports: a stage made again may round otherwise."""
    if (together := ensemble_of(model)) is not None:
        teachers = shop.config.stages[together].teachers
        models, digests = [t.model for t in teachers], [shop.teacher_digest(t) for t in teachers]
    else:
        models = [ModelConfig(path=str(StageRef.named(model)))]
        digests = [shop.digest(models[0])]
    stages = dict.fromkeys(each.stage.stage for each in models if each.stage is not None)
    exports = [digest for stage in stages for digest in shop.record(stage).get("manifests", {}).values()]
    return digests + exports


def _files(shop: Workshop, model: str) -> tuple[Path, Path]:
    """Where the scores of a model are, and the note of what they were computed from."""
    together = ensemble_of(model)
    ref = StageRef.named(together or model)
    stem = "ensemble-scores" if together else f"scores-{ref.part}" if ref.part else "scores"
    return shop.folder(ref.stage).path / f"{stem}.jsonl", shop.folder(ref.stage).path / f"{stem}.key"


def _scores(shop: Workshop, model: str, key: str, data_name: str) -> Scores | None:
    """Scores of one model on the main rank; from its file, if that was made from the same inputs."""
    file, note = _files(shop, model)
    if on_main(shop.dist, lambda: _is_scored(file, note, key)):
        return read_jsonl(file) if shop.dist.is_main else None
    say(f"scoring {model}", main=shop.dist.is_main)
    data = shop.data(data_name)
    split = data.splits.get(shop.config.evaluate.split)
    if split is None:
        raise DataError(
            "there is no such split to evaluate on", where=f"data.{data_name}", found=shop.config.evaluate.split
        )
    models = [m.to(shop.device).eval() for m in _models(shop, model, data)]
    batches = evaluation_batches(split, shop.config.evaluate.batch, shop.dist.rank, shop.dist.world_size)
    scorer = Scorer(shop.device, shop.dtype, shop.dist, shop.tile(models))
    records = scorer.records(models, data, split, batches)
    for each in models:
        if not isinstance(each, TappedModel):
            each.close()
    if records is not None:
        write_atomic(file, "".join(to_json(record) + "\n" for record in records))
        write_scores_note(note, key, file)
    return records


def _is_scored(file: Path, note: Path, key: str) -> bool:
    """Whether a file holds the scores of these inputs, as they were written."""
    known = read_scores_note(note)
    if known is None or known["key"] != key:
        return False
    if known["scores"] != file_digest(file):
        say(f"scored again: {file}: the file is damaged, or was changed")
        return False
    return True


def _models(shop: Workshop, model: str, data: LoadedData) -> list[LiveModel]:
    stage = ensemble_of(model)
    if stage is None:
        return [shop.model(ModelConfig(path=str(StageRef.named(model))), data, seed=0)]
    where, reads = f"stages.{stage}.teachers", LOGITS
    teachers = shop.config.stages[stage].teachers
    return [shop.teacher(t, data, f"{where}[{i}]", reads) for i, t in enumerate(teachers)]


def _shown(shop: Workshop, model: str) -> dict[str, Any]:
    """What the results say of a stage's model in addition to its scores."""
    ref = StageRef.named(model)
    done = dict(shop.record(ref.stage))
    if ref.part:
        done["parameters"] = done["members"][ref.part]
    return {key: done[key] for key in ("kind", "parameters", "steps", "seconds", "tokens")}


def _results(shop: Workshop, settings: EvaluateConfig, data: str, scores: dict[str, Scores]) -> dict[str, Any]:
    task = shop.config.data[data].task
    models = {}
    for model, records in scores.items():
        facts: dict[str, Any] = {"overall": summarise(task, records), "domains": by_domain(task, records)}
        if (together := ensemble_of(model)) is not None:
            facts |= {"kind": "ensemble", "members": [t.name for t in shop.config.stages[together].teachers]}
        else:
            facts |= _shown(shop, model)
        models[model] = facts
    comparisons: list[dict[str, Any]] = []
    rows = sum(num_rows(scores[pair.candidate]) for pair in settings.comparisons)
    resamples = settings.enough_resamples(rows)
    if resamples > settings.resamples:
        say(f"evaluate.resamples: {settings.resamples:,} are too few for {rows} comparisons: {resamples:,} are taken")
    for pair in settings.comparisons:
        comparisons += compare(
            task,
            pair.candidate,
            pair.baseline,
            scores[pair.candidate],
            scores[pair.baseline],
            Resampling(resamples, settings.confidence, shop.config.seed),
        )
    return {
        "task": task,
        "split": settings.split,
        "data": data,
        "models": models,
        "comparisons": correct(comparisons),
        "resamples": resamples,
    }
