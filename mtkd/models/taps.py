"""A transformers model that gives the canonical features of `mtkd.models.features`, and only those that are asked for.

Token-level logits are never computed here: the output head hands on its input, and `HeadLogits` multiplies it with the
head's weight for the rows somebody reads.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.errors import UserError, nearest
from mtkd.models.attention import AttentionCall, Recorder, recording
from mtkd.models.broken import overflowing_model
from mtkd.models.features import ATTENTION, DenseLogits, Features, HeadLogits, split_key
from mtkd.models.forward import number_format
from mtkd.models.headcalls import head_forward, last_position, pooled_forward
from mtkd.models.heads import output_layer, stand_in_pad
from mtkd.models.info import GLM, PRE_TRAINING, TAP, TOKEN_LEVEL, check_packing, model_info
from mtkd.models.packing import Layout, make_layout
from mtkd.models.vocabulary import VocabularyMap

VERIFY_TOLERANCE = 1e-3
"""Largest difference between our logits and the model's own, relative to its largest logit."""

LOW_TOLERANCE = 3e-2
"""Of two ways through a model whose matrices are bfloat16."""


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
        columns: of a classifier: the outputs that are its logits, in this order; None for all.

    Attributes:
        info: shape and capabilities.
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
        columns: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.packing = False
        self.info = model_info(model.config, auto_class)
        if model.config._attn_implementation != TAP:  # built by somebody else: no recorder would ever be called
            self.info = dataclasses.replace(self.info, taps=self.info.taps - set(ATTENTION))
        self._chosen = None if columns is None else torch.tensor(columns)
        self._outputs = self.info.num_labels
        if columns is not None:
            self.info = dataclasses.replace(self.info, num_labels=len(columns))
        self.num_ids = num_ids if vocabulary is None else vocabulary.num_kept
        self.token_level = auto_class in TOKEN_LEVEL
        self._two_heads = auto_class == PRE_TRAINING
        self._transform = head_transform(model.config)
        parameters = inspect.signature(model.forward).parameters
        # GPT-2 would add token types to the *word* embeddings; RoBERTa has a table of one row.
        types = getattr(model.config, "type_vocab_size", 0) or 0
        self._takes_types = "token_type_ids" in parameters and types > 1
        # Heads hand their keyword arguments on to the encoder or decoder, which would fill a cache by default.
        self._takes_parts = "sep" in parameters
        self._takes_cache = "use_cache" in inspect.signature(model.base_model.forward).parameters
        if self.token_level:
            if self.info.vocabulary < self.num_ids:
                raise UserError(
                    "the model has fewer embeddings than the tokenizer has ids",
                    where="@model",
                    found=self.info.vocabulary,
                    allowed=f"at least {self.num_ids}",
                )
            self._head().forward = MethodType(head_forward, self._head())  # type: ignore[method-assign]
        # GLM's classifier finds its first token by the mask
        self._pools_last = not self.token_level and self.info.causal and model.config.model_type != GLM
        if self._pools_last:
            stand_in_pad(model.config)
            layer = output_layer(model)
            layer.forward = MethodType(pooled_forward, layer)  # type: ignore[method-assign]

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of a batch of B sequences of L tokens.

        Args:
            wants: feature keys such as "logits", "hidden.4", "probs.2".

        Raises:
            UserError: a feature this model cannot give.
        """
        layout = make_layout(batch.attention_mask, self.info.width) if self.packing else None
        return self._features(batch, wants, layout)

    def _features(self, batch: Batch, wants: frozenset[str], layout: Layout | None) -> Features:
        keys = {key: split_key(key) for key in wants}
        self._check(keys)
        depths = sorted(self._depth(name, layer) for name, layer in keys.values() if name in _HIDDEN)
        attention = frozenset(layer for name, layer in keys.values() if name in ATTENTION and layer is not None)
        recorder = Recorder(attention)
        inputs = self._inputs(batch, layout)
        if depths:
            inputs["output_hidden_states"] = depths  # the others are not kept
        recorder.last = last_position(inputs, self.model.config) if self._pools_last else None
        with recording(recorder):
            output = self.model(**inputs)
        self._check_calls(recorder)
        if layout is not None:
            recorder = recorder.spread(layout.spread, layout.spread_call)
        features: Features = {}
        for key, (name, layer) in keys.items():
            if name == "logits":
                features[key] = self._logits(recorder, output)
            elif name == "nsp_logits":
                features[key] = DenseLogits(output.seq_relationship_logits)
            elif name in _HIDDEN:
                hidden = output.hidden_states[self._depth(name, layer)]
                hidden = hidden if layout is None else layout.spread(hidden)
                features[key] = hidden[:, 0] if name == "cls" else hidden
            else:
                assert layer is not None
                features[key] = _attention_feature(recorder.calls[layer], name)
        return features

    def _check_calls(self, recorder: Recorder) -> None:
        if recorder.layers and recorder.num_calls != self.info.num_layers:
            raise UserError(
                "attention features cannot be numbered: the model's layers do not attend once each",
                where="@model",
                found=f"{recorder.num_calls} attentions in {self.info.num_layers} layers",
            )

    @property
    def output_head(self) -> tuple[nn.Parameter, nn.Parameter | None] | None:
        """Weight [V,H] and bias [V] of a token-level head; None for a classification model."""
        if not self.token_level:
            return None
        head = self._head()
        assert isinstance(head.weight, nn.Parameter)
        return head.weight, head.bias

    @property
    def embedding_table(self) -> Tensor:
        """The input embedding by run id, [>= V,H]."""
        table = input_table(self.model)
        return table if self.vocabulary is None else table[self.vocabulary.to_kept]

    def enable_activation_checkpointing(self) -> None:
        """Recompute each layer in the backward pass.

        Non-reentrant: the reentrant form drops the gradient of a feature that is tapped inside a layer, silently.

        Raises:
            UserError: the architecture does not support it.
        """
        settings = {"use_reentrant": False}
        if not self.model.supports_gradient_checkpointing:
            raise UserError(
                f"architecture '{self.info.architecture}' cannot recompute its activations",
                where="engine.activation_checkpointing",
                todo="set it to false",
            )
        if hasattr(self.model, "activation_checkpointing_enable"):  # the name since transformers 5.2x
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

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
        training = self.training
        self.eval()
        try:
            batch = self._few_tokens((3, 1, 2))
            key = f"hidden.{self.info.num_layers}"
            layout = make_layout(batch.attention_mask, self.info.width, columns=6)
            packed, padded = (self._features(batch, frozenset({key}), x)[key] for x in (layout, None))
            assert isinstance(packed, Tensor)
            assert isinstance(padded, Tensor)
            largest = padded[batch.attention_mask].abs().max().clamp_min(1e-30)
            difference = float((packed - padded)[batch.attention_mask].abs().max() / largest)
        finally:
            self.train(training)
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
        training = self.model.training
        self.model.eval()
        try:
            batch = self._few_tokens((2,))
            last = self.info.num_layers
            recorder = Recorder(frozenset({last} if "query" in self.info.taps else ()), whole_logits=True)
            inputs = self._inputs(batch, None)
            recorder.last = last_position(inputs, self.model.config) if self._pools_last else None
            with recording(recorder), number_format(batch.input_ids.device.type, dtype):  # once: it may read 20 GB
                output = self.model(**inputs, output_hidden_states=[last])
            self._check_calls(recorder)
            ours = self._logits(recorder, output).in_dtype(torch.float32)
            whole = output.prediction_logits if self._two_heads else output.logits
            theirs = self._select(whole.float().reshape(-1, self._columns()))[:, : self.num_columns]
            index = torch.arange(theirs.shape[0], device=theirs.device)
            difference = float((ours.rows(index) - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        finally:
            self.model.train(training)
        if not theirs.isfinite().all():
            raise overflowing_model("@model", dtype)
        if not difference <= VERIFY_TOLERANCE:
            raise UserError(
                f"architecture '{self.info.architecture}' changes its logits after its head as mtkd does not know",
                where="@model",
                found=f"relative difference {difference:.2g}",
                allowed=f"at most {VERIFY_TOLERANCE}",
                todo="add the rule to head_transform in mtkd/models/taps.py",
            )

    @property
    def num_columns(self) -> int:
        """Columns of the logits: real token ids (kept ones, of a compressed vocabulary), or classes."""
        return self.num_ids if self.token_level else self.info.num_labels

    def _columns(self) -> int:
        return self.info.vocabulary if self.token_level else self._outputs

    def _select(self, logits: Tensor) -> Tensor:
        """The outputs that count, [..., C]; the others never reach a softmax."""
        return logits if self._chosen is None else logits.index_select(-1, self._chosen.to(logits.device))

    def _few_tokens(self, lengths: tuple[int, ...]) -> Batch:
        """Examples of the first real ids in turn, padded on the right."""
        pad = self.model.config.pad_token_id
        real = [i for i in range(min(self.info.vocabulary, 4)) if i != pad]
        device = next(self.model.parameters()).device
        size = max(lengths)
        tokens = torch.tensor([[real[(r + c) % len(real)] for c in range(size)] for r in range(len(lengths))])
        mask = torch.arange(size) < torch.tensor(lengths)[:, None]
        batch = Batch(torch.arange(len(lengths)), tokens, mask, torch.full_like(tokens, NO_LABEL))
        return batch.to(device)

    def _head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"architecture '{self.info.architecture}' has no linear output head", where="@model", found=type(head)
            )
        return head

    def _inputs(self, batch: Batch, layout: Layout | None) -> dict[str, Any]:
        ids = batch.input_ids if self.vocabulary is None else self.vocabulary.inputs(batch.input_ids)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": batch.attention_mask.long()}
        if layout is not None:
            # a mask of four dimensions is taken as it is, by every model that makes its own with transformers' helpers
            inputs = {"input_ids": layout.pack(ids), "attention_mask": layout.mask, "position_ids": layout.position_ids}
        elif self._takes_types and batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        if batch.sep is not None:
            if layout is not None or not self._takes_parts:
                raise UserError(
                    "examples in two parts are for GLM, on rows of their own",
                    where="@model",
                    found=f"architecture '{self.info.architecture}'" + (", packed rows" if layout is not None else ""),
                )
            inputs |= {"position_ids": batch.position_ids, "sep": batch.sep}
        if self._takes_cache:
            inputs["use_cache"] = False
        return inputs

    def _logits(self, recorder: Recorder, output: Any) -> DenseLogits | HeadLogits:
        if not self.token_level:
            return DenseLogits(self._select(output.logits))
        if recorder.head_input is None:
            raise UserError(f"architecture '{self.info.architecture}' never called its output head", where="@model")
        head = self._head()
        if recorder.head is None:
            return HeadLogits(recorder.head_input, head.weight, head.bias, self.num_ids, self._transform)
        weight, bias = recorder.head
        return HeadLogits(recorder.head_input, weight, bias, self.num_ids, self._transform)

    def _depth(self, name: str, layer: int | None) -> int:
        return 0 if name == "embedding" or layer is None else layer

    def _check(self, keys: dict[str, tuple[str, int | None]]) -> None:
        for key, (name, layer) in keys.items():
            if name not in self.info.taps:
                raise UserError(
                    f"architecture '{self.info.architecture}' cannot give this feature",
                    where="@model",
                    found=key,
                    allowed=sorted(self.info.taps),
                    todo=nearest(name, self.info.taps),
                )
            lowest = 1 if name in ATTENTION else 0
            if layer is not None and not lowest <= layer <= self.info.num_layers:
                raise UserError(
                    "no such layer", where="@model", found=key, allowed=f"{lowest} to {self.info.num_layers}"
                )


_HIDDEN = ("hidden", "cls", "embedding")


def _attention_feature(call: AttentionCall, name: str) -> Tensor:
    """A recorded operand as it is, or scores and probs computed from them outside the model's forward pass."""
    if name == "scores":
        return call.scores()
    if name == "probs":
        return call.probs()
    return {"query": call.query, "key": call.key, "value": call.value}[name]


def input_table(model: PreTrainedModel) -> Tensor:
    """The weight of the input embedding, [V_padded,H]."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


def _soft_cap(logits: Tensor, *, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _scale(logits: Tensor, *, factor: float) -> Tensor:
    return logits * factor


def head_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """What the architecture does to its logits after the head: a soft cap, a factor, or nothing.

    Gemma 2 and 3 cap (``final_logit_softcapping``), Cohere multiplies (``logit_scale``), Granite divides
    (``logits_scaling``), Falcon-H1 multiplies (``lm_head_multiplier``). `TappedModel.verify` finds what is missing.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return partial(_soft_cap, cap=float(cap))
    if config.model_type.startswith("granite") and getattr(config, "logits_scaling", None):
        return partial(_scale, factor=1 / float(config.logits_scaling))
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None):
            return partial(_scale, factor=float(getattr(config, name)))
    return None
