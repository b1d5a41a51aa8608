"""Whole runs with a teacher cache: what a student learns from it is what it learns from the teachers themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import cache_runs
import pytest
import torch
import yaml
from cache_runs import CACHED, EXACT, LIVE, TEACHERS, largest_difference, weights

import mtkd.running.capture
import mtkd.running.console
import mtkd.running.run
from mtkd.config import ModelConfig
from mtkd.config.read import load_config
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir
from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import DataError, NonFiniteError, UserError
from mtkd.pool.cache import CacheReader
from mtkd.running.context import RunContext
from mtkd.running.identity import model_digest
from mtkd.running.run import RunResult
from mtkd.running.status import status

NEAR = 2e-4
"""Of parameters after 8 steps of Adam at 1e-2: log-probabilities of 12 bits are off by up to 5e-4 nats."""
HIDDEN = {"feature": "hidden", "loss": "mse", "weight": 0.5}


def made(folder: Path, **changes: Any) -> RunResult:
    """The run of `cache_runs.values`."""
    return mtkd.running.run.run(cache_runs.config(folder, cache_runs.values(folder, **changes)))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tokens: ca_mkd (which reads the labels' cross entropy), and a row on hidden states with projection."""
    folder = tmp_path_factory.mktemp("cached")
    student = {"match": [HIDDEN], "weighting": "ca_mkd", "steps": 14}
    cache = {**EXACT, "traits": ["ce"], "hidden": ["hidden.1"], "dtype": "float32"}
    made(folder, cache=cache, student=student)
    return folder


def run_of(folder: Path) -> Path:
    return folder / "runs" / "tiny"


def test_a_student_of_caches_is_the_student_of_the_teachers(whole: Path) -> None:
    """In two and a half epochs, each in another order: the targets are found by number (F28)."""
    assert largest_difference(run_of(whole), "student", "live") < NEAR
    lines = [line for line in read_jsonl(run_of(whole) / "metrics.jsonl") if line["stage"] in ("student", "live")]
    both = {stage: [line for line in lines if line["stage"] == stage] for stage in ("student", "live")}
    for cached, live in zip(both["student"], both["live"], strict=True):
        assert cached.keys() == live.keys()
        for name in cached.keys() - {"stage", "time", "seconds"}:
            assert cached[name] == pytest.approx(live[name], rel=1e-4, abs=1e-5), name


def test_the_record_says_what_was_made(whole: Path) -> None:
    """DONE and `mtkd status` against the files of the cache."""
    record = json.loads((run_of(whole) / "stages" / "03-cache" / "DONE").read_text())
    for name in TEACHERS:
        facts = record["caches"][name]
        files = cache_runs.cache_bytes(run_of(whole), name)
        shards = {file: data for file, data in files.items() if file.startswith("shard-")}
        assert (facts["examples"], facts["shards"], len(shards)) == (48, 5, 5)
        assert facts["bytes"] == sum(map(len, shards.values()))
        assert facts["bytes_per_position"] == pytest.approx(facts["bytes"] / facts["positions"])
        assert 0 <= facts["kl"] < 1e-6
    assert not (run_of(whole) / "stages" / "03-cache" / "partial").exists()
    row = {stage["stage"]: stage for stage in status(run_of(whole))["stages"]}["cache"]
    assert row["state"] == "done"
    assert "teacher:" in row["checkpoint"]


def test_a_second_start_does_nothing(whole: Path) -> None:
    before = cache_runs.cache_bytes(run_of(whole))
    result = mtkd.running.run.run(load_config(whole / "run.yaml"))
    assert cache_runs.cache_bytes(run_of(whole)) == before
    assert result.export("cache/teacher").is_dir()
    with pytest.raises(UserError, match="several models or caches"):
        result.export("cache/nobody")


def test_the_teachers_of_a_cache_stage_are_scored_live(whole: Path) -> None:
    results = json.loads((run_of(whole) / "results.json").read_text())
    assert set(results["models"]) == {"teacher", "other", "student", "live", "ensemble:cache"}
    assert results["models"]["ensemble:cache"]["members"] == list(TEACHERS)


def test_a_pool_of_a_cache_and_a_live_teacher(whole: Path, tmp_path: Path) -> None:
    """The order of the pool is kept, and so is what it learns."""
    folder = again(whole, tmp_path)
    values = yaml.safe_load((folder / "run.yaml").read_text())
    values["stages"]["mixed"] = {**values["stages"]["student"], "teachers": [CACHED[0], LIVE[1]]}
    values["stages"]["turned"] = {**values["stages"]["student"], "teachers": [LIVE[0], CACHED[1]]}
    mtkd.running.run.run(cache_runs.config(folder, values))
    for stage in ("mixed", "turned"):
        assert largest_difference(run_of(folder), stage, "live") < NEAR


