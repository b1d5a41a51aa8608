"""A run: named data, stages in order, the engine, and what is compared at the end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from mtkd.config.base import STAGE_PREFIX, Config, Gigabytes, Length, Name, Positive, Processes, Seed
from mtkd.config.chain import ChainConfig, expand, stage_name
from mtkd.config.data import RANDOM_TOKENS, DataConfig, TokenizerConfig
from mtkd.config.model import ModelConfig
from mtkd.config.stage import ScoringBatchConfig, StageConfig
from mtkd.config.yamlfile import Written

# Per device: bytes of one model's float32 logits in a tile, and the largest tile.
_TILE_LIMITS = {"cpu": (32 * 2**20, 256), "cuda": (256 * 2**20, 4096)}


class EngineConfig(Config):
    """What runs the optimizer."""

    kind: Literal["torch", "deepspeed"] = Field("torch", description="torch: one process; deepspeed: everything else")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="bf16: autocast; parameters, losses and optimizer stay float32; auto: bf16 where the processor or "
        "the GPU multiplies it fast, else fp32; a run keeps what it was begun in",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU when there is one")
    processes: Processes = Field(
        1, description="deepspeed: processes that `mtkd run` starts on this node; launcher slurm: on every node"
    )
    hostfile: str | None = Field(
        None,
        min_length=1,
        description="deepspeed: file of nodes and their processes (`node-1 slots=8` a line), relative to the working "
        "directory; `mtkd run` starts them all",
    )
    launcher: Literal["auto", "pdsh", "slurm"] = Field(
        "auto",
        description="how several nodes are started; pdsh: those of the hostfile, over ssh; slurm: those of the "
        "allocation, with srun; auto: pdsh with a hostfile, else this node alone. `mtkd run --no_ssh` is called on "
        "every node",
    )
    timeout_seconds: Annotated[float, Field(ge=1, le=10_000_000)] = Field(
        1800.0,
        description="deepspeed: a run of several processes ends when none of them has finished a step, a batch or a "
        "collective for so long; it must be more than one process ever works alone, e.g. reading the data",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="deepspeed: what is sharded (1 optimizer, 2 gradients, 3 parameters)"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass (non-reentrant): less memory, more time"
    )
    tile: Positive | Literal["auto"] = Field(
        "auto",
        description="token positions whose vocabulary-size logits exist at one time; auto: as many as keep one "
        "model's logits below 32 MiB (at most 256 positions) on a CPU and below 256 MiB (at most 4096) on a GPU, "
        "and never fewer than 16, which passes the CPU's limit above 524,288 columns",
    )
    prefetch: bool = Field(
        True,
        description="offloaded teachers: bring the next one's weights while one runs; on a GPU memory for two of them",
    )
    compile: bool = Field(
        False,
        description="torch.compile of the student and of resident teachers, kind: torch; no gain measured on a CPU",
    )
    attention: Literal["auto", "flash", "efficient", "math"] = Field(
        "auto",
        description="kernel of scaled dot product attention; auto: torch chooses; CPUs have flash and math; on a GPU "
        "flash takes bf16 and no mask: batches without padding and packing only, torch refuses others at the first "
        "step",
    )
    threads: Annotated[int, Field(ge=0, le=4096)] = Field(
        0, description="CPU threads per process; 0 = $OMP_NUM_THREADS if set, else cores / processes"
    )
    gpu_memory_gb: Gigabytes | None = Field(
        None, description="memory of one GPU that `mtkd plan` compares with, 1e9 bytes; default: that of the GPU here"
    )
    host_memory_gb: Gigabytes | None = Field(
        None, description="memory of one host that `mtkd plan` compares with, 1e9 bytes; default: that of this machine"
    )
    processes_per_host: Processes | None = Field(
        None, description="processes that share a host's memory in `mtkd plan`; default: all"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.kind == "torch" and self.processes > 1:
            raise ValueError("engine kind 'torch' is one process; use kind: deepspeed for more")
        if self.kind == "torch" and self.zero_stage > 0:
            raise ValueError("zero_stage needs kind: deepspeed")
        if self.kind == "torch" and (self.hostfile is not None or self.launcher != "auto"):
            raise ValueError("hostfile and launcher need kind: deepspeed")
        if self.launcher == "pdsh" and self.hostfile is None:
            raise ValueError("launcher: pdsh needs a hostfile: the nodes to start")
        if self.launcher == "slurm" and self.hostfile is not None:
            raise ValueError("launcher: slurm takes the nodes of the allocation; leave out hostfile")
        if self.hostfile is not None and self.processes > 1:
            raise ValueError("processes and hostfile exclude each other: the hostfile's slots are the processes")
        if self.compile and self.kind != "torch":
            raise ValueError("compile needs kind: torch: DeepSpeed's hooks would break every graph")
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "compile and activation_checkpointing exclude each other: layers are recomputed uncompiled"
            )
        if self.attention == "efficient" and self.device == "cpu":
            raise ValueError("attention: efficient exists on GPUs only; on a CPU: auto, flash or math")
        if self.attention == "flash" and self.device == "cuda" and self.precision == "fp32":
            raise ValueError("attention: flash has no kernel for fp32 on a GPU; use precision: bf16, or another kernel")
        return self

    @property
    def decided_precision(self) -> Literal["fp32", "bf16"]:
        """The precision, where "auto" has been replaced: `mtkd.engine.precision` does so before anything asks."""
        assert self.precision != "auto", "mtkd.engine.precision.with_precision comes first"
        return self.precision

    @property
    def in_bf16(self) -> bool:
        """Whether models run under autocast."""
        return self.decided_precision == "bf16"

    def tile_for(self, columns: int, device: str) -> int:
        """Positions per tile for logits of that many columns on a "cpu" or "cuda" device.

        On a CPU larger blocks come from the system page by page and cost more than the arithmetic on them; a GPU needs
        larger ones to be busy. A multiple of 16, the height of a matrix unit, and at least 16: below, the head is read
        from memory more often than it is worth.
        """
        if self.tile != "auto":
            return self.tile
        logit_bytes, most = _TILE_LIMITS[device]
        return min(max(logit_bytes // (4 * max(columns, 1)) // 16 * 16, 16), most)


class Comparison(Config):
    """Two models, or the ensemble of a stage's teachers, compared per document with a paired test."""

    candidate: str = Field(
        description="stage name, NAME/MEMBER, or ensemble:STAGE for the uniform ensemble of its teachers"
    )
    baseline: str = Field(description="the same")


