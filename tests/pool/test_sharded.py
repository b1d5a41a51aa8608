"""Sharded teachers give a resident teacher's features and losses, whatever the student's ZeRO stage; in parts."""

from __future__ import annotations

import gc
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import sharded_teachers as small
import torch
from safetensors.torch import load_file, save_file
from test_offload import mapped
from tiny import CPU, causal_batch, causal_model, make_objective, rows_of
from tiny_run import tiny_config

import mtkd
import mtkd.pool.partition as loading
from mtkd.config import Named, OptimizerConfig, RunConfig, ShardedConfig
from mtkd.config.match import Match
from mtkd.engine.base import Engine
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import DataError, UserError
from mtkd.methods.papers import kd
from mtkd.models.packing import make_layout
from mtkd.models.stored import read_weights
from mtkd.objective.looks import after_step, before_step
from mtkd.planning.stages import stage_values
from mtkd.pool import LiveTeacher, TeacherPool
from mtkd.pool.partition import engine_settings, part_of, read_numbers
from mtkd.running.train import global_counts

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    small.write_models(folder)
    return folder


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("numbers", [0, 1, 2, 6, 7, 20])
def test_parts_are_everything_once(numbers: int, world_size: int) -> None:
    parts = [part_of(numbers, Dist(rank, world_size)) for rank in range(world_size)]
    assert [i for part in parts for i in part] == list(range(numbers))
    assert len({len(part) for part in parts if len(part)} - {-(-numbers // world_size)}) <= 1  # but the last one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_part_of_a_stored_weight_can_be_read(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 5).to(dtype) for name in ("a", "b")}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_weights(tmp_path)
    for name, tensor in tensors.items():
        for start, stop in ((0, 15), (4, 11), (14, 15), (7, 7)):
            assert torch.equal(read_numbers(stored[name], start, stop), tensor.reshape(-1)[start:stop])


# ---------------------------------------------------------------- features


class _Watch:
    """What loading reads on this rank, and how many weights are whole at a time."""

    def __init__(self) -> None:
        self.numbers, self.most = 0, 0
        self._made: list[torch.nn.Parameter] = []
        read, make = loading.read_numbers, loading._parameter

        def counted(stored: Any, start: int, stop: int) -> torch.Tensor:
            self.numbers += stop - start
            return read(stored, start, stop)

        def followed(*args: Any) -> torch.nn.Parameter:
            self._made.append(make(*args))
            self.most = max(self.most, sum(p.data.numel() > 0 for p in self._made))
            return self._made[-1]

        loading.read_numbers, loading._parameter = counted, followed

    def told(self) -> tuple[int, int]:
        """Numbers read and the most whole weights, since the last call."""
        found = self.numbers, self.most
        self.numbers, self.most, self._made = 0, 0, []
        return found


def gone(kept: weakref.ref[Any]) -> bool:
    """Whether what was let go is freed: soon, for threads of the engine may still hold it for a moment."""
    for _ in range(50):
        gc.collect()
        if kept() is None:
            return True
        time.sleep(0.1)
    return False


def _features(folder: Path) -> dict[str, Any]:
    dist, watch = init_distributed("cpu"), _Watch()
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    linear = torch.nn.functional.linear
    told: dict[str, Any] = {}
    for name in small.HEADS:
        theirs = small.resident(folder, name)
        # whole_parameters and prefetch change what is where, and no number
        ours = small.sharded(folder, name, dist, whole_parameters=40, prefetch_parameters=500)
        read = watch.told()
        teacher, judge = (LiveTeacher(name, model, CPU, torch.float32) for model in (ours, theirs))
        keys, batch = small.wants(ours), small.batch_of(name, dist.rank)
        if name == "padded":
            for model in (ours, theirs):
                model.enable_packing("packing")
            told["packed"] = make_layout(batch.attention_mask, ours.info.width) is not None
        worst = 0.0
        for step in range(4):  # the order of the layers is learned in the first, and used from the third on
            told_batch = small.filler(batch) if step == 2 and dist.is_main else batch
            pair = (small.values(x.forward(told_batch, keys), len(told_batch.keys)) for x in (teacher, judge))
            worst = max(worst, small.largest_difference(*pair))
        parts, whole = small.held_numbers(ours)
        numbers = [p.numel() for p in theirs.parameters()]
        table = ours.embedding_table
        mine = sum(len(part_of(n, dist)) for n in numbers)
        told[name] = {
            "difference": worst,
            "read": (read, (mine, 1)),
            "parts": (parts, sum(-(-n // dist.world_size) for n in numbers)),
            "whole": (whole, sum(n for n in numbers if n <= 40)),
            "parameters": (teacher.num_parameters, judge.num_parameters),
            "table": float((table - theirs.embedding_table).abs().max()),
        }
        kept = weakref.ref(next(ours.parameters()).ds_tensor)
        teacher.close()
        told[name]["closed"] = (small.held_numbers_after(ours), len(FWD_MODULE_STACK))
        del teacher, ours
        told[name]["freed"] = gone(kept)
    told["linear"] = torch.nn.functional.linear is linear  # ZeRO-3's own would stay for the whole process
    return told


@slow
def test_features_are_a_resident_teachers(models: Path) -> None:
    """All features of all layers on two ranks with unequal batches, one of them of filler rows in one call."""
    packed = []
    for told in run_distributed(_features, 2, models, timeout=1200):
        assert told.pop("linear")
        packed.append(told.pop("packed"))
        for name, found in told.items():
            assert found["difference"] < 1e-5, name
            for what in ("parts", "whole", "parameters", "read"):
                assert found[what][0] == found[what][1], (name, what, found[what])
            assert found["table"] == 0
            assert found["closed"] == (0, 0), name
            assert found["freed"], name
    assert packed == [True, False]  # one rank alone packs its rows


# ---------------------------------------------------------------- losses

LENGTHS = [9, 3, 7, 1, 8, 2, 5, 6]
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup=0.5, clip=0.5)
STEPS = 4
TEACHERS = ("tied", "padded", "glm")  # widths 32, 24, 24
ROWS = [
    *kd(temperature=2.0).values(),
    Match(feature="hidden", loss="mse", student_layer=(1, 2), teacher_layer=(1, 2)),
    Match(feature="probs", loss="attention_kl", student_layer=(1, 2), teacher_layer=(1, 2)),
]
LEARNED = Named(name="learned", options={"anchor_share": 0.5, "gate": "pooled"})
ALL_SHARDED, MIXED = ("sharded",) * 3, ("offload", "sharded", "resident")
# (weighting, whether the student's head is tied, ZeRO stage, backends): the ranks of `route`, `drop` and `learned`
# prefer different teachers
CASES: list[tuple[str | Named, bool, int, tuple[str, ...]]] = [
    ("uniform", False, 0, ALL_SHARDED),
    ("route", False, 1, ALL_SHARDED),
    ("drop", True, 2, ALL_SHARDED),
    ("mgda", False, 2, MIXED),
    ("mt_bert", True, 3, ALL_SHARDED),
    (LEARNED, False, 3, ("sharded", "resident", "sharded")),
]


def _pool(folder: Path, backends: tuple[str, ...], dist: Dist) -> list[Any]:
    made: list[Any] = []
    for name, backend in zip(TEACHERS, backends, strict=True):
        if backend == "sharded":
            made.append(small.sharded(folder, name, dist))
            continue
        model = small.resident(folder, name)
        made.append(mapped(model, folder, f"{name}-{dist.rank}") if backend == "offload" else model)
    return made


class _Stage:
    """As much of a built stage as a step needs."""

    def __init__(self, folder: Path, case: int, kind: str, dist: Dist) -> None:
        weighting, tied, zero_stage, backends = CASES[case]
        teachers = _pool(folder, backends if kind == "deepspeed" else ("resident",) * 3, dist)
        self.objective, pool = make_objective(causal_model(16, 2, 0, tied=tied), teachers, ROWS, weighting)
        self.pool = TeacherPool(
            [LiveTeacher(t.name, m, CPU, torch.float32) for t, m in zip(pool.teachers, teachers, strict=True)],
            pool.wants,
        )
        self.engine: Engine = TorchEngine(self.objective, OPTIMIZER, STEPS, CPU)
        if kind == "deepspeed":
            more = {"zero_stage": zero_stage, "accumulate": 2, "dist": dist}
            self.engine = DeepSpeedEngine(self.objective, OPTIMIZER, STEPS, CPU, **more)


def _losses(folder: Path, case: int, kind: str = "torch") -> list[list[float]]:
    """Losses of all steps, and of every row; over all ranks."""
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    accumulate = 2 if kind == "deepspeed" else 1
    stage, told = _Stage(folder, case, kind, dist), []
    for step in range(STEPS):
        batch = causal_batch(LENGTHS, seed=step, prompt=1)
        batch.routes = (torch.arange(len(LENGTHS)) % 2) * 2  # one rank's examples name the first, the other's the last
        parts = dist.world_size * accumulate
        mine = [list(range(8))[dist.rank + 2 * m :: parts] for m in range(accumulate)] if accumulate > 1 else [range(8)]
        if step == 2 and accumulate > 1:  # one rank has nothing at all: it must still take part
            mine = [list(range(8))[m::accumulate] if dist.is_main else [] for m in range(accumulate)]
        micro_batches = [rows_of(batch, list(rows)) for rows in mine]
        counts, _ = global_counts(micro_batches, dist, more=stage.objective.weighting.counts)
        sums: dict[str, float] = {}
        for part, features in before_step(stage.objective, stage.pool, stage.engine, step, micro_batches, counts):
            loss, metrics = stage.engine.forward(part, features, counts)
            stage.engine.backward(loss)
            for name, value in metrics.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        stage.engine.step(step)
        after_step(stage.objective, stage.engine, micro_batches)
        told.append(dist.sum([sums[name] for name in sorted(sums)]))
    stage.pool.close()
    stage.engine.close()
    return told


def _all_losses(folder: Path) -> list[list[list[float]]]:
    return [_losses(folder, case, "deepspeed") for case in range(len(CASES))]


@slow
def test_losses_are_those_of_resident_teachers(models: Path) -> None:
    """Four steps under students of ZeRO 0 to 3, alone and beside resident and offloaded teachers."""
    wanted = [_losses(models, case) for case in range(len(CASES))]
    assert len({tuple(told[-1]) for told in wanted}) == len(CASES)
    for ranks in run_distributed(_all_losses, 2, models, timeout=1200):
        for case, (ours, theirs) in enumerate(zip(ranks, wanted, strict=True)):
            for step, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), f"{CASES[case]}, step {step}"


# ---------------------------------------------------------------- weights


def _faults(folder: Path) -> list[Any]:
    dist = init_distributed("cpu")
    told: list[Any] = []
    for name in ("broken", "incomplete", "infinite"):
        small.HEADS[name] = small.CAUSAL
        try:
            small.sharded(folder, name, dist)
            told.append("")
        except DataError as error:
            told.append(str(error))
    # stored in bfloat16: kept so where the run computes in it, and read into float32 where it does not
    small.HEADS["half"] = small.CAUSAL
    exact = LiveTeacher("r", small.resident(folder, "half"), CPU, torch.float32)
    rounded = LiveTeacher("r", small.resident(folder, "half"), CPU, torch.bfloat16)
    batch = small.batch_of("half", dist.rank)
    for half, judge in ((False, exact), (True, rounded)):
        ours = small.sharded(folder, "half", dist, half=half)
        types = {p.ds_tensor.dtype for p in ours.parameters() if p.ds_numel > 100}
        dtype = torch.bfloat16 if half else torch.float32
        teacher = LiveTeacher("s", ours, CPU, dtype)
        pair = (small.values(x.forward(batch, small.wants(ours)), len(batch.keys), dtype) for x in (teacher, judge))
        told.append((sorted(map(str, types)), small.largest_difference(*pair)))
        ours.enable_packing("packing")  # outside of the teacher's autocast
        teacher.close()
    return told


@slow
def test_weights_that_cannot_be_used_are_refused_on_every_rank(models: Path, tmp_path: Path) -> None:
    for name, change in (("broken", None), ("incomplete", "model.norm.weight"), ("infinite", "lm_head.weight")):
        source = causal_model(16, 2, 1).model
        source.save_pretrained(tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        if name == "broken":
            file.write_bytes(file.read_bytes()[:-100])
        elif name == "incomplete":
            save_file({n: t for n, t in tensors.items() if n != change}, file, {"format": "pt"})
        else:
            tensors["lm_head.weight"][-1, -1] = torch.nan  # in the last rank's part
            save_file(tensors, file, {"format": "pt"})
    causal_model(16, 2, 1).model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for broken, incomplete, infinite, exact, rounded in run_distributed(_faults, 2, tmp_path, timeout=1200):
        assert "the file is truncated" in broken
        assert "1 missing: model.norm.weight" in incomplete
        assert "not finite" in infinite
        assert "lm_head.weight" in infinite
        assert exact[0] == ["torch.float32"]
        assert exact[1] < 1e-5
        assert rounded[0] == ["torch.bfloat16"]
        assert rounded[1] < 1e-5


# ---------------------------------------------------------------- configuration


def test_every_setting_reaches_the_engine(tmp_path: Path) -> None:
    def zero(**config: Any) -> dict[str, Any]:
        settings = engine_settings(ShardedConfig(**config), "teacher", 1000)
        found: dict[str, Any] = settings["zero_optimization"]
        return found

    plain = zero()
    assert plain["stage"] == 3
    assert "offload_param" not in plain
    assert zero(prefetch_parameters=7)["stage3_prefetch_bucket_size"] == 7 != plain["stage3_prefetch_bucket_size"]
    assert zero(prefetch_parameters=7)["stage3_max_live_parameters"] == 7
    assert zero(whole_parameters=7)["stage3_param_persistence_threshold"] == 7
    assert plain["stage3_param_persistence_threshold"] != 7
    assert zero(offload="cpu")["offload_param"]["device"] == "cpu"
    files = zero(offload="nvme", nvme_path=str(tmp_path))["offload_param"]
    # DeepSpeed empties the folder it is given: every teacher and run needs its own
    assert (files["device"], files["buffer_size"]) == ("nvme", 1000)
    assert files["nvme_path"].startswith(str(tmp_path / "teacher-"))


def planned(folder: Path, engine: dict[str, Any] | None = None, **teacher: Any) -> RunConfig:
    made = {"name": "t", "model": "stage:teacher", "backend": "sharded", **teacher}
    more = {"engine": {"kind": "deepspeed", **(engine or {})}}
    return tiny_config(folder, stages={"student": {"teachers": [made]}}, **more)


@pytest.mark.parametrize(
    ("teacher", "engine", "message"),
    [
        ({"backend": "offload", "sharded": {}}, {}, "sharded is for backend: sharded, not for offload"),
        (
            {"model": {"path": "stage:teacher", "slice": {"width": 8}}},
            {},
            "a sharded teacher is read from its files as it is",
        ),
        (
            {"model": {"path": "stage:teacher", "keep_layers": [1]}},
            {},
            "a sharded teacher is read from its files as it is",
        ),
        ({}, {"kind": "torch"}, "set engine.kind: deepspeed"),
        ({"sharded": {"offload": "nvme"}}, {}, "offload: nvme and nvme_path go together"),
        ({"sharded": {"nvme_path": "x"}}, {}, "offload: nvme and nvme_path go together"),
        ({"sharded": {"prefetch_parameters": -1}}, {}, "greater than or equal to 0"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    tmp_path: Path, teacher: dict[str, Any], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(tmp_path, engine, **teacher)


def test_a_cache_stage_refuses_it(tmp_path: Path) -> None:
    cache = {"kind": "cache", "teachers": [{"model": "stage:teacher", "backend": "sharded"}]}
    with pytest.raises(UserError, match="unequal numbers of batches"):
        tiny_config(tmp_path, engine={"kind": "deepspeed"}, stages={"student": None, "cache": cache}, evaluate=None)


def test_the_plan_names_it_and_needs_libaio_for_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = mtkd.plan(planned(tmp_path))
    assert plan.stages[1].models[1].backend == "sharded"
    assert "stage:teacher (sharded)" in plan.tables()[0].columns[4].cells
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: False)
    files = {"offload": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(UserError, match="libaio"):
        mtkd.plan(planned(tmp_path, sharded=files))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose=False: True)
    mtkd.plan(planned(tmp_path, sharded=files))


def test_where_the_weights_are_does_not_make_another_student(tmp_path: Path) -> None:
    one = planned(tmp_path, sharded={"whole_parameters": 3}).stages["student"]
    assert stage_values(one) == stage_values(planned(tmp_path, backend="resident").stages["student"])
    other = planned(tmp_path, backend="resident", model={"path": "stage:teacher", "keep_layers": [1]})
    assert stage_values(one) != stage_values(other.stages["student"])
