"""Faults of a cache stage in whole runs of the command: kills, SIGTERM, a full disk, several ranks (F28)."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import cache_runs
import processes
import pytest
import yaml
from tiny_run import NAME

from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import EXIT_DATA, EXIT_PREEMPTED

CACHE = {**cache_runs.EXACT, "traits": ["ce", "entropy"]}


def run_file(folder: Path) -> str:
    """A run of two teachers and their caches."""
    values = cache_runs.values(folder, cache=CACHE, student={})
    for name in ("student", "live"):
        del values["stages"][name]
    values["evaluate"] = {"stages": ["teacher"], "resamples": 100}
    return str(cache_runs.write(folder, values))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished, undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = processes.run(folder, "run", run_file(folder))
    assert code == 0, output
    return folder


def before_caches(whole: Path, folder: Path) -> str:
    """The same run with its teachers made and no cache yet."""
    shutil.copytree(whole / "data", folder / "data")
    shutil.copytree(whole / "runs", folder / "runs", ignore=shutil.ignore_patterns("03-cache", "results.json"))
    return run_file(folder)


def cached(folder: Path) -> dict[str, bytes]:
    """Every file of both caches."""
    run = folder / "runs" / NAME
    return {f"{t}/{n}": b for t in cache_runs.TEACHERS for n, b in cache_runs.cache_bytes(run, t).items()}


@pytest.mark.parametrize(
    "point",
    ["before-cache-shard@0", "after-cache-shard@2", "before-manifest@0", "before-cache-export", "before-done@10"],
)
def test_a_killed_cache_goes_on_where_it_was(point: str, whole: Path, tmp_path: Path) -> None:
    """At most one shard is made again, and what results is the undisturbed cache, byte by byte."""
    file = before_caches(whole, tmp_path)
    code, output = processes.run(tmp_path, "run", file, environment={"MTKD_TEST_KILL_AT": point})
    assert code == -9, output
    stage = tmp_path / "runs" / NAME / "stages" / "03-cache"
    shards = {path: path.stat().st_mtime_ns for path in stage.glob("*/*/shard-*")}
    code, output = processes.run(tmp_path, "run", file)
    assert code == 0, output
    assert cached(tmp_path) == cached(whole)
    assert logged(tmp_path) == logged(whole)
    later = {path.parent.name + path.name: path.stat().st_mtime_ns for path in stage.glob("export/*/shard-*")}
    for path, made in shards.items():
        assert later[path.parent.name + path.name] == made, "a finished shard was written again"


def logged(folder: Path) -> list[tuple[int, int]]:
    """(shards, examples) of every line of the cache stage, in order."""
    lines = read_jsonl(folder / "runs" / NAME / "metrics.jsonl")
    return [(line["step"], line["examples"]) for line in lines if line["stage"] == "cache"]


def stop_at(shard: int) -> None:
    """For `processes`: SIGTERM while a shard is made."""
    import os
    import signal

    import mtkd.running.capture

    make = mtkd.running.capture.make_records

    def records(content: Any, batch: Any, *rest: Any) -> Any:
        if int(batch.keys.min()) // CACHE["shard_examples"] == shard:
            os.kill(os.getpid(), signal.SIGTERM)
        return make(content, batch, *rest)

    mtkd.running.capture.make_records = records


def test_sigterm_ends_it_resumable(whole: Path, tmp_path: Path) -> None:
    file = before_caches(whole, tmp_path)
    code, output = processes.run(tmp_path, "run", file, prepare=partial(stop_at, 2))
    assert code == EXIT_PREEMPTED, output
    assert "2 shards of its caches are written" in " ".join(output.split())
    code, output = processes.run(tmp_path, "status", str(tmp_path / "runs" / NAME), "--json")
    assert json.loads(output)["stages"][2]["state"] == "started"
    code, output = processes.run(tmp_path, "resume", str(tmp_path / "runs" / NAME))
    assert code == 0, output
    assert cached(tmp_path) == cached(whole)


def test_a_begun_cache_of_something_else_is_told(whole: Path, tmp_path: Path) -> None:
    file = before_caches(whole, tmp_path)
    code, _ = processes.run(tmp_path, "run", file, environment={"MTKD_TEST_KILL_AT": "after-cache-shard@2"})
    assert code == -9
    command = ("run", file, "-o", "stages.cache.cache.bits=8")
    processes.assert_refused(tmp_path, command, EXIT_DATA, "bits", "--redo cache")
    code, output = processes.run(tmp_path, *command, "--redo", "cache")
    assert code == 0, output
    assert cached(tmp_path).keys() == cached(whole).keys()


def test_verify_finds_a_flipped_bit(whole: Path, tmp_path: Path) -> None:
    (folder,) = (whole / "runs" / NAME / "stages").glob("*-cache/export/teacher")
    code, output = processes.run(tmp_path, "cache", "verify", str(folder))
    assert code == 0, output
    assert "whole" in output
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    data = bytearray((broken / "shard-00001.safetensors").read_bytes())
    data[-3] ^= 1
    (broken / "shard-00001.safetensors").write_bytes(data)
    code, output = processes.run(tmp_path, "cache", "verify", str(broken))
    assert code == EXIT_DATA
    assert "shard-00001.safetensors" in output
    code, output = processes.run(tmp_path, "cache", "verify", str(broken), "--json")
    assert json.loads(output)["fine"] is False
    code, output = processes.run(tmp_path, "cache", "verify", str(tmp_path / "nowhere"))
    assert code == EXIT_DATA


@pytest.mark.slow
def test_two_ranks_write_the_same_cache_and_learn_from_it(tmp_path: Path) -> None:
    """Disjoint shards of both make the cache of one process, and each reads its own examples."""
    runs = {}
    for name, engine in (
        ("one", {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1}),
        ("two", {"kind": "deepspeed", "device": "cpu", "precision": "fp32", "threads": 1, "processes": 2}),
    ):
        folder = tmp_path / name
        folder.mkdir()
        values = cache_runs.values(folder, cache=CACHE, student={"match": []}, engine=engine)
        del values["stages"]["live"]
        for stage in values["stages"].values():
            if "student" in stage:
                stage["student"]["dropout"] = 0.0
        values["evaluate"] = {"stages": ["student"], "resamples": 100}
        if name == "two":  # from the same teachers
            shutil.copytree(runs["one"] / "data", folder / "data")
            values["stages"] = {n: s for n, s in values["stages"].items() if n in ("cache", "student")}
            exports = runs["one"] / "runs" / NAME / "stages"
            live = [{"name": t, "model": str(next(exports.glob(f"*-{t}")) / "export")} for t in cache_runs.TEACHERS]
            values["stages"]["cache"]["teachers"] = live
        code, output = processes.run(folder, "run", str(cache_runs.write(folder, values)))
        assert code == 0, output
        runs[name] = folder
    for teacher in cache_runs.TEACHERS:
        one, two = (cache_runs.cache_bytes(runs[name] / "runs" / NAME, teacher) for name in ("one", "two"))
        shards = [file for file in one if file.startswith("shard-")]
        assert len(shards) == 5
        assert all(one[file] == two[file] for file in shards)
    losses = {
        name: [
            line["loss"]
            for line in read_jsonl(folder / "runs" / NAME / "metrics.jsonl")
            if line["stage"] == "student" and "loss" in line
        ]
        for name, folder in runs.items()
    }
    assert losses["one"] == pytest.approx(losses["two"], rel=1e-4)


def test_configuration_of_the_copy(whole: Path) -> None:
    """run.yaml in the run's folder keeps the stage as it was written."""
    values = yaml.safe_load((whole / "runs" / NAME / "run.yaml").read_text())
    assert values["stages"]["cache"]["cache"]["traits"] == ["ce", "entropy"]
