"""From a model's description to the model: fresh, loaded, or cut from a loaded one; always float32, always seeded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mtkd.config import ModelConfig
from mtkd.errors import DataError, UserError
from mtkd.models.cards import missing_glm
from mtkd.models.classes import ClassMap, match_classes, named_after, output_names, teacher_classes
from mtkd.models.cloze import answer_with
from mtkd.models.create import empty_model, new_model, seeded
from mtkd.models.cut import cut_config, cut_weights
from mtkd.models.folder import find_folder
from mtkd.models.formats import format_of
from mtkd.models.fresh import fresh_config, set_dropout
from mtkd.models.glm.published import config_of_card
from mtkd.models.heads import check_heads, find_heads, of_another_head, reorder_outputs, stand_in_pad, unfitting
from mtkd.models.info import CLASSIFIER, GLM, attention_implementation, check_head, model_info
from mtkd.models.request import ModelRequest
from mtkd.models.vocabulary import VocabularyMap, compressed_config, compressed_weights, planned_config
from mtkd.models.weights import fill_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Full:
    """A model before anything is cut from it.

    Attributes:
        folder: of the weights; None for a fresh model.
        trained: it comes with a classification head, whole.
        classes: of a model that is trained further: which of its outputs are the data's classes.
    """

    config: PretrainedConfig
    folder: Path | None = None
    trained: bool = False
    classes: ClassMap | None = None


def build_model(
    config: ModelConfig,
    request: ModelRequest,
    *,
    on_loaded: Callable[[PreTrainedModel], None] | None = None,
    empty: bool = False,
) -> PreTrainedModel:
    """A model in float32 on the CPU, in eval mode.

    Args:
        config: where it comes from.
        request: what the stage asks of it.
        on_loaded: sees a loaded model before anything is cut from it.
        empty: of a model that is loaded whole: as `empty_model` makes it, its weights are not read.

    Raises:
        UserError: the description does not fit the task, the tokenizer or the data.
        DataError: the folder is unsafe, or its weights are not those of the architecture.
    """
    full = _full_config(config, request, weights=True)
    model = _whole_model(full, request, empty)
    if full.folder is not None and not empty and on_loaded is not None:
        on_loaded(model)
    if config.is_cut:
        weights = cut_weights(model, config)
        # A new model rather than one with modules deleted: layer numbers inside the modules are right by construction.
        model = new_model(cut_config(model.config, config), request.auto_class, request.seed)
        model.load_state_dict(weights, strict=True)
    if request.auto_class == CLASSIFIER:  # not before: the row of a padding id in an embedding gets no gradient
        stand_in_pad(model.config, request.tokenizer)
    return model


def _whole_model(full: _Full, request: ModelRequest, empty: bool) -> PreTrainedModel:
    """A model before layers are cut; a student's outputs are in the data's order."""
    if full.folder is None:
        return new_model(full.config, request.auto_class, request.seed)
    if empty:
        return empty_model(full.config, request.auto_class)
    model = _load(full.folder, full.config, request)
    if full.classes is not None and not full.classes.in_order:
        reorder_outputs(model, full.classes.columns)
    return model


def load_config(config: ModelConfig, request: ModelRequest) -> tuple[PretrainedConfig, ClassMap | None]:
    """The configuration that `build_model` would build, without weights; same arguments, same errors.

    Returns:
        (configuration, which output is which class of the data): None for a model without a classifier of its own. A
        teacher's configuration counts the data's classes alone.

    Raises:
        UserError: the description does not fit the task, the tokenizer or the data.
        DataError: the folder is unsafe or not a model.
    """
    full = _full_config(config, request, weights=False)
    classes, taught = full.classes, request.taught
    if full.trained and request.num_labels and taught is not None and "logits" in taught.reads:
        where = request.where or str(full.folder)
        classes = teacher_classes(full.config, request.label_names, request.num_labels, where, taught.meaning)
    if request.auto_class == CLASSIFIER:
        full.config.num_labels = request.num_labels or full.config.num_labels or 0
        stand_in_pad(full.config, request.tokenizer)
    return smaller_config(full.config, config, request.tokenizer, request.num_ids), classes


def smaller_config(
    config: PretrainedConfig, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, num_ids: int
) -> PretrainedConfig:
    """What is left of a configuration after keep_layers, slice and vocabulary, at plan time; same errors.

    Args:
        num_ids: ids of the run's tokenizer, for which `tokenizer` may stand in.
    """
    config = cut_config(config, model)
    if model.vocabulary is None:
        return config
    return planned_config(config, model.vocabulary, tokenizer, num_ids, "@model.vocabulary")


def compress_model(model: PreTrainedModel, auto_class: str, vocabulary: VocabularyMap, seed: int) -> PreTrainedModel:
    """A model with the kept rows of the embedding and the output head, and the rest of its weights."""
    config = compressed_config(model.config, vocabulary.kept.tolist())
    small = new_model(config, auto_class, seed)
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    small.load_state_dict(compressed_weights(model.state_dict(), shapes, vocabulary.kept), strict=True)
    return small


def _full_config(config: ModelConfig, request: ModelRequest, *, weights: bool) -> _Full:
    """Configuration before layers are cut, and the folder of the weights."""
    full, folder = _whole_config(config, request, weights)
    check_head(full, request.auto_class)
    if full.model_type == GLM:
        answer_with(full, request.answers, classifies=request.auto_class == CLASSIFIER)
    classifier, taught = request.auto_class == CLASSIFIER, request.taught
    heads = None if folder is None else find_heads(full, request.auto_class, folder)
    if folder is not None and heads is not None:
        where = f"{request.where}.model" if request.where and taught is not None else str(folder)
        check_heads(heads, folder, where, reads=None if taught is None else taught.reads, new=classifier)
    # the data's cloze has no weights of its own: its loaded model is a language model
    trained = classifier and request.answers is None and heads is not None and heads["logits"].whole
    classes = None
    if classifier and request.num_labels and not (trained and taught is not None):
        classes = _set_labels(full, request, trained, str(folder))
    _check_fits(full, request)
    _check_format(full, config, taught is not None, str(folder))
    cut_config(full, config)  # refused here, before weights are read
    return _Full(full, folder, trained, classes)


def _whole_config(config: ModelConfig, request: ModelRequest, weights: bool) -> tuple[PretrainedConfig, Path | None]:
    """(configuration as the folder or the description has it, folder of the weights: None without one here)."""
    if config.path is None:
        return fresh_config(config, request), None
    card, folder = None if weights else missing_glm(config.path, request.resolve), None
    if card is None:
        folder = find_folder(config.path, config.revision, request.resolve, weights=weights)
        full = _read_config(folder)
    else:
        full = config_of_card(card)
    if config.dropout is not None:
        set_dropout(full, config.dropout)
    return full, folder


def _read_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # unknown architectures and malformed values end in many classes
        raise DataError(f"the configuration cannot be read: {_first_line(error)}", where=str(folder)) from error


def _set_labels(config: PretrainedConfig, request: ModelRequest, trained: bool, folder: str) -> ClassMap | None:
    """Give a configuration the data's classes; a classifier's own outputs are matched with them first.

    Returns:
        None for a new head.
    """
    classes = None
    if trained:
        names = request.label_names or tuple(f"LABEL_{i}" for i in range(request.num_labels))
        classes = match_classes(output_names(config), names, request.where or folder, key="")
        if getattr(config, "verbalizers", None):  # of a cloze the order is that of its answers
            config.verbalizers, classes = [config.verbalizers[i] for i in classes.columns], None
    named_after(config, request.label_names, request.num_labels)
    return classes


def _check_fits(config: PretrainedConfig, request: ModelRequest) -> None:
    info = model_info(config, request.auto_class)
    if info.vocabulary < request.num_ids:
        raise UserError(
            "the tokenizer has more ids than the model has embeddings",
            where="@model",
            found=f"{request.num_ids} ids",
            allowed=f"at most {info.vocabulary}",
        )
    if info.max_positions < request.max_positions:
        raise UserError(
            "the data's examples are longer than the model's longest sequence",
            where="@data.max_length",
            found=f"{request.max_positions} tokens",
            allowed=f"at most {info.max_positions}",
        )


def _check_format(full: PretrainedConfig, config: ModelConfig, teaches: bool, folder: str) -> None:
    """Refuse to train or to cut weights of another number format than float32."""
    name = format_of(full)
    if name is not None and (config.is_cut or not teaches):
        raise UserError(
            f"a model of number format '{name}' is a teacher as it is: it is not trained and not cut",
            where="@model",
            found=folder,
            todo="use the full weights",
        )


def _load(folder: Path, config: PretrainedConfig, request: ModelRequest) -> PreTrainedModel:
    import transformers

    if format_of(config) is not None:  # transformers does not know the layers of our formats
        return fill_model(empty_model(config, request.auto_class), folder)
    try:
        with seeded(request.seed), quiet():
            model, report = getattr(transformers, request.auto_class).from_pretrained(
                folder,
                config=config,
                attn_implementation=attention_implementation(config, request.auto_class),
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported, and refused below with the names
                output_loading_info=True,
            )
    except Exception as error:  # safetensors, OS and transformers errors share no base class
        raise DataError(f"the weights cannot be loaded: {_first_line(error)}", where=str(folder)) from error
    _check_report(report, model.base_model_prefix, folder)
    return model.eval()


def _check_report(report: dict[str, Any], prefix: str, folder: Path) -> None:
    """Refuse weights that are not those of the architecture; transformers would initialise them at random.

    Args:
        report: transformers' loading info.
        prefix: of the encoder's or decoder's names in a model with a head; heads were looked at before.
    """
    mismatched = [
        f"{name} {list(stored)} instead of {list(shape)}" for name, stored, shape in report["mismatched_keys"]
    ]
    missing = sorted(report["missing_keys"])
    fresh = [name for name in missing if not name.startswith(f"{prefix}.") or f"{prefix}.pooler." in name]
    missing = [name for name in missing if name not in fresh]
    unexpected = [n for n in sorted(report["unexpected_keys"]) if not of_another_head(n, prefix)]
    errors = [str(e) for e in report.get("error_msgs") or ()]
    for what, names in (
        ("missing", missing),
        ("of another shape", sorted(mismatched)),
        ("not part of the architecture", unexpected),
        ("unreadable", errors),
    ):
        if names:
            raise unfitting(what, names, folder)
    if fresh:
        _log.info("%s: new head: %s", folder.name, ", ".join(fresh))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' loading report and bar: what it would say is checked, and raised if it matters."""
    from transformers.utils import logging as hub_logging

    level, bar = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.set_verbosity(logging.CRITICAL)
    hub_logging.disable_progress_bar()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bar:
            hub_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
