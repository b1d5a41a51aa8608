"""Wiring: a stage of the configuration -> objective, pool, data stream, engine. The only place that knows all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mtkd.config import ModelConfig, RunConfig, StageConfig, StageRef, TeacherConfig
from mtkd.config.read import fingerprint
from mtkd.data.load import LoadedData, load_data
from mtkd.data.progress import say
from mtkd.data.raw import Raw
from mtkd.data.sampler import Order, TrainStream
from mtkd.data.segmentation import segmentation_digest
from mtkd.data.split import Split
from mtkd.data.tokenizers import num_real_ids, tokenizer_fingerprint
from mtkd.data.transforms import StepFacts, make_transforms
from mtkd.engine.base import Trainable, seed_everything
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir, StageDir
from mtkd.engine.make import make_engine
from mtkd.engine.tile import tile_for
from mtkd.methods.rows import placed_rows
from mtkd.models.classes import teacher_classes
from mtkd.models.digest import weights_digest
from mtkd.models.folder import check_folder, find_folder
from mtkd.models.info import CLASSIFIER
from mtkd.models.load import build_model, compress_model
from mtkd.models.request import ModelRequest, Taught
from mtkd.models.taps import TappedModel, input_table
from mtkd.models.vocabulary import VocabularyMap, compressed_teacher, compressed_twice, make_vocabulary, read_vocabulary
from mtkd.objective.cofinetune import CoFinetuning, check_members
from mtkd.objective.compile import compile_rows
from mtkd.objective.wire import Wiring, wire
from mtkd.planning.cachefolder import cache_digest, cache_folder, cached_teacher
from mtkd.planning.data import DataReader
from mtkd.planning.exports import check_foreign, open_export
from mtkd.planning.locate import compare_tokenizer, given_tokenizer, resolve_path, revision_of, trained_tokenizer
from mtkd.planning.places import placed
from mtkd.planning.stages import identity, stage_seed
from mtkd.planning.teaching import heads_read
from mtkd.pool import BACKENDS, CachedTeacher, LiveModel, LiveTeacher, Site, Teacher, TeacherPool
from mtkd.running.built import BuiltStage
from mtkd.weightings.make import make_weighting, stage_facts, stage_reads


class Workshop:
    """What the stages of a run share: configuration, tokenizer, data, devices.

    Args:
        config: the run. run: its folder. dist: this process's rank. device: where tensors live.
        reader: of its data, where the plan has read them already.
    Attributes:
        records: per stage that is done its DONE record, as the main rank knows it: over a network file system other
            ranks may see the file seconds later.
    """

    def __init__(
        self, config: RunConfig, run: RunDir, dist: Dist, device: torch.device, reader: DataReader | None = None
    ) -> None:
        self.config, self.base, self.run, self.dist, self.device = config, config.base, run, dist, device
        self.dtype = torch.bfloat16 if config.engine.in_bf16 else torch.float32
        self._reader = reader or DataReader(config.base)
        self._data: dict[str, LoadedData] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def folder(self, stage: str) -> StageDir:
        """The folder of a stage of this run."""
        return self.run.stage(list(self.config.stages).index(stage) + 1, stage)

    def record(self, stage: str) -> dict[str, Any]:
        """What a stage that is done has recorded."""
        found = self.records.get(stage) or self.folder(stage).done()
        assert found is not None, "earlier stages are done before later ones start"
        return found

    def raw(self, name: str) -> Raw:
        """The documents or rows of a `data` entry, read once."""
        with placed(data=f"data.{name}"):
            return self._reader.raw(self.config.data[name])

    def data(self, name: str) -> LoadedData:
        """A `data` entry as token ids, made once."""
        if name not in self._data:
            with placed(data=f"data.{name}"):
                loaded = load_data(name, self.config.data[name], self.raw(name), self.tokenizer)
            self._data[name] = loaded
            for note in self.raw(name).notes:
                say(f"data.{name}: {note}", main=self.dist.is_main)
            for split in loaded.splits.values():
                if split.note:
                    say(f"data.{name}: {split.note}", main=self.dist.is_main)
        return self._data[name]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's one tokenizer: trained (and kept in the run folder), given, or that of the first loaded model."""
        settings = self.config.tokenizer
        if settings is not None and settings.train_on is not None:
            return trained_tokenizer(self.config, self.raw(settings.train_on), self.run.path, self.dist)
        return given_tokenizer(self.config)

    def resolve(self, path: str) -> Path | str:
        """stage:NAME[/MEMBER] -> its export, a folder -> its path, a card -> its source; else the hub id as it is.

        What a run made is compared with what it sealed, once per process.
        """
        ref = StageRef.parse(path)
        if ref is not None:
            return open_export(ref.stage, self.folder(ref.stage), self.record(ref.stage), ref.part)
        found = resolve_path(path, self.base)
        if isinstance(found, Path):
            check_foreign(found)
        return found

    def steps(self, stage: StageConfig, data: LoadedData) -> int:
        """Optimizer steps of a stage."""
        if stage.steps is not None:
            return stage.steps
        if stage.epochs is not None:
            order = Order(data.splits["train"].lengths, stage.batch, 0)
            return max(1, round(stage.epochs * order.num_batches(0)))
        return self._equal_time_steps(stage)

    def _equal_time_steps(self, stage: StageConfig) -> int:
        assert stage.equal_time is not None
        target, rate = self.record(stage.equal_time.to), self.record(stage.equal_time.rate_of)
        return max(1, math.ceil(target["seconds"] / (rate["seconds"] / rate["steps"])))

    def identity(self, name: str) -> dict[str, Any]:
        """What determines the model this stage makes; see `chain.identity`. Earlier stages must be done."""
        stage = self.config.stages[name]
        data = self.config.data_name(stage.data)
        steps = self._equal_time_steps(stage) if stage.equal_time else stage.steps or 0
        models = {role: self._digest(model, stage.place(name, role)) for role, model in stage.trained.items()}
        for role, model in stage.trained.items():
            if model.vocabulary is not None:
                counted = self.config.data_name(model.vocabulary.counts)
                texts = self.config.data[counted]
                written = [tokenizer_fingerprint(self.tokenizer, chat=True)] if texts.chat else []
                parts = [self.raw(counted).fingerprint, texts.values(), *written]
                models[f"{role} vocabulary"] = fingerprint(parts)
        for i, teacher in enumerate(stage.teachers):
            where = f"stages.{name}.teachers[{i}].model"
            if not BACKENDS[teacher.backend].runs and teacher.model.stage is None:
                models[f"teacher {teacher.name}"] = cache_digest(
                    cache_folder(teacher.model.path or "", self.base, where)
                )
            else:
                models[f"teacher {teacher.name}"] = self._digest(teacher.model, where)
        return identity(
            self.config,
            name,
            data=self.raw(data).fingerprint,
            tokenizer=tokenizer_fingerprint(self.tokenizer, chat=self.config.data[data].chat),
            segmentation=segmentation_digest(self.tokenizer),
            models=models,
            steps=steps,
        )

    def _digest(self, model: ModelConfig, where: str) -> str:
        with placed(model=where):
            return self.digest(model)

    def digest(self, model: ModelConfig) -> str:
        """What identifies the weights a model starts from, and what is cut from them."""
        whole, cut = self._whole_digest(model), model.model_dump(mode="json", include={"keep_layers", "slice"})
        return fingerprint([whole, cut]) if model.is_cut else whole

    def teacher_digest(self, teacher: TeacherConfig) -> str:
        """What identifies a teacher's predictions: its weights, and what its outputs stand for where the user says it.

        A cache has it: it keeps the logits of the data's classes, in the order that `classes` gives them.
        """
        weights = self.digest(teacher.model)
        return weights if teacher.classes is None else fingerprint([weights, teacher.classes])

    def _whole_digest(self, model: ModelConfig) -> str:
        if model.path is None:
            return "fresh"
        if model.stage is not None:
            return str(self.record(model.stage.stage)["fingerprint"]) + model.stage.part
        folder = self.resolve(model.path)
        if not isinstance(folder, Path):
            return f"{folder}@{revision_of(model)}"
        check_folder(folder)  # a link in it could lead the digest to a file outside
        return weights_digest(folder)

    def vocabulary(self, model: ModelConfig, where: str) -> VocabularyMap | None:
        """The map that comes with a model's folder; None for a model with a whole vocabulary."""
        return read_vocabulary(self.resolve(model.path), self.tokenizer, where) if model.path else None

    def model(
        self,
        model: ModelConfig,
        data: LoadedData,
        seed: int,
        teacher: LiveModel | None = None,
        where: str = "model",
        empty: bool = False,
        taught: Taught | None = None,
    ) -> TappedModel:
        """A model for the data's task, with taps; one that is loaded has the run's tokenizer.

        Args:
            where: its block in the configuration; of a teacher the teacher's, whose `model` it is.
            teacher: whose embedding tells which ids are alike, for a fresh student with a compressed vocabulary.
            empty: without its weights, as `build_model` has it.
            taught: of a frozen teacher: what is read of it; None for a model that is trained, or was here.
        """
        with placed(model=where if taught is None else f"{where}.model", data=f"data.{data.name}", teacher=where):
            num_ids, task = num_real_ids(self.tokenizer), data.task.class_for(data.config)
            vocabulary = self.vocabulary(model, where)
            if model.path is not None and vocabulary is None:
                folder, revision = self.resolve(model.path), revision_of(model)
                compare_tokenizer(self.tokenizer, folder, revision, where, masked=data.task.masked)
            request = ModelRequest.of_data(
                data.name,
                data.config,
                (data.num_labels, data.label_names),
                self.tokenizer,
                num_ids if vocabulary is None else vocabulary.num_kept,
                self.resolve,
            )
            tables = [] if teacher is None else [teacher.embedding_table]
            built = build_model(
                model,
                replace(request, taught=taught, seed=seed, where=where),
                on_loaded=lambda whole: tables.insert(0, input_table(whole)),
                empty=empty,
            )
            if model.vocabulary is not None:
                if vocabulary is not None:
                    raise compressed_twice(f"{where}.vocabulary")
                name = self.config.data_name(model.vocabulary.counts)
                with placed(data=f"data.{name}"):
                    made = make_vocabulary(
                        model.vocabulary,
                        self.config.data[name],
                        self.raw(name),
                        self.tokenizer,
                        built.config,
                        tables[0],
                    )
                vocabulary = self.dist.broadcast_object(made)  # near ties could be rounded differently elsewhere
                built = compress_model(built, task, vocabulary, seed)
            columns = None
            if taught is not None and "logits" in taught.reads and task == CLASSIFIER and request.answers is None:
                found = teacher_classes(built.config, data.label_names, data.num_labels, where, taught.classes)
                columns = None if found.in_order else found.columns
            return TappedModel(built, task, num_ids, vocabulary, columns)

    def teacher(self, teacher: TeacherConfig, data: LoadedData, where: str, reads: frozenset[str]) -> LiveModel:
        """A teacher whose tokenizer is the run's, with its weights where its backend keeps them; a collective.

        Its logits are those of the data's classes, in their order.

        Args: reads: which of its predictions are read (`mtkd.planning.teaching`): their heads must be in its files.
        """
        with placed(model=f"{where}.model", teacher=where):
            assert teacher.model.path is not None
            if data.task.token_level and self.vocabulary(teacher.model, where) is not None:
                raise compressed_teacher(teacher.model.path, where)
            backend = BACKENDS[teacher.backend]
            taught = Taught(reads, teacher.classes)
            model = self.model(teacher.model, data, seed=0, where=where, empty=backend.in_files, taught=taught)
            path, revision = teacher.model.path, teacher.model.revision
            folder = partial(find_folder, path, revision, self.resolve, weights=True)
            file = self.run.offload_file(teacher.name)
            site = Site(self.device, self.dtype, self.dist, folder, file)
            return backend.open(teacher, model, site, where)

    def build(self, name: str) -> BuiltStage:
        """Load and wire everything of a stage.

        Raises:
            UserError: whatever the plan could not see without weights.
        """
        stage, where = self.config.stages[name], f"stages.{name}"
        with placed(stage=where):
            data = self.data(self.config.data_name(stage.data))
            split = self._train_split(stage, data, where)  # before models are loaded: it may name unknown teachers
            if stage.kind == "cofinetune":
                objective, pool = self._cofinetuning(stage, data, f"{where}.members"), TeacherPool([], [])
            else:
                objective, pool = self._distillation(stage, data, where, heads_read(self.config, name))
            for model in objective.models.values():
                if self.config.engine.activation_checkpointing:
                    model.enable_activation_checkpointing()
                if self.config.engine.compile:
                    model.compile_model()
            return self._built(name, objective, pool, data, split)

    def _cofinetuning(self, stage: StageConfig, data: LoadedData, where: str) -> Trainable:
        seed = stage_seed(self.config, stage)
        # models trained together are initialised differently, like teachers of different seeds
        models = {
            name: self.model(model, data, seed + i, where=f"{where}.{name}")
            for i, (name, model) in enumerate(stage.members.items())
        }
        check_members({name: model.info for name, model in models.items()}, where)
        return CoFinetuning(
            models, regression=data.num_labels == 1, tile=self.tile(list(models.values())), dtype=self.dtype
        )

    def _distillation(
        self, stage: StageConfig, data: LoadedData, where: str, reads: frozenset[str]
    ) -> tuple[Trainable, TeacherPool]:
        """Objective and pool of a stage with one student; without teachers it learns from the labels alone."""
        names, seed = tuple(t.name for t in stage.teachers), stage_seed(self.config, stage)
        live = {t.name: self.teacher(t, data, f"{where}.teachers[{i}]", reads)
                for i, t in enumerate(stage.teachers) if BACKENDS[t.backend].runs}  # fmt: skip
        first = live.get(names[0]) if names else None
        student = self.model(stage.trained["student"], data, seed, first, f"{where}.student")
        if stage.batch.packing:
            for model in (student, *live.values()):
                model.enable_packing(f"{where}.batch.packing")
        teachers: list[Teacher] = [
            LiveTeacher(t.name, live[t.name], self.device, self.dtype, self.config.engine.compile)
            if t.name in live
            else self._cached(t, data, f"{where}.teachers[{i}].model")
            for i, t in enumerate(stage.teachers)
        ]
        infos = {teacher.name: teacher.info for teacher in teachers}
        rows = compile_rows(
            placed_rows(stage, data.config, where, data.num_labels == 1),
            student.info,
            infos,
            token_level=data.task.token_level,
            regression=not data.task.token_level and data.num_labels == 1,
        )
        facts = stage_facts(names, [t.num_parameters for t in teachers], student, seed)
        weighting = make_weighting(stage.weighting, facts, f"{where}.weighting")
        tile = self.tile([student, *live.values()])
        how = Wiring(stage.per, data.task.token_level, tile, self.dtype, seed)
        objective = wire(student, infos, rows, weighting, how)
        wants = [objective.teacher_wants(k) for k in range(len(teachers))]
        return objective, TeacherPool(teachers, wants, self.config.engine.prefetch)

    def tile(self, models: Sequence[LiveModel]) -> int:
        """Positions per tile for the widest of some models' logits."""
        return tile_for(self.config.engine, max(model.num_columns for model in models), self.device.type)

    def _cached(self, teacher: TeacherConfig, data: LoadedData, where: str) -> CachedTeacher:
        """A teacher's cache, which is that of the run's data, tokenizer and (where the run knows it) teacher."""
        path = teacher.model.path
        assert path is not None
        ref = teacher.model.stage
        folder = self.folder(ref.stage).export / ref.part if ref else cache_folder(path, self.base, where)
        made_of = [t for t in self.config.stages[ref.stage].teachers if t.name == ref.part] if ref else []
        digest = self.teacher_digest(made_of[0]) if made_of else None
        found = cached_teacher(
            teacher.name, folder, data, self.tokenizer, digest, self.config.engine.decided_precision, where
        )
        if ref:  # after it said what else it may be: another teacher's
            open_export(ref.stage, self.folder(ref.stage), self.record(ref.stage), ref.part)
        return found

    def _train_split(self, stage: StageConfig, data: LoadedData, where: str) -> Split:
        """What the stage trains on, with the teacher that each example names where the weighting reads it."""
        names = tuple(t.name for t in stage.teachers)
        split, reads = data.splits["train"], stage_reads(stage, where, token_level=data.task.token_level)
        return split.routed(names, f"{where}.weighting") if "route" in reads.names else split

    def _built(self, name: str, objective: Trainable, pool: TeacherPool, data: LoadedData, split: Split) -> BuiltStage:
        stage, steps = self.config.stages[name], self.steps(self.config.stages[name], data)
        seed = stage_seed(self.config, stage)
        order = Order(split.lengths, stage.batch, seed)
        stream = TrainStream(split, order, self.dist.rank, self.dist.world_size, stage.batch.accumulate)
        engine = make_engine(self.config.engine, objective, stage, steps, self.device, self.dist)
        seed_everything(seed * 1_000_003 + self.dist.rank)  # dropout; the data order has its own generator
        layout = {
            "engine": self.config.engine.kind,
            "world_size": self.dist.world_size,
            "zero_stage": self.config.engine.zero_stage,
        }
        facts = StepFacts(0, seed, self.tokenizer, split, data.config.max_length)
        transforms = make_transforms(stage.transforms, facts, f"stages.{name}.transforms")
        return BuiltStage(
            name, stage, objective, pool, engine, stream, data, steps, self.identity(name), layout, transforms
        )
