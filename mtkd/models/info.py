"""What can be known of a model from its configuration alone: shape, capabilities, number of parameters."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mtkd.errors import UserError
from mtkd.models.cloze import check_glm
from mtkd.models.features import ATTENTION

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CAUSAL_LM = "AutoModelForCausalLM"
MASKED_LM = "AutoModelForMaskedLM"
CLASSIFIER = "AutoModelForSequenceClassification"
PRE_TRAINING = "AutoModelForPreTraining"
TOKEN_LEVEL = (CAUSAL_LM, MASKED_LM, PRE_TRAINING)

TAP = "mtkd_tap"
"""Name of the attention function that records query, key and value; see `mtkd.models.attention`."""

GLM = "glm_blocklm"
"""mtkd's own architecture, `mtkd.models.glm`."""

# Architectures that number positions from pad_token_id + 1, so that their table holds that many positions fewer.
OFFSET_POSITIONS = (
    *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text"),
    *("mpnet", "longformer", "luke", "xmod", "ibert"),
)
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class ModelInfo:
    """Shape and capabilities of a model.

    Attributes:
        architecture: transformers' ``model_type``.
        num_layers: N; ``hidden.0`` to ``hidden.N`` exist, attention features from 1 to N.
        width: H of the hidden states.
        num_heads: A of query, scores and probs.
        num_kv_heads: A of key and value; fewer than `num_heads` where heads are grouped.
        head_width: D.
        vocabulary: rows of the embedding, padding included.
        num_labels: columns of a classification model's logits; 0 for token-level models.
        max_positions: longest sequence, in tokens.
        causal: a token attends only to those before it.
        taps: names of the features it can give.
        unpackable: why it cannot run on packed rows (`mtkd.models.packing`), "" where it can.
        cloze: a classifier without layers of its own, which scores words in place of a blank.
    """

    architecture: str
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    vocabulary: int
    num_labels: int
    max_positions: int
    causal: bool
    taps: frozenset[str]
    unpackable: str = field(default="", compare=False)
    cloze: bool = False


def model_info(config: PretrainedConfig, auto_class: str) -> ModelInfo:
    """Read a configuration; no weights are needed.

    Args:
        config: GPT-2's and DistilBERT's own names are read through transformers' attribute map.
        auto_class: e.g. "AutoModelForCausalLM".

    Raises:
        UserError: an architecture without that head, or one that is not a plain encoder or decoder.
    """
    if config.is_encoder_decoder or not hasattr(config, "num_hidden_layers"):
        raise UserError(
            "only plain encoders and decoders are supported",
            where="@model",
            found=f"architecture '{config.model_type}'",
        )
    check_head(config, auto_class)
    if config.model_type == GLM:
        check_glm(config, classifies=auto_class == CLASSIFIER)
    heads = config.num_attention_heads
    width = config.hidden_size
    taps = {"logits", "hidden", "embedding", "cls"} | ({"nsp_logits"} if auto_class == PRE_TRAINING else set())
    tapped = attention_implementation(config, auto_class) == TAP
    cloze = auto_class == CLASSIFIER and getattr(config, "verbalizers", None) is not None
    if tapped and not cloze:  # a cloze attends to words that are not in the batch
        taps.update(ATTENTION)
    cls, causal = model_class(config, auto_class), is_causal(config, auto_class)
    why = "only language models read token by token" if auto_class == CLASSIFIER else ""
    return ModelInfo(
        architecture=config.model_type,
        num_layers=config.num_hidden_layers,
        width=width,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        vocabulary=config.vocab_size,
        num_labels=(config.num_labels or 0) if auto_class == CLASSIFIER else 0,
        max_positions=_max_positions(config),
        causal=causal,
        taps=frozenset(taps),
        unpackable=why or _unpackable(config, cls, causal, tapped),
        cloze=cloze,
    )


