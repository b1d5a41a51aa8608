"""Say before a run how far the teachers of its stages agree: `mtkd plan FILE --agreement` runs those that are here."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from mtkd.config import RunConfig, StageRef, TeacherConfig, teacher_config
from mtkd.config.teacher import OffloadTeacher
from mtkd.data.batch import STUDENT
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir
from mtkd.engine.precision import choose, decided, device_of
from mtkd.engine.tile import tile_for
from mtkd.evaluate.report.wording import agreement_text
from mtkd.planning.data import DataReader
from mtkd.planning.labels import with_teachers_classes
from mtkd.planning.locate import missing, tokenizer_is_trained
from mtkd.planning.places import in_file, placed
from mtkd.planning.plan import resolve, specify
from mtkd.planning.spec import StageSpec
from mtkd.planning.streams import pinned
from mtkd.pool import BACKENDS
from mtkd.running.consensus import agreement_of, some_texts
from mtkd.running.context import RunContext
from mtkd.running.sample import batches_of
from mtkd.running.teachers import open_teacher


def agreements(config: RunConfig, reader: DataReader | None = None) -> dict[str, str]:
    """Per distill stage with several teachers how far they agree on at most 256 train texts, or why that is not known.

    One process reads the teachers where they are and writes nothing. Temperatures that are still to be fitted
    (`calibrate`) are 1: they change no choice.

    Args:
        reader: of the data entries, if a plan has read them already.
    Raises:
        UserError: as a run would, for a teacher that cannot be read.
    """
    with in_file(config):
        config = pinned(resolve(decided(config, choose(config).precision)))
        reader = reader or DataReader(config.base)
        run = specify(with_teachers_classes(config, reader), reader)
        device = torch.device(device_of(config.engine))
        context = RunContext(run.config, RunDir(run.config.folder), Dist(), device, reader, run.stages)
        several = {name: spec for name, spec in run.stages.items() if _asked(spec)}
        return {name: _not_yet(context, spec) or _foretold(context, spec) for name, spec in several.items()}


def _asked(spec: StageSpec) -> bool:
    return spec.stage.kind == "distill" and len(spec.teachers) > 1 and "logits" in spec.heads


def _not_yet(context: RunContext, spec: StageSpec) -> str:
    """Why the teachers cannot be asked now; "" where they can."""
    config, settings = context.config, context.config.tokenizer
    for teacher in spec.teachers:
        path = teacher.config.model.path
        ref = StageRef.parse(path or "")
        if ref is not None and context.folder(ref.stage).done() is None:
            return f"not known before stage '{ref.stage}' is done"
        if missing(path, config.base) is not None:
            return f"not known: {path} is not here"
        if BACKENDS[teacher.backend].several:
            return f"not known before the stage begins: '{teacher.name}' is sharded over the processes of the run"
    if spec.stage.transforms:
        return "not known before the stage begins: its transforms make the texts"
    if spec.data.facts.not_here:
        return f"not known: {spec.data.facts.not_here}"
    if settings is not None and settings.train_on is not None:
        raw = context.raw(settings.train_on)
        if not tokenizer_is_trained(config, raw, context.run.path):
            return "not known before the run has trained its tokenizer"
    return ""


def _foretold(context: RunContext, spec: StageSpec) -> str:
    data = context.data(spec.data.name)
    if data.num_labels == 1:
        return "not measured: the teachers predict numbers"
    with placed(stage=spec.where), ExitStack() as opened:
        teachers = []
        for planned in spec.teachers:
            teacher = open_teacher(context, _here(planned.config), data, planned.place, spec.heads, stage=spec.name)
            opened.callback(teacher.close)
            teachers.append(teacher)
        if any(teacher.view != STUDENT for teacher in teachers):
            return "not known before the stage begins: a transform writes a teacher's text"
        split, device = data.splits["train"], context.device
        tile = tile_for(context.config.engine, max(t.num_columns for t in teachers), device.type)
        batches = (b.to(device) for b in batches_of(split, some_texts(split), spec.stage.batch, context.dist))
        found = agreement_of(teachers, batches, context.dtype, tile, context.dist)
    return agreement_text(found) or "not known: a cache keeps draws, or another temperature than 1"


def _here(teacher: TeacherConfig) -> TeacherConfig:
    """The teacher as one process asks it that writes nothing: no file of offloaded weights, nothing fitted."""
    if teacher.calibrate is not None and teacher.calibrate.fits:
        teacher = teacher.model_copy(update={"calibrate": None})
    if not isinstance(teacher, OffloadTeacher):
        return teacher
    values = teacher.model_dump(exclude_unset=True, exclude={"backend"})
    return teacher_config({**values, "name": teacher.name})  # resident
