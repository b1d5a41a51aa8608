"""Say whether a stage fits into memory, where its memory goes, and what would make it fit.

A stage needs the weights that stay (`mtkd.planning.memory`) and the largest moment of a step
(`mtkd.planning.footprint`). Advice is never a rule of thumb: each change is planned, and named only if the stage then
needs less.
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
from mtkd.planning.rollouts import rows_written, writing_bytes
from mtkd.planning.spec import StageSpec, TeacherSpec
from mtkd.pool import BACKENDS
from mtkd.pool.backends import teacher_share
from mtkd.pool.sizes import Place, Share

GB = 1e9
_WORTH = 0.01  # advice saves at least this share of what is needed


@dataclass(frozen=True)
class Limits:
    """Bytes that a stage may use.

    Attributes:
        rank: of a GPU; None where it is unknown, and on a CPU, whose ranks share the host's memory.
        source: "given" in the configuration or "found" on this machine, by name.
    """

    rank: float | None
    host: float | None
    disk: float | None
    source: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One line of the table, in GB (1e9 bytes): memory of a rank's device, and of a host."""

    name: str
    rank_gb: float
    host_gb: float


@dataclass(frozen=True)
class StageMemory:
    """The memory and disk that a stage needs.

    Attributes:
        moment: part of a step at which most is needed.
        parts: lines that add up to `rank_gb` and `host_gb` (1e9 bytes).
        loading_gb: memory of a host before the first step: every rank loads its models there.
        disk: GB of checkpoints, export, cache and files of offloaded teachers, by name.
        fits: None where no limit is known.
        advice: changes that save memory, the best first.
        notes: parts that are not counted.
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
    """The limits that the configuration names, else those of this machine.

    Args:
        folder: of the run; it need not exist.
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
    """Bytes that this process may use: a container may have less than its machine, so the smallest limit counts."""
    sizes = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        sizes.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            sizes.append(float(text))
    return min(sizes, default=None)


def stage_memory(spec: StageSpec, engine: EngineConfig, limits: Limits, *, on_gpu: bool) -> StageMemory:
    """Count what a stage needs, compare it with the limits, and advise where it does not fit."""
    memory = _needs(spec, engine, on_gpu)
    fits, verdict = _verdict(memory, limits, on_gpu)
    advice = _advice(spec, engine, memory, limits, on_gpu) if fits is False else []
    return replace(memory, fits=fits, verdict=verdict, advice=advice)


