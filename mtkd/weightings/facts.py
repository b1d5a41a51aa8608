"""Facts that a weighting may read besides single traits: one function each, and in its decorator what it is made of.

The function sees the `Traits` of a micro-batch: its `around` has the batch, the student's features, the step's counts
and the Gram matrix. A fact that is made of these costs this one function; `traits.read("name")` reads it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models.features import DenseLogits, Logits, NoLogits, SparseLogits, as_logits
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.weightings.traits import Traits, fact


@fact(traits=("choice",), teachers=True)
def agreement(traits: Traits) -> Tensor:
    """Share of the other teachers whose most probable column is the same, [T,B,L]; 1 for a single teacher."""
    choices = traits.computed("choice")  # [T,*targets.shape]
    same = (choices[:, None] == choices[None]).float().sum(1) - 1
    others = max(traits.num_teachers - 1, 1)
    values = same / others if traits.num_teachers > 1 else torch.ones_like(same)
    # Choices are 0 at positions that do not count: teachers would seem to agree there.
    known = traits.where("choice")
    return traits.averaged(traits.filled(values.masked_fill(~known, 0), known), known)


@fact(teachers=True)
def class_probabilities(traits: Traits) -> Tensor:
    """The teachers' probabilities of the classes, [T,B,C]; C = 0 for token tasks."""
    if traits.mask.dim() == 2:
        return torch.zeros(traits.num_teachers, len(traits.mask), 0, device=traits.mask.device)
    every = torch.arange(len(traits.mask), device=traits.mask.device)  # [B]
    return torch.stack([torch.softmax(logits.rows(every), -1) for logits in traits.logits])


@fact(teachers=True)
def own_mass(traits: Traits) -> Tensor:
    """Probability ``1 - p_k(other)`` over all outputs that an example is of a teacher's own classes, [T,B,1].

    1 for a teacher without an output that means "none of my classes" (`other` of a teacher).
    """
    ones = torch.ones(traits.mask.shape[0], device=traits.mask.device)
    if traits.mask.dim() == 2:
        return ones.expand(traits.num_teachers, -1)[..., None]
    masses = []
    for logits in traits.logits:
        # a wrapper that hides the outputs would make a specialist claim everything, silently
        assert isinstance(logits, DenseLogits | NoLogits), f"class logits exist whole; found {type(logits).__name__}"
        masses.append(logits.own_mass() if isinstance(logits, DenseLogits) else ones)
    return torch.stack(masses)[..., None]


@fact(student=("logits",))
def student_uncertainty(traits: Traits) -> Tensor:
    """Entropy of the student's distribution as a share of the largest one, log V: 0 to 1, [B,L]; detached."""
    student = _student(traits)
    known = traits.where("entropy", cached=isinstance(student, SparseLogits))
    values = traits.filled(traits.of(student, "entropy", known)[None], known)  # [1,*targets.shape]
    return (traits.averaged(values, known)[0] / math.log(max(student.num_columns, 2))).clamp(0, 1)


@fact(student=("logits",))
def student_loss(traits: Traits) -> Tensor:
    """The student's mean loss on each example's labels before the step, [B]; 0 without labels; detached."""
    values = traits.of(_student(traits), "ce", traits.mask)  # [*targets.shape]
    return values.sum(-1) / traits.mask.sum(-1).clamp_min(1) if values.dim() == 2 else values


@fact(student=("hidden",))
def pooled(traits: Traits) -> Tensor:
    """Mean of the student's last hidden states over an example's unpadded tokens, [B,H]; detached."""
    hidden, mask = traits.around.student["hidden"], traits.around.batch.attention_mask[..., None]  # [B,L,H], [B,L,1]
    assert isinstance(hidden, Tensor)
    return hidden.float().masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1)


@fact(prepared=True)
def route(traits: Traits) -> Tensor:
    """Number of the teacher that the data names for each example, [B]; -1 in filler rows."""
    routes = traits.around.batch.routes
    assert routes is not None
    return routes


@fact(teachers=True, prepared=True)
def gram(traits: Traits) -> Tensor:
    """Inner products of the teachers' loss gradients with respect to the student's logits, [T,T] float64.

    Of the whole optimizer step, all micro-batches and ranks together: the same for every micro-batch.
    """
    assert traits.around.gram is not None
    return traits.around.gram


@fact(teachers=True, text=True)
def token_log_probs(traits: Traits) -> Tensor:
    """Log-probability of the token that stands at each position, given those before it, [T,B,L] float32, nats.

    Of every unpadded token, prompts included, at temperature 1. It is 0 for the first token of an example, which
    nothing predicts, and at padding. Position l predicts the token at l + 1: a weight there that reads no further than
    l does not see what it weighs. A token that a teacher holds impossible has the lowest finite number.

    Raises: UserError for a task of classes.
    """
    batch = traits.around.batch
    if batch.targets.dim() == 1:
        raise UserError(
            "the tokens of a text have log-probabilities under language models alone", where="@stage.weighting"
        )
    values = [text_log_probs(logits, batch, traits.tile, traits.pieces) for logits in traits.logits]
    return torch.stack(values).clamp_min(torch.finfo(torch.float32).min)


@torch.no_grad()
def text_log_probs(logits: Logits, batch: Batch, tile: int, pieces: Pieces = EVERY_PIECE) -> Tensor:
    """One teacher's `token_log_probs`, [B,L]; a tile of logits exists at a time."""
    if isinstance(logits, SparseLogits):
        return logits.text_fact("token_log_probs")
    real, index = batch.token_mask, batch.where(_followed)  # [B,L], [n]
    after = index + 1  # in the same example: none of its last column is among `index`
    tokens, values = batch.input_ids.reshape(-1)[after], torch.zeros(real.numel(), device=real.device)
    for piece in pieces.of(len(index), tile):
        rows = logits.rows(index[piece])  # [m,V]
        values[after[piece]] = -nn.functional.cross_entropy(rows, tokens[piece], reduction="none")
    return values.view(real.shape)


def _followed(batch: Batch) -> Tensor:
    """Unpadded tokens that have another one after them, [B,L] bool."""
    real = batch.token_mask
    return nn.functional.pad(real[:, :-1] & real[:, 1:], (0, 1))


def _student(traits: Traits) -> Logits:
    return as_logits(traits.around.student["logits"])
