"""`mtkd.plan`: everything resolved and checked, nothing trained and no weight loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mtkd.cachefolder import CacheFacts, check_precision_of, check_tokenizer_of, read_facts
from mtkd.cacheplan import (
    check_cacheable,
    check_cached,
    check_layers,
    check_same_data,
    compressed_from_cache,
    content_of,
    describe,
    train_tokens,
)
from mtkd.chain import model_name, model_of, needed_stages, scored_models, stage_of, stage_values
from mtkd.checks import check
from mtkd.cofinetune import check_members
from mtkd.config import DataConfig, ModelConfig, RunConfig, StageConfig, TeacherConfig
from mtkd.data.tokenizers import check_chat_template, check_same_tokenizer, num_real_ids, train_tokenizer
from mtkd.errors import UserError
from mtkd.ladder import Look, complete
from mtkd.launcher import launch_command
from mtkd.locate import given_tokenizer, read_tokenizer, resolve_path, revision_of
from mtkd.memory import FLOAT, TeacherSize, check_offload, teacher_bytes
from mtkd.mix import stage_rows
from mtkd.models.folder import check_folder
from mtkd.models.info import CLASSIFIER, ModelInfo, check_packing, count_parameters, model_info
from mtkd.models.load import load_config as load_model_config
from mtkd.models.load import smaller_config
from mtkd.models.vocabulary import compressed_teacher, compressed_twice, read_vocabulary
from mtkd.models.weights import check_weights
from mtkd.planned import SKIPPED, Plan, PlannedModel, PlannedStage, of_cache, planned_model, row_text, with_consequences
from mtkd.pool.partition import check_nvme
from mtkd.registry import TASKS, load_plugins
from mtkd.rows import compile_rows
from mtkd.rundir import RunDir

# Float32 copies of a trainable parameter in training: weight, gradient, two Adam moments.
_COPIES = {"weight": 1, "gradient": 1, "optimizer": 2}


def resolve(config: RunConfig) -> RunConfig:
    """The run with every stage of its chain: shapes that depend on other models are derived; else as it is.

    Raises:
        UserError: a shape cannot be derived, or the stages that result are not valid.
    """
    load_plugins(config.plugins, config.base)
    return complete(config, lambda stand_in: _Planner(stand_in).look())


def plan(config: RunConfig) -> Plan:
    """Resolve and check a run: models from their configurations, rows against both sides, tokenizers against another.

    Raises:
        UserError: whatever would fail later for a reason that can be known now.
    """
    config = resolve(config)
    check(config)
    planner = _Planner(config)
    planner.check_chats()
    stages = with_consequences([planner.stage(name) for name in config.stages])
    planner.check_scored()
    engine = config.engine
    command = ["mtkd", "run", "FILE"]
    if engine.kind == "deepspeed" and engine.processes > 1:
        command = launch_command(engine, ["run", "FILE"])[1:]
        command = ["python", *command]
    kind = f"{engine.kind}, {engine.processes} process(es), {engine.precision}"
    if engine.kind == "deepspeed":
        kind += f", ZeRO {engine.zero_stage}"
    return Plan(config.name, str(config.folder), kind, " ".join(command), stages)


class _Planner:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._made: dict[str, PretrainedConfig] = {}
        self._cached: dict[str, CacheFacts] = {}  # what cache stages will have made
        self._compressed: dict[str, int] = {}  # stages whose model has a compressed vocabulary: its ids
        settings = config.tokenizer
        self._trains_tokenizer = settings is not None and settings.train_on is not None
        if self._trains_tokenizer:
            assert settings is not None
            # A stand-in with the special tokens of the one to come, which has at most `vocab_size` ids.
            self._tokenizer: PreTrainedTokenizerBase = train_tokenizer(["stand-in"], settings.vocab_size)
            self._num_ids = settings.vocab_size
        else:
            self._tokenizer = given_tokenizer(config)
            self._num_ids = num_real_ids(self._tokenizer)

    def stage(self, name: str) -> PlannedStage:
        stage, where = self.config.stages[name], f"stages.{name}"
        data = self.config.data[self.config.data_name(stage.data)]
        task = TASKS.find(data.task, f"data.{stage.data}.task")
        auto_class = task.class_for(data)
        if stage.kind == "cache":
            return self._cache_stage(name, stage, auto_class, where)
        models = [(role, m, self._model_config(stage, m, f"{where}.{role}")) for role, m in stage.trained.items()]
        own = len(models)
        self._made |= {model_name(name, stage, role): made for role, _, made in models}
        for role, model, made in models:
            if model.vocabulary is not None or self._vocabulary(model) is not None:
                self._compressed[model_name(name, stage, role)] = made.vocab_size
            self._check_tokenizer(model, f"{where}.{role}", token_level=False)
        sized = [self._sized(role, model, made, data, auto_class) for role, model, made in models]
        caches = self._caches(stage, data, auto_class, where)
        for i, teacher in enumerate(stage.teachers):
            place = f"{where}.teachers[{i}]"
            if teacher.name in caches:
                sized.append(of_cache(teacher, caches[teacher.name]))
                continue
            made = self._teacher_config(stage, teacher, auto_class, place)
            sized.append(self._sized(teacher.name, teacher.model, made, data, auto_class))
            self._check_tokenizer(teacher.model, place, task.token_level)
            if teacher.sharded is not None:
                check_nvme(teacher.sharded, f"{place}.sharded")
        backends = [""] * own + [teacher.backend for teacher in stage.teachers]
        planned = [replace(model, backend=backend) for (model, _), backend in zip(sized, backends, strict=True)]
        infos = [info for _, info in sized]
        if stage.batch.packing:
            for which, info in zip(planned, infos, strict=True):
                if which.backend != "cached":  # a cached teacher does not run
                    check_packing(info, f"{where}.batch.packing")
        if stage.members:
            check_members({p.role: info for p, info in sized}, f"{where}.members")
        rows = compile_rows(
            stage_rows(stage, data, where),
            infos[0],
            {p.role: info for p, info in sized[own:]},
            token_level=task.token_level,
            regression=False if task.token_level or data.labels else None,
            where=f"{where}.match",
        )
        check_cached(stage, rows, caches, token_level=task.token_level, where=where)
        if caches and task.token_level and name in self._compressed:
            raise compressed_from_cache(next(iter(caches)), f"{where}.student.vocabulary")
        texts = [row_text(row.match.weight, row.key, row.pairs) for row in rows]
        return PlannedStage(
            name,
            stage.kind,
            self._state(name),
            needed_stages(stage),
            planned,
            texts,
            stage.steps,
            self._tokens(stage, data.max_length),
            self._memory(planned[:own], self._sizes(planned[own:], infos[own:], where), infos[0]),
        )

    def _sized(
        self, role: str, model: ModelConfig, made: PretrainedConfig, data: DataConfig, auto_class: str
    ) -> tuple[PlannedModel, ModelInfo]:
        info = _with_open_labels(model_info(made, auto_class), data, auto_class)
        return planned_model(role, model, info, count_parameters(made, auto_class)), info

    def _cache_stage(self, name: str, stage: StageConfig, auto_class: str, where: str) -> PlannedStage:
        """The teachers of a cache stage, what is kept of each, and how large that may become."""
        data = self.config.data[self.config.data_name(stage.data)]
        check_cacheable(stage, data, where)
        token_level = TASKS.find(data.task).token_level
        planned, texts = list[PlannedModel](), list[str]()
        sizes: list[TeacherSize] = []
        for i, teacher in enumerate(stage.teachers):
            place = f"{where}.teachers[{i}]"
            made = self._teacher_config(stage, teacher, auto_class, place)
            self._check_tokenizer(teacher.model, place, token_level)
            model, info = self._sized(teacher.name, teacher.model, made, data, auto_class)
            columns = self._num_ids if token_level else info.num_labels
            content = content_of(stage.cache, token_level=token_level, columns=columns, seed=self.config.seed)
            check_layers(content, info, f"{where}.cache", teacher.name)
            self._made[f"{name}/{teacher.name}"] = made
            self._cached[f"{name}/{teacher.name}"] = CacheFacts(content, info, model.parameters, f"stages.{name}")
            planned.append(replace(model, backend=teacher.backend))
            sizes += self._sizes(planned[-1:], [info], where)
            text = f"{teacher.name}: {describe(content, info, train_tokens(data, self.config.base))}"
            if teacher.backend == "streamed":
                sweep = stage.batch.tokens or (stage.batch.sequences or 0) * data.max_length
                text += f"; all its weights are read from disk for every batch of <= {sweep:,} tokens"
            texts.append(text)
        logits = self._tile(self._num_ids) * self._num_ids * 2 if token_level else 0
        # they are run one after the other
        memory = max(teacher_bytes([s], on_gpu=self._on_gpu, prefetch=False) for s in sizes) + logits * FLOAT
        return PlannedStage(
            name, stage.kind, self._state(name), needed_stages(stage), planned, texts, None, None, memory / 1e9
        )

    def _caches(self, stage: StageConfig, data: DataConfig, auto_class: str, where: str) -> dict[str, CacheFacts]:
        """What is known of the caches that a stage reads, by teacher; those of earlier stages need not exist yet."""
        found = {}
        for i, teacher in enumerate(stage.teachers):
            if teacher.backend != "cached":
                continue
            place, made = f"{where}.teachers[{i}].model", model_of(teacher.model.path)
            if made is None:
                found[teacher.name] = read_facts(teacher.model.path or "", self.config.base, auto_class, place)
                check_precision_of(found[teacher.name], self.config.engine.precision, place)
                if not self._trains_tokenizer:
                    check_tokenizer_of(found[teacher.name], self._tokenizer, place)
            else:
                found[teacher.name] = self._cached[made]
                earlier = self.config.stages[stage_of(teacher.model.path) or ""]
                check_same_data(self.config, earlier, stage, place)
            facts = found[teacher.name]
            found[teacher.name] = replace(facts, info=_with_open_labels(facts.info, data, auto_class))
        return found

    def _model_config(self, stage: StageConfig, model: ModelConfig, where: str) -> PretrainedConfig:
        vocabulary = self._vocabulary(model)
        if model.vocabulary is not None and vocabulary is not None:
            raise compressed_twice(f"{where}.vocabulary")
        earlier = stage_of(model.path)
        if earlier is not None:
            made = self._made[model_of(model.path) or ""]
            return self._for_task(smaller_config(made, model, self._tokenizer, self._num_ids), earlier, stage, where)
        data = self.config.data[self.config.data_name(stage.data)]
        return load_model_config(
            model,
            TASKS.find(data.task).class_for(data),
            num_ids=vocabulary or self._num_ids,
            max_positions=data.max_length,
            num_labels=len(data.labels),
            label_names=data.labels,
            tokenizer=self._tokenizer,
            resolve=lambda path: resolve_path(path, self.config.base),
        )

    def _teacher_config(
        self, stage: StageConfig, teacher: TeacherConfig, auto_class: str, where: str
    ) -> PretrainedConfig:
        """Of a teacher that runs; names and shapes in the files of a streamed or sharded one are compared with it."""
        made = self._model_config(stage, teacher.model, where)
        folder = resolve_path(teacher.model.path or "", self.config.base)
        if teacher.backend in ("streamed", "sharded") and isinstance(folder, Path) and auto_class != CLASSIFIER:
            check_folder(folder)
            check_weights(made, auto_class, folder)
        return made

    def _for_task(self, made: PretrainedConfig, earlier: str, stage: StageConfig, where: str) -> PretrainedConfig:
        """An earlier stage's model as this stage will load it: the head of its task, the length of its data."""
        data = self.config.data[self.config.data_name(stage.data)]
        auto_class = TASKS.find(data.task).class_for(data)
        made = type(made).from_dict(made.to_dict())
        if auto_class == CLASSIFIER and data.labels:
            self._check_labels(earlier, data.labels, where)
            made.num_labels = len(data.labels)
        longest = model_info(made, auto_class).max_positions
        if longest < data.max_length:
            raise UserError(
                "the data's examples are longer than the longest sequence of the earlier stage's model",
                where=where,
                found=f"{data.max_length} tokens",
                allowed=f"at most {longest}",
                todo="give the model of that stage more max_positions, or this data a smaller max_length",
            )
        return made

    def _check_labels(self, earlier: str, labels: tuple[str, ...], where: str) -> None:
        """Refuse a classifier of an earlier stage whose classes are others, where both sides name them."""
        theirs = self.config.data[self.config.data_name(self.config.stages[earlier].data)]
        if theirs.task == "classify" and theirs.labels and theirs.labels != labels:
            raise UserError(
                f"stage '{earlier}' makes a classifier of other classes",
                where=where,
                found=", ".join(theirs.labels),
                allowed=", ".join(labels),
                todo="use data of the same classes in the same order, or go on from a model that is no classifier",
            )

    def _vocabulary(self, model: ModelConfig) -> int | None:
        """Ids of a model that comes with a vocabulary map; None for a whole vocabulary."""
        made = model_of(model.path)
        if made is not None or model.path is None:
            return self._compressed.get(made or "")
        found = read_vocabulary(resolve_path(model.path, self.config.base), self._tokenizer, "model.path")
        return None if found is None else found.num_kept

    def check_scored(self) -> None:
        """Refuse to score a model on examples that are longer than it can read; after every stage was planned."""
        name = self.config.data_name(self.config.evaluate.data)
        data = self.config.data[name]
        auto_class = TASKS.find(data.task).class_for(data)
        for model in scored_models(self.config):
            longest = model_info(self._made[model], auto_class).max_positions
            if longest < data.max_length:
                raise UserError(
                    f"data '{name}' has examples longer than '{model}' can read",
                    where="evaluate.data",
                    found=f"{data.max_length} tokens",
                    allowed=f"at most {longest}",
                    todo="give the model more max_positions, or leave it out of evaluate.stages",
                )

    def check_chats(self) -> None:
        """Refuse turns of a chat that the run's tokenizer, trained ones included, cannot write."""
        for name, data in self.config.data.items():
            if data.chat:
                check_chat_template(self._tokenizer, f"data.{name}.chat")

    def look(self) -> Look:
        """What the ladder of a chain asks about models."""
        return Look(self.stage, self._model_config, self._made)

    def _check_tokenizer(self, model: ModelConfig, where: str, token_level: bool) -> None:
        """Token -> id of the teacher and of the run, where both exist before anything is trained."""
        if self._vocabulary(model) is not None:
            if token_level:
                raise compressed_teacher(model.path or "", where)
            return
        if stage_of(model.path) is None and not self._trains_tokenizer and model.path is not None:
            own = read_tokenizer(resolve_path(model.path, self.config.base), revision_of(model))
            check_same_tokenizer(self._tokenizer, own, where)

    def _state(self, name: str) -> str:
        folder = self.config.folder
        if not (folder / "run.yaml").is_file():
            return "to do"
        stage = RunDir.open(folder).stage(list(self.config.stages).index(name) + 1, name)
        record = stage.done()
        if record is None:
            return "to do"
        same = record["identity"]["stage"] == stage_values(self.config.stages[name])
        return SKIPPED if same else "done, but differs"

    def _tokens(self, stage: StageConfig, max_length: int) -> int | None:
        if stage.steps is None:
            return None
        per_step = stage.batch.tokens or (stage.batch.sequences or 0) * max_length
        return stage.steps * per_step

    def _sizes(self, teachers: list[PlannedModel], infos: list[ModelInfo], where: str) -> list[TeacherSize]:
        """What the teachers occupy; refuses to offload where there is no room for it."""
        sizes = [
            TeacherSize(t.parameters, 0 if info.num_labels else info.vocabulary * info.width, t.backend, t.layers)
            for t, info in zip(teachers, infos, strict=True)
        ]
        check_offload(sizes, self.config.folder, on_gpu=self._on_gpu, where=f"{where}.teachers")
        return sizes

    @property
    def _on_gpu(self) -> bool:
        device = self.config.engine.device
        return device == "cuda" or (device == "auto" and torch.cuda.is_available())

    def _tile(self, columns: int) -> int:
        return self.config.engine.tile_for(columns, "cuda" if self._on_gpu else "cpu")

    def _memory(self, trained: list[PlannedModel], teachers: list[TeacherSize], student: ModelInfo) -> float:
        """GB (1e9 bytes) per rank of weights, gradients, Adam's moments and one vocabulary tile; no activations."""
        engine = self.config.engine
        ranks, shard = engine.processes, engine.zero_stage
        own = sum(m.parameters for m in trained) * FLOAT
        total = own * _COPIES["optimizer"] / (ranks if shard >= 1 else 1)
        total += own * _COPIES["gradient"] / (ranks if shard >= 2 else 1)
        total += own * _COPIES["weight"] / (ranks if shard >= 3 else 1)
        total += teacher_bytes(teachers, on_gpu=self._on_gpu, prefetch=engine.prefetch)
        live = sum(t.backend != "cached" for t in teachers)
        total += self._tile(student.vocabulary) * student.vocabulary * FLOAT * (3 + live)
        return total / 1e9


def _with_open_labels(info: ModelInfo, data: DataConfig, auto_class: str) -> ModelInfo:
    """The same number of classes for every model where only the data tells it; the build compares the real ones."""
    return replace(info, num_labels=2) if auto_class == CLASSIFIER and not data.labels else info
