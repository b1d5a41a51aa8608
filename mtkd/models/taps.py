"""A transformers model that gives the features of `mtkd.models.features`, and only those that are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mtkd.data.batch import Batch
from mtkd.errors import UserError, nearest
from mtkd.models.attention import Recorder, recording
from mtkd.models.broken import overflowing_model
from mtkd.models.classes import ClassMap
from mtkd.models.features import ATTENTION, DenseLogits, Features, split_key
from mtkd.models.forward import number_format
from mtkd.models.info import TAP, ModelInfo, check_packing, model_info
from mtkd.models.inputs import Inputs, few_tokens
from mtkd.models.packing import Layout, make_layout
from mtkd.models.predictions import Predictions
from mtkd.models.vocabulary import VocabularyMap

VERIFY_TOLERANCE = 1e-3
"""Largest difference between our logits and the model's own, relative to its largest logit."""

LOW_TOLERANCE = 3e-2
"""Of two ways through a model whose matrices are bfloat16."""

_HIDDEN = ("hidden", "cls", "embedding")


class TappedModel(nn.Module):
    """A model with taps.

    ``key`` and ``value`` features keep their own number of heads where heads are grouped (``info.num_kv_heads``);
    ``scores`` and ``probs`` repeat them to ``info.num_heads``. ``hidden.k`` is exactly ``output_hidden_states[k]``: the
    last one is after the final normalisation in pre-norm models (GPT-2, Llama, Qwen2).

    Args:
        model: a plain encoder or decoder with a head, as `mtkd.models.load.build_model` makes it.
        auto_class: the auto class of that head, e.g. "AutoModelForMaskedLM".
        num_ids: real token ids; columns of the vocabulary at and after it are padding and never reach a softmax.
        vocabulary: of a model with a compressed one; batches keep the run's ids, its logits have the kept columns.
        classes: of a classifier: which of its outputs are its logits; None for all, in their order.

    Attributes:
        info: shape and capabilities.
        num_ids: columns of token-level logits.
        packing: whether batches run on packed rows; set by `enable_packing`.

    Raises:
        UserError: fewer columns than ids, or an output head that is not linear.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        auto_class: str,
        num_ids: int,
        vocabulary: VocabularyMap | None = None,
        classes: ClassMap | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.packing = False
        self.num_ids = num_ids if vocabulary is None else vocabulary.num_kept
        self.info = model_info(model.config, auto_class)
        if model.config._attn_implementation != TAP:  # transformers' own: no recorder would ever be called
            self.info = dataclasses.replace(self.info, taps=self.info.taps - set(ATTENTION))
        self.inputs = Inputs(model, vocabulary)
        self.predictions = Predictions(model, auto_class, self.info, self.num_ids, classes)
        self.token_level = self.predictions.token_level
        if classes is not None:
            self.info = dataclasses.replace(self.info, num_labels=len(classes.classes))

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of a batch of B sequences of L tokens.

        Args:
            wants: feature keys such as "logits", "hidden.4", "probs.2".

        Raises:
            UserError: a feature this model cannot give.
        """
        layout = None
        if self.packing:
            layout = make_layout(batch.attention_mask, self.info.width, on_host=batch.on_host.attention_mask)
        return self._features(batch, wants, layout)

    def _features(self, batch: Batch, wants: frozenset[str], layout: Layout | None) -> Features:
        keys = {key: split_key(key) for key in wants}
        _check_keys(keys, self.info)
        depths = sorted({layer or 0 for name, layer in keys.values() if name in _HIDDEN})
        inputs = self.inputs.of(batch, layout)
        if depths:
            inputs["output_hidden_states"] = depths  # the others are not kept
        layers = frozenset(layer for name, layer in keys.values() if name in ATTENTION and layer)
        recorder = Recorder(layers, padded=not bool(batch.on_host.attention_mask.all()))
        output = self._run(inputs, recorder)
        if layout is not None:
            recorder = recorder.spread(layout.spread, layout.spread_call)
        features: Features = {}
        for key, (name, layer) in keys.items():
            if name == "logits":
                features[key] = self.predictions.logits(recorder, output)
            elif name == "nsp_logits":
                features[key] = DenseLogits(output.seq_relationship_logits)  # [B,2]
            elif name in _HIDDEN:
                hidden = output.hidden_states[layer or 0]  # [B,L,H], of packed rows [R,C,H]
                hidden = hidden if layout is None else layout.spread(hidden)
                features[key] = hidden[:, 0] if name == "cls" else hidden
            else:
                assert layer is not None
                features[key] = recorder.calls[layer].feature(name)
        return features

    def _run(self, inputs: dict[str, Any], recorder: Recorder) -> Any:
        """The model's own output; what was asked of `recorder` is in it then."""
        recorder.last = self.predictions.last(inputs)
        with recording(recorder):
            output = self.model(**inputs)
        if recorder.layers and recorder.num_calls != self.info.num_layers:
            raise UserError(
                "attention features cannot be numbered: the model's layers do not attend once each",
                where="@model",
                found=f"{recorder.num_calls} attentions in {self.info.num_layers} layers",
            )
        return output

    @property
    def output_head(self) -> tuple[nn.Parameter, nn.Parameter | None] | None:
        """Weight [V,H] and bias [V] of a token-level head; None for a classification model."""
        if not self.token_level:
            return None
        head = self.predictions.head
        assert isinstance(head.weight, nn.Parameter)
        return head.weight, head.bias

    @property
    def embedding_table(self) -> Tensor:
        """The input embedding by run id, [>= V,H]."""
        table = input_table(self.model)
        return table if self.vocabulary is None else table[self.vocabulary.to_kept]

    @property
    def num_columns(self) -> int:
        """Columns of the logits: real token ids (kept ones, of a compressed vocabulary), or classes."""
        return self.num_ids if self.token_level else self.info.num_labels

    def enable_activation_checkpointing(self) -> None:
        """Recompute each layer in the backward pass.

        Non-reentrant: the reentrant form drops the gradient of a feature that is tapped inside a layer, silently.

        Raises:
            UserError: the architecture does not support it.
        """
        _recompute_layers(self.model)

    def compile_model(self) -> None:
        """Run the transformers model through torch.compile; parameters and their names stay.

        The tap's recorder breaks the graph once per attention, and is read outside the compiled parts: features are
        right with and without taps, at 3e-6 of the plain model's. Shapes are dynamic: lengths differ from batch to
        batch. Measured on 2 cores (Llama 4x512, 4 x 256 tokens): within 3 % of the plain forward, after 27 s.
        """
        self.model.compile(dynamic=True)

    @torch.no_grad()
    def enable_packing(self, where: str, tolerance: float = VERIFY_TOLERANCE) -> None:
        """Run batches on packed rows from now on, where that needs fewer products than padding.

        Three short examples in one row are compared with the same ones padded; for a whole model, before an engine
        shards it.

        Args:
            where: the stage's `batch.packing`, for messages.
            tolerance: relative; bfloat16 needs `LOW_TOLERANCE`.
        Raises:
            UserError: an architecture that cannot be run so.
        """
        check_packing(self.info, where)
        with evaluating(self):
            batch = few_tokens(self.model, self.info.vocabulary, (3, 1, 2))
            key = f"hidden.{self.info.num_layers}"
            layout = make_layout(batch.attention_mask, self.info.width, columns=6)
            hidden = [self._features(batch, frozenset({key}), rows)[key] for rows in (layout, None)]
        # [n,H] of the n real tokens, packed and padded
        packed, padded = (h[batch.attention_mask] for h in hidden if isinstance(h, Tensor))
        difference = _relative_difference(packed, padded)
        if not difference <= tolerance:
            raise UserError(
                f"architecture '{self.info.architecture}' mixes the examples of a packed row",
                where=where,
                found=f"relative difference {difference:.2g}",
                allowed=f"at most {tolerance}",
                todo="drop packing",
            )
        self.packing = True

    @torch.no_grad()
    def verify(self, dtype: torch.dtype = torch.float32) -> None:
        """Compare with the model's own output on two tokens; for a whole model, right after loading.

        Args:
            dtype: bfloat16 runs the model under autocast; the head's product is in float32 in any case.
        Raises:
            DataError: the logits are not finite.
            UserError: they differ by more than `VERIFY_TOLERANCE`, or attention features cannot be numbered.
        """
        with evaluating(self.model):
            batch, last = few_tokens(self.model, self.info.vocabulary, (2,)), self.info.num_layers
            recorder = Recorder(frozenset({last} if "query" in self.info.taps else ()), whole_logits=True)
            inputs = self.inputs.of(batch, None) | {"output_hidden_states": [last]}
            with number_format(batch.input_ids.device.type, dtype):  # once: it may read 20 GB
                output = self._run(inputs, recorder)
            logits = self.predictions.logits(recorder, output).in_dtype(torch.float32)
            whole = self.predictions.whole(output, self.num_columns)  # [n,V] or [n,C]
            difference = _relative_difference(logits.rows(torch.arange(whole.shape[0], device=whole.device)), whole)
        if not whole.isfinite().all():
            raise overflowing_model("@model", dtype)
        if not difference <= VERIFY_TOLERANCE:
            raise UserError(
                f"architecture '{self.info.architecture}' changes its logits after its head as mtkd does not know",
                where="@model",
                found=f"relative difference {difference:.2g}",
                allowed=f"at most {VERIFY_TOLERANCE}",
                todo="add the rule to head_transform in mtkd/models/predictions.py",
            )


def input_table(model: PreTrainedModel) -> Tensor:
    """The weight of the input embedding, [V_padded,H]."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


def _recompute_layers(model: PreTrainedModel) -> None:
    settings = {"use_reentrant": False}
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"architecture '{model.config.model_type}' cannot recompute its activations",
            where="engine.activation_checkpointing",
            todo="set it to false",
        )
    if hasattr(model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it a module is in eval mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _relative_difference(values: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected value; nan where one is not a number."""
    return float((values - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _check_keys(keys: dict[str, tuple[str, int | None]], info: ModelInfo) -> None:
    for key, (name, layer) in keys.items():
        if name not in info.taps:
            raise UserError(
                f"architecture '{info.architecture}' cannot give this feature",
                where="@model",
                found=key,
                allowed=sorted(info.taps),
                todo=nearest(name, info.taps),
            )
        lowest = 1 if name in ATTENTION else 0
        if layer is not None and not lowest <= layer <= info.num_layers:
            raise UserError("no such layer", where="@model", found=key, allowed=f"{lowest} to {info.num_layers}")
