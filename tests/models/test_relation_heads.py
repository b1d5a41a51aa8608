"""MiniLMv2's relations between models of BERT's real widths: 12 heads of a base model against 16 of a large one."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_batch, make_objective
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from mtkd.config.match import Match
from mtkd.data.batch import position_counts
from mtkd.errors import UserError
from mtkd.models.info import MASKED_LM
from mtkd.models.taps import TappedModel

NUM_IDS = 61


def bert(width: int, heads: int, layers: int, seed: int) -> TappedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=NUM_IDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=64, max_position_embeddings=16, attn_implementation="mtkd_tap",
    )  # fmt: skip
    return TappedModel(BertForMaskedLM(config), MASKED_LM, NUM_IDS).eval()


def relations(model: TappedModel, layer: int, ids: Tensor, mask: Tensor, name: str, heads: int) -> Tensor:
    """log softmax(X X^T / sqrt(d)) of the plain module's outputs, 64 heads, [B,R,L,L]."""
    found: list[Tensor] = []
    module = getattr(model.model.bert.encoder.layer[layer].attention.self, name)
    handle = module.register_forward_hook(lambda _m, _i, out: found.append(out))
    model.model(input_ids=ids, attention_mask=mask.long())
    handle.remove()
    x = found[0].unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = (x @ x.mT / x.shape[-1] ** 0.5).masked_fill(~mask[:, None, None], -torch.inf)
    return scores.log_softmax(-1)


def test_12_heads_learn_from_16() -> None:
    student, teacher = bert(768, 12, 1, seed=0), bert(1024, 16, 2, seed=1)
    rows = [
        Match(feature=name, loss="relation_kl", student_layer="last", teacher_layer="last", options={"heads": 64})
        for name in ("query", "key", "value")
    ]
    objective, pool = make_objective(student, [teacher], rows)
    batch = causal_batch([6, 4])
    loss, _ = objective(batch, pool.forward(batch), position_counts([batch]))
    wanted = torch.zeros(())
    for name in ("query", "key", "value"):
        ours = relations(student, 0, batch.input_ids, batch.attention_mask, name, 64)
        theirs = relations(teacher, 1, batch.input_ids, batch.attention_mask, name, 64)
        terms = torch.where(batch.attention_mask[:, None, None], theirs.exp() * (theirs - ours), 0.0).sum(-1).mean(1)
        wanted = wanted + terms[batch.attention_mask].sum() / int(batch.attention_mask.sum())
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)
    loss.backward()
    assert student.model.bert.encoder.layer[0].attention.self.value.weight.grad is not None


def test_48_relation_heads_do_not_divide_a_large_model() -> None:
    """768 / 48 = 16, but 1024 / 48 is not whole: the paper takes 64 for large teachers."""
    rows = [Match(feature="query", loss="relation_kl", options={"heads": 48})]
    with pytest.raises(UserError, match="width 1024"):
        make_objective(bert(768, 12, 1, seed=0), [bert(1024, 16, 1, seed=1)], rows)
