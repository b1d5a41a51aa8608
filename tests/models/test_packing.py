"""Packed rows against transformers' own eager models that read every example alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_bank import ARCHITECTURES, LM_OF, NUM_IDS, batch, build, description, reference, row, tapped
from torch import Tensor
from transformers import MistralConfig, PhiConfig

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models.features import HeadLogits
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, check_packing, model_info
from mtkd.models.packing import first_fit, make_layout
from mtkd.models.taps import TappedModel

DECODERS = tuple(a for a in ARCHITECTURES if LM_OF[a] == CAUSAL_LM)
MIXES = [(9, 4, 7, 1, 2, 3), (12, 1, 1, 1, 1, 1), (8, 3)]
LAYERED = ("hidden", "query", "key", "value", "scores", "probs")
EVERYTHING = frozenset({"logits", "embedding", "cls.2"} | {f"{name}.{k}" for name in LAYERED for k in (1, 3)})


def packed(architecture: str, **fields: object) -> TappedModel:
    model = tapped(architecture, CAUSAL_LM, **fields)
    model.enable_packing("batch.packing")
    return model


def tokens(features: object) -> Tensor:
    assert isinstance(features, HeadLogits)
    n = features.hidden.shape[0] * features.hidden.shape[1]
    return features.rows(torch.arange(n)).view(*features.hidden.shape[:2], -1)


@pytest.mark.parametrize("lengths", MIXES)
@pytest.mark.parametrize("architecture", DECODERS)
def test_losses_and_gradients_are_those_of_each_example_alone(architecture: str, lengths: tuple[int, ...]) -> None:
    model, data = packed(architecture), batch(lengths)
    layout = make_layout(data.attention_mask, model.info.width)
    assert layout is not None
    assert layout.rows * layout.columns < data.input_ids.numel()
    plain = reference(model, CAUSAL_LM)
    logits = tokens(model(data, frozenset({"logits"}))["logits"])
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(NUM_IDS, data.input_ids.shape, generator=generator)
    ours = theirs = torch.zeros(())
    for i, length in enumerate(lengths):
        ours = ours + torch.nn.functional.cross_entropy(logits[i, :length], targets[i, :length], reduction="sum")
        alone = plain(input_ids=row(data, i).input_ids).logits[0, :, :NUM_IDS]
        theirs = theirs + torch.nn.functional.cross_entropy(alone, targets[i, :length], reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    ours.backward()
    theirs.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.model.named_parameters():
        gradient, other = parameter.grad, expected[name].grad
        assert gradient is not None
        assert other is not None
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()), msg=name)


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_feature_is_that_of_padded_rows(architecture: str) -> None:
    model, data = packed(architecture), batch(MIXES[0])
    found = model(data, EVERYTHING)
    model.packing = False
    expected = model(data, EVERYTHING)
    for key in EVERYTHING:
        ours, theirs = found[key], expected[key]
        if key == "logits":
            ours, theirs = tokens(ours), tokens(theirs)
        assert isinstance(ours, Tensor)
        assert isinstance(theirs, Tensor)
        if ours.dim() == 4:  # [B,A,L,...]: queries, keys and values at real tokens
            ours, theirs = ours.transpose(1, 2), theirs.transpose(1, 2)
        if not key.startswith("cls"):
            ours, theirs = ours[data.attention_mask], theirs[data.attention_mask]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=key)


def test_an_example_does_not_see_the_others_in_its_row() -> None:
    model, data = packed("llama"), batch(MIXES[0])
    layout = make_layout(data.attention_mask, model.info.width)
    assert layout is not None
    assert layout.rows < len(MIXES[0]) - 1
    before = model(data, EVERYTHING)
    for changed in range(len(MIXES[0])):
        other = copy.deepcopy(data)
        other.input_ids[changed] = 5 + (other.input_ids[changed] - 4) % (NUM_IDS - 5)  # every token another
        after = model(other, EVERYTHING)
        rest = [i for i in range(len(MIXES[0])) if i != changed]
        for key in EVERYTHING:
            old, new = before[key], after[key]
            old, new = (tokens(old), tokens(new)) if key == "logits" else (old, new)
            assert isinstance(old, Tensor)
            assert isinstance(new, Tensor)
            assert torch.equal(old[rest], new[rest]), (key, changed)
            assert key.startswith("probs") or not torch.equal(old[changed], new[changed]), (key, changed)


def test_padding_is_zero_and_filler_rows_do_no_harm() -> None:
    model, data = packed("gpt2"), batch((6, 2, 3))
    filled = Batch(
        torch.tensor([0, 1, 2, -1]),
        torch.cat([data.input_ids, torch.ones(1, 6, dtype=torch.int64)]),
        torch.cat([data.attention_mask, torch.arange(6)[None] < 1]),
        torch.cat([data.targets, data.targets[:1]]),
    )
    hidden, alone = (model(b, frozenset({"hidden.3"}))["hidden.3"] for b in (filled, data))
    assert isinstance(hidden, Tensor)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(hidden[:3], alone, rtol=1e-4, atol=1e-5)
    assert not hidden[~filled.attention_mask].any()


def test_recomputed_activations_have_the_same_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = packed("llama").train()
        if checkpointing:
            model.enable_activation_checkpointing()
        features = model(batch(MIXES[0]), frozenset({"logits", "query.2", "hidden.1"}))
        query, hidden = features["query.2"], features["hidden.1"]
        assert isinstance(query, Tensor)
        assert isinstance(hidden, Tensor)
        (tokens(features["logits"]).square().mean() + query.square().mean() + hidden.square().mean()).backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("columns", [20, 25, 60, 1000])
def test_first_fit_places_each_example_once_in_few_rows(columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    lengths = torch.randint(1, 21, (70,), generator=generator).tolist()
    rows = first_fit(lengths, columns)
    assert sorted(e for r in rows for e in r) == list(range(70))
    assert all(sum(lengths[e] for e in r) <= columns for r in rows)
    assert len(rows) <= math.floor(11 / 9 * max(1, math.ceil(sum(lengths) / columns))) + 1
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    layout = make_layout(mask, 64, columns)
    assert layout is not None
    ids = torch.arange(1, 1 + mask.numel()).view(mask.shape)
    assert torch.equal(layout.spread(layout.pack(ids)), ids * mask)
    assert torch.equal(layout.spread(layout.position_ids), torch.arange(20).expand(70, 20) * mask)


def test_full_rows_are_left_as_they_are() -> None:
    assert make_layout(torch.ones(3, 8, dtype=torch.bool), 24) is None


def test_models_that_cannot_be_packed_are_refused() -> None:
    for architecture in ("bert", "llama"):
        with pytest.raises(UserError, match="cannot be run on packed rows"):
            check_packing(model_info(build(description(architecture), CLASSIFIER).config, CLASSIFIER), "x")
    with pytest.raises(UserError, match="both directions"):
        tapped("roberta", LM_OF["roberta"]).enable_packing("stages.a.batch.packing")
    window = MistralConfig(hidden_size=16, num_attention_heads=2, sliding_window=8, num_hidden_layers=1)
    assert "window" in model_info(window, CAUSAL_LM).unpackable
    assert not model_info(MistralConfig(sliding_window=None), CAUSAL_LM).unpackable
    assert not model_info(PhiConfig(), CAUSAL_LM).unpackable


def test_a_model_that_mixes_the_examples_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is said to take the mask and ignores it; whatever its configuration says."""
    model = tapped("llama", CAUSAL_LM)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **inputs: forward(**{**inputs, "attention_mask": None,
                                                                            "position_ids": None}))  # fmt: skip
    assert not model.info.unpackable
    with pytest.raises(UserError, match="mixes the examples"):
        model.enable_packing("stages.a.batch.packing")
    assert not model.packing
