"""The whole configuration of a run: frozen, unknown keys forbidden, a description and a unit for every field.

Read by `mtkd.configfile.load_config`, printed as JSON Schema by `mtkd schema`. No torch is imported here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from mtkd.match import Match

STAGE_PREFIX = "stage:"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def check_name(name: str) -> str:
    """A name that is safe as a folder: no separators, no leading '-' or '.', no '..', at most 100 characters."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            "a name has 1 to 100 characters A-Z a-z 0-9 _ . + -, starts with a letter, digit or _, has no '..'"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every block: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Named(Config):
    """A registered thing and its options; a plain string means no options."""

    name: str = Field(description="registered name; see `mtkd ls`")
    options: dict[str, Any] = Field(default_factory=dict, description="checked against its keyword parameters")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class TokenizerConfig(Config):
    """The one tokenizer of the run: loaded, or trained on the train split of a data entry."""

    path: str | None = Field(None, description="folder or hub id")
    train_on: str | None = Field(
        None, description="name of a `data` entry; a byte-level BPE is trained on its train split"
    )
    vocab_size: Positive = Field(4096, description="ids of a trained tokenizer, special tokens included")

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if (self.path is None) == (self.train_on is None):
            raise ValueError("give either `path` or `train_on`")
        return self


class DataConfig(Config):
    """Where examples come from, what is asked of them, and how they become batches of ids."""

    source: str = Field(description="registered source (`mtkd ls sources`): python-stdlib, files, hub")
    path: str | None = Field(None, description="hub: dataset id; files: folder that the file names are relative to")
    subset: str | None = Field(None, description="hub: configuration name, e.g. sst2")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    files: dict[Literal["train", "validation", "test"], str] = Field(
        default_factory=dict, description="files: path per split; .jsonl .json .csv .tsv .parquet .txt"
    )
    splits: dict[Literal["train", "validation", "test"], str] = Field(
        default_factory=dict, description="hub: the source's own split name per split of ours"
    )
    domains: tuple[str, ...] = Field((), description="python-stdlib: prose, code (default: both)")
    task: str = Field("causal-lm", description="registered task (`mtkd ls tasks`): causal-lm, masked-lm, classify")
    text: str = Field("text", description="column of the (first) text")
    text_pair: str | None = Field(None, description="column of the second text, classify only")
    label: str = Field("label", description="column of the label, classify only")
    labels: tuple[str, ...] = Field((), description="class names in order; default: sorted values of the train split")
    max_length: Positive = Field(
        128,
        description="tokens per example, special ones included; language-model tasks cut longer documents into blocks",
    )
    mask_share: Share = Field(0.15, description="masked-lm: share of tokens selected as targets")
    validation_share: Share = Field(
        0.0, description="share of the train split held out as validation when the source has none"
    )
    limit: dict[Literal["train", "validation", "test"], Positive] = Field(
        default_factory=dict, description="at most this many documents or rows per split, chosen by the seed"
    )
    seed: int = Field(0, description="of hold-out, limit and masking of evaluation data")


class ModelConfig(Config):
    """A model: loaded from `path`, cut from a loaded model's layers, or fresh from a short description."""

    path: str | None = Field(None, description="folder, hub id, card name in teachers/, or stage:NAME")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    keep_layers: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="with path: copy only these layers (counted from 1) of the loaded model"
    )
    architecture: str | None = Field(None, description="fresh: bert, roberta, distilbert, gpt2, llama, qwen2")
    layers: Positive | None = Field(None, description="fresh: number of layers")
    width: Positive | None = Field(None, description="fresh: hidden width")
    heads: Positive | None = Field(None, description="fresh: attention heads; must divide the width")
    kv_heads: Positive | None = Field(None, description="fresh llama, qwen2: key/value heads; default: heads")
    intermediate: Positive | None = Field(
        None, description="fresh: feed-forward width; default 4 x width (llama, qwen2: 8/3 x width)"
    )
    max_positions: Positive | None = Field(
        None, description="fresh: longest sequence in tokens; default: the data's max_length"
    )
    tie_embeddings: bool = Field(True, description="fresh: output head shares the embedding matrix")
    dropout: Share | None = Field(
        None, description="dropout share while training; default: the model's own (fresh: 0.0)"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        shape = [
            n for n in ("layers", "width", "heads", "kv_heads", "intermediate", "max_positions") if getattr(self, n)
        ]
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either `path` (loaded) or `architecture` (fresh)")
        if self.path is not None and shape:
            raise ValueError(f"a loaded model has its own {', '.join(shape)}; use keep_layers to cut it")
        if self.architecture is not None:
            missing = [n for n in ("layers", "width", "heads") if getattr(self, n) is None]
            if missing:
                raise ValueError(f"a fresh model needs {', '.join(missing)}")
            if self.keep_layers is not None:
                raise ValueError("keep_layers goes with path")
            if self.width % self.heads:  # type: ignore[operator]
                raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
            if self.kv_heads and self.heads % self.kv_heads:  # type: ignore[operator]
                raise ValueError(f"{self.kv_heads} key/value heads do not divide {self.heads} heads")
        return self


class TeacherConfig(Config):
    """One teacher of the pool."""

    name: Name = Field(
        "",
        description="name in metrics and options; default: the last part of the model's path",
        validate_default=False,
    )
    model: ModelConfig = Field(description="a folder, hub id, card or stage:NAME")
    backend: Literal["resident"] = Field(
        "resident", description="where its weights live: resident = loaded beside the student"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"model": value}
        if isinstance(value, dict) and not value.get("name"):
            model = value.get("model")
            path = model.get("path") if isinstance(model, dict) else model
            if isinstance(path, str):
                value = {**value, "name": path.removeprefix(STAGE_PREFIX).rstrip("/").split("/")[-1]}
        return value


class BatchConfig(Config):
    """How many examples make one optimizer step, over all ranks and accumulation together."""

    sequences: Positive | None = Field(None, description="sequences per optimizer step")
    tokens: Positive | None = Field(
        None, description="token budget per optimizer step, padding included; batches are grouped by length"
    )
    accumulate: Positive = Field(1, description="micro-batches per rank and optimizer step")

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        if (self.sequences is None) == (self.tokens is None):
            raise ValueError("give either `sequences` or `tokens`")
        return self


class OptimizerConfig(Config):
    """AdamW and its schedule; what DeepSpeed would default differently is written out from here."""

    lr: Annotated[float, Field(gt=0)] = Field(5e-4, description="peak learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="decoupled; matrices only, not biases and norms"
    )
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="Adam's decay rates")
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon")
    warmup: Share = Field(0.1, description="share of the steps with linearly rising learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="after warm-up; linear and cosine end at final_lr"
    )
    final_lr: Share = Field(0.0, description="learning rate at the end, as a share of the peak")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest norm of the whole gradient; 0 = no clipping")


