"""What `mtkd plan` makes of the numbers: limits, verdicts, advice that helps, disk, and the tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_memory import GB, Case, llama
from tiny_run import tiny_config, write_yaml

import mtkd
from mtkd.config import BatchConfig, EngineConfig, ModelConfig, StageConfig, teacher_config
from mtkd.config.match import Match
from mtkd.planning.budget import Limits, StageMemory, _changes, find_limits, stage_memory
from mtkd.planning.memory import trained_share
from mtkd.pool.backends import teacher_share
from mtkd.pool.sizes import Place, Share, TeacherSize

HERE = {"GPU": "given", "host": "found", "disk": "found"}


def test_a_sharded_and_a_streamed_teacher_by_hand() -> None:
    """A part per rank, the largest layer with what is gathered ahead, the heads; a layer and the heads."""
    place = Place(on_gpu=True, ranks=4, local=4)
    sharded = [TeacherSize(1_000, 60, "sharded", 10, ahead=5), TeacherSize(600, 40, "sharded", 8, ahead=5)]
    after = 250 + 150 + 60 + 40
    assert teacher_share(sharded, place) == Share((after + 94 + 20), after)
    streamed = [TeacherSize(1_000, 60, "streamed", 10), TeacherSize(600, 40, "streamed", 8)]
    assert teacher_share(streamed, place) == Share(94 + 60 + 40, (60 + 40))
    assert teacher_share(streamed, Place(on_gpu=False)) == Share(94 + 60, 60)
    assert teacher_share([TeacherSize(1_000, 60, "cached")], place) == Share()


def test_zero_shards_more_with_every_stage() -> None:
    engine = EngineConfig(kind="deepspeed", processes=4, device="cpu")
    held = [trained_share(4e9, engine.model_copy(update={"zero_stage": z}), 4) for z in range(4)]
    # at stage 0 they come and go: a step's footprint tells
    gradients = [4e9 if h.gradients is None else h.gradients for h in held]
    totals = [h.weights + h.optimizer + g for h, g in zip(held, gradients, strict=True)]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == 16e9  # weight, gradient, two moments
    # by hand: 4 whole + the float32 copy and two moments of a quarter; gradients whole, then a quarter; all a quarter
    assert totals[1:] == [4e9 + 3e9 + 4e9, 4e9 + 3e9 + 1e9, 1e9 + 3e9 + 1e9]


def needed(case: Case, limits: Limits, *, on_gpu: bool = True, **engine: Any) -> StageMemory:
    return stage_memory(case.spec(), case.engine.model_copy(update=engine), limits, on_gpu=on_gpu)


def test_a_verdict_names_what_is_short_and_by_how_much() -> None:
    case = Case([Match(loss="kl")])
    whole = needed(case, Limits(None, None, None))
    assert whole.fits is None
    assert needed(case, Limits(whole.rank_gb * 1.01 * GB, 10 * GB, GB, HERE)).fits is True
    short = needed(case, Limits((whole.rank_gb - 0.02) * GB, 10 * GB, GB, HERE))
    assert short.fits is False
    assert f"GPU: {whole.rank_gb:.2f} GB needed" in short.verdict
    assert "0.02 GB too much" in short.verdict
    assert "host" not in short.verdict
    disk = needed(case, Limits(GB, 10 * GB, 1e6, HERE))
    assert (disk.fits, disk.verdict.startswith("does not fit. disk:")) == (False, True)


def test_advice_is_what_the_plan_says_of_the_changed_run() -> None:
    """Every line names a change; made, it needs as little as was said."""
    case = Case([Match(loss="kl")], ("resident",) * 3)
    whole = needed(case, Limits(None, None, None))
    tight = Limits(whole.rank_gb * 0.75 * GB, 10 * GB, GB, HERE)
    advice = needed(case, tight).advice
    said = {line.split(": ")[0] + ": " + line.split(": ")[1]: line for line in advice}
    assert advice[0].startswith("stages.s.batch.accumulate: 4: ")
    assert advice[0].endswith(", fits")
    assert any(line.startswith("stages.s.teachers: backend: offload: ") for line in advice)
    assert not any("zero_stage" in line or "sharded" in line for line in advice)  # one process has nothing to share
    for change, fields in {
        "engine.tile: 128": {"tile": 128},
        "engine.activation_checkpointing: true": {"activation_checkpointing": True},
        "engine.precision: bf16": {"precision": "bf16"},
    }.items():
        then = needed(case, Limits(None, None, None), **fields)
        if change in said:
            assert f"{then.rank_gb:.2f} GB" in said[change]
        else:  # it was left out because it does not help
            assert then.rank_gb > 0.99 * whole.rank_gb
    assert "engine.activation_checkpointing: true" in said
    order = [line.endswith("fits") for line in advice]
    assert order == sorted(order, reverse=True)


def test_several_ranks_are_told_to_shard() -> None:
    case = Case([Match(loss="kl")], teacher=llama(512, 4), kind="deepspeed", processes=16)
    whole = needed(case, Limits(None, None, None))
    advice = needed(case, Limits(whole.rank_gb * 0.5 * GB, None, None, HERE)).advice
    assert any(line.startswith("engine.zero_stage: 3") for line in advice)
    assert any("backend: sharded" in line for line in advice)


def test_no_advice_is_refused_when_it_is_taken() -> None:
    """A cut teacher, and those of a cache stage, cannot be sharded."""
    case = Case([Match(loss="kl")], kind="deepspeed", processes=16)
    spec = case.spec()
    cut = teacher_config({"name": "t0", "model": ModelConfig(path="x", keep_layers=(1, 2))})
    caching = StageConfig(kind="cache", teachers=case.stage.teachers, batch=BatchConfig(sequences=16))
    for stage, told in (
        (case.stage, True),
        (case.stage.model_copy(update={"teachers": (cut,)}), False),
        (caching, False),
    ):
        texts = [text for text, *_ in _changes(replace(spec, stage=stage), case.engine, on_gpu=True)]
        assert any("backend: sharded" in text for text in texts) is told, (stage.kind, texts)


def test_limits_are_the_configurations_or_this_machines(tmp_path: Path) -> None:
    given = find_limits(EngineConfig(gpu_memory_gb=80, host_memory_gb=500), tmp_path, on_gpu=True)
    assert (given.rank, given.host, given.source["host"]) == (80e9, 500e9, "given")
    found = find_limits(EngineConfig(), tmp_path / "not" / "there", on_gpu=False)
    assert found.rank is None
    assert found.source["host"] == "found"
    assert found.host is not None
    assert found.disk is not None
    psutil = pytest.importorskip("psutil")
    assert found.host <= psutil.virtual_memory().total


def test_ranks_of_one_host_share_its_memory() -> None:
    every = Case([Match(loss="kl")], ("resident",), kind="deepspeed", processes=4)
    few = Case([Match(loss="kl")], ("resident",), kind="deepspeed", processes=4, processes_per_host=2)
    together, apart = (needed(case, Limits(None, None, None), on_gpu=False) for case in (every, few))
    assert together.rank_gb == apart.rank_gb
    assert together.host_gb == pytest.approx(4 * together.rank_gb)
    assert apart.host_gb == pytest.approx(2 * apart.rank_gb)
    pinned = needed(Case([Match(loss="kl")], ("offload",), kind="deepspeed", processes=4), Limits(None, None, None))
    assert pinned.host_gb == pytest.approx(4 * every.spec().teachers[0].numbers.weights / GB)


def test_a_stage_that_needs_values_is_planned_without_its_step() -> None:
    """A loss that reads numbers: weights are counted all the same, and the plan says what is not."""
    case = Case([Match(loss="kl")])
    spec = replace(case.spec(), rows=(object(),))
    found = stage_memory(spec, case.engine, Limits(None, None, None), on_gpu=False)
    assert "activations, tiles and temporaries are not counted" in found.notes[1]
    own = spec.exported / GB
    assert found.rank_gb == pytest.approx(4 * own + spec.teachers[0].numbers.weights / GB)


def test_checkpoints_are_as_large_as_planned(tmp_path: Path) -> None:
    """A whole run's folder against the plan of its stages: checkpoints of the torch engine, and the export."""
    config = tiny_config(tmp_path)
    planned = {stage.name: stage.memory for stage in mtkd.plan(config, memory=True).stages}
    made = mtkd.run(config)
    student = planned["student"]
    assert student is not None
    assert student.fits is True
    folder = next((made.folder / "stages").glob("*-student"))
    checkpoints = list((folder / "checkpoints").rglob("state-rank-0.pt"))
    assert len(checkpoints) == 3
    tensors = 0
    state = torch.load(checkpoints[0], weights_only=True)
    for values in (state["objective"].values(), *(s.values() for s in state["optimizer"]["state"].values())):
        storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values if v.dim()}
        tensors += sum(storages.values())
    assert "4 checkpoints" in student.disk  # three are kept while a fourth is written
    assert student.disk["4 checkpoints"] * GB / 4 == pytest.approx(tensors, rel=0.02)
    weights = (made.export("student") / "model.safetensors").stat().st_size
    assert student.disk["export"] * GB == pytest.approx(weights, rel=0.15)