class EvaluateConfig(Config):
    """What is scored on the test split at the end, and which differences are tested."""

    data: str = Field("", description="name of a `data` entry; may be left out when there is only one")
    split: Literal["validation", "test"] = Field("test", description="split that is scored")
    stages: tuple[str, ...] = Field(
        (), description="stages (or NAME/MEMBER) scored; default: all whose models can do the task of `data`"
    )
    ensembles: tuple[str, ...] = Field(
        (), description="stages whose teachers are also scored as a uniform mixture of probabilities"
    )
    comparisons: tuple[Comparison, ...] = Field(
        (), description="paired tests; their p-values are Holm-corrected together"
    )
    batch: ScoringBatchConfig = Field(ScoringBatchConfig(sequences=32), description="batch size of scoring")
    resamples: Length = Field(10_000, description="bootstrap and permutation resamples")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="level of the confidence intervals")

    def enough_resamples(self, rows: int) -> int:
        """`resamples`, or as many more as a verdict needs: no p is below 1 / (resamples + 1), and Holm multiplies it.

        With 4 rows / (1 - confidence) of them the smallest p of all rows is corrected to a quarter of the level.

        Args: rows: comparisons in the family, those of domains too.
        """
        return max(self.resamples, math.ceil(4 * rows / (1 - self.confidence) - 1e-9))