def again(whole: Path, folder: Path) -> Path:
    """A copy of a finished run, as its own."""
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    values = yaml.safe_load((folder / "run.yaml").read_text())
    values["output"] = str(folder / "runs")
    cache_runs.write(folder, values)
    return folder


def test_redoing_the_cache_redoes_what_reads_it(whole: Path, tmp_path: Path) -> None:
    folder = again(whole, tmp_path)
    before = {stage: weights(run_of(folder), stage) for stage in ("student", "live")}
    done = {p.parent.name: p.stat().st_mtime_ns for p in run_of(folder).glob("stages/*/DONE")}
    mtkd.running.run.run(load_config(folder / "run.yaml"), ["cache"])
    later = {p.parent.name: p.stat().st_mtime_ns for p in run_of(folder).glob("stages/*/DONE")}
    assert {name for name in done if later[name] != done[name]} == {"03-cache", "04-student"}
    for stage, tensors in before.items():
        for name, value in weights(run_of(folder), stage).items():
            assert torch.equal(value, tensors[name])


def test_a_changed_cache_makes_what_reads_it_stale(whole: Path, tmp_path: Path) -> None:
    """It is refused with the option that changed."""
    folder = again(whole, tmp_path)
    with pytest.raises(DataError, match="--redo cache") as caught:
        mtkd.running.run.run(load_config(folder / "run.yaml", ["stages.cache.cache.k=299"]))
    assert "k" in str(caught.value.found)


def test_how_many_run_together_decides_nothing(whole: Path, tmp_path: Path) -> None:
    """The stage's batch is how it is made, not what: a finished cache stays."""
    folder = again(whole, tmp_path)
    mtkd.running.run.run(load_config(folder / "run.yaml", ["stages.cache.batch.sequences=7"]))


def elsewhere(whole: Path, folder: Path, *overrides: str, **top: Any) -> None:
    """A run of the student alone whose cached teachers are given as folders of another run."""
    values = yaml.safe_load((whole / "run.yaml").read_text())
    caches = [
        {"name": name, "model": str(run_of(whole) / "stages" / "03-cache" / "export" / name), "backend": "cached"}
        for name in TEACHERS
    ]
    values["stages"] = {"student": {**values["stages"]["student"], "teachers": caches}}
    values |= {"output": str(folder / "runs"), "evaluate": {"resamples": 100}, **top}
    if not (folder / "data").exists():
        shutil.copytree(whole / "data", folder / "data")
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    mtkd.running.run.run(load_config(file, overrides))


def test_many_runs_share_a_cache(whole: Path, tmp_path: Path) -> None:
    """A student of another run's cache is the same to the bit."""
    elsewhere(whole, tmp_path)
    ours, theirs = weights(run_of(tmp_path), "student"), weights(run_of(whole), "student")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_cache_of_another_tokenizer_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer") as caught:
        elsewhere(whole, tmp_path, "tokenizer.vocab_size=290")
    assert_both_digests(caught.value)


def test_the_cache_of_other_data_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "data", tmp_path / "data")
    tokenizer = run_of(whole) / "stages" / "01-teacher" / "export"
    lines = (tmp_path / "data" / "train.jsonl").read_text().splitlines()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match="data set") as caught:
        elsewhere(whole, tmp_path, tokenizer={"path": str(tokenizer)})
    assert_both_digests(caught.value)


def test_the_cache_of_another_teacher_is_refused(whole: Path, tmp_path: Path) -> None:
    """Someone puts one teacher's cache into the place of the other's."""
    folder = again(whole, tmp_path)
    export = run_of(folder) / "stages" / "03-cache" / "export"
    shutil.rmtree(export / "teacher")
    shutil.copytree(export / "other", export / "teacher")
    with pytest.raises(DataError, match="what stage 'cache' made is not what it sealed") as caught:
        mtkd.running.run.run(load_config(folder / "run.yaml"), ["student"])
    assert "--redo cache" in caught.value.todo


def test_the_cache_in_another_precision_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="another precision") as caught:
        elsewhere(whole, tmp_path, "engine.precision=bf16")
    assert "fp32" in str(caught.value.found)
    assert "bf16" in str(caught.value.allowed)


def test_what_is_cut_from_a_teacher_is_a_part_of_its_digest(whole: Path) -> None:
    values = load_config(whole / "run.yaml")
    context = RunContext(values, RunDir(run_of(whole)), Dist(), torch.device("cpu"))
    models = [ModelConfig(path="stage:teacher", keep_layers=layers) for layers in (None, (1,), (2,), (1, 2))]
    models.append(ModelConfig(path="stage:teacher", slice={"heads": 1}))
    assert len({model_digest(context, model) for model in models}) == len(models)