RECIPES = [
    file
    for file in sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    if file.stem in ("assistant", "takd", "cached", "instruct", "tinybert", "glmd", "custom_weighting")
]


@pytest.mark.slow
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_step_of_every_recipe_is_counted(file: Path, tmp_path: Path) -> None:
    """Language models and classifiers, caches, attention and hidden rows, compressed vocabularies."""
    planned = mtkd.plan(mtkd.load_config(file, [f"output={tmp_path}"]), memory=True)
    for stage in planned.stages:
        assert stage.memory is not None
        assert not [note for note in stage.memory.notes if "not counted, for" in note], stage.name
        names = {part.name for part in stage.memory.parts}
        assert "teachers' weights" in names or stage.kind != "cache"
        if stage.kind != "cache":
            assert {"student weights", "gradients", "optimizer"} <= names


def test_the_command_shows_parts_and_verdict(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mtkd.cli.app import app

    file = str(write_yaml(tmp_path))
    told = json.loads(CliRunner().invoke(app, ["plan", file, "--json"]).stdout)
    memory = told["stages"][1]["memory"]
    assert memory["fits"] is True
    assert sum(part["rank_gb"] for part in memory["parts"]) == pytest.approx(memory["rank_gb"])
    tight = CliRunner().invoke(app, ["plan", file, "-o", "engine.host_memory_gb=0.0001"]).stdout
    assert "does not fit" in tight
    assert "try engine." in tight


def test_a_given_gpu_is_planned_for_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {"gpu_memory_gb": 0.0001}
    for engine, word in ((given, "GPU: "), ({**given, "device": "cpu"}, "fits: host"), ({}, "fits: host")):
        config = tiny_config(tmp_path, engine={"device": "auto", **engine})
        memory = mtkd.plan(config, memory=True).stages[-1].memory
        assert memory is not None
        assert word in memory.verdict
