"""`mtkd.run`: run the stages of a run one after the other, score its models, and write the report."""

from __future__ import annotations

import gc
import json
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mtkd.config import RunConfig, StageRef
from mtkd.config.read import fingerprint
from mtkd.data.progress import say
from mtkd.data.vocabulary import compress_tokenizer
from mtkd.engine.dist import Dist, on_main, together
from mtkd.engine.folder import RunDir, StageDir
from mtkd.engine.make import start_processes
from mtkd.engine.notes import Done
from mtkd.engine.seal import fault_point
from mtkd.engine.watch import note, watched
from mtkd.errors import UserError
from mtkd.evaluate.report import is_current, write_report
from mtkd.models.load import quiet
from mtkd.planning.checks import check
from mtkd.planning.data import DataFacts, DataReader
from mtkd.planning.exports import check_finished, manifests, open_export
from mtkd.planning.labels import with_teachers_classes
from mtkd.planning.places import in_file, placed
from mtkd.planning.plan import resolve, specify, specs_of
from mtkd.planning.spec import StageSpec
from mtkd.planning.stages import changed_stages, to_redo
from mtkd.planning.streams import commits, with_commits
from mtkd.running.agreement import agree, agree_on_precision, agree_on_run, check_shared
from mtkd.running.answers import check_answered
from mtkd.running.blame import plugin_errors
from mtkd.running.build import BuiltStage, build
from mtkd.running.capture import capture, restore_notes
from mtkd.running.chance import warn_below_chance, warn_uncalibrated
from mtkd.running.consensus import note_consensus
from mtkd.running.context import RunContext
from mtkd.running.generate import generate
from mtkd.running.identity import finished, stage_identity
from mtkd.running.judge import judge
from mtkd.running.redo import drop_replaced, pending, set_aside, undone_on_error
from mtkd.running.remember import remember
from mtkd.running.train import train


@dataclass(frozen=True)
class RunResult:
    """The result of a run.

    Attributes:
        folder: the run folder.
        report: its HTML page.
        stages: per stage its DONE record (steps, seconds, parameters, fingerprint, ...).
        results: task, metrics of every scored model, comparisons; see `mtkd.running.judge`.
    """

    folder: Path
    report: Path
    stages: dict[str, dict[str, Any]]
    results: dict[str, Any]

    def export(self, stage: str) -> Path:
        """Folder of a model (STAGE or STAGE/MEMBER) for plain `AutoModel*.from_pretrained`, or of a cache."""
        ref = StageRef.named(stage)
        name, member = ref.stage, ref.part
        members = self.stages[name].get("members") or self.stages[name].get("caches") or {}
        if members and member not in members:
            raise UserError(
                "this stage made several models or caches", found=stage, allowed=[f"{name}/{m}" for m in members]
            )
        return RunDir(self.folder).stage(list(self.stages).index(name) + 1, name).export / member


def run(config: RunConfig, redo: Sequence[str] = ()) -> RunResult:
    """Run every stage that is not done, evaluate, and write the report.

    A second call on the same configuration goes on where the first stopped, and redoes no finished stage.

    Args:
        redo: stages that are made again, with all stages that depend on them.

    Raises:
        UserError: and its subclasses, whose `exit_code` is that of the command line.
    """
    dist, device = start_processes(config.engine)
    # Everything is inside `watched`: the other ranks would wait for one that refuses the run.
    with watched(dist, config.engine.timeout_seconds, config.folder / "logs"), plugin_errors(), in_file(config):
        agree_on_run(dist, config, redo)
        config = agree_on_precision(dist, config)
        return _run(config, redo, dist, device)