def assert_both_digests(error: DataError) -> None:
    found, allowed = str(error.found).split()[0], str(error.allowed).split()[0]
    assert found != allowed
    assert len(found) >= 32
    assert len(allowed) >= 32


def test_an_unknown_sample_is_an_error_not_zeros(whole: Path) -> None:
    reader = CacheReader(run_of(whole) / "stages" / "03-cache" / "export" / "teacher")
    with pytest.raises(DataError, match="no example 48"):
        reader.read([3, 48])


def test_classes_with_every_kind_of_weighting(tmp_path: Path) -> None:
    """Class logits are whole: traits, gradients and rewards are those of the teachers; hidden rows are projected."""
    student = {
        "method": {"name": "kd", "options": {"temperature": 2.0}},
        "match": [HIDDEN, {"feature": "cls", "loss": "mse"}, {"loss": "ce", "target": "labels"}],
    }
    cache = {"hidden": ["hidden.1", "cls.1"], "dtype": "float32"}
    values = cache_runs.class_values(tmp_path, cache=cache, student=student)
    pairs = [values["stages"].pop(name) for name in ("student", "live")]
    weightings = ("mt_bert", "ae_kd", "rl_kd", "learned", "confidence")
    for weighting in weightings:
        for kind, stage in zip(("cached", "live"), pairs, strict=True):
            values["stages"][f"{weighting}-{kind}"] = {**stage, "weighting": weighting, "steps": 4}
    values["evaluate"] = {"stages": ["teacher"], "resamples": 100}
    mtkd.running.run.run(cache_runs.config(tmp_path, values))
    for weighting in weightings:
        assert largest_difference(run_of(tmp_path), f"{weighting}-cached", f"{weighting}-live") < 1e-6, weighting


def test_sampled_targets_teach(tmp_path: Path) -> None:
    """The student's divergence from them falls."""
    values = cache_runs.values(tmp_path, cache={"targets": "sampled", "k": 200, "shard_examples": 48}, student={})
    del values["stages"]["live"]
    values["evaluate"] = {"stages": ["teacher"], "resamples": 100}
    mtkd.running.run.run(cache_runs.config(tmp_path, values))
    losses = [
        line["row/0:logits:kl"]
        for line in read_jsonl(run_of(tmp_path) / "metrics.jsonl")
        if line["stage"] == "student" and "loss" in line
    ]
    assert losses[-1] < losses[0]


def test_a_teacher_of_nan_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = mtkd.running.capture.make_records

    def broken(*arguments: Any) -> Any:
        records = make(*arguments)
        records[0].targets["log_probs"][0, 0] = float("nan")
        return records

    monkeypatch.setattr(mtkd.running.capture, "make_records", broken)
    with pytest.raises(NonFiniteError, match="not finite") as caught:
        made(tmp_path, cache=EXACT, student={})
    assert "'teacher'" in str(caught.value)


def test_a_run_of_caches_alone(whole: Path, tmp_path: Path) -> None:
    """Its teacher is a model from elsewhere, and there is nothing to score; content and class logits are the same."""
    values = yaml.safe_load((whole / "run.yaml").read_text())
    shutil.copytree(whole / "data", tmp_path / "data")
    teacher = run_of(whole) / "stages" / "01-teacher" / "export"
    stage = values["stages"]["cache"]
    values["stages"] = {"cache": {**stage, "teachers": [{"name": "teacher", "model": str(teacher)}]}}
    values["data"]["text"]["files"] = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    values |= {"output": str(tmp_path / "runs"), "evaluate": {}, "tokenizer": None}
    result = mtkd.running.run.run(cache_runs.config(tmp_path, values))
    assert result.results["models"] == {}
    ours, theirs = cache_runs.cache_bytes(run_of(tmp_path)), cache_runs.cache_bytes(run_of(whole))
    for name in ours:
        assert name in theirs
        assert (ours[name] == theirs[name]) == name.startswith("shard-"), name  # other names and digests of the origin


def test_examples_of_an_earlier_session_do_not_count_in_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = [0.0], list[str]()
    monkeypatch.setattr(mtkd.running.console.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(mtkd.running.console, "say", told.append)
    progress = mtkd.running.console.StageProgress("cache", 100, 0, True, "example")
    progress.skip(40)  # of the first teacher
    now[0] = 20.0
    progress.update(50, None, note="a")
    progress.skip(80)  # of the second one
    now[0] = 40.0
    progress.update(90, None, note="b")
    assert all("0.50 examples/s" in line for line in told)
    assert len(told) == 2
