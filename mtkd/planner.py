"""`mtkd.plan`: everything resolved and checked, nothing trained and no weight loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mtkd.chain import model_name, model_of, needed_stages, scored_models, stage_of, stage_values
from mtkd.checks import check
from mtkd.cofinetune import check_members
from mtkd.config import ModelConfig, RunConfig, StageConfig
from mtkd.data.tokenizers import check_same_tokenizer, num_real_ids, train_tokenizer
from mtkd.errors import UserError
from mtkd.ladder import Look, complete
from mtkd.launcher import launch_command
from mtkd.locate import given_tokenizer, read_tokenizer, resolve_path
from mtkd.memory import FLOAT, TeacherSize, check_offload, teacher_bytes
from mtkd.mix import stage_rows
from mtkd.models.info import CLASSIFIER, ModelInfo, count_parameters, model_info
from mtkd.models.load import load_config as load_model_config
from mtkd.models.load import smaller_config
from mtkd.models.vocabulary import compressed_teacher, compressed_twice, read_vocabulary
from mtkd.registry import TASKS, load_plugins
from mtkd.rows import compile_rows
from mtkd.rundir import RunDir

SKIPPED = "done, skipped"
# Float32 copies of a trainable parameter in training: weight, gradient, two Adam moments.
_COPIES = {"weight": 1, "gradient": 1, "optimizer": 2}


@dataclass(frozen=True)
class PlannedModel:
    """A model of a stage: `role` is "student" or the teacher's name; `parameters` counted on the meta device.

    Attributes: backend: where a teacher's weights live; empty for what is trained.
    """

    role: str
    origin: str
    architecture: str
    layers: int
    width: int
    heads: int
    parameters: int
    backend: str = ""


@dataclass(frozen=True)
class PlannedStage:
    """A stage as it would run; `steps` and `tokens` (upper bound) are None while they depend on data or stages."""

    name: str
    kind: str
    state: str
    needs: list[str]
    models: list[PlannedModel]
    rows: list[str]
    steps: int | None
    tokens: int | None
    memory_gb: float


@dataclass(frozen=True)
class Plan:
    """What `mtkd run` would do."""

    name: str
    folder: str
    engine: str
    command: str
    stages: list[PlannedStage] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """For the terminal."""
        table = Table(
            "stage", "kind", "state", "model", "origin", "shape", "parameters", "steps", "tokens <=", "GB per rank",
            title=f"{self.name}  ->  {self.folder}   engine: {self.engine}",
        )  # fmt: skip
        for stage in self.stages:
            for i, model in enumerate(stage.models):
                shape = f"{model.architecture} {model.layers}x{model.width}, {model.heads} heads"
                first = (stage.name, stage.kind, stage.state) if i == 0 else ("", "", "")
                work = (_number(stage.steps), _number(stage.tokens), f"{stage.memory_gb:.2f}") if i == 0 else ("",) * 3
                origin = f"{model.origin} (offload)" if model.backend == "offload" else model.origin
                table.add_row(*first, model.role, origin, shape, f"{model.parameters:,}", *work)
        rows = Table("stage", "row", title="rows of the objective")
        for stage in self.stages:
            for row in stage.rows:
                rows.add_row(stage.name, row)
        table.caption = f"started by: {self.command}"
        return [table, rows]


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
    stages = _with_consequences([planner.stage(name) for name in config.stages])
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


def _with_consequences(stages: list[PlannedStage]) -> list[PlannedStage]:
    """A stage is not skipped when one that it uses is to be made: its teacher will be another."""
    found: dict[str, PlannedStage] = {}
    for stage in stages:
        stale = [need for need in stage.needs if found[need].state != SKIPPED]
        if stage.state == SKIPPED and stale:
            stage = replace(stage, state=f"done, but {stale[0]} is not")
        found[stage.name] = stage
    return list(found.values())


class _Planner:
    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._made: dict[str, PretrainedConfig] = {}
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
        models = [(role, m, self._model_config(stage, m, f"{where}.{role}")) for role, m in stage.trained.items()]
        own = len(models)
        self._made |= {model_name(name, stage, role): made for role, _, made in models}
        for role, model, made in models:
            if model.vocabulary is not None or self._vocabulary(model) is not None:
                self._compressed[model_name(name, stage, role)] = made.vocab_size
            self._check_tokenizer(model, f"{where}.{role}", token_level=False)
        for i, teacher in enumerate(stage.teachers):
            place = f"{where}.teachers[{i}]"
            models.append((teacher.name, teacher.model, self._model_config(stage, teacher.model, place)))
            self._check_tokenizer(teacher.model, place, task.token_level)
        planned, infos = [], []
        for role, model, config in models:
            info = model_info(config, auto_class)
            if auto_class == CLASSIFIER and not data.labels:  # found in the data: whatever they are, they fit
                info = replace(info, num_labels=2)
            infos.append(info)
            planned.append(_planned(role, model, info, count_parameters(config, auto_class)))
        backends = [""] * own + [teacher.backend for teacher in stage.teachers]
        planned = [replace(model, backend=backend) for model, backend in zip(planned, backends, strict=True)]
        if stage.members:
            check_members({role: info for (role, _, _), info in zip(models, infos, strict=True)}, f"{where}.members")
        rows = compile_rows(
            stage_rows(stage, data, where),
            infos[0],
            {role: info for (role, _, _), info in zip(models[own:], infos[own:], strict=True)},
            token_level=task.token_level,
            regression=False if task.token_level or data.labels else None,
            where=f"{where}.match",
        )
        texts = [_row_text(row.match.weight, row.key, row.pairs) for row in rows]
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
            own = read_tokenizer(resolve_path(model.path, self.config.base), model.revision)
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
            TeacherSize(t.parameters, 0 if info.num_labels else info.vocabulary * info.width, t.backend)
            for t, info in zip(teachers, infos, strict=True)
        ]
        check_offload(sizes, self.config.folder, on_gpu=self._on_gpu, where=f"{where}.teachers")
        return sizes

    @property
    def _on_gpu(self) -> bool:
        device = self.config.engine.device
        return device == "cuda" or (device == "auto" and torch.cuda.is_available())

    def _memory(self, trained: list[PlannedModel], teachers: list[TeacherSize], student: ModelInfo) -> float:
        """GB (1e9 bytes) per rank of weights, gradients, Adam's moments and one vocabulary tile; no activations."""
        engine = self.config.engine
        ranks, shard = engine.processes, engine.zero_stage
        own = sum(m.parameters for m in trained) * FLOAT
        total = own * _COPIES["optimizer"] / (ranks if shard >= 1 else 1)
        total += own * _COPIES["gradient"] / (ranks if shard >= 2 else 1)
        total += own * _COPIES["weight"] / (ranks if shard >= 3 else 1)
        total += teacher_bytes(teachers, on_gpu=self._on_gpu, prefetch=engine.prefetch)
        total += engine.tile * student.vocabulary * FLOAT * (3 + len(teachers))
        return total / 1e9


def _planned(role: str, model: ModelConfig, info: ModelInfo, parameters: int) -> PlannedModel:
    origin = model.path or "fresh"
    if model.keep_layers:
        origin += f" layers {','.join(map(str, model.keep_layers))}"
    if model.slice:
        origin += ", sliced"
    if model.vocabulary:
        origin += f", {info.vocabulary:,} ids"
    return PlannedModel(role, origin, info.architecture, info.num_layers, info.width, info.num_heads, parameters)


def _row_text(weight: float, key: str, pairs: tuple[tuple[tuple[int, int], ...], ...]) -> str:
    layers = [f"{s}<-{t}" for s, t in pairs[0]] if pairs and pairs[0] != ((0, 0),) else []
    return f"{weight:g} x {key}" + (f"  (student<-teacher layers {', '.join(layers)})" if layers else "")


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
