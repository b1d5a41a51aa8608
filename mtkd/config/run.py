"""Describe a run: named data, stages in order, the engine, and the final comparisons."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PrivateAttr, model_validator

from mtkd.config.ablation import chosen_stage, expand_ablation
from mtkd.config.base import Config, Name, Positive, Seed
from mtkd.config.chain import ChainConfig, expand
from mtkd.config.data import DataConfig
from mtkd.config.engine import EngineConfig
from mtkd.config.evaluate import Ablation, Comparison, EvaluateConfig
from mtkd.config.mix import resolve_mixes
from mtkd.config.references import References, models_of, scored_of
from mtkd.config.stage import StageConfig
from mtkd.config.stagedata import resolve_stage_data
from mtkd.config.tokenizer import TokenizerConfig
from mtkd.config.yamlfile import Written


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

    # `load_config` sets the folder of relative paths, and the written file with its lines, for messages.
    _base: Path | None = PrivateAttr(None)
    _written: Written = PrivateAttr(Written())

    @property
    def base(self) -> Path:
        """Folder of the YAML file; the working directory for a configuration made in Python."""
        return self._base or Path.cwd()

    @model_validator(mode="after")
    def _references(self) -> RunConfig:
        # The model is frozen for its users, but this is part of its construction.
        object.__setattr__(self, "data", resolve_mixes(resolve_stage_data(self.data, self.stages, self.folder)))
        if self.chain is not None:
            self._add_chain(self.chain)
        if self.evaluate.ablate is not None and (self.chain is None or self.chain.resolved):
            self._add_ablation(self.evaluate.ablate)
        if not self.stages and self.chain is None:
            raise ValueError("stages: a run needs at least one stage, or a chain")
        if self.chain is None or self.chain.resolved:  # an unresolved chain has no stages yet
            References(self.data, self.stages, self.evaluate, self.engine, self.tokenizer).check()
        return self

    def _add_chain(self, chain: ChainConfig) -> None:
        """Add the chain's stages, and the comparison of its student with the control."""
        for i, teacher in enumerate(chain.teachers):
            ref = teacher.model.stage
            if ref is not None and ref.stage not in self.stages:
                raise ValueError(
                    f"chain.teachers[{i}]: '{ref}' is not a stage; stages are: {', '.join(self.stages) or 'none'}"
                )
        if not chain.resolved:
            return
        # The model is frozen for its users, but this is part of its construction.
        object.__setattr__(self, "stages", expand(chain, self.stages))
        scorable = [n for n, stage in self.stages.items() if stage.trained and self._may_be_scored(stage)]
        object.__setattr__(self, "evaluate", with_control(self.evaluate, chain, scorable))
        self.model_fields_set.update(("stages", "evaluate"))

    def _add_ablation(self, ablation: Ablation) -> None:
        """Add the students without a teacher, and their comparisons with the one of all teachers."""
        name = chosen_stage(ablation, self.stages)
        stage = self.stages[name]
        if not self._may_be_scored(stage):
            raise ValueError(f"evaluate.ablate: stage {name!r} has another task than `evaluate.data`: it is not scored")
        # The name is kept: of a run with more stages, "the last one" would be another.
        evaluate = self.evaluate.model_copy(update={"ablate": ablation.model_copy(update={"stage": name})})
        data = self.data.get(self.data_name(stage.data))
        classes = data is not None and data.task == "classify"
        stages, evaluate = expand_ablation(evaluate, self.stages, classes=classes)
        object.__setattr__(self, "stages", stages)
        object.__setattr__(self, "evaluate", evaluate)
        self.model_fields_set.update(("stages", "evaluate"))

    @property
    def folder(self) -> Path:
        """Folder of this run."""
        return Path(self.output) / self.name

    def _may_be_scored(self, stage: StageConfig) -> bool:
        """Whether a stage's models do the task of `evaluate.data`, judged by the configuration alone."""
        source, target = (self.data.get(self.data_name(name)) for name in (stage.data, self.evaluate.data))
        if source is None or target is None:
            return True  # an unknown name is refused elsewhere
        return source.task == target.task and source.next_sentence >= target.next_sentence

    @property
    def models(self) -> list[str]:
        """Every model that the run makes: NAME, or NAME/MEMBER where a stage makes several; caches do not count."""
        return models_of(self.stages)

    @property
    def scored(self) -> list[str]:
        """The models that are scored at the end, without ensembles."""
        return scored_of(self.stages, self.evaluate)

    def data_name(self, name: str) -> str:
        """The name of a `data` entry; "" stands for the only one."""
        return name or next(iter(self.data))

    def data_of(self, stage: StageConfig) -> DataConfig:
        """The `data` entry that a stage trains on."""
        return self.data[self.data_name(stage.data)]


def with_control(evaluate: EvaluateConfig, chain: ChainConfig, stages: list[str]) -> EvaluateConfig:
    """Add to the evaluation of a chain: the student against the control, and the score of the teachers.

    A single teacher of the run is scored with its stage; other teachers are scored as an ensemble.

    Args:
        stages: names of stages that can be scored on the evaluation's data.
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
