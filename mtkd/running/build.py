"""A stage ready to train: its spec, with weights. `build` makes it, the loop reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mtkd.config import StageConfig
from mtkd.data.batch import Batch
from mtkd.data.domains import Domains
from mtkd.data.load import LoadedData
from mtkd.data.sampler import Order, TrainStream
from mtkd.data.split import Split
from mtkd.data.transforms import StepFacts, Transform, make_transforms
from mtkd.engine.base import Engine, Trainable, seed_everything
from mtkd.engine.make import make_engine
from mtkd.engine.tile import tile_for
from mtkd.errors import DataError
from mtkd.models.generate import check_writing
from mtkd.models.info import ModelInfo
from mtkd.models.taps import TappedModel
from mtkd.objective.cofinetune import CoFinetuning, check_members
from mtkd.objective.wire import Wiring, wire
from mtkd.planning.places import placed
from mtkd.planning.spec import StageSpec
from mtkd.pool import Teacher, TeacherPool
from mtkd.running.context import RunContext
from mtkd.running.identity import equal_time_steps
from mtkd.running.models import load_model
from mtkd.running.rollout import Rollout, make_rollout
from mtkd.running.teachers import open_teacher
from mtkd.weightings.make import make_weighting, stage_facts, stage_reads


@dataclass
class BuiltStage:
    """Everything the loop needs for one stage.

    Attributes:
        identity: values that determine its model; a checkpoint must have the same.
        layout: engine and processes that a checkpoint is cut for.
    """

    name: str
    stage: StageConfig
    objective: Trainable
    pool: TeacherPool
    engine: Engine
    stream: TrainStream
    data: LoadedData
    steps: int
    identity: dict[str, Any]
    layout: dict[str, Any]
    transforms: tuple[Transform, ...] = ()
    rollout: Rollout | None = None

    def num_parameters(self, member: str | None = None) -> int:
        """Number of parameters of the exported models, or of one of them; tied and shared ones count once."""
        models = torch.nn.ModuleList(m.model for n, m in self.objective.models.items() if member in (None, n))
        return sum(getattr(p, "ds_numel", p.numel()) for p in models.parameters())

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, number `step`, on the engine's device."""
        batches = next(self.stream) if self.rollout is None else self.rollout.batches(step)
        for transform in self.transforms:
            batches = transform(batches, step)
        return [batch.to(self.engine.device) for batch in batches]

    def watch(self, writing: Callable[[int, int, int], None]) -> None:
        """Have a rollout say how far it is; see `Rollout.watch`."""
        if self.rollout is not None:
            self.rollout.watch = writing

    def close(self) -> None:
        """Free teachers, engine and graphs before the next stage."""
        self.pool.close()
        self.engine.close()


def build(context: RunContext, spec: StageSpec, identity: dict[str, Any]) -> BuiltStage:
    """Load and wire everything of a stage.

    Args:
        identity: of the stage, see `mtkd.running.identity.stage_identity`.
    Raises:
        UserError: an error that shows in the weights alone.
    """
    config, stage = context.config, spec.stage
    with placed(stage=spec.where):
        data = context.data(spec.data.name)
        split = _train_split(spec, data)  # before models are loaded, for it may name unknown teachers
        if stage.kind == "cofinetune":
            objective, pool = _cofinetuning(context, spec, data), TeacherPool([], [])
        else:
            objective, pool = _distillation(context, spec, data)
        for model in objective.models.values():
            if config.engine.activation_checkpointing:
                model.enable_activation_checkpointing()
            if config.engine.compile:
                model.compile_model()
        steps, dist = _steps(context, stage, split), context.dist
        stream = TrainStream(
            split,
            Order(split.lengths, stage.batch, spec.seed, mixture=split.mixture),
            dist.rank,
            dist.world_size,
            stage.batch.accumulate,
        )
        engine = make_engine(config.engine, objective, stage, steps, context.device, dist)
        seed_everything(spec.seed * 1_000_003 + dist.rank)  # dropout; the data order has its own generator
        layout = {
            "engine": config.engine.kind,
            "world_size": dist.world_size,
            "zero_stage": config.engine.zero_stage,
        }
        facts = StepFacts(0, spec.seed, context.tokenizer, split, data.config.max_length)
        transforms = make_transforms(stage.transforms, facts, f"{spec.where}.transforms")
        rollout = make_rollout(spec, stream, engine, context.tokenizer, split.pad_id)
        made = (objective, pool, engine, stream, data)
        return BuiltStage(spec.name, stage, *made, steps, identity, layout, transforms, rollout)