def _run(config: RunConfig, redo: Sequence[str], dist: Dist, device: torch.device) -> RunResult:
    config = resolve(config)
    check(config)
    streams = on_main(dist, lambda: commits(config))  # one for all ranks: a branch may move between two questions
    config = with_commits(config, streams)
    reader = DataReader(config.base)
    config = with_teachers_classes(config, reader)
    begun = on_main(dist, lambda: pending(RunDir(config.folder)))
    again = to_redo(config, [*redo, *(name for name in begun if name in config.stages)])
    specs = _specify(config, reader, dist, again)
    folder = on_main(dist, lambda: RunDir.create(config, base=Path(config.output)))
    check_shared(dist, folder.path)
    with ExitStack() as resources:
        # The main rank alone takes the lock. `on_main` passes its errors on: the others would wait in a collective.
        on_main(dist, lambda: resources.enter_context(folder.lock()))
        on_main(dist, lambda: set_aside(folder, again))
        if dist.is_main:
            resources.enter_context(undone_on_error(folder, config))
        run_id = on_main(dist, lambda: remember(config, folder, streams))
        _pathrank(folder, dist, run_id)
        context = RunContext(config, folder, dist, device, reader, specs)
        on_main(dist, lambda: _check_needed(context))
        check_answered(context)
        for name in config.stages:
            context.records[name] = _stage(context, name)
        results = judge(context)
        report = on_main(dist, lambda: _report(folder))
    return RunResult(folder.path, report, {name: done.values() for name, done in context.records.items()}, results)


def _specify(config: RunConfig, reader: DataReader, dist: Dist, again: Sequence[str]) -> Mapping[str, StageSpec]:
    """The specs of all stages; none where all are done and none is redone. A collective.

    A mistake in the last stage must show before the first one runs, and before a stage to redo is set aside. The main
    rank goes first and checks every row of the data; the others then make the same specs from its facts. Specs are not
    sent: they hold functions of plug-ins.

    Args:
        again: the stages that are to be redone.
    """
    specs: Mapping[str, StageSpec] = {}

    def first() -> dict[str, DataFacts] | None:
        nonlocal specs
        folder = RunDir(Path(config.output) / config.name)
        stages = [folder.stage(number, name) for number, name in enumerate(config.stages, 1)]
        if not again and folder.config_file.is_file() and all(stage.done() for stage in stages):
            return None
        run = specify(config, reader)
        if run.missing:
            raise UserError(
                "models or data of this run are not here", where="stages", found="\n           ".join(run.missing)
            )
        specs = run.stages
        return reader.known()

    facts = on_main(dist, first)
    if facts is None:
        return {}
    reader.adopt(facts)
    return together(dist, lambda: specs if dist.is_main else specs_of(config, reader), _planned_otherwise)


def _planned_otherwise(message: str) -> UserError:
    return UserError(
        f"the run cannot be planned on every process: {message}", where="stages", todo="give every node the same files"
    )


def _check_needed(context: RunContext) -> None:
    """Check the exports of finished stages: damage must show before hours of training, and before users load them."""
    done = {name: record for name in context.config.stages if (record := context.folder(name).done())}
    to_do = [stage for name, stage in context.config.stages.items() if name not in done]
    models = [model for s in to_do for model in (*s.trained.values(), *(t.model for t in s.teachers))]
    for ref in (model.stage for model in models):
        if ref is not None and ref.stage in done:
            open_export(ref.stage, context.folder(ref.stage), done[ref.stage], ref.part)
    for name, record in done.items():
        for path in check_finished(name, context.folder(name), record):
            say(f"stage {name}: what it made is gone, nothing needs it: {path}")


def _report(folder: RunDir) -> Path:
    """The report, written again unless it is current."""
    return folder.report_file if is_current(folder.path) else write_report(folder.path)


def _pathrank(folder: RunDir, dist: Dist, run_id: str) -> None:
    """Log where each of several ranks runs; `mtkd.engine.watch` adds how it ended."""
    if dist.world_size > 1:
        note(
            folder.rank_log(dist.rank),
            f"run {run_id}: rank {dist.rank} of {dist.world_size}, pid {os.getpid()} on {socket.gethostname()}",
        )


