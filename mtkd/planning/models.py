"""What every model of a run will be, from configurations alone: architecture, sizes, vocabulary, tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from mtkd.config import DataConfig, ModelConfig, RunConfig, StageConfig, TeacherConfig
from mtkd.data.blanks import answer_ids
from mtkd.data.chat import check_chat_template
from mtkd.data.encode import around_text
from mtkd.data.glm_tokens import command_ids
from mtkd.data.infilling import Infilling
from mtkd.data.tasks import TaskSpec, check_model
from mtkd.data.tokenizers import num_real_ids, train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.models.classes import ClassMap, Given, match_classes
from mtkd.models.folder import check_folder
from mtkd.models.formats import format_of
from mtkd.models.info import CLASSIFIER, GLM, ModelInfo, model_info
from mtkd.models.load import answer_with, smaller_config
from mtkd.models.load import load_config as load_model_config
from mtkd.models.numbers import numbers_of
from mtkd.models.request import ModelRequest, Taught
from mtkd.models.vocabulary import compressed_teacher, compressed_twice, read_vocabulary
from mtkd.models.weights import check_weights
from mtkd.planning.data import DataFacts, DataReader, unread
from mtkd.planning.footprint import Shape
from mtkd.planning.locate import (
    compare_tokenizer,
    given_tokenizer,
    missing,
    resolve_path,
    revision_of,
    tokenizer_origin,
)
from mtkd.planning.places import placed
from mtkd.planning.stages import scored_models
from mtkd.planning.table import PlannedModel, planned_model
from mtkd.pool import BACKENDS
from mtkd.registry import TASKS


class PlannedModels:
    """The models of a run as its stages will have them; stages are asked for in order.

    Args:
        config: resolved.
        reader: of the data entries, whose classes the models have; None: what the configuration names is all there is.
    Attributes:
        tokenizer: the run's, or one with its special tokens that stands in while it does not exist (`stands_in`).
        num_ids: of the run's tokenizer, at most.
        made: configurations of the models that earlier stages make, by name.
        compressed: of these models, the ids of those whose vocabulary is compressed.
        notes: place of a model in the configuration -> what its classes are matched with, and what differs in its
            tokenizer and does not matter.
    """

    def __init__(self, config: RunConfig, reader: DataReader | None = None) -> None:
        self.config = config
        self._reader = reader
        self.made: dict[str, PretrainedConfig] = {}
        self.compressed: dict[str, int] = {}  # stages whose model has a compressed vocabulary: its ids
        self.notes: dict[str, list[str]] = {}
        settings = config.tokenizer
        self.stands_in = settings is not None and settings.train_on is not None
        card = None if self.stands_in else missing(tokenizer_origin(config)[0], config.base)
        if self.stands_in:
            assert settings is not None
            # A stand-in with the special tokens of the one to come, which has at most `vocab_size` ids.
            self.tokenizer: PreTrainedTokenizerBase = train_tokenizer(
                ["stand-in"], settings.vocab_size, commands=settings.commands
            )
            self.num_ids = settings.vocab_size
        elif card is not None:
            assert card.ids is not None, "cards of GLM have it"
            self.tokenizer, self.num_ids = train_tokenizer(["stand-in"], card.ids, commands="glm"), card.ids
            self.stands_in = True  # as little is known of it
        else:
            self.tokenizer = given_tokenizer(config)
            self.num_ids = num_real_ids(self.tokenizer)

    def facts(self, data: DataConfig) -> DataFacts:
        """What is known of a `data` entry: its classes, and what its labels are."""
        return unread(data) if self._reader is None else self._reader.facts(self._name_of(data), data)

    def sized(
        self, role: str, model: ModelConfig, made: PretrainedConfig, data: DataConfig, auto_class: str
    ) -> tuple[PlannedModel, ModelInfo]:
        """A line of the plan, and what the rows ask about the model; parameters are counted without memory for them."""
        info = with_open_labels(model_info(made, auto_class), self.facts(data), auto_class)
        return planned_model(role, model, info, numbers_of(made, auto_class)), info

    def of(
        self,
        stage: StageConfig,
        model: ModelConfig,
        where: str,
        reads: frozenset[str] | None = None,
        classes: Given | None = None,
    ) -> PretrainedConfig:
        """The configuration of a model as a stage will have it, which is one that can do the stage's task.

        Args:
            reads: of a teacher: which of its predictions are read; None for a model that is trained.
            classes: of a teacher: what its outputs stand for, where the user says it.
        """
        data = self.config.data[self.config.data_name(stage.data)]
        if classes is not None:
            self._check_given(data, f"{where}.classes")
        block = where if reads is None else f"{where}.model"
        with placed(model=block, data=f"data.{self._name_of(data)}"):
            made, found = self._any(stage, model, where, reads, classes)
        if found is not None and found.note:
            self._note(where, found.note)
        with placed(model=block):
            cloze = model_info(made, TASKS.find(data.task).class_for(data)).cloze
        compressed = model.vocabulary is not None or self.vocabulary(model) is not None
        check_model(data, made.model_type, where, cloze=cloze, compressed=compressed)
        return made

    def unread(self, stage: StageConfig, model: ModelConfig, where: str) -> PretrainedConfig:
        """As `of`, while a chain's shapes are looked for: nothing is said of predictions."""
        return self.of(stage, model, where, frozenset())

    def _any(
        self, stage: StageConfig, model: ModelConfig, where: str, reads: frozenset[str] | None, classes: Given | None
    ) -> tuple[PretrainedConfig, ClassMap | None]:
        vocabulary = self.vocabulary(model)
        if model.vocabulary is not None and vocabulary is not None:
            raise compressed_twice(f"{where}.vocabulary")
        data = self.config.data[self.config.data_name(stage.data)]
        if model.stage is not None:
            made = smaller_config(self.made[model.stage.model], model, self.tokenizer, self.num_ids)
            found = None
            if reads is None or "logits" in reads:
                found = self._classes_of(model.stage.stage, data, where, classes, "classes" if reads else "")
            return self._for_task(made, data, where), found
        facts, name = self.facts(data), self._name_of(data)
        request = ModelRequest.of_data(
            name,
            data,
            (facts.num_labels, facts.classes),
            self.tokenizer,
            vocabulary or self.num_ids,
            lambda path: resolve_path(path, self.config.base),
        )
        taught = None if reads is None else Taught(reads, classes)
        return load_model_config(model, replace(request, taught=taught, where=where))

    def of_teacher(
        self, stage: StageConfig, teacher: TeacherConfig, auto_class: str, where: str, reads: frozenset[str]
    ) -> PretrainedConfig:
        """Of a teacher that runs; names and shapes in the files of a streamed or sharded one are compared with it."""
        made = self.of(stage, teacher.model, where, reads, teacher.classes)
        name, backend = format_of(made), BACKENDS[teacher.backend]
        if name is not None and not backend.formats:
            raise UserError(
                f"backend '{teacher.backend}' does not keep weights of number format '{name}'",
                where=f"{where}.backend",
                todo="use another backend, or the full weights",
            )
        folder = resolve_path(teacher.model.path or "", self.config.base)
        if backend.in_files and isinstance(folder, Path) and auto_class != CLASSIFIER:
            with placed(model=f"{where}.model"):
                check_folder(folder)
                check_weights(made, auto_class, folder)
        return made

    def _check_given(self, data: DataConfig, where: str) -> None:
        """Refuse `classes` where a teacher's outputs are not classes of their own.

        Raises:
            UserError: naming the task.
        """
        task = TASKS.find(data.task)
        numbers = self.facts(data).kind == "number"
        if task.token_level or task.cloze or numbers:
            why = "its labels are numbers" if numbers else f"task {data.task}"
            raise UserError(
                "classes is for classifiers: here the teacher's outputs are not classes of its own",
                where=where,
                found=f"data '{self._name_of(data)}': {why}",
                todo="drop it",
            )

    def _answers(self, data: DataConfig) -> list[list[int]] | None:
        """Token ids of the words of a cloze's classes; a stand-in's while the tokenizer is not there."""
        if not TASKS.find(data.task).cloze:
            return None
        return answer_ids(data, self.tokenizer, f"data.{self._name_of(data)}")

    def _name_of(self, data: DataConfig) -> str:
        return next(name for name, other in self.config.data.items() if other is data)

    def _for_task(self, made: PretrainedConfig, data: DataConfig, where: str) -> PretrainedConfig:
        """An earlier stage's model as this stage will load it: the head of its task, the length of its data."""
        auto_class = TASKS.find(data.task).class_for(data)
        made = type(made).from_dict(made.to_dict())
        if made.model_type == GLM:
            answer_with(made, auto_class, self._answers(data))
        facts = self.facts(data)
        if auto_class == CLASSIFIER and facts.known:
            made.num_labels = facts.num_labels
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

    def _classes_of(self, earlier: str, data: DataConfig, where: str, given: Given | None, key: str) -> ClassMap | None:
        """Which output of an earlier stage's classifier is which class of the data, where both sides are known.

        Args: key: what the user can write to say it; see `match_classes`.
        """
        made_on = self.config.data[self.config.data_name(self.config.stages[earlier].data)]
        theirs, ours = self.facts(made_on), self.facts(data)
        if not (made_on.task == data.task == "classify" and theirs.known and ours.known):
            return None
        try:
            if theirs.kind != ours.kind:
                raise DataError(
                    "",
                    where=where,
                    found=", ".join(theirs.classes) or "numbers (a regression)",
                    allowed=", ".join(ours.classes) or "numbers (a regression)",
                )
            return match_classes(theirs.classes, ours.classes, where, given, key=key)
        except DataError as error:
            message = f"stage '{earlier}' makes a classifier of other classes"
            todo = error.todo or "use data of the same classes, or go on from a model that is no classifier"
            raise DataError(message, where=where, found=error.found, allowed=error.allowed, todo=todo) from None

    def vocabulary(self, model: ModelConfig) -> int | None:
        """Ids of a model that comes with a vocabulary map; None for a whole vocabulary."""
        if model.stage is not None:
            return self.compressed.get(model.stage.model)
        if model.path is None:
            return None
        found = read_vocabulary(resolve_path(model.path, self.config.base), self.tokenizer, "@model.path")
        return None if found is None else found.num_kept

    def check_scored(self) -> None:
        """Refuse to score a model on examples that are longer than it can read; after every stage was planned."""
        name = self.config.data_name(self.config.evaluate.data)
        data = self.config.data[name]
        auto_class = TASKS.find(data.task).class_for(data)
        for model in scored_models(self.config):
            longest = model_info(self.made[model], auto_class).max_positions
            if longest < data.max_length:
                raise UserError(
                    f"data '{name}' has examples longer than '{model}' can read",
                    where="evaluate.data",
                    found=f"{data.max_length} tokens",
                    allowed=f"at most {longest}",
                    todo="give the model more max_positions, or leave it out of evaluate.stages",
                )

    def check_chats(self) -> None:
        """Refuse turns of a chat that the run's tokenizer, trained ones included, cannot write at all."""
        for name, data in self.config.data.items():
            if data.chat:
                check_chat_template(self.tokenizer, f"data.{name}.chat")

    def check_commands(self) -> None:
        """Refuse GLM's tasks with a tokenizer that lacks what they write, or examples too short for a blank."""
        for name, data in self.config.data.items():
            task = TASKS.find(data.task, f"data.{name}.task")
            with placed(data=f"data.{name}"):
                if task.cloze:
                    command_ids(self.tokenizer)
                if task.laid:
                    Infilling(self.tokenizer, data, around_text(self.tokenizer)).room(data.max_length)

    def check_tokenizer(self, model: ModelConfig, where: str, task: TaskSpec, *, teaches: bool) -> None:
        """Token -> id and the cut of texts of a model and of the run, where both exist before anything is trained."""
        if self.vocabulary(model) is not None:
            if teaches and task.token_level:
                raise compressed_teacher(model.path or "", where)
            return
        known = model.path is not None and model.stage is None and missing(model.path, self.config.base) is None
        if known:
            assert model.path is not None
            folder, revision = resolve_path(model.path, self.config.base), revision_of(model)
            if not self.stands_in:
                found = compare_tokenizer(self.tokenizer, folder, revision, where, masked=task.masked)
                for note in found:
                    self._note(where, note)

    def _note(self, where: str, note: str) -> None:
        if note not in (known := self.notes.setdefault(where, [])):
            known.append(note)

    def shape(self, made: PretrainedConfig, auto_class: str, model: ModelConfig, stage: str | None = None) -> Shape:
        """A model without weights. Args: stage: that trains it, for a vocabulary that it compresses."""
        kept = made.vocab_size if stage in self.compressed or self.vocabulary(model) is not None else None
        return Shape(made, auto_class, self.num_ids, kept)


def with_open_labels(info: ModelInfo, facts: DataFacts, auto_class: str) -> ModelInfo:
    """The same number of classes for every model while the data was not read; the build compares the real ones."""
    return replace(info, num_labels=2) if auto_class == CLASSIFIER and not facts.known else info
