"""Students sliced from a wider model: what is kept, that nothing is mixed, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from model_bank import EVERY_HEAD, LM_OF, NUM_IDS, batch, build, description, lively, tokenizer
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mtkd.config import ModelConfig
from mtkd.errors import UserError
from mtkd.models.cut import head_dimensions, spread
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, MASKED_LM
from mtkd.models.load import load_config
from mtkd.models.numbers import count_parameters
from mtkd.models.request import ModelRequest
from mtkd.models.taps import TappedModel

GROUPED = ("llama", "qwen2")


def cut(model: PreTrainedModel, auto_class: str, folder: Path, **fields: object) -> PreTrainedModel:
    model.save_pretrained(folder)
    return build(ModelConfig.model_validate({"path": str(folder), **fields}), auto_class)


def wide(architecture: str, auto_class: str, **fields: object) -> PreTrainedModel:
    """Width 48, 8 heads (4 of keys and values where they are grouped), 80 feed-forward units."""
    shape = {"width": 48, "heads": 8, "intermediate": 80, **({"kv_heads": 4} if architecture in GROUPED else {})}
    return lively(build(description(architecture, **{**shape, **fields}), auto_class), seed=7)


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_a_slice_of_the_same_shape_is_the_model(architecture: str, auto_class: str, tmp_path: Path) -> None:
    model = wide(architecture, auto_class)
    same = cut(model, auto_class, tmp_path, slice={"width": 48})
    assert same.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in same.state_dict().items())


QUERIES, KEYS = ("query", "q_proj", "q_lin"), ("key", "value", "k_proj", "v_proj", "k_lin", "v_lin")
OUTPUTS = r"attention\.output\.dense|o_proj|out_lin|attn\.c_proj|attention\.dense"
UP = r"intermediate\.dense|lin1|gate_proj|up_proj|c_fc|dense_h_to_4h"
TABLES = r"embeddings|embed_tokens|wte|wpe"


def by_head(small: Tensor, large: Tensor, heads: list[int]) -> Tensor:
    """`large` [8*6, ...] with the heads of `small` [4*6, ...] at these places."""
    out = large.clone().unflatten(0, (-1, 6))
    out[heads] = small.unflatten(0, (-1, 6))
    return out.flatten(0, 1)


def embed(name: str, small: Tensor, large: Tensor, grouped: bool) -> Tensor:
    """One weight of a wide model that computes what the small one does, with the noise of `large` where none listens.

    Every hidden column stands there twice (mean and variance, hence every normalisation, stay the same) and is read
    once; other heads and units are read with weight 0. Linear layers are [outputs, inputs] here.
    """
    queries = [0, 1, 4, 5] if grouped else [0, 2, 4, 6]
    module = name.rpartition(".")[0]
    if small.dim() == 2 and not re.search(rf"({TABLES})$", module):  # inputs
        if re.search(rf"({OUTPUTS})$", module):
            small = by_head(small.t(), torch.zeros(48, small.shape[0]), queries).t()
        else:
            small = torch.cat([small, torch.zeros(len(small), large.shape[1] - small.shape[1])], 1)
    last = module.rpartition(".")[2]
    if last in QUERIES + KEYS:
        return by_head(small, large, queries if last in QUERIES or not grouped else [0, 2])
    if re.search(rf"({UP})$", module):
        return torch.cat([small, large[len(small) :]])
    if small.dim() == 2 and re.search(rf"({TABLES})$", module):
        return torch.cat([small, small], 1)
    return torch.cat([small, small]) if len(large) != len(small) else small


@torch.no_grad()
def widen(small: PreTrainedModel, large: PreTrainedModel, architecture: str) -> None:
    """Write the small model into the large one."""
    ours, theirs = small.state_dict(), large.state_dict()
    for name, value in ours.items():
        target, grouped = theirs[name], architecture in GROUPED
        if "query_key_value" in name:  # [q|k|v, inputs]: three matrices of their own
            parts = [
                embed(name.replace("query_key_value", each), s, t, grouped)
                for each, s, t in zip(QUERIES[:1] + KEYS[:2], value.chunk(3), target.chunk(3), strict=True)
            ]
            target.copy_(torch.cat(parts))
        elif "c_attn" in name:  # [inputs, q|k|v]
            parts = [
                embed(name.replace("c_attn", each), s, t, grouped)
                for each, s, t in zip(QUERIES[:1] + KEYS[:2], value.t().chunk(3), target.t().chunk(3), strict=True)
            ]
            target.copy_(torch.cat(parts).t())
        elif re.search(r"c_proj\.weight|c_fc\.weight", name):
            target.copy_(embed(name, value.t(), target.t(), grouped).t())
        else:
            target.copy_(embed(name, value, target, grouped))


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_a_model_hidden_in_a_wider_one_is_found_again(architecture: str, auto_class: str, tmp_path: Path) -> None:
    # a tied table could not hold every column twice for the inputs and once for the head
    small = lively(build(description(architecture, intermediate=40, tie_embeddings=False), auto_class))
    large = wide(architecture, auto_class, tie_embeddings=False)
    widen(small, large, architecture)
    heads = {"heads": 4, **({"kv_heads": 2} if architecture in GROUPED else {})}
    found = cut(large, auto_class, tmp_path, slice={"width": 24, "intermediate": 40, **heads})
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in found.state_dict().items())
    layers = range(1, 4)
    wants = frozenset({"logits", *(f"probs.{k}" for k in layers), *(f"hidden.{k}" for k in layers)})
    ours, theirs = (TappedModel(m, auto_class, NUM_IDS).eval()(batch(), wants) for m in (found, large))
    kept = [0, 1, 4, 5] if architecture in GROUPED else [0, 2, 4, 6]
    for k in layers:
        torch.testing.assert_close(theirs[f"probs.{k}"][:, kept], ours[f"probs.{k}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs[f"hidden.{k}"][..., :24], ours[f"hidden.{k}"], atol=1e-4, rtol=1e-4)
    index = torch.arange(batch().input_ids.numel() if auto_class != CLASSIFIER else 3)
    mine, wanted = ours["logits"].rows(index), theirs["logits"].rows(index)  # type: ignore[union-attr]
    torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)


def per_head(weight: Tensor, heads: list[int], dims: list[int], width: int) -> Tensor:
    """[8*6, 48] -> the rows of some dimensions of some heads, and the first columns."""
    return weight.view(-1, 6, 48)[heads][:, dims, :width].reshape(-1, width)


def test_query_key_and_value_are_cut_apart_and_inside_the_heads(tmp_path: Path) -> None:
    """Narrower heads; GPT-2's fused matrix is three of BERT's."""
    bert, gpt2 = wide("bert", MASKED_LM), wide("gpt2", CAUSAL_LM)
    shape = {"width": 12, "heads": 4, "intermediate": 20}
    small = cut(bert, MASKED_LM, tmp_path / "bert", slice=shape).bert.encoder.layer[1].attention
    heads, dims = [0, 2, 4, 6], [0, 2, 4]
    for name in ("query", "key", "value"):
        whole, part = (getattr(a.self, name) for a in (bert.bert.encoder.layer[1].attention, small))
        assert torch.equal(part.weight, per_head(whole.weight, heads, dims, 12))
        assert torch.equal(part.bias, whole.bias.view(8, 6)[heads][:, dims].flatten())
    whole = bert.bert.encoder.layer[1].attention.output.dense.weight
    assert torch.equal(small.output.dense.weight, per_head(whole.t(), heads, dims, 48).t()[:12])
    part, fused = (m.transformer.h[1].attn for m in (cut(gpt2, CAUSAL_LM, tmp_path / "gpt2", slice=shape), gpt2))
    separate = [per_head(block, heads, dims, 12) for block in fused.c_attn.weight.t().chunk(3)]
    assert torch.equal(part.c_attn.weight, torch.cat(separate).t())
    blocks = [block.view(8, 6)[heads][:, dims].flatten() for block in fused.c_attn.bias.chunk(3)]
    assert torch.equal(part.c_attn.bias, torch.cat(blocks))
    assert part(torch.zeros(1, 2, 12))[0].shape == (1, 2, 12)


def test_rotary_pairs_stay_together_and_keep_their_angles(tmp_path: Path) -> None:
    assert head_dimensions(4, 8, rotary=True) == [0, 2, 4, 6]
    assert head_dimensions(2, 8, rotary=True) == [0, 4]
    assert head_dimensions(4, 12, rotary=True) == [0, 3, 6, 9]
    model = wide("llama", CAUSAL_LM, heads=4, kv_heads=2, width=32)  # head width 8
    small = cut(model, CAUSAL_LM, tmp_path, slice={"width": 16, "heads": 4, "kv_heads": 2})
    positions, hidden = torch.arange(5)[None], torch.zeros(1, 5, 16)
    ours = small.model.rotary_emb(hidden, positions)[0]
    theirs = model.model.rotary_emb(torch.zeros(1, 5, 32), positions)[0]
    torch.testing.assert_close(ours, theirs[..., [0, 2, 4, 6]])
    whole, part = model.model.layers[0].self_attn, small.model.layers[0].self_attn
    expected = whole.k_proj.weight.view(2, 8, 32)[:, [0, 2, 4, 6], :16].reshape(8, 16)
    assert torch.equal(part.k_proj.weight, expected)


def test_layers_and_width_together_and_the_plan(tmp_path: Path) -> None:
    """The configuration known at plan time is the model's; the export loads with plain transformers."""
    model = wide("qwen2", CAUSAL_LM)
    model.save_pretrained(tmp_path / "model")
    config = ModelConfig.model_validate(
        {"path": str(tmp_path / "model"), "keep_layers": [1, 3], "slice": {"width": 24, "heads": 4}}
    )
    student = build(config, CAUSAL_LM)
    planned, _ = load_config(config, ModelRequest(CAUSAL_LM, NUM_IDS, max_positions=16, tokenizer=tokenizer()))
    assert count_parameters(planned, CAUSAL_LM) == sum(p.numel() for p in student.parameters())
    shape = student.config
    assert (shape.num_key_value_heads, shape.intermediate_size, shape.num_hidden_layers) == (2, 40, 2)
    third = model.model.layers[2].mlp.down_proj.weight
    assert torch.equal(student.model.layers[1].mlp.down_proj.weight, third[:24, :40])
    student.save_pretrained(tmp_path / "student")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ids = batch().input_ids
    torch.testing.assert_close(plain(ids).logits, student(ids).logits, atol=1e-5, rtol=1e-5)