def _stage(context: RunContext, name: str) -> Done:
    """Make a stage, unless it is done."""
    folder, stage, dist = context.folder(name), context.config.stages[name], context.dist
    identity = stage_identity(context, name)
    agree(dist, identity, f"stage '{name}': data, tokenizer and models", "give every node the same files")
    if (record := _finished(context, name, identity)) is not None:
        return record
    say(f"stage {name}: {stage.kind}", main=dist.is_main)
    spec = context.specs[name]
    with placed(stage=spec.where):
        makers = {"cache": capture, "generate": generate}
        facts = makers.get(stage.kind, _trained)(context, spec, identity)
    record = Done.of({**facts, "fingerprint": fingerprint(identity), "identity": identity})
    fault_point("before-done", record.steps)
    on_main(dist, lambda: _mark_done(context.run, folder, record))
    gc.collect()
    return record


def _finished(context: RunContext, name: str, identity: dict[str, Any]) -> Done | None:
    """The record of a stage that is done with its present identity; None where it is to do."""
    config, folder, main = context.config, context.folder(name), context.dist.is_main
    folders = {other: context.folder(other) for other in config.stages}

    def found() -> Done | None:
        return finished(folder, name, identity, list(dict.fromkeys([name, *changed_stages(config, folders)])))

    record = on_main(context.dist, found)
    if record is None:
        return None
    if record.caches:
        for path in on_main(context.dist, partial(restore_notes, folder, record)):
            say(f"  a note of stage '{name}' was damaged, written again: {path}", main=main)
    work = f"{len(record.caches)} caches" if record.caches else f"{record.steps} steps"
    say(f"stage {name}: done ({work}, {record.seconds:.0f} s), skipped", main=main)
    return record


def _trained(context: RunContext, spec: StageSpec, identity: dict[str, Any]) -> dict[str, Any]:
    """Train a stage, export its models, and return the facts for its DONE record."""
    folder = context.folder(spec.name)
    built = build(context, spec, identity)
    if "logits" in spec.heads:
        read = {planned.place: teacher for planned, teacher in zip(spec.teachers, built.pool.teachers, strict=True)}
        for look in (warn_below_chance, warn_uncalibrated):
            look(read, built.data, built.stage.batch, context.device, context.dist)
    agreement = note_consensus(built, spec, folder) if context.config.evaluate.agreement else {}
    facts = train(built, context.config, context.run, folder)
    record = {
        "stage": spec.name,
        "kind": built.stage.kind,
        "parameters": built.num_parameters(),
        "members": {member: built.num_parameters(member) for member in built.stage.members},
        "teachers": [t.name for t in built.stage.teachers],
        **({"agreement": agreement} if agreement else {}),
        **facts,
    }
    _export(context, built, folder)
    record["manifests"] = on_main(context.dist, lambda: manifests(folder.export, [""]))
    built.close()
    return record


def _mark_done(run: RunDir, folder: StageDir, record: Done) -> None:
    folder.mark_done(record)
    drop_replaced(run)


def _export(context: RunContext, built: BuiltStage, folder: StageDir) -> None:
    """Write every model and its tokenizer for plain transformers; members have folders of their own."""
    states = {name: built.engine.model_state(name) for name in built.objective.models}

    def write(path: Path) -> None:
        for name, model in built.objective.models.items():
            state = states[name]
            assert state is not None
            folder = path / name if built.stage.members else path
            with quiet():
                model.model.save_pretrained(folder, state_dict=state)
            context.tokenizer.save_pretrained(folder)
            if model.vocabulary is not None:
                compress_tokenizer(folder, model.vocabulary.kept.tolist(), model.vocabulary.to_kept.tolist())
                model.vocabulary.save(folder)

    facts = {"stage": built.name, "identity": built.identity}
    on_main(context.dist, lambda: folder.sealed_export(write, json.loads(json.dumps(facts))))