def _needs(spec: StageSpec, engine: EngineConfig, on_gpu: bool) -> StageMemory:
    ranks = num_processes(engine)
    local = min(engine.processes_per_host or largest_node(engine), ranks)
    place = Place(on_gpu, engine.prefetch, ranks, local)
    notes = ["not counted: Python and its libraries, and on a GPU the driver's context and what its allocator rounds"]
    step, footprint, has_gpu = _step(spec, engine, on_gpu), None, torch.cuda.is_available()
    if on_gpu and not has_gpu:
        notes.append("steps are counted with a CPU's kernels, for there is no GPU here")
    try:
        footprint = measure(step, "cuda" if on_gpu and has_gpu else "cpu")
        notes += footprint.notes
    except UserError:
        raise
    except Exception as error:  # a loss or a model that reads values, which fake tensors do not have
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        notes.append(
            f"activations, tiles and temporaries are not counted, for a step cannot be made without values: {text}"
        )
    if spec.stage.batch.packing:
        notes.append("packed rows are counted as padded ones of as many tokens")
    teachers = teacher_share([teacher.size for teacher in _at_one_time(spec)], place)
    moment, ranked = "update", dict[str, float]()
    if spec.trained:
        moment, ranked = _trained_parts(spec, engine, footprint, step, teachers)
    elif footprint is not None:  # a cache is made while its teacher runs
        moment, ranked = footprint.moment, {**_moving(footprint), "teachers' weights": teachers.rank}
    parts = [
        Part(name, value / GB, (0 if on_gpu else value * local) / GB)
        for name, value in ranked.items()
        if value or name == "gradients"  # a line of 0 answers the question where the gradients went
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
    spec: StageSpec, engine: EngineConfig, footprint: Footprint | None, step: Step, teachers: Share
) -> tuple[str, dict[str, float]]:
    """The largest moment and its bytes per rank, by part; weights and gradients alone where no step could be made."""
    share = trained_share(footprint.trained if footprint else spec.exported, engine, num_processes(engine))
    parts = {"student weights": share.weights, "optimizer": share.optimizer, "DeepSpeed's buffers": share.buckets}
    if footprint is None:
        gradients = share.weights if share.gradients is None else share.gradients
        return "update", {**parts, "gradients": gradients, "teachers' weights": teachers.rank}
    parts["buffers of the models"] = footprint.buffers
    after = {"teachers' weights": teachers.after}
    earlier = float(footprint.trained) if step.micro_batches > 1 else 0.0  # gradients of the micro-batch before
    turn = {"gradients": earlier, "teachers' features": footprint.asked, "teachers' weights": teachers.rank}
    writing = writing_bytes(step, 2 if engine.in_bf16 else 4)
    if share.gradients is None:
        moments = {
            "teachers": turn,
            footprint.moment: {"gradients": footprint.gradients, **_moving(footprint), **after},
            "update": {"gradients": footprint.trained, "DeepSpeed's buffers": share.flat, **after},
        }
    else:  # DeepSpeed keeps gradients from ZeRO 1 on, so they are the same at every moment
        moments = {
            "teachers": {**turn, "gradients": share.gradients},
            "learning": {"gradients": share.gradients, "activations, tiles, temporaries": footprint.ungraded, **after},
        }
    if writing:
        whole = {"student, gathered": share.gathered, "gradients": share.gradients or 0.0}
        moments["writing"] = {**writing, **whole, **after}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return moment, {**parts, **moments[moment]}


def _moving(footprint: Footprint) -> dict[str, float]:
    return {
        "activations": footprint.activations,
        "teachers' features": footprint.teachers,
        "tiles and temporaries": footprint.rest,
    }


def _at_one_time(spec: StageSpec) -> tuple[TeacherSpec, ...]:
    """The teachers that share the memory: a cache stage runs one after the other, so its largest counts."""
    if spec.stage.trained or (spec.stage.write is not None and spec.stage.write.ensemble):
        return spec.teachers
    return (max(spec.teachers, key=lambda teacher: teacher.numbers.weights),)


