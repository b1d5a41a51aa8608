"""Run a cache stage: its teachers run once over the train split, one after the other, and their answers go to disk.

Ranks take disjoint shards and talk after every round of them. Nothing else is collective, so unequal examples do not
matter. A shard's batches hold its own examples alone. So its content depends neither on the number of ranks nor on
where an earlier session stopped.
"""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtkd.config import BatchConfig, StageConfig
from mtkd.config.read import differences
from mtkd.data.load import LoadedData
from mtkd.data.progress import say
from mtkd.data.sampler import length_batches
from mtkd.data.split import Split
from mtkd.data.tokenizers import num_real_ids
from mtkd.engine.dist import alive, on_main, together
from mtkd.engine.folder import StageDir
from mtkd.engine.jsonlines import rewind
from mtkd.engine.notes import Done, Identity, read_seconds, write_seconds
from mtkd.engine.record import read_record, write_record
from mtkd.engine.seal import MANIFEST, fault_point, remove
from mtkd.engine.stopping import StopFlag, stop_flag
from mtkd.engine.tile import tile_for
from mtkd.errors import DataError, NonFiniteError, Preempted, UserError, on_every_rank
from mtkd.models.features import as_logits
from mtkd.planning.caches import check_layers, content_of
from mtkd.planning.exports import manifests
from mtkd.planning.spec import StageSpec, TeacherSpec
from mtkd.planning.stages import redo_command
from mtkd.pool import Teacher
from mtkd.pool.cache import CacheContent, CacheReader, CacheWriter, Record, make_records
from mtkd.pool.cache.folder import open_cache, origin_of
from mtkd.running.chance import warn_below_chance, warn_uncalibrated
from mtkd.running.console import StageProgress
from mtkd.running.context import RunContext
from mtkd.running.identity import as_known, teacher_digest
from mtkd.running.metrics import JsonLines
from mtkd.running.overflow import overflowing
from mtkd.running.sample import spread
from mtkd.running.teachers import open_teacher

_IDENTITY, _SECONDS = "identity.json", "seconds.json"
_LOOKED_AT = 16  # examples whose inputs of two epochs are compared


@dataclass
class _Job:
    """The shared facts and the progress of a stage's caches.

    Attributes:
        seconds: running time of teachers, earlier sessions included.
        shards, examples: done so far, over all teachers.
        place: of the running teacher, in the configuration.
    """

    context: RunContext
    spec: StageSpec
    data: LoadedData
    folder: StageDir
    seconds: float = 0.0
    shards: int = 0
    examples: int = 0
    place: str = ""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def stage(self) -> StageConfig:
        return self.spec.stage

    @property
    def split(self) -> Split:
        return self.data.splits["train"]


def capture(context: RunContext, spec: StageSpec, identity: dict[str, Any]) -> dict[str, Any]:
    """Make the caches of a stage, going on with those that an earlier session began.

    Returns:
        Facts for the stage's DONE record; `caches`: per teacher the facts of `CacheWriter.finish` and its examples.
    Raises:
        Preempted: SIGTERM or SIGINT arrived; finished shards stay.
        DataError: the begun caches are others, or inputs change with the epoch.
        NonFiniteError: a teacher's outputs are NaN.
    """
    name, stage = spec.name, spec.stage
    job = _Job(context, spec, context.data(spec.data.name), context.folder(name))
    _check_same_every_epoch(job.split, f"{spec.where}.data")
    if not on_main(context.dist, lambda: _begun(job, identity)):
        unit = len(job.split) * len(stage.teachers)
        with stop_flag() as stopped, StageProgress(name, unit, 0, context.dist.is_main, "example") as progress:
            for teacher in spec.teachers:
                _cache(job, teacher, stopped, progress)
            on_main(context.dist, lambda: _catch_up(job))  # an earlier session may have made them all
            if not context.dist.all_ok(not stopped()):
                raise on_every_rank(_preempted(job))
        fault_point("before-cache-export", 0)
        # last: `export` exists only with every cache finished
        on_main(context.dist, lambda: job.folder.partial.rename(job.folder.export) and None)
    context.dist.barrier()
    exported = job.folder.export

    def read() -> tuple[dict[str, dict[str, Any]], float]:
        """The facts of each finished cache, and the seconds of all sessions."""
        facts = {t.name: _facts(exported / t.name, job.data) for t in stage.teachers}
        return facts, read_seconds(exported / _SECONDS, _damaged(job))

    caches, seconds = together(context.dist, read, partial(_failed, exported))
    for teacher_name, facts in caches.items():
        say(f"  {name}/{teacher_name}: {_sentence(facts)}", main=context.dist.is_main)
    return {
        "stage": name,
        "kind": stage.kind,
        "parameters": sum(facts["parameters"] for facts in caches.values()),
        "teachers": [t.name for t in stage.teachers],
        "steps": sum(facts["shards"] for facts in caches.values()),
        "seconds": seconds,
        "tokens": sum(facts["positions"] for facts in caches.values()),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        "caches": caches,
        "manifests": manifests(exported, list(caches)),
    }


