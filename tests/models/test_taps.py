"""Taps against the models' own outputs: eager attention, output_hidden_states, hooks on the projections, own logits."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from model_bank import (
    ARCHITECTURES,
    EVERY_HEAD,
    LM_OF,
    NUM_IDS,
    batch,
    build,
    description,
    lively,
    reference,
    row,
    tapped,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models import attention, predictions
from mtkd.models.features import DenseLogits, Features, HeadLogits
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, MASKED_LM, attention_implementation
from mtkd.models.taps import TappedModel

LAYERS = 3
EVERYTHING = frozenset(
    {"logits", "embedding"}
    | {f"{name}.{k}" for name in ("hidden", "cls") for k in range(LAYERS + 1)}
    | {f"{name}.{k}" for name in ("query", "key", "value", "scores", "probs") for k in range(1, LAYERS + 1)}
)


def own_outputs(model: TappedModel, auto_class: str, data: Batch) -> tuple[object, dict[str, Tensor]]:
    """The eager model's outputs, and what its query, key and value projections returned."""
    plain = reference(model, auto_class)
    recorded: dict[str, Tensor] = {}

    def keep(key: str) -> object:
        return lambda module, args, output: recorded.__setitem__(key, output)

    ends = {
        "query": ("query", "q_lin", "q_proj"),
        "key": ("key", "k_lin", "k_proj"),
        "value": ("value", "v_lin", "v_proj"),
    }
    for name, module in plain.named_modules():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        for kind, suffixes in ends.items():
            if name.split(".")[-1] in suffixes:
                module.register_forward_hook(keep(f"{kind}.{layer + 1}"))
        if name.endswith(("c_attn", "query_key_value")):
            module.register_forward_hook(keep(f"fused.{layer + 1}"))
    inputs = {"input_ids": data.input_ids, "attention_mask": data.attention_mask.long()}
    if model.info.architecture == "bert" and data.token_type_ids is not None:
        inputs["token_type_ids"] = data.token_type_ids
    with torch.no_grad():
        output = plain(**inputs, output_hidden_states=True, output_attentions=True)
    for k in range(1, LAYERS + 1):
        if f"fused.{k}" in recorded:
            for kind, part in zip(ends, recorded[f"fused.{k}"].chunk(3, -1), strict=True):
                recorded[f"{kind}.{k}"] = part
    return output, recorded