def _step(spec: StageSpec, engine: EngineConfig, on_gpu: bool) -> Step:
    batch, length = spec.stage.batch, spec.data.config.max_length
    share = num_processes(engine) * batch.accumulate
    # rounded up: the rank with the most sequences needs the most memory
    sequences = -(-batch.sequences // share) if batch.sequences else (batch.tokens or 0) // share // length
    return Step(
        replace(spec, teachers=_at_one_time(spec)),
        sequences=rows_written(spec.stage.rollout, max(sequences, 1)),
        length=length,
        micro_batches=batch.accumulate,
        tile=tile_for(engine, spec.columns, "cuda" if on_gpu else "cpu"),
        on_gpu=on_gpu,
        dtype=torch.bfloat16 if engine.in_bf16 else torch.float32,
        checkpointing=engine.activation_checkpointing,
    )


def _disk(spec: StageSpec, engine: EngineConfig) -> dict[str, float]:
    """GB on the disk, by name."""
    stage = spec.stage
    if not stage.trained:
        return {} if spec.cache_bytes is None else {"cache": spec.cache_bytes / GB}
    count = stage.keep + (stage.export == "best") if stage.save_every or stage.export == "best" else 1
    if stage.steps and stage.save_every:
        count = min(count, -(-stage.steps // stage.save_every) + (stage.export == "best"))
    most = count + (count > 1)  # the newest is written before the oldest is removed
    return {
        f"{most} checkpoints" if most > 1 else "checkpoint": most * checkpoint_bytes(spec.exported, engine) / GB,
        "export": spec.exported / GB,
    }


def _verdict(memory: StageMemory, limits: Limits, on_gpu: bool) -> tuple[bool | None, str]:
    pairs = [
        ("host", max(memory.host_gb, memory.loading_gb), limits.host),
        ("disk", sum(memory.disk.values()), limits.disk),
    ]
    if on_gpu:
        pairs.insert(0, ("GPU", memory.rank_gb, limits.rank))
    limited = [(name, need, limit / GB) for name, need, limit in pairs if limit is not None]
    over = [
        f"{name}: {need:.2f} GB needed, {limit:.2f} GB {limits.source[name]}, {need - limit:.2f} GB too much"
        for name, need, limit in limited
        if need > limit
    ]
    if over:
        return False, "does not fit. " + "; ".join(over)
    if not limited or (on_gpu and limits.rank is None):
        return None, "no GPU here and no engine.gpu_memory_gb: nothing to compare with"
    return True, "fits: " + ", ".join(f"{name} {need:.2f} of {limit:.2f} GB" for name, need, limit in limited)


def _advice(spec: StageSpec, engine: EngineConfig, now: StageMemory, limits: Limits, on_gpu: bool) -> list[str]:
    """Plan each change by itself, and list those that save memory: first those that fit, then the largest savings."""
    helpful = []
    for text, changed, other in _changes(spec, engine, on_gpu):
        try:
            then = _needs(changed, other, on_gpu)
        except UserError:  # an architecture that cannot recompute its layers, say
            continue
        saved = _most(now, on_gpu) - _most(then, on_gpu)
        if saved > _WORTH * _most(now, on_gpu):
            fits, _ = _verdict(then, limits, on_gpu)
            helpful.append((bool(fits), saved, text, then))
    helpful.sort(key=lambda each: (not each[0], -each[1]))
    unit = "per GPU" if on_gpu else "per host"
    return [
        f"{text}: {_most(then, on_gpu):.2f} GB {unit}, {'fits' if fits else 'not enough alone'}"
        for fits, _, text, then in helpful
    ]


def _most(memory: StageMemory, on_gpu: bool) -> float:
    return memory.rank_gb if on_gpu else max(memory.host_gb, memory.loading_gb)


def _changes(spec: StageSpec, engine: EngineConfig, on_gpu: bool) -> Iterator[tuple[str, StageSpec, EngineConfig]]:
    """The changes to try: what to write into the configuration, the changed stage, the changed engine."""
    stage, where = spec.stage, spec.where
    if spec.trained and not engine.activation_checkpointing and not engine.compile:
        yield (
            "engine.activation_checkpointing: true",
            spec,
            engine.model_copy(update={"activation_checkpointing": True}),
        )
    if not engine.in_bf16 and (on_gpu or here("cpu").precision == "bf16"):  # not where a CPU multiplies it slowly
        yield "engine.precision: bf16", spec, engine.model_copy(update={"precision": "bf16"})
    step = _step(spec, engine, on_gpu)
    tile = min(step.tile, step.sequences * step.length)
    if spec.token_level and tile > 16:  # the least that `tile: auto` takes
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
    if not stage.trained:  # its teachers are in memory one after the other
        return
    heavy = [teacher for teacher in stage.teachers if BACKENDS[teacher.backend].lighter]
    several = engine.kind == "deepspeed" and num_processes(engine) > 1
    cut = any(teacher.model.is_cut for teacher in heavy)
    for name in dict.fromkeys(lighter for teacher in heavy for lighter in BACKENDS[teacher.backend].lighter):
        if (BACKENDS[name].several and not several) or (BACKENDS[name].in_files and cut):
            continue
        yield f"{where}.teachers: backend: {name}", spec.with_backend(name), engine
