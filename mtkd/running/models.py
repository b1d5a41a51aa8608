"""Load the models of a stage, with the run's tokenizer and the head for the stage's data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from mtkd.config import ModelConfig
from mtkd.data.load import LoadedData
from mtkd.data.tokenizers import num_real_ids
from mtkd.models.classes import ClassMap, teacher_classes
from mtkd.models.info import CLASSIFIER
from mtkd.models.load import build_model, compress_model
from mtkd.models.request import ModelRequest, Taught
from mtkd.models.taps import TappedModel, input_table
from mtkd.models.vocabulary import VocabularyMap, compressed_twice, make_vocabulary, read_vocabulary
from mtkd.planning.locate import compare_tokenizer, revision_of
from mtkd.planning.places import placed
from mtkd.pool import Teacher
from mtkd.running.context import RunContext


def load_model(
    context: RunContext,
    model: ModelConfig,
    data: LoadedData,
    *,
    seed: int = 0,
    where: str = "model",
    teacher: Teacher | None = None,
    taught: Taught | None = None,
    empty: bool = False,
) -> TappedModel:
    """A model for the data's task, with taps.

    Args:
        seed: of newly initialised weights.
        where: its block in the configuration, or the teacher's block that has it as `model`.
        teacher: its embedding shows which ids are alike, for a fresh student with a compressed vocabulary.
        taught: of a frozen teacher: what is read of it; None for a model that is trained, or was here.
        empty: without its weights, as `build_model` has it.
    Raises:
        UserError: its tokenizer, head, classes or shape are not what the stage needs.
    """
    with placed(model=where if taught is None else f"{where}.model", data=f"data.{data.name}", teacher=where):
        num_ids, task = num_real_ids(context.tokenizer), data.task.class_for(data.config)
        vocabulary = vocabulary_of(context, model, where)
        if model.path is not None and vocabulary is None:
            folder, revision = context.resolve(model.path), revision_of(model)
            compare_tokenizer(context.tokenizer, folder, revision, where, masked=data.task.masked)
        request = ModelRequest.of_data(
            data.name,
            data.config,
            (data.num_labels, data.label_names),
            context.tokenizer,
            num_ids if vocabulary is None else vocabulary.num_kept,
            context.resolve,
        )
        request = replace(request, taught=taught, seed=seed, where=where)
        table = None if teacher is None else teacher.embedding_table
        tables = [] if table is None else [table]
        built = build_model(model, request, on_loaded=partial(_keep_table, tables), empty=empty)
        if model.vocabulary is not None:
            if vocabulary is not None:
                raise compressed_twice(f"{where}.vocabulary")
            vocabulary = _vocabulary(context, model, built, tables[0])
            built = compress_model(built, task, vocabulary, seed)
        return TappedModel(built, task, num_ids, vocabulary, _classes(built, request, data))


def _keep_table(tables: list[Tensor], whole: PreTrainedModel) -> None:
    """Put the input embedding of a loaded model, before it is cut, in front of the teacher's."""
    tables.insert(0, input_table(whole))


def _classes(built: PreTrainedModel, request: ModelRequest, data: LoadedData) -> ClassMap | None:
    """Which outputs of a teaching classifier are the data's classes; None where all are, in the same order."""
    taught = request.taught
    if (
        taught is None
        or "logits" not in taught.reads
        or request.auto_class != CLASSIFIER
        or request.answers is not None
    ):
        return None
    classes = teacher_classes(built.config, data.label_names, data.num_labels, request.where, taught.meaning)
    return None if classes.in_order else classes


def vocabulary_of(context: RunContext, model: ModelConfig, where: str) -> VocabularyMap | None:
    """The map that comes with a model's folder; None for a model with a whole vocabulary."""
    return read_vocabulary(context.resolve(model.path), context.tokenizer, where) if model.path else None


def _vocabulary(context: RunContext, model: ModelConfig, built: PreTrainedModel, table: Tensor) -> VocabularyMap:
    """The part of the ids that a model is to keep; the main rank's, on every rank.

    Args:
        table: the embedding [V,H] that shows which ids are alike.
    """
    assert model.vocabulary is not None
    name = context.config.data_name(model.vocabulary.counts)
    with placed(data=f"data.{name}"):
        vocabulary = make_vocabulary(
            model.vocabulary,
            context.config.data[name],
            context.raw(name),
            context.tokenizer,
            built.config,
            table,
        )
    return context.dist.broadcast_object(vocabulary)  # ranks could round near ties differently, and keep other ids