class EqualTime(Config):
    """Steps such that this stage trains as many seconds as another one did."""

    to: Name = Field(description="stage whose training seconds are matched")
    rate_of: Name = Field(description="stage with the same work per step, whose measured seconds per step are used")


class StageConfig(Config):
    """One thing the run makes: a fine-tuned or a distilled model that later stages use as stage:NAME."""

    kind: Literal["finetune", "distill"] = Field(description="finetune: labels only; distill: from teachers")
    data: str = Field("", description="name of a `data` entry; may be left out when there is only one")
    student: ModelConfig = Field(description="the model that is trained")
    teachers: tuple[TeacherConfig, ...] = Field((), description="the pool, in order")
    method: Named | None = Field(None, description="a method of the table; its rows come first")
    match: tuple[Match, ...] = Field((), description="further rows")
    weighting: Named = Field(Named(name="uniform"), description="how much each teacher counts")
    per: Literal["example", "token"] = Field("example", description="one weight per example or per token (token tasks)")
    steps: Positive | None = Field(None, description="optimizer steps")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over the train split")
    equal_time: EqualTime | None = Field(None, description="instead of steps: train as long as another stage")
    batch: BatchConfig = Field(BatchConfig(sequences=16), description="batch size")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and schedule")
    seed: int | None = Field(None, description="of initialisation, order and dropout; default: the run's seed")
    evaluate_every: Annotated[int, Field(ge=0)] = Field(
        0, description="optimizer steps between validation losses; 0 = only at the end"
    )
    save_every: Annotated[int, Field(ge=0)] = Field(
        0, description="optimizer steps between checkpoints; 0 = only at the end"
    )
    keep: Positive = Field(2, description="newest sealed checkpoints kept")

    @field_validator("teachers")
    @classmethod
    def _unique_teachers(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        names = [t.name for t in teachers]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"teacher name {double[0]!r} is used twice; give each its own `name`")
        return teachers

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if sum(x is not None for x in (self.steps, self.epochs, self.equal_time)) != 1:
            raise ValueError("give exactly one of `steps`, `epochs`, `equal_time`")
        if self.kind == "distill":
            if not self.teachers:
                raise ValueError("a distill stage needs `teachers`")
            if self.method is None and not self.match:
                raise ValueError("a distill stage needs a `method` or `match` rows")
        else:
            given = [n for n in ("teachers", "method", "match") if getattr(self, n)]
            if given or "weighting" in self.model_fields_set:
                raise ValueError(f"a finetune stage trains on labels alone; drop {', '.join(given or ['weighting'])}")
        return self


class EngineConfig(Config):
    """What runs the optimizer."""

    kind: Literal["torch", "deepspeed"] = Field("torch", description="torch: one process; deepspeed: everything else")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: autocast; parameters, losses and optimizer stay float32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU when there is one")
    processes: Positive = Field(1, description="deepspeed: processes that `mtkd run` starts on this node")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="deepspeed: what is sharded (1 optimizer, 2 gradients, 3 parameters)"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass (non-reentrant): less memory, more time"
    )
    tile: Positive = Field(256, description="token positions whose vocabulary-size logits exist at one time")
    threads: Annotated[int, Field(ge=0)] = Field(
        0, description="CPU threads per process; 0 = $OMP_NUM_THREADS if set, else cores / processes"
    )

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.kind == "torch" and self.processes > 1:
            raise ValueError("engine kind 'torch' is one process; use kind: deepspeed for more")
        if self.kind == "torch" and self.zero_stage > 0:
            raise ValueError("zero_stage needs kind: deepspeed")
        return self


