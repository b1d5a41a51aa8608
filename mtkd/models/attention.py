"""One attention function for all architectures: it sees query, key, value and mask, and calls the library's SDPA.

It is registered with transformers under the name "mtkd_tap", together with the mask that SDPA expects. It sees query
and key *after* rotary embedding. Nothing is kept unless a recorder is active, and a recorder is active only inside
`TappedModel.forward`: what activation checkpointing recomputes in the backward pass is not recorded a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mtkd.errors import UserError
from mtkd.models.info import TAP


@dataclass
class AttentionCall:
    """The operands of one layer's attention: references into the forward pass, not copies.

    Attributes:
        query: [B,A,L,D].
        key, value: [B,G,L,D], G = A unless heads are grouped.
        mask: bool (True = attend) or additive, broadcastable to [B,A,L,L]; None with `causal` for a plain triangle.
        bias: additive position bias, broadcastable to [B,A,L,L], or None.
        scaling: factor of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    scaling: float

    def scores(self) -> Tensor:
        """QK^T * scaling, -inf where a query must not look; grouped keys are repeated. [B,A,L,L] float32."""
        with torch.autocast(self.query.device.type, enabled=False):
            key = self.key.float().repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
            scores = self.query.float() @ key.transpose(-1, -2) * self.scaling
            if self.bias is not None:
                scores = scores + self.bias.float()
            if self.mask is None:
                blocked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
                return scores.masked_fill(blocked, -torch.inf) if self.causal else scores
            if self.mask.dtype == torch.bool:
                return scores.masked_fill(~self.mask, -torch.inf)
            # An additive mask blocks with the lowest number of its dtype, which is not infinity.
            blocked = self.mask <= torch.finfo(self.mask.dtype).min / 2
            return (scores + self.mask.float().masked_fill(blocked, 0)).masked_fill(blocked, -torch.inf)

    def probs(self) -> Tensor:
        """softmax(scores) over keys; zeros, not NaN, for a query that may look at nothing. [B,A,L,L] float32."""
        scores = self.scores()
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(nothing, 0), -1).masked_fill(nothing, 0)

    def feature(self, name: str) -> Tensor:
        """An operand as it is, or scores and probs computed from them outside the model's forward pass."""
        if name == "scores":
            return self.scores()
        if name == "probs":
            return self.probs()
        return {"query": self.query, "key": self.key, "value": self.value}[name]


@dataclass
class Recorder:
    """What one forward pass leaves behind.

    Attributes:
        layers: attention layers to keep, counted from 1 in the order of their calls (ALBERT calls one module N times).
        calls: the kept ones.
        num_calls: how many attentions there were.
        head_input: what the output head was given, [B,L,H].
        whole_logits: whether the head also computes them.
        head: weight and bias of a sharded teacher's output head, whole; None where the parameters can be read later.
        last: position of the token that a decoder's classifier reads, [B]; None for other models.
        padded: whether a row of the batch has padding; None where the masks themselves must be asked.
    """

    layers: frozenset[int]
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    num_calls: int = 0
    head_input: Tensor | None = None
    whole_logits: bool = False
    head: tuple[Tensor, Tensor | None] | None = None
    last: Tensor | None = None
    padded: bool | None = None

    def spread(self, hidden: Callable[[Tensor], Tensor], call: Callable[[AttentionCall], AttentionCall]) -> Recorder:
        """What was recorded on packed rows, put back where the examples are in the batch."""
        if any(recorded.bias is not None for recorded in self.calls.values()):
            raise UserError(
                "attention with a position bias cannot be recorded on packed rows", where="@stage.batch.packing"
            )
        head_input = None if self.head_input is None else hidden(self.head_input)
        calls = {layer: call(recorded) for layer, recorded in self.calls.items()}
        return Recorder(self.layers, calls, self.num_calls, head_input, head=self.head)


_active: ContextVar[Recorder | None] = ContextVar("mtkd_recorder", default=None)


@contextmanager
def recording(recorder: Recorder | None) -> Iterator[None]:
    """Within it the tap and the tapped heads write into `recorder`; None switches them off."""
    token = _active.set(recorder)
    try:
        yield
    finally:
        _active.reset(token)


def active_recorder() -> Recorder | None:
    """The recorder of the forward pass that is running, if any."""
    return _active.get()


def tap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,  # transformers' attention interface
) -> tuple[Tensor, None]:
    """Record the operands if this layer is asked for, then attend with SDPA."""
    recorder = _active.get()
    if recorder is not None:
        recorder.num_calls += 1
        if recorder.num_calls in recorder.layers:
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            scaling = kwargs.get("scaling")
            recorder.calls[recorder.num_calls] = AttentionCall(
                query,
                key,
                value,
                attention_mask,
                kwargs.get("position_bias"),
                causal=bool(causal) and attention_mask is None and query.shape[2] > 1,
                scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            )
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def tap_mask(*, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:  # transformers' mask interface
    """The mask for SDPA, which is left out where no row is padded, as transformers does.

    transformers asks the mask itself, so that a GPU is waited for twice in every forward pass. Here the batch is known
    on the host.
    """
    recorder = _active.get()
    padded = None if recorder is None or torch.compiler.is_compiling() else recorder.padded
    if attention_mask is not None and padded is False:
        attention_mask = None
    elif attention_mask is not None and padded:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


def use_attention(kernel: str, device: str, precision: str = "fp32") -> None:
    """Let scaled dot product attention use one kernel only, or ("auto") the one that torch chooses.

    For the whole process, not around a forward pass: activation checkpointing runs the forward again in the backward.

    Raises:
        UserError: the device has no such kernel.
    """
    if kernel == "efficient" and device == "cpu":
        raise UserError(
            "memory-efficient attention exists on GPUs only",
            where="engine.attention",
            found=kernel,
            allowed=["auto", "flash", "math"],
        )
    if kernel == "flash" and device == "cuda" and precision == "fp32":
        raise UserError(
            "flash attention has no kernel for fp32 on a GPU",
            where="engine.attention",
            found=kernel,
            allowed=["auto", "efficient", "math"],
            todo="use precision: bf16, or another kernel",
        )
    for name, switch in _ATTENTION_SWITCHES.items():
        switch(kernel in ("auto", name))


# torch keeps these under `cuda`, and heeds flash and math on a CPU too. cuDNN's kernel belongs to "auto" alone.
_ATTENTION_SWITCHES = {
    "flash": torch.backends.cuda.enable_flash_sdp,
    "efficient": torch.backends.cuda.enable_mem_efficient_sdp,
    "math": torch.backends.cuda.enable_math_sdp,
    "cudnn": torch.backends.cuda.enable_cudnn_sdp,
}


AttentionInterface.register(TAP, tap_attention)
AttentionMaskInterface.register(TAP, tap_mask)