def test_heads_of_their_own_width_keep_it(tmp_path: Path) -> None:
    """Llama's head_dim may be other than width / heads."""
    model = build(description("llama"), CAUSAL_LM)
    config = type(model.config).from_dict({**model.config.to_dict(), "head_dim": 8})
    model = lively(type(model)(config))
    student = cut(model, CAUSAL_LM, tmp_path, slice={"heads": 2})
    assert (student.config.head_dim, student.config.num_key_value_heads) == (8, 1)
    assert torch.equal(
        student.model.layers[0].self_attn.q_proj.weight, model.model.layers[0].self_attn.q_proj.weight[:16]
    )


@pytest.mark.parametrize(
    ("architecture", "slice_", "message"),
    [
        ("bert", {"width": 96}, "not larger"),
        ("bert", {"intermediate": 81}, "not larger"),
        ("bert", {"width": 20, "heads": 8}, "do not divide"),
        ("bert", {"width": 40}, None),  # 6 of width 6 would be 36: the default does not divide
        ("bert", {"width": 48, "heads": 4}, "heads are wider"),
        ("bert", {"width": 24, "heads": 4, "kv_heads": 2}, "no grouped heads"),
        ("llama", {"width": 24, "heads": 4, "kv_heads": 1}, "groups of heads"),
        ("llama", {"width": 24, "heads": 4, "kv_heads": 3}, "groups of heads"),
        ("llama", {"width": 12, "heads": 4}, "must be even"),
    ],
)
def test_shapes_that_are_refused(
    architecture: str, slice_: dict[str, int], message: str | None, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message or "do not divide") as error:
        cut(wide(architecture, LM_OF[architecture]), LM_OF[architecture], tmp_path, slice=slice_)
    assert "model.slice." in str(error.value)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    from transformers import ElectraConfig, ElectraForMaskedLM

    config = ElectraConfig(vocab_size=NUM_IDS, hidden_size=24, num_attention_heads=4, num_hidden_layers=1)
    with pytest.raises(UserError, match="no rules to slice architecture 'electra'") as error:
        cut(ElectraForMaskedLM(config), MASKED_LM, tmp_path, slice={"width": 12, "heads": 2})
    assert "distilbert" in str(error.value)


def test_a_slice_needs_a_shape_and_a_path() -> None:
    with pytest.raises(ValidationError, match="a slice needs"):
        ModelConfig.model_validate({"path": "x", "slice": {}})
    with pytest.raises(ValidationError, match="go with path"):
        ModelConfig.model_validate({"architecture": "bert", "layers": 1, "width": 8, "heads": 2, "slice": {"width": 4}})
    with pytest.raises(ValidationError, match="cut it with keep_layers and slice"):
        ModelConfig.model_validate({"path": "x", "width": 24})


def test_spread() -> None:
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(4, 12) == [0, 3, 6, 9]
    assert spread(3, 8) == [0, 2, 5]
