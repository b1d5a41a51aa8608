"""Check the names that one part of a run uses for another: data, earlier stages, scored models.

`RunConfig` checks them on construction. Every error is a ValueError whose message begins with the place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtkd.config.data import DataConfig
from mtkd.config.engine import EngineConfig
from mtkd.config.evaluate import EvaluateConfig
from mtkd.config.model import ModelConfig
from mtkd.config.refs import ENSEMBLE_PREFIX, StageRef
from mtkd.config.source import RANDOM_TOKENS
from mtkd.config.stage import StageConfig
from mtkd.config.teacher import OwnTeacher
from mtkd.config.tokenizer import TokenizerConfig


def models_of(stages: Mapping[str, StageConfig]) -> list[str]:
    """Every model that stages make: NAME, or NAME/MEMBER where a stage makes several; caches do not count."""
    trained = {name: stage for name, stage in stages.items() if stage.trained}
    return [m for name, stage in trained.items() for m in ([f"{name}/{k}" for k in stage.members] or [name])]


def scored_of(stages: Mapping[str, StageConfig], evaluate: EvaluateConfig) -> list[str]:
    """The models that `evaluate` scores at the end, without ensembles."""
    names = evaluate.stages or tuple(stages)
    return [m for m in models_of(stages) if any(m == c or m.startswith(f"{c}/") for c in names)]


@dataclass(frozen=True)
class References:
    """The parts of a run that name one another."""

    data: Mapping[str, DataConfig]
    stages: Mapping[str, StageConfig]
    evaluate: EvaluateConfig
    engine: EngineConfig
    tokenizer: TokenizerConfig | None

    def check(self) -> None:
        """Refuse an unknown name, or one of another kind.

        Raises:
            ValueError: at the first one.
        """
        if self.tokenizer and self.tokenizer.train_on is not None:
            self._check_data(self.tokenizer.train_on, "tokenizer.train_on")
            if self.data[self.tokenizer.train_on].source == RANDOM_TOKENS:
                raise ValueError("tokenizer.train_on: random tokens are nothing to learn a vocabulary from")
        self._check_data(self.evaluate.data, "evaluate.data")
        self._check_held_out()
        if self.evaluate.answers is not None and self.evaluate.answers.data:
            self._check_data(self.evaluate.answers.data, "evaluate.answers.data")
        for position, (name, stage) in enumerate(self.stages.items()):
            self._check_stage(name, stage, list(self.stages)[:position])
        self._check_scored()

    def _check_stage(self, name: str, stage: StageConfig, earlier: Sequence[str]) -> None:
        where = f"stages.{name}"
        self._check_data(stage.data, f"{where}.data")
        for maker in self.data[stage.data or next(iter(self.data))].made_by:
            self._check_earlier(StageRef(maker), earlier, f"{where}.data")
        for role, model in stage.trained.items():
            self._check_vocabulary(model, stage, f"{stage.place(name, role)}.vocabulary")
        self._check_sharded(stage, where)
        for role, model in stage.trained.items():
            self._check_made(model.stage, earlier, stage.place(name, role), cached=False)
        for i, teacher in enumerate(stage.teachers):
            self._check_made(teacher.model.stage, earlier, f"{where}.teachers[{i}]", cached=teacher.backend == "cached")
            if teacher.calibrate is not None and teacher.calibrate.data:
                self._check_data(teacher.calibrate.data, f"{where}.teachers[{i}].calibrate.data")
        if stage.equal_time:
            for timed in (stage.equal_time.to, stage.equal_time.rate_of):
                self._check_timed(StageRef.named(timed), earlier, f"{where}.equal_time")

    def _check_held_out(self) -> None:
        """Refuse to score on, or to learn a vocabulary from, what a stage of the run writes."""
        asked = {"evaluate.data": self.evaluate.data}
        if self.evaluate.answers is not None:
            asked["evaluate.answers.data"] = self.evaluate.answers.data or self.evaluate.data
        if self.tokenizer is not None and self.tokenizer.train_on is not None:
            asked["tokenizer.train_on"] = self.tokenizer.train_on
        for where, name in asked.items():
            entry = self.data.get(name or next(iter(self.data)))
            if entry is not None and entry.made_by:
                raise ValueError(f"{where}: a stage writes these data: name others, such as those of its prompts")

    def _check_data(self, name: str, where: str) -> None:
        if name and name not in self.data:
            raise ValueError(f"{where}: no data named {name!r}; data are: {', '.join(self.data)}")
        if not name and len(self.data) > 1:
            raise ValueError(f"{where}: say which of the data: {', '.join(self.data)}")

    def _check_sharded(self, stage: StageConfig, where: str) -> None:
        sharded = [i for i, teacher in enumerate(stage.teachers) if teacher.backend == "sharded"]
        if sharded and self.engine.kind != "deepspeed":
            raise ValueError(
                f"{where}.teachers[{sharded[0]}].backend: a sharded teacher has a part on every process, and engine "
                f"kind {self.engine.kind!r} is one process; set engine.kind: deepspeed"
            )

    def _check_vocabulary(self, model: ModelConfig, stage: StageConfig, where: str) -> None:
        if model.vocabulary is None:
            return
        counts = model.vocabulary.counts
        self._check_data(counts, f"{where}.counts")
        if self.data[counts or next(iter(self.data))].source == RANDOM_TOKENS:
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
        if model.path is None and isinstance(stage.teachers[0], OwnTeacher):
            raise ValueError(
                f"{where}: a fresh model's ids are compared by its first teacher's embedding, which a teacher of your "
                "own does not have; put a resident teacher first, or load the student"
            )

    def _check_earlier(self, ref: StageRef, earlier: Sequence[str], where: str) -> None:
        if ref.stage not in earlier:
            raise ValueError(f"{where}: '{ref}' is not an earlier stage; earlier are: {', '.join(earlier) or 'none'}")

    def _check_timed(self, ref: StageRef, earlier: Sequence[str], where: str) -> None:
        """Refuse `equal_time` with a stage that is not earlier, or that trains nothing."""
        self._check_earlier(ref, earlier, where)
        if not self.stages[ref.stage].trained:
            raise ValueError(
                f"{where}: stage {ref.stage!r} is a {self.stages[ref.stage].kind}: it has no training to be as long as"
            )

    def _check_made(self, ref: StageRef | None, earlier: Sequence[str], where: str, *, cached: bool) -> None:
        """Refuse a reference to no model of an earlier stage; `cached`: to none of its caches."""
        if ref is None:
            return
        self._check_earlier(ref, earlier, where)
        stage = self.stages[ref.stage]
        if stage.kind == "generate":
            raise ValueError(
                f"{where}: '{ref}' writes texts, and is no model; data read them: {{source: stage, stage: {ref.stage}}}"
            )
        caches = stage.kind == "cache"
        parts, kind = [StageRef(ref.stage, part) for part in stage.parts], "cache" if caches else "model"
        if ref not in (parts or [StageRef(ref.stage)]):
            raise ValueError(
                f"{where}: '{ref}' is not a {kind} of that stage; its {kind}s are: "
                f"{', '.join(map(str, parts or [StageRef(ref.stage)]))}"
            )
        if caches and not cached:
            raise ValueError(
                f"{where}: '{ref}' is a cache of a teacher's outputs, not a model; a teacher reads "
                f"it with {{model: {ref}, backend: cached}}"
            )
        if cached and not caches:
            raise ValueError(
                f"{where}: backend: cached reads a cache, and stage {ref.stage!r} makes a model; cache it first: "
                f"{{kind: cache, teachers: [{ref}]}}"
            )

    def _check_scored(self) -> None:
        models = models_of(self.stages)
        for stage in self.evaluate.stages:
            if stage not in self.stages and stage not in models:
                raise ValueError(f"evaluate: {stage!r} is not a stage; stages are: {', '.join(self.stages)}")
            if stage in self.stages and not self.stages[stage].trained:
                raise ValueError(
                    f"evaluate.stages: {stage!r} is a "
                    f"{self.stages[stage].kind}, not a model; its teachers together can be scored: name it in "
                    "evaluate.ensembles"
                )
        for stage in self.evaluate.ensembles:
            if stage not in self.stages:
                raise ValueError(f"evaluate: {stage!r} is not a stage; stages are: {', '.join(self.stages)}")
        for stage in self.evaluate.ensembles:
            if not self.stages[stage].teachers:
                raise ValueError(f"evaluate.ensembles: stage {stage!r} has no teachers")
            self._check_live(stage)
        scored = {*scored_of(self.stages, self.evaluate), *(ENSEMBLE_PREFIX + s for s in self.evaluate.ensembles)}
        for i, pair in enumerate(self.evaluate.comparisons):
            for side in (pair.candidate, pair.baseline):
                if side not in scored:
                    raise ValueError(
                        f"evaluate.comparisons[{i}]: {side!r} is not scored; scored are: {', '.join(sorted(scored))}"
                    )

    def _check_live(self, stage: str) -> None:
        """Refuse to score cached teachers: a cache holds the train split alone."""
        cached = [t for t in self.stages[stage].teachers if t.backend == "cached"]
        if not cached:
            return
        made_by = dict.fromkeys(t.model.stage.stage for t in cached if t.model.stage is not None)
        advice = f"name {' or '.join(made_by)} instead" if made_by else "score them in the run that made the cache"
        raise ValueError(
            f"evaluate.ensembles: teacher {cached[0].name!r} of stage {stage!r} is read from a cache, which holds the "
            f"train split alone; the teachers of a cache stage are live and can be scored: {advice}"
        )