def _unpackable(config: PretrainedConfig, cls: type[PreTrainedModel], causal: bool, tapped: bool) -> str:
    """Why a token-level model cannot be run on packed rows; "" where it can.

    Args:
        tapped: whether all of its attention goes through mtkd's tap.
    """
    if not causal:
        return "it attends in both directions"
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        return "its attention depends on the distance in the row (ALiBi)"
    kinds: Any = getattr(config, "layer_types", None)
    windowed = getattr(config, "sliding_window", None) if kinds is None else any(k != "full_attention" for k in kinds)
    if windowed:
        return "some of its layers attend to a window or are recurrent"
    if not tapped:
        return "its attention does not go through transformers' attention interface"
    if "position_ids" not in inspect.signature(cls.forward).parameters:
        return "it takes no position ids"
    return ""


def check_packing(info: ModelInfo, where: str) -> None:
    """Refuse a model that cannot be run on packed rows.

    Args:
        where: the stage's `batch.packing`.
    Raises:
        UserError: naming the architecture and the reason.
    """
    if info.unpackable:
        raise UserError(
            f"architecture '{info.architecture}' cannot be run on packed rows",
            where=where,
            found=info.unpackable,
            allowed="decoders with full attention, such as llama, qwen2, gpt2 and glm_blocklm, on causal-lm data",
            todo="drop packing; batch: {tokens: N} and group_by_length also save padding",
        )


def attention_implementation(config: PretrainedConfig, auto_class: str) -> str | None:
    """The tap where every layer's attention goes through transformers' `AttentionInterface`; else what the model needs.

    Attention with capped scores (Gemma 2) has no SDPA form: it runs eagerly, without attention features. None leaves
    the choice to transformers (DeBERTa, models with layers that are not attention).
    """
    if getattr(config, "attn_logit_softcapping", None):
        return "eager"
    kinds = getattr(config, "layer_types", None) or ()
    regular = all(kind in _ATTENTION_LAYERS for kind in kinds)
    cls: Any = model_class(config, auto_class)
    return TAP if regular and cls._supports_attention_backend and cls._supports_sdpa else None


def model_class(config: PretrainedConfig, auto_class: str) -> type[PreTrainedModel]:
    """The class that `auto_class` builds for this configuration.

    Raises:
        UserError: the architecture has no such head.
    """
    import transformers

    mapping = getattr(transformers, auto_class)._model_mapping
    if type(config) not in mapping:
        raise UserError(
            f"architecture '{config.model_type}' has no model for this task",
            where="@model",
            found=auto_class,
            todo="choose an architecture that fits the task: bert, roberta, distilbert for masked-lm; "
            "gpt2, llama, qwen2, glm_blocklm for causal-lm; any of them for classify",
        )
    entry = mapping[type(config)]
    if not isinstance(entry, (tuple, list)):
        return entry
    chosen = [cls for cls in entry if cls.__name__ in (config.architectures or ())]
    return (chosen or list(entry))[0]


def check_head(config: PretrainedConfig, auto_class: str) -> None:
    """Refuse an encoder where a causal model is asked for: its tokens would see the ones they must predict.

    Raises:
        UserError: also when the architecture has no head of this kind, or none for the next sentence.
    """
    cls = model_class(config, auto_class)
    # "For pre-training" means BERT's two heads to some architectures and the language model alone to the others.
    if auto_class == PRE_TRAINING and "next_sentence_label" not in inspect.signature(cls.forward).parameters:
        raise UserError(
            f"architecture '{config.model_type}' has no next-sentence head",
            where="@model",
            found=cls.__name__,
            todo="use bert, or drop data.next_sentence",
        )
    if auto_class == CAUSAL_LM and not is_causal(config, auto_class):
        raise UserError(
            f"architecture '{config.model_type}' attends in both directions and cannot be a causal model",
            where="@model",
            todo="use gpt2, llama, qwen2 or glm_blocklm, or the task masked-lm",
        )


def is_causal(config: PretrainedConfig, auto_class: str) -> bool:
    """Whether a token attends only to earlier ones: decoders, and encoders that say ``is_decoder``.

    GLM does unless it knows how long the part is that it reads in both directions; its classifiers always are.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    name = config.model_type
    if name == GLM:
        return auto_class != CLASSIFIER
    only_decoder = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return bool(getattr(config, "is_decoder", False)) or only_decoder


def _max_positions(config: PretrainedConfig) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:  # no limit of its own (ALiBi)
        return 1 << 30
    return positions - config.pad_token_id - 1 if config.model_type in OFFSET_POSITIONS else positions