def split_heads(projected: Tensor, heads: int) -> Tensor:
    """[B,L,A*D] -> [B,A,L,D]."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding written as complex numbers: (x_j, x_{j+D/2}) turns by t * theta^(-2j/D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_every_feature_equals_the_models_own(
    architecture: str, auto_class: str, padded: bool, checkpointing: bool
) -> None:
    model = tapped(architecture, auto_class)
    data = batch(types=True) if padded else batch((9, 9, 9), types=True)
    own, projections = own_outputs(model, auto_class, data)
    if checkpointing:
        model.enable_activation_checkpointing()
        model.train()  # dropout is 0: layers are recomputed only in train mode
    features = model(data, EVERYTHING)
    assert set(features) == EVERYTHING
    logits = features["logits"]
    flat = own.logits.flatten(0, -2)
    close(logits.rows(torch.arange(len(flat))), flat)
    close(features["embedding"], own.hidden_states[0])
    for k in range(LAYERS + 1):
        close(features[f"hidden.{k}"], own.hidden_states[k])
        close(features[f"cls.{k}"], own.hidden_states[k][:, 0])
    heads = {"query": model.info.num_heads, "key": model.info.num_kv_heads, "value": model.info.num_kv_heads}
    for k in range(1, LAYERS + 1):
        close(features[f"probs.{k}"], own.attentions[k - 1])
        close(torch.softmax(features[f"scores.{k}"], -1), own.attentions[k - 1])
        for kind, count in heads.items():
            expected = split_heads(projections[f"{kind}.{k}"], count)
            if architecture in ("llama", "qwen2") and kind != "value":
                expected = rotated(expected, 10_000.0)
            close(features[f"{kind}.{k}"], expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_minus_infinity_exactly_where_masked(architecture: str) -> None:
    model = tapped(architecture, LM_OF[architecture])
    data = batch()
    scores = model(data, frozenset({"scores.2", "query.2", "key.2"}))
    allowed = data.attention_mask[:, None, None, :].expand(-1, 1, 9, -1)
    if model.info.causal:
        allowed = allowed & torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(scores["scores.2"].isfinite(), allowed.expand(-1, 4, -1, -1))
    group = model.info.num_heads // model.info.num_kv_heads
    for head in range(4):  # grouped heads: query head a looks at key head a // group
        product = scores["query.2"][:, head] @ scores["key.2"][:, head // group].transpose(1, 2) / 6**0.5
        keep = allowed[:, 0]
        close(scores["scores.2"][:, head][keep], product[keep])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_nothing(architecture: str) -> None:
    model = tapped(architecture, LM_OF[architecture])
    data = batch(width=12)
    padded = model(data, EVERYTHING)
    for i in range(3):
        alone = row(data, i)
        n = alone.input_ids.shape[1]
        single = model(alone, EVERYTHING)
        close(padded["logits"].rows(torch.arange(n) + i * 12), single["logits"].rows(torch.arange(n)))
        for k in range(1, LAYERS + 1):
            close(padded[f"hidden.{k}"][i, :n], single[f"hidden.{k}"][0])
            close(padded[f"value.{k}"][i, :, :n], single[f"value.{k}"][0])
            close(padded[f"probs.{k}"][i, :, :n, :n], single[f"probs.{k}"][0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_under_checkpointing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss on every tap: same gradient with recomputed layers, and the recomputation records nothing."""
    attended, recorded = [], []
    sdpa, call = attention.sdpa_attention_forward, attention.AttentionCall
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *a, **k: attended.append(1) or sdpa(*a, **k))
    monkeypatch.setattr(attention, "AttentionCall", lambda *a, **k: recorded.append(1) or call(*a, **k))

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = tapped(architecture, LM_OF[architecture]).train()
        if checkpointing:
            model.enable_activation_checkpointing()
        attended.clear()
        recorded.clear()
        loss(model(batch(), EVERYTHING)).backward()
        assert len(attended) == (2 * LAYERS if checkpointing else LAYERS)
        assert len(recorded) == LAYERS
        return {n: p.grad for n, p in model.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        if gradient is None:
            assert recomputed[name] is None, name
        else:
            torch.testing.assert_close(recomputed[name], gradient, atol=1e-5, rtol=1e-4)
    touched = [n for n, g in plain.items() if g is not None and float(g.abs().max()) > 0]
    assert len(touched) > 0.8 * len(plain)


def loss(features: Features) -> Tensor:
    """A different weight on every element of every tap, so that no gradient cancels."""
    total = torch.zeros(())
    for number, key in enumerate(sorted(features)):
        value = features[key]
        value = value if isinstance(value, Tensor) else value.rows(torch.tensor([0, 3, 5]))
        value = value.masked_fill(value.isinf(), 0).flatten()
        total = total + (value.square() * torch.linspace(0.5, 1.5, len(value)).roll(number)).mean()
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_is_wanted(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tapped(architecture, LM_OF[architecture])
    everything = model(batch(), EVERYTHING)
    recorded = []
    call = attention.AttentionCall
    monkeypatch.setattr(attention, "AttentionCall", lambda *a, **k: recorded.append(1) or call(*a, **k))
    for wants, calls in (({"hidden.2"}, 0), ({"cls.3", "embedding"}, 0), (set(), 0), ({"value.3"}, 1)):
        features = model(batch(), frozenset(wants))
        assert set(features) == wants
        assert len(recorded) == calls
        for key in wants:
            assert torch.equal(features[key], everything[key])


class Largest(TorchDispatchMode):
    """Size of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_never_dense(architecture: str) -> None:
    auto_class = LM_OF[architecture]
    model = TappedModel(build(description(architecture), auto_class, num_ids=5000, max_positions=40), auto_class, 5000)
    data = batch((40, 40, 12), width=40)
    positions = data.input_ids.numel()
    with torch.no_grad(), Largest() as size:
        features = model(data, frozenset({"logits", "hidden.3"}))
    assert isinstance(features["logits"], HeadLogits)
    assert size.elements < positions * 5000 / 10
    with torch.no_grad(), Largest() as size:
        model.model(input_ids=data.input_ids)  # the check itself sees a dense tensor when there is one
    assert size.elements >= positions * 5000


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_padded_vocabulary_never_appears(architecture: str) -> None:
    auto_class = LM_OF[architecture]
    wide = lively(build(description(architecture), auto_class, num_ids=NUM_IDS + 3))
    model = TappedModel(wide, auto_class, NUM_IDS).eval()
    index = torch.arange(5)
    before = model(batch(), frozenset({"logits"}))["logits"].rows(index)
    head, bias = model.output_head
    with torch.no_grad():
        head[NUM_IDS:] = torch.nan
        if bias is not None:
            bias[NUM_IDS:] = torch.nan
    after = model(batch(), frozenset({"logits"}))["logits"]
    assert before.shape == (5, NUM_IDS)
    assert after.num_columns == NUM_IDS
    assert torch.equal(after.rows(index), before)
    with pytest.raises(UserError, match="fewer embeddings"):
        TappedModel(wide, auto_class, NUM_IDS + 4)


def test_class_logits_and_heads() -> None:
    model = tapped("bert", CLASSIFIER)
    logits = model(batch(), frozenset({"logits"}))["logits"]
    assert isinstance(logits, DenseLogits)
    assert logits.values.shape == (3, 3)
    assert model.output_head is None
    weight, bias = tapped("bert", MASKED_LM).output_head
    assert weight.shape == (NUM_IDS, 24)
    assert bias.shape == (NUM_IDS,)
    assert tapped("llama", CAUSAL_LM).output_head[1] is None


def test_token_types_reach_only_models_with_a_table_for_them() -> None:
    wants = frozenset({"hidden.3"})
    for architecture in ARCHITECTURES:
        model = tapped(architecture, LM_OF[architecture])
        plain, typed = model(batch(), wants)["hidden.3"], model(batch(types=True), wants)["hidden.3"]
        assert torch.equal(plain, typed) == (architecture != "bert"), architecture


def test_a_copied_model_reads_its_own_head() -> None:
    """The replaced forward is bound to the module: a deep copy must not answer with the original's weights."""
    model = tapped("gpt2", CAUSAL_LM)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.output_head[0].zero_()
    assert float(other.model(batch().input_ids).logits.abs().max()) == 0
    assert float(other(batch(), frozenset({"logits"}))["logits"].rows(torch.arange(3)).abs().max()) == 0
    assert float(model.model(batch().input_ids).logits.abs().max()) > 0


def test_scores_stay_float32_under_autocast() -> None:
    model = tapped("bert", MASKED_LM)
    wants = frozenset({"query.1", "key.1", "scores.1", "probs.1"})
    with torch.autocast("cpu", torch.bfloat16):
        features = model(batch(), wants)
    assert features["query.1"].dtype == torch.bfloat16
    assert features["scores.1"].dtype == features["probs.1"].dtype == torch.float32
    product = features["query.1"].float() @ features["key.1"].float().transpose(-1, -2) / 6**0.5
    seen = features["scores.1"].isfinite()
    close(features["scores.1"][seen], product[seen])


@pytest.mark.parametrize("causal", [True, False])
def test_mask_forms_agree(causal: bool) -> None:
    """None, bool and additive masks of the same pattern give the same scores; a bias is added."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 6), torch.randn(2, 2, 5, 6)
    pattern = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    pattern = pattern.tril() if causal else pattern
    additive = torch.zeros(1, 1, 5, 5).masked_fill(~pattern, torch.finfo(torch.float32).min)

    def scores(mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        return attention.AttentionCall(query, key, key, mask, bias, causal and mask is None, 0.5).scores()

    assert torch.equal(scores(None), scores(pattern))
    assert torch.equal(scores(None), scores(additive))
    assert torch.equal(scores(None).isinf()[0, 0], ~pattern[0, 0])
    bias = torch.randn(1, 4, 5, 5)
    close(scores(None, bias), scores(None) + bias)


def test_a_query_that_sees_nothing_has_zero_probability_and_finite_gradient() -> None:
    query = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])[None, None]
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way back either, not even a masked one
        probs = attention.AttentionCall(query, query, query, mask, None, False, 1.0).probs()
        probs.square().sum().backward()
    close(probs[0, 0].sum(-1), torch.tensor([1.0, 0.0, 1.0]))
    assert torch.isfinite(query.grad).all()


def test_layers_are_numbered_by_call_where_modules_are_shared() -> None:
    config = transformers.AlbertConfig(
        vocab_size=NUM_IDS, embedding_size=12, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=16, pad_token_id=1, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    plain = transformers.AutoModelForMaskedLM.from_config(config, attn_implementation="mtkd_tap")
    model = TappedModel(lively(plain), MASKED_LM, NUM_IDS).eval()
    own, _ = own_outputs(model, MASKED_LM, batch())
    features = model(batch(), frozenset({"probs.1", "probs.3", "hidden.3"}))
    close(features["probs.1"], own.attentions[0])
    close(features["probs.3"], own.attentions[2])
    close(features["hidden.3"], own.hidden_states[3])


SHAPE = {
    "vocab_size": NUM_IDS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "num_key_value_heads": 2, "head_dim": 6, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
AFTER_THE_HEAD = {
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 2.0}),
    "gemma3": (transformers.Gemma3TextConfig, {"final_logit_softcapping": 0.5}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 4.0}),
}


def scaled_model(name: str) -> TappedModel:
    make, extra = AFTER_THE_HEAD[name]
    config = make(**SHAPE, **extra)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention_implementation(config, CAUSAL_LM)
    )
    return TappedModel(lively(model), CAUSAL_LM, NUM_IDS)


@pytest.mark.parametrize("name", AFTER_THE_HEAD)
def test_what_happens_after_the_head_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = scaled_model(name).eval()
    model.verify()
    own = model.model(input_ids=batch().input_ids, attention_mask=batch().attention_mask.long()).logits.flatten(0, 1)
    close(model(batch(), frozenset({"logits"}))["logits"].rows(torch.arange(len(own))), own)
    monkeypatch.setattr(predictions, "head_transform", lambda config: None)
    with pytest.raises(UserError, match="after its head"):
        scaled_model(name).verify()


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_verify_accepts_what_is_right_and_restores_the_mode(architecture: str, auto_class: str) -> None:
    model = tapped(architecture, auto_class).train()
    model.verify()
    assert model.model.training


def test_an_architecture_without_the_interface_gives_no_attention() -> None:
    shape = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")}
    config = transformers.DebertaV2Config(**shape, max_position_embeddings=16)
    plain = transformers.AutoModelForMaskedLM.from_config(config)
    model = TappedModel(plain, MASKED_LM, NUM_IDS).eval()
    assert model.info.taps == {"logits", "hidden", "embedding", "cls"}
    assert set(model(batch(), frozenset({"logits", "hidden.2"}))) == {"logits", "hidden.2"}
    with pytest.raises(UserError, match="cannot give this feature"):
        model(batch(), frozenset({"probs.1"}))


def test_a_model_built_without_the_tap_promises_no_attention() -> None:
    config = build(description("llama"), CAUSAL_LM).config
    plain = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    assert "probs" not in TappedModel(plain, CAUSAL_LM, NUM_IDS).info.taps


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_no_cache_is_filled(architecture: str, auto_class: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, filled = tapped(architecture, auto_class), []
    update = transformers.DynamicCache.update
    monkeypatch.setattr(transformers.DynamicCache, "update", lambda *a, **k: filled.append(1) or update(*a, **k))
    model(batch(), frozenset({"logits"}))
    assert not filled
    if model.info.architecture == "llama":  # left alone, it would
        model.model(batch().input_ids)
        assert filled


@pytest.mark.parametrize("key", ["hidden.4", "probs.0", "probs.4"])
def test_layers_outside_the_model(key: str) -> None:
    with pytest.raises(UserError, match="no such layer"):
        tapped("bert", MASKED_LM)(batch(), frozenset({key}))