def restore_notes(folder: StageDir, record: Done) -> list[Path]:
    """Write damaged notes of a finished cache again, from its DONE.

    A stage that loses its DONE goes on by these notes, so they must be intact by then.

    Args:
        record: the stage's DONE.
    Returns:
        The notes that were damaged.
    """
    identity, seconds = folder.export / _IDENTITY, folder.export / _SECONDS
    damaged = []
    if not _holds(lambda: read_record(identity, Identity) == record.identity):
        remove(identity)
        write_record(identity, record.identity)
        damaged.append(identity)
    if not _holds(lambda: read_seconds(seconds, "") == record.seconds):
        remove(seconds)
        write_seconds(seconds, record.seconds)
        damaged.append(seconds)
    return damaged


def _holds(compare: Callable[[], bool]) -> bool:
    try:
        return compare()
    except (FileNotFoundError, DataError):
        return False


def _begun(job: _Job, identity: dict[str, Any]) -> bool:
    """Whether an earlier session had only the DONE record left to write; otherwise make the working folder.

    Raises:
        DataError: the begun caches are others; with every difference.
    """
    for folder in (job.folder.export, job.folder.partial):
        note = folder / _IDENTITY
        if not note.is_file():
            continue
        begun = read_record(note, Identity, _damaged(job))
        changed = differences(begun, json.loads(json.dumps(as_known(begun, identity))))
        if changed:
            raise DataError(
                "the caches begun here are of another configuration, teacher, data set or tokenizer",
                where=job.spec.where,
                found="\n           ".join(changed),
                todo="undo the change, give the run another name, or begin this stage again: "
                + redo_command([job.name]),
            )
        if folder == job.folder.partial:
            job.seconds = read_seconds(folder / _SECONDS, _damaged(job))
        return folder == job.folder.export
    job.folder.partial.mkdir(parents=True, exist_ok=True)
    write_seconds(job.folder.partial / _SECONDS, 0.0)
    write_record(job.folder.partial / _IDENTITY, identity)
    return False


def _damaged(job: _Job) -> str:
    """The advice for a damaged note."""
    return f"begin this stage again: {redo_command([job.name])}"


def _cache(job: _Job, planned: TeacherSpec, stopped: StopFlag, progress: StageProgress) -> None:
    """Make the missing shards of one teacher's cache, in the working folder."""
    context, dist, config = job.context, job.context.dist, planned.config
    where = job.place = planned.place
    folder = job.folder.partial / config.name
    if dist.broadcast_object((folder / MANIFEST).is_file()):
        finished = together(dist, lambda: CacheReader(folder), partial(_failed, folder))
        job.shards, job.examples = job.shards + finished.num_shards, job.examples + finished.origin.num_examples
        progress.skip(job.examples)
        return
    teacher = open_teacher(context, config, job.data, where, job.spec.heads, stage=job.name)
    token_level = job.data.task.token_level
    content = content_of(
        job.stage.cache,
        token_level=token_level,
        columns=num_real_ids(context.tokenizer) if token_level else job.data.num_labels,
        seed=context.config.seed,
        others=planned.num_others,
        missing=planned.missing,
    )
    check_layers(content, teacher.info, f"{job.spec.where}.cache", config.name)
    digest, precision = teacher_digest(context, config), context.config.engine.decided_precision
    origin = origin_of(digest, job.data, context.tokenizer, teacher.record(), precision)

    def open_writer() -> CacheWriter:
        return CacheWriter(folder, content, origin, job.stage.cache.shard_examples)

    on_main(dist, lambda: open_writer() and None)  # one rank makes the folder, so the others compare theirs with it
    writer = together(dist, open_writer, partial(_failed, folder))
    missing = on_main(dist, writer.missing)  # all ranks share one list: they may see a network folder differently
    job.shards += writer.num_shards - len(missing)
    job.examples += origin.num_examples - sum(len(examples) for _, examples in missing)
    progress.skip(job.examples)
    on_main(dist, lambda: _catch_up(job))
    if missing:
        for look in (warn_below_chance, warn_uncalibrated):
            look({where: teacher}, job.data, job.stage.batch, context.device, dist)
    for start in range(0, len(missing), dist.world_size):
        _round(job, teacher, writer, missing[start : start + dist.world_size], stopped, progress)
    teacher.close()
    del teacher
    gc.collect()  # the next teacher needs the memory
    on_main(dist, writer.finish)