class RunConfig(Config):
    """A run: an ordered graph of stages over named data."""

    name: Name = Field(description="folder of the run below `output`")
    seed: Seed = Field(0, description="default seed of every stage")
    output: str = Field("runs", description="folder of all runs, relative to the working directory")
    plugins: tuple[str, ...] = Field((), description="Python files with losses, weightings, ..., relative to this file")
    tokenizer: TokenizerConfig | None = Field(
        None, description="the run's tokenizer; default: that of the first loaded model"
    )
    data: dict[Name, DataConfig] = Field(min_length=1, description="named data")
    stages: dict[Name, StageConfig] = Field(
        default_factory=dict, description="stages in order; those of `chain` come to them by themselves"
    )
    chain: ChainConfig | None = Field(None, description="teacher-assistant chain: stages in a short form")
    engine: EngineConfig = Field(EngineConfig(), description="torch or deepspeed")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="final scoring and comparisons")
    log_every: Positive = Field(10, description="optimizer steps between lines of metrics.jsonl")

    # Set by `load_config`: the folder that relative paths start from, and what was written, with lines, for messages.
    _base: Path | None = PrivateAttr(None)
    _written: Written = PrivateAttr(Written())

    @property
    def base(self) -> Path:
        """Folder of the YAML file; the working directory for a configuration made in Python."""
        return self._base or Path.cwd()

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        if self.chain is not None:
            self._add_chain(self.chain)
        if not self.stages and self.chain is None:
            raise ValueError("stages: a run needs at least one stage, or a chain")
        if self.chain is None or self.chain.resolved:  # else the stages are not all there yet
            self._check_references()
        return self

    def _add_chain(self, chain: ChainConfig) -> None:
        """Put the chain's stages among the others, and the comparison with the control among those asked for."""
        for i, teacher in enumerate(chain.teachers):
            path = teacher.model.path or ""
            if path.startswith(STAGE_PREFIX) and stage_name(path) not in self.stages:
                raise ValueError(
                    f"chain.teachers[{i}]: {path!r} is not a stage; stages are: {', '.join(self.stages) or 'none'}"
                )
        if not chain.resolved:
            return
        # The model is frozen for its users; this is still its construction.
        object.__setattr__(self, "stages", expand(chain, self.stages))
        scorable = [n for n, stage in self.stages.items() if stage.kind != "cache" and self._may_be_scored(stage)]
        object.__setattr__(self, "evaluate", with_control(self.evaluate, chain, scorable))
        self.model_fields_set.update(("stages", "evaluate"))

    def _check_references(self) -> None:
        names = list(self.stages)
        if self.tokenizer and self.tokenizer.train_on is not None:
            self._known_data(self.tokenizer.train_on, "tokenizer.train_on")
            if self.data[self.tokenizer.train_on].source == RANDOM_TOKENS:
                raise ValueError("tokenizer.train_on: random tokens are nothing to learn a vocabulary from")
        self._known_data(self.evaluate.data, "evaluate.data")
        for position, (name, stage) in enumerate(self.stages.items()):
            where = f"stages.{name}"
            self._known_data(stage.data, f"{where}.data")
            for role, model in stage.trained.items():
                self._known_vocabulary(model, stage, f"{stage.place(name, role)}.vocabulary")
            self._sharded_by_deepspeed(stage, where)
            earlier = names[:position]
            used = [(stage.place(name, role), model.path, False) for role, model in stage.trained.items()]
            used += [
                (f"{where}.teachers[{i}]", t.model.path, t.backend == "cached") for i, t in enumerate(stage.teachers)
            ]
            if stage.equal_time:
                timed = (stage.equal_time.to, stage.equal_time.rate_of)
                used += [(f"{where}.equal_time", STAGE_PREFIX + s, False) for s in timed]
            for place, path, cached in used:
                if path and path.startswith(STAGE_PREFIX):
                    self._known_stage(path.removeprefix(STAGE_PREFIX), earlier, place, cached)
        self._known_scored()

    @property
    def folder(self) -> Path:
        """Folder of this run."""
        return Path(self.output) / self.name

    def _may_be_scored(self, stage: StageConfig) -> bool:
        """As far as the configuration alone can tell whether a stage's models do the task of `evaluate.data`."""
        ours, theirs = (self.data.get(self.data_name(name)) for name in (stage.data, self.evaluate.data))
        if ours is None or theirs is None:
            return True  # an unknown name is told elsewhere
        return ours.task == theirs.task and ours.next_sentence >= theirs.next_sentence

    def _sharded_by_deepspeed(self, stage: StageConfig, where: str) -> None:
        sharded = [i for i, teacher in enumerate(stage.teachers) if teacher.backend == "sharded"]
        if sharded and self.engine.kind != "deepspeed":
            raise ValueError(
                f"{where}.teachers[{sharded[0]}].backend: a sharded teacher has a part on every process, and engine "
                f"kind {self.engine.kind!r} is one process; set engine.kind: deepspeed"
            )

    def _known_vocabulary(self, model: ModelConfig, stage: StageConfig, where: str) -> None:
        if model.vocabulary is None:
            return
        self._known_data(model.vocabulary.counts, f"{where}.counts")
        if self.data[self.data_name(model.vocabulary.counts)].source == RANDOM_TOKENS:
            raise ValueError(f"{where}.counts: random tokens have no frequencies to count; name real data")
        if model.path is None and not stage.teachers:
            raise ValueError(
                f"{where}: a fresh model's ids are compared by its first teacher's embedding, and this stage has no "
                "teachers"
            )
        if model.path is None and stage.teachers[0].backend == "cached":
            raise ValueError(
                f"{where}: a fresh model's ids are compared by its first teacher's embedding, which a cache does not "
                "have; put a resident teacher first, or load the student"
            )

    def _known_stage(self, reference: str, earlier: list[str], where: str, cached: bool) -> None:
        """`reference` is NAME of an earlier stage, or NAME/PART of one that makes several models or caches.

        Args: cached: whether a cache is asked for.
        """
        stage, slash, _ = reference.partition("/")
        if stage not in earlier:
            raise ValueError(
                f"{where}: '{STAGE_PREFIX}{reference}' is not an earlier stage; earlier are: "
                f"{', '.join(earlier) or 'none'}"
            )
        caches = self.stages[stage].kind == "cache"
        if where.rpartition(".")[2] == "equal_time":
            if caches:
                raise ValueError(f"{where}: stage {stage!r} is a cache: it has no training to be as long as")
            return
        parts, kind = [f"{stage}/{name}" for name in self.stages[stage].parts], "cache" if caches else "model"
        if (parts and reference not in parts) or (slash and not parts):
            raise ValueError(
                f"{where}: '{STAGE_PREFIX}{reference}' is not a {kind} of that stage; its {kind}s are: "
                f"{', '.join(STAGE_PREFIX + m for m in parts or [stage])}"
            )
        if caches and not cached:
            raise ValueError(
                f"{where}: '{STAGE_PREFIX}{reference}' is a cache of a teacher's outputs, not a model; a teacher reads "
                f"it with {{model: {STAGE_PREFIX}{reference}, backend: cached}}"
            )
        if cached and not caches:
            raise ValueError(
                f"{where}: backend: cached reads a cache, and stage {stage!r} makes a model; cache it first: "
                f"{{kind: cache, teachers: [{STAGE_PREFIX}{reference}]}}"
            )

    @property
    def models(self) -> list[str]:
        """Every model the run makes: NAME, or NAME/MEMBER where a stage makes several; caches are none."""
        trained = {name: stage for name, stage in self.stages.items() if stage.kind != "cache"}
        return [m for name, stage in trained.items() for m in ([f"{name}/{k}" for k in stage.members] or [name])]

    @property
    def scored(self) -> list[str]:
        """The models that are scored at the end, ensembles aside."""
        chosen = self.evaluate.stages or tuple(self.stages)
        return [m for m in self.models if any(m == c or m.startswith(f"{c}/") for c in chosen)]

    def _known_scored(self) -> None:
        for stage in self.evaluate.stages:
            if stage not in self.stages and stage not in self.models:
                raise ValueError(f"evaluate: {stage!r} is not a stage; stages are: {', '.join(self.stages)}")
            if stage in self.stages and self.stages[stage].kind == "cache":
                raise ValueError(
                    f"evaluate.stages: {stage!r} is a cache, not a model; its teachers together can be scored: name it "
                    "in evaluate.ensembles"
                )
        scored = {*self.scored, *(f"ensemble:{s}" for s in self.evaluate.ensembles)}
        for stage in self.evaluate.ensembles:
            if stage not in self.stages:
                raise ValueError(f"evaluate: {stage!r} is not a stage; stages are: {', '.join(self.stages)}")
        for stage in self.evaluate.ensembles:
            if not self.stages[stage].teachers:
                raise ValueError(f"evaluate.ensembles: stage {stage!r} has no teachers")
            self._live_ensemble(stage)
        for i, pair in enumerate(self.evaluate.comparisons):
            for side in (pair.candidate, pair.baseline):
                if side not in scored:
                    raise ValueError(
                        f"evaluate.comparisons[{i}]: {side!r} is not scored; scored are: {', '.join(sorted(scored))}"
                    )

    def _live_ensemble(self, stage: str) -> None:
        """Refuse to score teachers that are read from a cache: it holds the train split alone."""
        cached = [t for t in self.stages[stage].teachers if t.backend == "cached"]
        if not cached:
            return
        paths = [t.model.path or "" for t in cached]
        made_by = dict.fromkeys(stage_name(path) for path in paths if path.startswith(STAGE_PREFIX))
        advice = f"name {' or '.join(made_by)} instead" if made_by else "score them in the run that made the cache"
        raise ValueError(
            f"evaluate.ensembles: teacher {cached[0].name!r} of stage {stage!r} is read from a cache, which holds the "
            f"train split alone; the teachers of a cache stage are live and can be scored: {advice}"
        )

    def _known_data(self, name: str, where: str) -> None:
        if name and name not in self.data:
            raise ValueError(f"{where}: no data named {name!r}; data are: {', '.join(self.data)}")
        if not name and len(self.data) > 1:
            raise ValueError(f"{where}: say which of the data: {', '.join(self.data)}")

    def data_name(self, name: str) -> str:
        """A `data` reference resolved: the only entry when left out."""
        return name or next(iter(self.data))


def with_control(evaluate: EvaluateConfig, chain: ChainConfig, stages: list[str]) -> EvaluateConfig:
    """The evaluation of a chain: the student against the direct one, and the teachers it is measured by, if not asked.

    The teachers' own score is that of their stage; of several, or of models from elsewhere, that of their ensemble.

    Args: stages: those that can be scored on the evaluation's data.
    """
    scored = [name for name in evaluate.stages or stages if name in stages]
    changes: dict[str, object] = {}
    pair = Comparison(candidate=chain.student_name, baseline=chain.direct_name or "")
    if chain.direct and {pair.candidate, pair.baseline} <= set(scored) and pair not in evaluate.comparisons:
        changes["comparisons"] = (*evaluate.comparisons, pair)
    first = chain.names[0]
    live = all(teacher.backend != "cached" for teacher in chain.teachers)
    if chain.teacher_stage is None and live and first in stages and first not in evaluate.ensembles:
        changes["ensembles"] = (*evaluate.ensembles, first)
    return evaluate.model_copy(update=changes) if changes else evaluate
