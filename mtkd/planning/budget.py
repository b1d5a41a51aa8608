"""Does a stage fit, where does its memory go, and what would make it fit: the part of `mtkd plan` about memory.

A stage's needs are the weights that stay (`mtkd.planning.memory`) and the largest moment of a step
(`mtkd.planning.footprint`). Advice is never a rule of thumb: each change is planned again, and named only if the stage
then needs less.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from mtkd.config import EngineConfig
from mtkd.engine.disk import free_disk
from mtkd.engine.launch import largest_node, num_processes
from mtkd.engine.precision import here
from mtkd.engine.tile import tile_for
from mtkd.errors import UserError
from mtkd.planning.footprint import Footprint, Step, measure
from mtkd.planning.memory import checkpoint_bytes, trained_share
from mtkd.planning.spec import StageSpec, TeacherSpec
from mtkd.pool import BACKENDS
from mtkd.pool.backends import teacher_share
from mtkd.pool.sizes import Place, Share

GB = 1e9
_WORTH = 0.01  # a change that saves less than this share of what is needed is no advice


@dataclass(frozen=True)
class Limits:
    """Bytes there are: on a GPU (None: on a CPU ranks share the host's memory, or not known), per host, on the disk.

    Attributes:
        source: "given" in the configuration or "found" on this machine, by name.
    """

    rank: float | None
    host: float | None
    disk: float | None
    source: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One line of the table, GB (1e9 bytes): of a rank's device memory, and of the host's memory per host."""

    name: str
    rank_gb: float
    host_gb: float


@dataclass(frozen=True)
class StageMemory:
    """What a stage needs.

    Attributes:
        moment: of a step at which most is needed.
        parts: that add up to `rank_gb` and `host_gb` (1e9 bytes).
        loading_gb: of a host's memory before the first step: models are loaded there, by every rank.
        disk: checkpoints, export, cache, files of offloaded teachers; GB by name.
        fits: None where nothing is known to compare with.
        advice: changes after which less is needed, the best first.
        notes: what is not counted.
    """

    moment: str
    parts: list[Part]
    rank_gb: float
    host_gb: float
    loading_gb: float
    disk: dict[str, float]
    fits: bool | None = None
    verdict: str = ""
    advice: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_limits(engine: EngineConfig, folder: Path, *, on_gpu: bool) -> Limits:
    """What the configuration says, else what this machine has.

    Args:
        folder: of the run, which may not exist yet.
    """
    source = {}
    rank = engine.gpu_memory_gb and engine.gpu_memory_gb * GB
    source["GPU"] = "given"
    if rank is None and on_gpu and torch.cuda.is_available():
        rank, source["GPU"] = float(torch.cuda.get_device_properties(0).total_memory), "found"
    host = engine.host_memory_gb and engine.host_memory_gb * GB
    source["host"] = "given"
    if host is None:
        host, source["host"] = _host_memory(), "found"
    source["disk"] = "found"
    return Limits(rank if on_gpu else None, host, free_disk(folder)[1], source)


def _host_memory() -> float | None:
    """Bytes of memory that this process may use: of the machine, or of its container."""
    found = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            found.append(float(text))
    return min(found, default=None)


def stage_memory(spec: StageSpec, engine: EngineConfig, limits: Limits, *, on_gpu: bool) -> StageMemory:
    """What a stage needs, whether that is there, and what would help if it is not."""
    made = _needs(spec, engine, on_gpu)
    fits, verdict = _verdict(made, limits, on_gpu)
    advice = _advice(spec, engine, made, limits, on_gpu) if fits is False else []
    return replace(made, fits=fits, verdict=verdict, advice=advice)


def _needs(spec: StageSpec, engine: EngineConfig, on_gpu: bool) -> StageMemory:
    ranks = num_processes(engine)
    local = min(engine.processes_per_host or largest_node(engine), ranks)
    place = Place(on_gpu, engine.prefetch, ranks, local)
    notes = ["not counted: Python and its libraries, and on a GPU the driver's context and what its allocator rounds"]
    step, found, there = _step(spec, engine, on_gpu), None, torch.cuda.is_available()
    if on_gpu and not there:
        notes.append("steps are counted with a CPU's kernels, for there is no GPU here")
    try:
        found = measure(step, "cuda" if on_gpu and there else "cpu")
        notes += found.notes
    except UserError:
        raise
    except Exception as error:  # a loss or a model that reads values
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        notes.append(
            f"activations, tiles and temporaries are not counted, for a step cannot be made without values: {text}"
        )
    if spec.stage.batch.packing:
        notes.append("packed rows are counted as padded ones of as many tokens")
    teachers = teacher_share([teacher.size for teacher in _at_one_time(spec)], place)
    moment, ranked = "update", dict[str, float]()
    if spec.trained:
        moment, ranked = _trained_parts(spec, engine, found, step, teachers)
    elif found is not None:  # a cache is made while its teacher runs
        moment, ranked = found.moment, {**_moving(found), "teachers' weights": teachers.rank}
    parts = [
        Part(name, value / GB, (0 if on_gpu else value * local) / GB)
        for name, value in ranked.items()
        if value or name == "gradients"  # who looks for them should find them, gone as they are at other moments
    ]
    if teachers.host:
        parts.append(Part("waiting teachers, pinned", 0, teachers.host / GB))
    disk = _disk(spec, engine)
    if teachers.disk:
        disk["waiting teachers"] = teachers.disk / GB
    return StageMemory(
        moment,
        parts,
        sum(part.rank_gb for part in parts),
        sum(part.host_gb for part in parts),
        (teachers.built + max(spec.exported, teachers.passing)) * local / GB,
        disk,
        notes=notes,
    )


def _trained_parts(
    spec: StageSpec, engine: EngineConfig, found: Footprint | None, step: Step, teachers: Share
) -> tuple[str, dict[str, float]]:
    """(moment, bytes of a rank by part) of the largest moment; without what moves where a step could not be made."""
    held = trained_share(found.trained if found else spec.exported, engine, num_processes(engine))
    parts = {"student weights": held.weights, "optimizer": held.optimizer, "DeepSpeed's buffers": held.buckets}
    if found is None:
        gradients = held.weights if held.gradients is None else held.gradients
        return "update", {**parts, "gradients": gradients, "teachers' weights": teachers.rank}
    parts["buffers of the models"] = found.buffers
    after = {"teachers' weights": teachers.after}
    earlier = float(found.trained) if step.micro_batches > 1 else 0.0  # gradients of the micro-batch before
    turn = {"gradients": earlier, "teachers' features": found.asked, "teachers' weights": teachers.rank}
    if held.gradients is None:
        moments = {
            "teachers": turn,
            found.moment: {"gradients": found.gradients, **_moving(found), **after},
            "update": {"gradients": found.trained, "DeepSpeed's buffers": held.flat, **after},
        }
    else:  # where gradients stay, or live elsewhere, the largest moment is that of everything else
        moments = {
            "teachers": {**turn, "gradients": held.gradients},
            "learning": {"gradients": held.gradients, "activations, tiles, temporaries": found.ungraded, **after},
        }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, {**parts, **moments[moment]}


def _moving(found: Footprint) -> dict[str, float]:
    return {
        "activations": found.activations,
        "teachers' features": found.teachers,
        "tiles and temporaries": found.rest,
    }


def _at_one_time(spec: StageSpec) -> tuple[TeacherSpec, ...]:
    """The teachers that are in memory together: of a cache stage one after the other, so the largest."""
    if spec.stage.kind != "cache":
        return spec.teachers
    return (max(spec.teachers, key=lambda teacher: teacher.numbers.weights),)


def _step(spec: StageSpec, engine: EngineConfig, on_gpu: bool) -> Step:
    batch, length = spec.stage.batch, spec.data.config.max_length
    share = num_processes(engine) * batch.accumulate
    sequences = -(-batch.sequences // share) if batch.sequences else (batch.tokens or 0) // share // length
    return Step(
        replace(spec, teachers=_at_one_time(spec)),
        sequences=max(sequences, 1),
        length=length,
        micro_batches=batch.accumulate,
        tile=tile_for(engine, spec.columns, "cuda" if on_gpu else "cpu"),
        on_gpu=on_gpu,
        dtype=torch.bfloat16 if engine.in_bf16 else torch.float32,
        checkpointing=engine.activation_checkpointing,
    )


def _disk(spec: StageSpec, engine: EngineConfig) -> dict[str, float]:
    """GB by name."""
    stage = spec.stage
    if stage.kind == "cache":
        return {} if spec.cache_bytes is None else {"cache": spec.cache_bytes / GB}
    kept = stage.keep + (stage.export == "best") if stage.save_every or stage.export == "best" else 1
    if stage.steps and stage.save_every:
        kept = min(kept, -(-stage.steps // stage.save_every) + (stage.export == "best"))
    written = kept + (kept > 1)  # the oldest goes when the newest is there
    return {
        f"{written} checkpoints" if written > 1 else "checkpoint": written
        * checkpoint_bytes(spec.exported, engine)
        / GB,
        "export": spec.exported / GB,
    }


def _verdict(made: StageMemory, limits: Limits, on_gpu: bool) -> tuple[bool | None, str]:
    pairs = [("host", max(made.host_gb, made.loading_gb), limits.host), ("disk", sum(made.disk.values()), limits.disk)]
    if on_gpu:
        pairs.insert(0, ("GPU", made.rank_gb, limits.rank))
    known = [(name, need, there / GB) for name, need, there in pairs if there is not None]
    over = [
        f"{name}: {need:.2f} GB needed, {there:.2f} GB {limits.source[name]}, {need - there:.2f} GB too much"
        for name, need, there in known
        if need > there
    ]
    if over:
        return False, "does not fit. " + "; ".join(over)
    if not known or (on_gpu and limits.rank is None):
        return None, "no GPU here and no engine.gpu_memory_gb: nothing to compare with"
    return True, "fits: " + ", ".join(f"{name} {need:.2f} of {there:.2f} GB" for name, need, there in known)


def _advice(spec: StageSpec, engine: EngineConfig, now: StageMemory, limits: Limits, on_gpu: bool) -> list[str]:
    """Changes that help, each by itself; and all of them together where none is enough."""
    found = []
    for text, changed, other in _changes(spec, engine, on_gpu):
        try:
            then = _needs(changed, other, on_gpu)
        except UserError:  # an architecture that cannot recompute its layers, say
            continue
        saved = _most(now, on_gpu) - _most(then, on_gpu)
        if saved > _WORTH * _most(now, on_gpu):
            fits, _ = _verdict(then, limits, on_gpu)
            found.append((bool(fits), saved, text, then))
    found.sort(key=lambda each: (not each[0], -each[1]))
    unit = "per GPU" if on_gpu else "per host"
    return [
        f"{text}: {_most(then, on_gpu):.2f} GB {unit}, {'fits' if fits else 'not enough alone'}"
        for fits, _, text, then in found
    ]


def _most(made: StageMemory, on_gpu: bool) -> float:
    return made.rank_gb if on_gpu else max(made.host_gb, made.loading_gb)


def _changes(spec: StageSpec, engine: EngineConfig, on_gpu: bool) -> Iterator[tuple[str, StageSpec, EngineConfig]]:
    """(what to write into the configuration, the stage and the engine as they then are)."""
    stage, where = spec.stage, spec.where
    if spec.trained and not engine.activation_checkpointing and not engine.compile:
        yield (
            "engine.activation_checkpointing: true",
            spec,
            engine.model_copy(update={"activation_checkpointing": True}),
        )
    if not engine.in_bf16 and (on_gpu or here("cpu").precision == "bf16"):
        yield "engine.precision: bf16", spec, engine.model_copy(update={"precision": "bf16"})
    step = _step(spec, engine, on_gpu)
    tile = min(step.tile, step.sequences * step.length)
    if spec.token_level and tile > 16:
        smaller = max(tile // 4, 16)
        yield f"engine.tile: {smaller}", spec, engine.model_copy(update={"tile": smaller})
    if engine.kind == "deepspeed" and num_processes(engine) > 1:
        for zero in range(engine.zero_stage + 1, 4):
            yield f"engine.zero_stage: {zero}", spec, engine.model_copy(update={"zero_stage": zero})
    size = (stage.batch.sequences or (stage.batch.tokens or 0) // spec.data.config.max_length) // num_processes(engine)
    if spec.trained and size > stage.batch.accumulate:
        for count in {min(stage.batch.accumulate * 4, size), size}:
            batch = stage.batch.model_copy(update={"accumulate": count})
            smaller_batch = replace(spec, stage=stage.model_copy(update={"batch": batch}))
            yield f"{where}.batch.accumulate: {count}", smaller_batch, engine
    if stage.kind == "cache":  # its teachers are in memory one after the other
        return
    heavy = [teacher for teacher in stage.teachers if BACKENDS[teacher.backend].lighter]
    several = engine.kind == "deepspeed" and num_processes(engine) > 1
    cut = any(teacher.model.is_cut for teacher in heavy)
    for name in dict.fromkeys(lighter for teacher in heavy for lighter in BACKENDS[teacher.backend].lighter):
        if (BACKENDS[name].several and not several) or (BACKENDS[name].in_files and cut):
            continue
        yield f"{where}.teachers: backend: {name}", spec.with_backend(name), engine