def _round(
    job: _Job,
    teacher: Teacher,
    writer: CacheWriter,
    shards: list[tuple[int, range]],
    stopped: StopFlag,
    progress: StageProgress,
) -> None:
    """Write at most one shard per rank; afterwards every rank knows of failures and signals."""
    dist, begun = job.context.dist, time.monotonic()

    def own_shard() -> int:
        """Write this rank's shard, and count its examples."""
        if dist.rank >= len(shards):
            return 0
        number, examples = shards[dist.rank]
        records = _records(job, teacher, writer.content, examples, stopped)
        if records is None:
            return 0
        with stopped.writing():
            writer.write(number, records)
        return len(records)

    num_written = together(dist, own_shard, partial(_failed, writer.folder))
    stops, new_shards, new_examples = dist.sum([stopped(), bool(num_written), num_written])
    job.seconds += time.monotonic() - begun
    job.shards, job.examples = job.shards + int(new_shards), job.examples + int(new_examples)
    on_main(dist, lambda: _log(job))
    progress.update(job.examples, None, note=teacher.name)
    if stops:
        raise on_every_rank(_preempted(job))


def _preempted(job: _Job) -> Preempted:
    return Preempted(
        f"stopped; {job.shards} shards of its caches are written",
        where=job.spec.where,
        todo="run it again (without --redo) to go on from there",
    )


def _records(
    job: _Job, teacher: Teacher, content: CacheContent, examples: range, stopped: StopFlag
) -> list[Record] | None:
    """A teacher's answers for some examples; None when a signal stops the process first."""
    wants, records = frozenset({"logits", *content.hidden}), list[Record]()
    tile = tile_for(job.context.config.engine, content.columns, job.context.device.type)
    for batch in _batches(job.split, job.stage.batch, examples):
        if stopped():
            return None
        batch = batch.to(job.context.device)
        features = teacher.forward(batch.read_by(teacher.view), wants)
        features["logits"] = as_logits(features["logits"]).in_dtype(job.context.dtype)
        records += make_records(content, batch, features, tile)
        alive()
    for record in records:
        _check_finite(record, teacher.name, content.dtype, job)
    return records


def _batches(split: Split, batch: BatchConfig, examples: range) -> Iterator[Any]:
    """The batches of a shard, by falling length, of the size in the stage's `batch`."""
    for part in length_batches(np.array(examples), split.lengths, batch):
        yield split.collate(part.tolist())


def _check_finite(record: Record, teacher: str, dtype: str, job: _Job) -> None:
    """Refuse NaN; -inf is valid, for it is the log of a mass of 0."""
    arrays = [*record.targets.values(), *record.traits.values()]
    arrays += [] if record.classes is None else [record.classes]
    if any(np.isnan(values).any() for values in arrays):
        raise overflowing(teacher, job.place, f"logits of example {record.id}", job.context.dtype)
    for key, values in record.hidden.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(
                f"a hidden state of teacher '{teacher}' is not finite in {dtype}",
                where=job.place,
                found=f"{key} of example {record.id}",
                todo="set cache.dtype to bfloat16 or float32: float16 ends at 65,504",
            )


def _failed(folder: Path, message: str) -> UserError:
    return UserError(
        f"the caches could not be made: {message}",
        where=str(folder),
        todo="fix the cause and run it again: the shards that are written stay",
    )


def _log(job: _Job) -> None:
    """Log the progress for `mtkd status`, and keep the seconds for a later session."""
    write_seconds(job.folder.partial / _SECONDS, job.seconds)
    lines = JsonLines(job.context.run.metrics_file, job.name)
    lines.write(job.shards, {"examples": job.examples}, {"seconds": round(job.seconds, 3)})


def _catch_up(job: _Job) -> None:
    """Log the shards that a killed session wrote but did not log, and drop lines of shards that are missing."""
    if rewind(job.context.run.metrics_file, job.name, job.shards) < job.shards:
        _log(job)


def _facts(folder: Path, data: LoadedData) -> dict[str, Any]:
    """The facts of a finished cache, with its numbers of examples and shards."""
    reader, facts = open_cache(folder, data.task.class_for(data.config), str(folder))
    return {
        **reader.facts,
        "parameters": facts.num_parameters,
        "examples": reader.origin.num_examples,
        "shards": reader.num_shards,
        "targets": reader.content.targets,
    }


def _sentence(facts: dict[str, Any]) -> str:
    text = f"{facts['examples']:,} examples, {facts['bytes'] / 1e6:,.1f} MB, {facts['bytes_per_position']:.1f} bytes "
    text += "per example" if facts["targets"] == "classes" else "per target"
    return text + (f", KL of the reconstruction {facts['kl']:.2g} nats" if "kl" in facts else "")


def _check_same_every_epoch(split: Split, where: str) -> None:
    """Refuse data whose inputs change with the epoch: a teacher's answers would change with them.

    Raises:
        DataError: naming the first example that differs.
    """
    for example in spread(np.arange(len(split)), _LOOKED_AT).tolist():
        one, other = (split.collate([example], epoch=epoch) for epoch in (0, 1))
        same = torch.equal(one.input_ids, other.input_ids) and torch.equal(
            one.targets.nan_to_num(), other.targets.nan_to_num()
        )
        if not same:
            raise DataError(
                "the inputs of these data change with the epoch: a cache would hold those of one epoch only",
                where=where,
                found=f"example {example}",
                todo="use resident teachers for these data",
            )
