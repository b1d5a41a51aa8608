"""A run: named data, stages in order, the engine, and what is compared at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PrivateAttr, model_validator

from mtkd.config.base import STAGE_PREFIX, Config, Name, Positive
from mtkd.config.data import DataConfig, TokenizerConfig
from mtkd.config.stage import BatchConfig, StageConfig


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
    stages: tuple[str, ...] = Field(
        (), description="stages (or NAME/MEMBER) scored; default: all whose models can do the task of `data`"
    )
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
