"""Next-sentence rows: both heads of BERT's pre-training against transformers' own, and rows that count sequences."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from model_bank import NUM_IDS, batch, build, description, lively, reference
from tiny import make_objective, rows_of
from torch import Tensor

from mtkd.config.match import Match
from mtkd.data.batch import Batch, position_counts
from mtkd.errors import UserError
from mtkd.models.info import MASKED_LM, PRE_TRAINING, check_head
from mtkd.models.taps import TappedModel

LABELS = Match(feature="nsp_logits", loss="ce", target="labels", weight=0.5)
SOFT = Match(feature="nsp_logits", loss="kl", options={"temperature": 2.0})


def both_heads(seed: int) -> TappedModel:
    model = lively(build(description("bert", layers=2), PRE_TRAINING, seed=seed), seed=seed)
    return TappedModel(model, PRE_TRAINING, NUM_IDS).eval()


def pairs() -> Batch:
    data = batch(types=True)
    data.targets[:, 1] = data.input_ids[:, 1]
    return dataclasses.replace(data, nsp_targets=torch.tensor([0, 1, 1]))


def own(model: TappedModel, data: Batch) -> tuple[Tensor, Tensor]:
    """transformers' own (token logits, next-sentence logits) of the same weights, without taps."""
    plain = reference(model, PRE_TRAINING)
    output = plain(data.input_ids, data.attention_mask.long(), data.token_type_ids)
    return output.prediction_logits, output.seq_relationship_logits


def test_both_heads_are_the_models_own() -> None:
    model, data = both_heads(1), pairs()
    model.verify()
    features = model(data, frozenset({"logits", "nsp_logits"}))
    tokens, follows = own(model, data)
    for key, wanted in (("logits", tokens.flatten(0, 1)), ("nsp_logits", follows)):
        found = features[key]
        assert not isinstance(found, Tensor)
        torch.testing.assert_close(found.rows(torch.arange(len(wanted))), wanted, atol=1e-5, rtol=1e-5)


def test_rows_are_means_over_sequences() -> None:
    student, teachers, data = both_heads(1), [both_heads(2), both_heads(3)], pairs()
    objective, pool = make_objective(student, teachers, [LABELS, SOFT])
    loss, metrics = objective(data, pool.forward(data), position_counts([data]))
    with torch.no_grad():
        s, *t = (own(model, data)[1].double() for model in (student, *teachers))
        assert data.nsp_targets is not None
        hard = -torch.softmax(s, -1)[range(3), data.nsp_targets].log().mean()
        p = [torch.softmax(x / 2, -1) for x in (s, *t)]
        soft = sum(4 * (q * (q / p[0]).log()).sum(-1).mean() for q in p[1:]) / 2
    torch.testing.assert_close(metrics["row/0:nsp_logits:ce"].double(), hard, rtol=1e-4, atol=0)
    torch.testing.assert_close(metrics["row/1:nsp_logits:kl"].double(), soft, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss.detach().double(), 0.5 * hard + soft, rtol=1e-4, atol=0)


def test_micro_batches_and_filler_rows_add_up_to_the_whole() -> None:
    data = pairs()
    objective, pool = make_objective(both_heads(1), [both_heads(2)], [LABELS, SOFT, Match()])

    def gradient(parts: list[Batch]) -> list[Tensor]:
        objective.zero_grad()
        for part in parts:
            objective(part, pool.forward(part), position_counts(parts))[0].backward()
        return [p.grad for p in objective.student.parameters() if p.grad is not None]

    def some(rows: list[int]) -> Batch:
        part = rows_of(data, rows, trim=False)
        assert data.nsp_targets is not None
        chosen = data.nsp_targets[rows] if rows else torch.tensor([-100])
        return dataclasses.replace(part, nsp_targets=chosen)

    whole, cut = gradient([data]), gradient([some([0]), some([]), some([1, 2])])
    assert any(bool(g.any()) for g in whole)
    data.token_type_ids = None
    for ours, theirs in zip(gradient([some([0, 1, 2])]), gradient([some([0]), some([]), some([1, 2])]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(whole) == len(cut)


def test_a_model_without_the_head_gives_no_row() -> None:
    plain = TappedModel(build(description("bert", layers=2), MASKED_LM), MASKED_LM, NUM_IDS)
    with pytest.raises(UserError, match="cannot come from the student"):
        make_objective(plain, [both_heads(2)], [LABELS])
    with pytest.raises(UserError, match="cannot come from the teacher"):
        make_objective(both_heads(1), [plain], [SOFT])


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "gpt2", "llama"])
def test_architectures_without_the_head_are_refused(architecture: str) -> None:
    config = build(description(architecture), MASKED_LM if "bert" in architecture else "AutoModelForCausalLM").config
    with pytest.raises(UserError, match=r"next-sentence head|no model for this task"):
        check_head(config, PRE_TRAINING)


def test_an_incomplete_teacher_is_not_filled_with_noise(tmp_path: Path) -> None:
    build(description("bert", layers=2), MASKED_LM).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="weights are missing"):
        build(str(tmp_path), PRE_TRAINING)