def tile_of(context: RunContext, models: Sequence[TappedModel | Teacher]) -> int:
    """Positions per tile for the widest logits of these models."""
    return tile_for(context.config.engine, max(model.num_columns for model in models), context.device.type)


def _cofinetuning(context: RunContext, spec: StageSpec, data: LoadedData) -> Trainable:
    """Models that are trained together on labels."""
    where = f"{spec.where}.members"
    # members with equal weights would teach the same, so each has a seed of its own
    models = {
        name: load_model(context, model, data, seed=spec.seed + i, where=f"{where}.{name}")
        for i, (name, model) in enumerate(spec.stage.members.items())
    }
    check_members({name: model.info for name, model in models.items()}, where)
    tile = tile_of(context, list(models.values()))
    return CoFinetuning(models, regression=data.num_labels == 1, tile=tile, dtype=context.dtype)


def _distillation(context: RunContext, spec: StageSpec, data: LoadedData) -> tuple[Trainable, TeacherPool]:
    """Objective and pool of a stage with one student; without teachers it learns from the labels alone."""
    stage = spec.stage
    packing, compiled = f"{spec.where}.batch.packing" if stage.batch.packing else "", context.config.engine.compile
    teachers = [
        open_teacher(context, t.config, data, t.place, spec.heads, stage=spec.name, packing=packing, compiled=compiled)
        for t in spec.teachers
    ]
    first = teachers[0] if teachers else None
    where = f"{spec.where}.student"
    student = load_model(context, stage.trained["student"], data, seed=spec.seed, where=where, teacher=first)
    _check_planned(spec.trained["student"].info, student.info, where, logits=True)
    if packing:
        student.enable_packing(packing)
    if stage.rollout is not None and stage.rollout.share:
        check_writing(student, f"{spec.where}.rollout")
    for planned, teacher in zip(spec.teachers, teachers, strict=True):
        _check_planned(planned.info, teacher.info, planned.place, logits="logits" in spec.heads)
    names = tuple(teacher.name for teacher in teachers)
    facts = stage_facts(names, [t.num_parameters for t in teachers], student, spec.seed)
    weighting = make_weighting(stage.weighting, facts, f"{spec.where}.weighting")
    domains = Domains.of([t.config for t in spec.teachers])
    teach = domains.teach if domains else ()
    tile = tile_of(context, [student, *teachers])
    how = Wiring(stage.per, spec.token_level, tile, context.dtype, spec.seed, teach)
    objective = wire(student, {teacher.name: teacher.info for teacher in teachers}, spec.rows, weighting, how)
    wants = [objective.teacher_wants(k, has_logits="logits" in t.info.taps) for k, t in enumerate(teachers)]
    return objective, TeacherPool(teachers, wants, context.config.engine.prefetch)


def _check_planned(planned: ModelInfo, loaded: ModelInfo, where: str, *, logits: bool) -> None:
    """Refuse a model that changed since the plan: rows name its layers, and weights have its shapes.

    The number of ids may differ: of a tokenizer that the run trains, the plan knows an upper bound. So may the number
    of classes of a teacher whose hidden states alone are read: it keeps its own head.

    Args:
        logits: its logits are read.
    Raises:
        DataError: with both shapes.
    """
    expected = replace(planned, vocabulary=loaded.vocabulary)
    if not logits:
        expected = replace(expected, num_labels=loaded.num_labels)
    if expected != loaded:
        raise DataError(
            "the model's configuration changed since the run was planned",
            where=where,
            found=str(loaded),
            allowed=str(planned),
            todo="start the run again: it is planned first",
        )


def _train_split(spec: StageSpec, data: LoadedData) -> Split:
    """The train split, with the teacher that each example names where the weighting reads it, or with its domain."""
    names, where = tuple(teacher.name for teacher in spec.teachers), f"{spec.where}.weighting"
    split, reads = data.splits["train"], stage_reads(spec.stage, spec.where, token_level=spec.token_level)
    domains = Domains.of([teacher.config for teacher in spec.teachers])
    if domains is not None:
        return split.in_domains(domains, f"{spec.where}.teachers")
    return split.routed(names, where) if "route" in reads.names else split


def _steps(context: RunContext, stage: StageConfig, split: Split) -> int:
    """Optimizer steps of a stage."""
    if stage.steps is not None:
        return stage.steps
    if stage.epochs is not None:
        each = stage.rollout.reuse if stage.rollout is not None and stage.rollout.share else 1  # steps of one batch
        return max(
            1, round(stage.epochs * Order(split.lengths, stage.batch, 0, mixture=split.mixture).num_batches(0) * each)
        )
    return equal_time_steps(context, stage)