class Comparison(Config):
    """Two models, or the ensemble of a stage's teachers, compared per document with a paired test."""

    candidate: str = Field(description="stage name, or ensemble:STAGE for the uniform ensemble of its teachers")
    baseline: str = Field(description="the same")


class EvaluateConfig(Config):
    """What is scored on the test split at the end, and which differences are tested."""

    data: str = Field("", description="name of a `data` entry; may be left out when there is only one")
    split: Literal["validation", "test"] = Field("test", description="split that is scored")
    stages: tuple[str, ...] = Field((), description="stages scored; default: all of them")
    ensembles: tuple[str, ...] = Field(
        (), description="stages whose teachers are also scored as a uniform mixture of probabilities"
    )
    comparisons: tuple[Comparison, ...] = Field(
        (), description="paired tests; their p-values are Holm-corrected together"
    )
    batch: BatchConfig = Field(BatchConfig(sequences=32), description="batch size of scoring")
    resamples: Positive = Field(10_000, description="bootstrap and permutation resamples")
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="level of the confidence intervals")


class RunConfig(Config):
    """A run: an ordered graph of stages over named data."""

    name: Name = Field(description="folder of the run below `output`")
    seed: int = Field(0, description="default seed of every stage")
    output: str = Field("runs", description="folder of all runs, relative to the working directory")
    plugins: tuple[str, ...] = Field((), description="Python files with losses, weightings, ..., relative to this file")
    tokenizer: TokenizerConfig | None = Field(
        None, description="the run's tokenizer; default: that of the first loaded model"
    )
    data: dict[Name, DataConfig] = Field(min_length=1, description="named data")
    stages: dict[Name, StageConfig] = Field(min_length=1, description="stages in order")
    engine: EngineConfig = Field(EngineConfig(), description="torch or deepspeed")
    evaluate: EvaluateConfig = Field(EvaluateConfig(), description="final scoring and comparisons")
    log_every: Positive = Field(10, description="optimizer steps between lines of metrics.jsonl")

    # Where relative data paths and plug-ins start from: the folder of the YAML file, set by `load_config`.
    _base: Path | None = PrivateAttr(None)

    @property
    def base(self) -> Path:
        """Folder of the YAML file; the working directory for a configuration made in Python."""
        return self._base or Path.cwd()

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        names = list(self.stages)
        if self.tokenizer and self.tokenizer.train_on is not None:
            self._known_data(self.tokenizer.train_on, "tokenizer.train_on")
        self._known_data(self.evaluate.data, "evaluate.data")
        for position, (name, stage) in enumerate(self.stages.items()):
            where = f"stages.{name}"
            self._known_data(stage.data, f"{where}.data")
            earlier = names[:position]
            used = [(f"{where}.student", stage.student.path)]
            used += [(f"{where}.teachers[{i}]", t.model.path) for i, t in enumerate(stage.teachers)]
            if stage.equal_time:
                used += [
                    (f"{where}.equal_time", STAGE_PREFIX + s) for s in (stage.equal_time.to, stage.equal_time.rate_of)
                ]
            for place, path in used:
                if path and path.startswith(STAGE_PREFIX) and path.removeprefix(STAGE_PREFIX) not in earlier:
                    raise ValueError(
                        f"{place}: {path!r} is not an earlier stage; earlier are: {', '.join(earlier) or 'none'}"
                    )
        self._known_scored()
        return self

    @property
    def folder(self) -> Path:
        """Folder of this run."""
        return Path(self.output) / self.name

    def _known_scored(self) -> None:
        scored = set(self.evaluate.stages or self.stages)
        scored |= {f"ensemble:{s}" for s in self.evaluate.ensembles}
        for stage in (*self.evaluate.stages, *self.evaluate.ensembles):
            if stage not in self.stages:
                raise ValueError(f"evaluate: {stage!r} is not a stage; stages are: {', '.join(self.stages)}")
        for stage in self.evaluate.ensembles:
            if not self.stages[stage].teachers:
                raise ValueError(f"evaluate.ensembles: stage {stage!r} has no teachers")
        for i, pair in enumerate(self.evaluate.comparisons):
            for side in (pair.candidate, pair.baseline):
                if side not in scored:
                    raise ValueError(
                        f"evaluate.comparisons[{i}]: {side!r} is not scored; scored are: {', '.join(sorted(scored))}"
                    )

    def _known_data(self, name: str, where: str) -> None:
        if name and name not in self.data:
            raise ValueError(f"{where}: no data named {name!r}; data are: {', '.join(self.data)}")
        if not name and len(self.data) > 1:
            raise ValueError(f"{where}: say which of the data: {', '.join(self.data)}")

    def data_name(self, name: str) -> str:
        """A `data` reference resolved: the only entry when left out."""
        return name or next(iter(self.data))
