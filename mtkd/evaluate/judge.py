"""The end of a run: score its models on held-out data, compare them with paired tests, write results.json."""

from __future__ import annotations

import json
from typing import Any

from mtkd.build import Workshop
from mtkd.chain import scored_models
from mtkd.config import STAGE_PREFIX, EvaluateConfig, ModelConfig
from mtkd.configfile import fingerprint
from mtkd.console import say
from mtkd.data.collate import LoadedData
from mtkd.data.sampler import evaluation_batches
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.engine.dist import on_main
from mtkd.errors import DataError
from mtkd.evaluate.metrics import by_domain, summarise
from mtkd.evaluate.score import score
from mtkd.evaluate.significance import compare, correct
from mtkd.jsonlines import finite, read_jsonl, to_json
from mtkd.models.taps import TappedModel
from mtkd.pool import LiveModel
from mtkd.seal import write_atomic

ENSEMBLE = "ensemble:"

Scores = list[dict[str, Any]]


def judge(shop: Workshop) -> dict[str, Any]:
    """Score every model that `evaluate` names and compare them; nothing is redone whose inputs are unchanged.

    Returns:
        What results.json holds: task, split, models with overall and per-domain metrics, comparisons.
    """
    settings = shop.config.evaluate
    name = shop.config.data_name(settings.data)
    wanted = [*scored_models(shop.config), *(ENSEMBLE + s for s in settings.ensembles)]
    context = {
        "data": shop.raw(name).fingerprint,
        "config": shop.config.data[name].values(),
        "split": settings.split,
        "tokenizer": tokenizer_fingerprint(shop.tokenizer, chat=shop.config.data[name].chat),
        "precision": shop.config.engine.decided_precision,
    }
    keys = {model: fingerprint([context, _fingerprints(shop, model)]) for model in wanted}
    inputs = fingerprint([keys, settings.model_dump(mode="json")])
    path = shop.run.path / "results.json"
    known = on_main(shop.dist, lambda: json.loads(path.read_text()) if path.exists() else {})
    if known.get("inputs") == inputs:
        return known
    scores = {model: _scores(shop, model, keys[model], name) for model in wanted}
    shop.dist.barrier()
    results: dict[str, Any] = {}
    if shop.dist.is_main:
        results = _results(shop, settings, name, {m: s for m, s in scores.items() if s is not None})
        results["inputs"] = inputs
        results = finite(results)
        write_atomic(path, to_json(results, indent=1))
    return dict(shop.dist.broadcast_object(results))


def _fingerprints(shop: Workshop, model: str) -> list[str]:
    """The DONE fingerprints of the models behind a name."""
    if not model.startswith(ENSEMBLE):
        return [shop.digest(ModelConfig(path=STAGE_PREFIX + model))]
    stage = shop.config.stages[model.removeprefix(ENSEMBLE)]
    return [shop.teacher_digest(teacher) for teacher in stage.teachers]


def _scores(shop: Workshop, model: str, key: str, data_name: str) -> Scores | None:
    """Scores of one model, from its file when that was made from the same inputs; on the main rank."""
    stage = model.removeprefix(ENSEMBLE)
    stage, _, member = stage.partition("/")
    stem = "ensemble-scores" if model.startswith(ENSEMBLE) else f"scores-{member}" if member else "scores"
    file, note = (shop.folder(stage).path / f"{stem}{end}" for end in (".jsonl", ".key"))
    if shop.dist.broadcast_object(note.exists() and file.exists() and note.read_text() == key):
        return read_jsonl(file)
    say(f"scoring {model}", main=shop.dist.is_main)
    data = shop.data(data_name)
    split = data.splits.get(shop.config.evaluate.split)
    if split is None:
        raise DataError(
            "there is no such split to evaluate on", where=f"data.{data_name}", found=shop.config.evaluate.split
        )
    models = [m.to(shop.device).eval() for m in _models(shop, model, data)]
    batches = evaluation_batches(split, shop.config.evaluate.batch, shop.dist.rank, shop.dist.world_size)
    records = score(models, data, split, batches, shop.device, shop.dtype, shop.dist, shop.tile(models))
    for each in models:
        if not isinstance(each, TappedModel):
            each.close()
    if records is not None:
        write_atomic(file, "".join(to_json(record) + "\n" for record in records))
        write_atomic(note, key)
    return records


def _models(shop: Workshop, model: str, data: LoadedData) -> list[LiveModel]:
    if not model.startswith(ENSEMBLE):
        return [shop.model(ModelConfig(path=STAGE_PREFIX + model), data, seed=0)]
    stage = model.removeprefix(ENSEMBLE)
    where, reads = f"stages.{stage}.teachers", frozenset({"logits"})
    teachers = shop.config.stages[stage].teachers
    return [shop.teacher(t, data, f"{where}[{i}]", reads) for i, t in enumerate(teachers)]


def _results(shop: Workshop, settings: EvaluateConfig, data: str, scores: dict[str, Scores]) -> dict[str, Any]:
    task = shop.config.data[data].task
    models = {}
    for model, records in scores.items():
        facts: dict[str, Any] = {"overall": summarise(task, records), "domains": by_domain(task, records)}
        if model.startswith(ENSEMBLE):
            facts |= {
                "kind": "ensemble",
                "members": [t.name for t in shop.config.stages[model.removeprefix(ENSEMBLE)].teachers],
            }
        else:
            stage, _, member = model.partition("/")
            done = dict(shop.record(stage))
            if member:
                done["parameters"] = done["members"][member]
            facts |= {key: done[key] for key in ("kind", "parameters", "steps", "seconds", "tokens")}
        models[model] = facts
    comparisons: list[dict[str, Any]] = []
    for pair in settings.comparisons:
        comparisons += compare(
            task,
            pair.candidate,
            pair.baseline,
            scores[pair.candidate],
            scores[pair.baseline],
            resamples=settings.resamples,
            confidence=settings.confidence,
            seed=shop.config.seed,
        )
    return {"task": task, "split": settings.split, "data": data, "models": models, "comparisons": correct(comparisons)}
