"""Plan every model of a run from configurations alone: architecture, sizes, vocabulary, tokenizer."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from mtkd.config import DataConfig, ModelConfig, RunConfig, StageConfig
from mtkd.data.blanks import answer_ids
from mtkd.data.tasks import TaskSpec, check_model
from mtkd.errors import UserError
from mtkd.models.classes import UNSAID, ClassMap, Meaning
from mtkd.models.cloze import answer_with
from mtkd.models.info import CLASSIFIER, GLM, model_info
from mtkd.models.load import load_config as load_model_config
from mtkd.models.load import smaller_config
from mtkd.models.request import ModelRequest, Taught
from mtkd.models.vocabulary import compressed_teacher, compressed_twice, read_vocabulary
from mtkd.planning.classes import check_given, earlier_classes
from mtkd.planning.data import DataFacts, DataReader, unread
from mtkd.planning.locate import (
    resolve_path,
)
from mtkd.planning.places import placed
from mtkd.planning.spec import DataSpec, ModelSpec
from mtkd.planning.stages import scored_models
from mtkd.planning.tokenizer import PlannedTokenizer
from mtkd.registry import TASKS


class PlannedModels:
    """The models of a run, without weights; stages are planned in order.

    Args:
        config: resolved.
        reader: of the data entries, whose classes the models have; None: the configuration alone names them.
    Attributes:
        tokens: the run's tokenizer, or its stand-in.
        made: configurations of the models that earlier stages make, by name.
        compressed: number of ids of those models whose vocabulary is compressed, by name.
        matched: place of a teacher in the configuration -> which of its outputs are the data's classes.
        notes: place of a model in the configuration -> how its classes are matched, and differences of its tokenizer
            that do not matter.
    """

    def __init__(self, config: RunConfig, reader: DataReader | None = None) -> None:
        self.config = config
        self._reader = reader
        self.made: dict[str, PretrainedConfig] = {}
        self.compressed: dict[str, int] = {}
        self.matched: dict[str, ClassMap] = {}
        self.notes: dict[str, list[str]] = {}
        self.tokens = PlannedTokenizer(config)

    def facts(self, data: DataConfig) -> DataFacts:
        """The facts of a `data` entry: its classes and the kind of its labels."""
        return unread(data) if self._reader is None else self._reader.facts(self._name_of(data), data)

    def spec(
        self, config: PretrainedConfig, model: ModelConfig, data: DataSpec, *, compressed: bool = False
    ) -> ModelSpec:
        """A model without weights.

        Args:
            compressed: whether the stage that trains it cuts its vocabulary.
        """
        return ModelSpec(
            config,
            data.auto_class,
            self.tokens.num_ids,
            kept=config.vocab_size if compressed or self.vocabulary(model) is not None else None,
            labels_known=data.facts.known,
        )

    def of(
        self,
        stage: StageConfig,
        model: ModelConfig,
        where: str,
        reads: frozenset[str] | None = None,
        meaning: Meaning = UNSAID,
    ) -> PretrainedConfig:
        """The configuration of a model in a stage, checked against the stage's task.

        Args:
            reads: predictions of a teacher that are read; None for a model that is trained.
            meaning: what the user says of a teacher's outputs.
        """
        data = self.config.data_of(stage)
        if meaning.key:
            check_given(self._name_of(data), data, self.facts(data), where, meaning.key)
        block = where if reads is None else f"{where}.model"
        with placed(model=block, data=f"data.{self._name_of(data)}"):
            config, matching = self._any(stage, model, where, reads, meaning)
        if matching is not None:
            self.matched[where] = matching
            if matching.note:
                self._note(where, matching.note)
        with placed(model=block):
            cloze = model_info(config, TASKS.find(data.task).class_for(data)).cloze
        compressed = model.vocabulary is not None or self.vocabulary(model) is not None
        check_model(data, config.model_type, where, cloze=cloze, compressed=compressed)
        return config

    def unread(self, stage: StageConfig, model: ModelConfig, where: str) -> PretrainedConfig:
        """The same while a chain's shapes are derived: no predictions are read yet."""
        return self.of(stage, model, where, frozenset())

    def _any(
        self, stage: StageConfig, model: ModelConfig, where: str, reads: frozenset[str] | None, meaning: Meaning
    ) -> tuple[PretrainedConfig, ClassMap | None]:
        vocabulary = self.vocabulary(model)
        if model.vocabulary is not None and vocabulary is not None:
            raise compressed_twice(f"{where}.vocabulary")
        data = self.config.data_of(stage)
        if model.stage is not None:
            config = smaller_config(self.made[model.stage.model], model, self.tokens.tokenizer, self.tokens.num_ids)
            matching = None
            if reads is None or "logits" in reads:
                matching = self._classes_of(model.stage.stage, data, where, meaning, "classes" if reads else "")
            return self._for_task(config, data, where), matching
        facts, name = self.facts(data), self._name_of(data)
        request = ModelRequest.of_data(
            name,
            data,
            (facts.num_labels, facts.classes),
            self.tokens.tokenizer,
            vocabulary or self.tokens.num_ids,
            lambda path: resolve_path(path, self.config.base),
        )
        taught = None if reads is None else Taught(reads, meaning)
        return load_model_config(model, replace(request, taught=taught, where=where))

    def _answers(self, data: DataConfig) -> list[list[int]] | None:
        """Token ids of the words of a cloze's classes; of the stand-in while the tokenizer does not exist."""
        if not TASKS.find(data.task).cloze:
            return None
        return answer_ids(data, self.tokens.tokenizer, f"data.{self._name_of(data)}")

    def _name_of(self, data: DataConfig) -> str:
        return next(name for name, other in self.config.data.items() if other is data)

    def _for_task(self, config: PretrainedConfig, data: DataConfig, where: str) -> PretrainedConfig:
        """An earlier stage's model with the head of this stage's task, checked against the length of its data."""
        auto_class = TASKS.find(data.task).class_for(data)
        config = type(config).from_dict(config.to_dict())
        if config.model_type == GLM:
            answer_with(config, self._answers(data), classifies=auto_class == CLASSIFIER)
        facts = self.facts(data)
        if auto_class == CLASSIFIER and facts.known:
            config.num_labels = facts.num_labels
        longest = model_info(config, auto_class).max_positions
        if longest < data.max_length:
            raise UserError(
                "the data's examples are longer than the longest sequence of the earlier stage's model",
                where=where,
                found=f"{data.max_length} tokens",
                allowed=f"at most {longest}",
                todo="give the model of that stage more max_positions, or this data a smaller max_length",
            )
        return config

    def _classes_of(self, earlier: str, data: DataConfig, where: str, meaning: Meaning, key: str) -> ClassMap | None:
        """Match an earlier stage's classifier with the classes of the data; None where a side is not known."""
        source_data = self.config.data_of(self.config.stages[earlier])
        source, target = self.facts(source_data), self.facts(data)
        if not (source_data.task == data.task == "classify" and source.known and target.known):
            return None
        return earlier_classes(earlier, source, target, where, meaning, key)

    def vocabulary(self, model: ModelConfig) -> int | None:
        """Ids of a model that comes with a vocabulary map; None for a whole vocabulary."""
        if model.stage is not None:
            return self.compressed.get(model.stage.model)
        if model.path is None:
            return None
        table = read_vocabulary(resolve_path(model.path, self.config.base), self.tokens.tokenizer, "@model.path")
        return None if table is None else table.num_kept

    def check_scored(self) -> None:
        """Refuse to score a model on examples that are longer than it can read; called after every stage is planned."""
        self._check_length(self.config.data_name(self.config.evaluate.data), "evaluate.data")
        if (answers := self.config.evaluate.answers) is not None and answers.data:
            self._check_length(answers.data, "evaluate.answers.data")

    def _check_length(self, name: str, where: str) -> None:
        data = self.config.data[name]
        auto_class = TASKS.find(data.task).class_for(data)
        for model in scored_models(self.config):
            longest = model_info(self.made[model], auto_class).max_positions
            if longest < data.max_length:
                raise UserError(
                    f"data '{name}' has examples longer than '{model}' can read",
                    where=where,
                    found=f"{data.max_length} tokens",
                    allowed=f"at most {longest}",
                    todo="give the model more max_positions, or leave it out of evaluate.stages",
                )

    def check_tokenizer(self, model: ModelConfig, where: str, task: TaskSpec, *, teaches: bool) -> None:
        """Compare the tokenizers of a model and of the run, and note differences that do not matter."""
        if self.vocabulary(model) is not None:
            if teaches and task.token_level:
                raise compressed_teacher(model.path or "", where)
            return
        for note in self.tokens.compare(model, where, masked=task.masked):
            self._note(where, note)

    def _note(self, where: str, note: str) -> None:
        if note not in (notes := self.notes.setdefault(where, [])):
            notes.append(note)
