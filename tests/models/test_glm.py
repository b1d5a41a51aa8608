"""GLM against its architecture written out in float64, its cache against whole passes, its heads one by one."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from glm_bank import (
    EOP,
    MASK,
    PAD,
    POSITIONS,
    SHAPE,
    SOP,
    block_positions,
    logits_of,
    noisy,
    padded,
    prefix,
    rows,
    small_config,
    small_model,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    StaticCache,
)

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.errors import UserError
from mtkd.models.cloze import answer_with
from mtkd.models.features import HeadLogits
from mtkd.models.glm import GLMConfig, GLMForConditionalGeneration, GLMForSequenceClassification, GLMModel
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, model_info
from mtkd.models.taps import TappedModel
from mtkd.objective.cofinetune import check_members

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh")


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_row_with_a_scalar(activation: str, implementation: str) -> None:
    model = small_model(hidden_act=activation)
    model.set_attn_implementation(implementation)
    for ids, sep, at in rows():
        positions = block_positions(len(ids), sep, at)
        expected = logits_of(model, ids, positions, prefix(len(ids), sep))
        inputs = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor(positions).T[None]}
        for mask in (sep, torch.tensor(sep), torch.tensor([sep])):
            close(model(**inputs, attention_mask=mask).logits[0], expected)
            close(model(**inputs, sep=mask).logits[0], expected)
    single = small_model(hidden_act=activation).float()
    close(single(**inputs, sep=sep).logits[0].double(), logits_of(single, ids, positions, prefix(len(ids), sep)), 2e-5)


def test_the_two_gelu_forms_are_told_apart() -> None:
    ids = torch.tensor([rows()[0][0]])
    erf, tanh = (small_model(hidden_act=name)(ids).logits for name in ACTIVATIONS)
    assert 1e-5 < float((erf - tanh).abs().max()) < 1e-2


@pytest.mark.parametrize("activation", ACTIVATIONS)
# the length of part A alone does not say that padding is on the left
@pytest.mark.parametrize(
    ("side", "form"), [("right", "vector"), *((s, f) for s in ("left", "right") for f in ("mask", "whole", "float"))]
)
def test_padded_rows(activation: str, side: str, form: str) -> None:
    model, examples = small_model(hidden_act=activation), rows()
    ids, positions, mask, places = padded(examples, side)
    seps = torch.tensor([sep for _, sep, _ in examples])
    whole = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for row, (place, (tokens, sep, _)) in enumerate(zip(places, examples, strict=True)):
        whole[row, 0, place, place] = prefix(len(tokens), sep)
    whole |= torch.eye(ids.shape[1], dtype=torch.bool)
    if form == "vector":
        given = {"attention_mask": seps}
    elif form == "mask":
        given = {"attention_mask": mask, "sep": seps}
    else:
        given = {"attention_mask": whole if form == "whole" else whole.double()}
    logits = model(ids, position_ids=positions, **given).logits
    assert torch.isfinite(logits).all()
    for row, (place, (tokens, sep, at)) in enumerate(zip(places, examples, strict=True)):
        expected = logits_of(model, tokens, block_positions(len(tokens), sep, at), prefix(len(tokens), sep))
        close(logits[row, place], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_positions_and_sep_it_is_a_causal_model(side: str) -> None:
    model, examples = small_model(), rows()
    ids, _, mask, places = padded(examples, side)
    logits = model(ids, attention_mask=mask).logits
    for row, (place, (tokens, _, _)) in enumerate(zip(places, examples, strict=True)):
        expected = logits_of(model, tokens, [(i, 0) for i in range(len(tokens))], prefix(len(tokens), 0))
        close(logits[row, place], expected)
    tokens = examples[0][0]
    alone = model(torch.tensor([tokens])).logits
    close(alone[0], logits[0, places[0]])
    close(model(torch.tensor([tokens]), position_ids=torch.arange(len(tokens))[None]).logits, alone)
    close(model(inputs_embeds=model.get_input_embeddings()(torch.tensor([tokens]))).logits, alone)


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("given", ["padding", "none"])
def test_incremental_equals_whole(step: int, given: str) -> None:
    """The prompt (part A and the start of the piece) in one pass, then `step` tokens at a time."""
    model, (first, _, third) = small_model().float(), rows()
    examples = [first, third, (first[0][:8], 4, 1)] if given == "padding" else [first, (first[0][::-1], 4, 3)]
    ids, positions, mask, _ = padded(examples, "left")
    seps = torch.tensor([sep for _, sep, _ in examples])
    mask = mask if given == "padding" else None
    whole = model(ids, position_ids=positions, attention_mask=mask, sep=seps).logits
    cache, parts = DynamicCache(config=model.config), []
    bounds = [0, *range(6, ids.shape[1], step), ids.shape[1]]  # all of part A stands before column 6
    for start, end in pairwise(bounds):
        seen = None if mask is None else mask[:, :end]
        output = model(
            ids[:, start:end],
            position_ids=positions[:, :, start:end],
            attention_mask=seen,
            sep=seps,
            past_key_values=cache,
            use_cache=True,
        )
        assert output.past_key_values is cache
        parts.append(output.logits)
    assert cache.get_seq_length() == ids.shape[1]
    found, real = torch.cat(parts, 1), torch.ones_like(ids).bool() if mask is None else mask.bool()
    close(found[real], whole[real], 1e-5)


def greedy(model: GLMForConditionalGeneration, row: tuple[list[int], int, int], steps: int) -> list[int]:
    """Filling a blank without a cache: the whole row through the written-out architecture for every token."""
    ids, sep, at = row
    ids = [*ids[:sep], SOP]
    for _ in range(steps):
        logits = logits_of(model, ids, block_positions(len(ids), sep, at), prefix(len(ids), sep))
        ids.append(int(logits[-1].argmax()))
    return ids[sep + 1 :]


def blanks() -> tuple[dict[str, Tensor], list[tuple[list[int], int, int]]]:
    """The rows' parts A with a started piece, padded on the left."""
    examples = rows()
    prompts = [([*ids[:sep], SOP], sep, at) for ids, sep, at in examples]
    ids, positions, mask, _ = padded(prompts, "left")
    seps = torch.tensor([sep for _, sep, _ in examples])
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "sep": seps}, examples


def test_generate_fills_blanks_of_unequal_prompts() -> None:
    inputs, examples = blanks()
    model = small_model(eos_token_id=None)
    with torch.no_grad():  # so that the pieces are not one token over and over
        model.glm.position_embeddings.weight.mul_(8)
        model.glm.block_position_embeddings.weight.mul_(8)
    expected = [greedy(model, row, 6) for row in examples]
    assert len({tuple(row) for row in expected}) == 3
    calls = []
    model.glm.register_forward_hook(lambda module, args, output: calls.append(output.last_hidden_state.shape[1]))
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert found[:, -6:].tolist() == expected
    assert calls == [inputs["input_ids"].shape[1], 1, 1, 1, 1, 1]  # the cache is used
    uncached = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(uncached, found)
    twice = model.generate(**inputs, max_new_tokens=6, num_return_sequences=2, num_beams=2)
    alone = [
        model.generate(
            inputs["input_ids"][i : i + 1, -sep - 1 :],
            position_ids=inputs["position_ids"][i : i + 1, :, -sep - 1 :],
            attention_mask=torch.tensor([sep]),
            max_new_tokens=6,
            num_return_sequences=2,
            num_beams=2,
        )
        for i, (_, sep, _) in enumerate(examples)
    ]
    assert twice[:, -6:].tolist() == torch.cat([found[:, -6:] for found in alone]).tolist()


def test_generate_stops_at_the_end_of_the_piece() -> None:
    inputs, examples = blanks()
    model = small_model()
    third = greedy(model, examples[0], 6)
    model.generation_config.eos_token_id = third[2]
    found = model.generate(**{k: v[:1] for k, v in inputs.items()}, max_new_tokens=6, do_sample=False)
    assert found[0, inputs["input_ids"].shape[1] :].tolist() == third[: third.index(third[2]) + 1]
    assert GLMForConditionalGeneration(small_config()).generation_config.eos_token_id == EOP


def test_generate_goes_on_with_plain_text() -> None:
    model, ids = small_model(eos_token_id=None), rows()[2][0]
    expected = list(ids)
    for _ in range(4):
        plain = [(i, 0) for i in range(len(expected))]
        expected.append(int(logits_of(model, expected, plain, prefix(len(expected), 0))[-1].argmax()))
    assert model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)[0].tolist() == expected
    short = rows()[1][0]
    two = torch.tensor([ids, [PAD] * (len(ids) - len(short)) + short])
    mask = torch.tensor([[1] * len(ids), [0] * (len(ids) - len(short)) + [1] * len(short)])
    found = model.generate(two, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert found[0].tolist() == expected
    alone = model.generate(torch.tensor([short]), max_new_tokens=4, do_sample=False)
    assert found[1, -4:].tolist() == alone[0, -4:].tolist()


@pytest.mark.parametrize("verbalizers", [None, [[3], [4, 5], [4, 6, 7]]])
def test_saved_and_loaded(tmp_path: Path, verbalizers: list[list[int]] | None) -> None:
    ids = torch.tensor([rows()[0][0]])
    model = small_model().float()
    model.save_pretrained(tmp_path / "lm")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "lm"), GLMConfig)
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        loaded = auto.from_pretrained(tmp_path / "lm")
        assert type(loaded) is GLMForConditionalGeneration
        assert loaded.lm_head.weight is loaded.glm.word_embeddings.weight
        close(loaded(ids, sep=4).logits, model(ids, sep=4).logits, 1e-5)
    assert isinstance(AutoModel.from_pretrained(tmp_path / "lm"), GLMModel)
    classifier = noisy(GLMForSequenceClassification(small_config(num_labels=3, verbalizers=verbalizers)))
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    close(loaded(ids).logits, classifier(ids).logits, 1e-5)
    assert loaded(ids, labels=torch.tensor([1])).loss is not None


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_pooled_head_reads_in_both_directions(side: str) -> None:
    model = noisy(GLMForSequenceClassification(small_config(num_labels=3)).double())
    body = GLMForConditionalGeneration(small_config()).double()
    body.glm.load_state_dict(model.glm.state_dict())
    features = []
    body.lm_head.register_forward_hook(lambda module, args, output: features.append(args[0]))
    examples = rows()
    ids, _, mask, _ = padded(examples, side)
    found = model(ids, attention_mask=mask).logits
    for row, (tokens, _, _) in enumerate(examples):
        length = len(tokens)
        body(torch.tensor([tokens]), attention_mask=torch.ones(1, 1, length, length))
        pooled = torch.tanh(features[-1][0, 0] @ model.pooler.weight.T + model.pooler.bias)
        expected = pooled @ model.classifier.weight.T + model.classifier.bias
        close(found[row], expected)
        close(model(torch.tensor([tokens])).logits[0], expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cloze_scores_every_answer_as_if_it_stood_alone(side: str) -> None:
    answers = [[3], [4, 5], [4, 6, 7], [8]]
    model = noisy(GLMForSequenceClassification(small_config(num_labels=4, verbalizers=answers)).double())
    lm = GLMForConditionalGeneration(small_config()).double()
    lm.glm.load_state_dict(model.glm.state_dict())
    examples = [([*ids[:at], MASK, *ids[at + 1 :]], len(ids), at) for ids, _, at in rows()]
    examples[2] = ([9, 8, 7], 3, 3)  # no blank: asked at its end
    ids, _, mask, _ = padded(examples, side)
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    assert output.hidden_states[1].shape[:2] == ids.shape
    for row, (tokens, sep, at) in enumerate(examples):
        for label, answer in enumerate(answers):
            ended = [*answer, EOP]  # one of the answers has several tokens: all end, and the end is scored
            whole = [*tokens, SOP, *ended[:-1]]
            logits = logits_of(lm, whole, block_positions(len(whole), sep, at), prefix(len(whole), sep))
            logs = torch.log_softmax(logits[sep:], -1)
            close(output.logits[row, label], sum(logs[i, word] for i, word in enumerate(ended)))
    labels = torch.tensor([1, 0, 3])
    expected = -torch.log_softmax(output.logits.float(), -1)[torch.arange(3), labels].mean()
    close(model(ids, attention_mask=mask, labels=labels).loss, expected, 1e-5)


def test_a_class_whose_words_begin_with_anothers_can_win() -> None:
    """P(words) alone falls with every word; with the end of the piece the answers are disjoint events."""
    ids = torch.randint(30, 60, (20, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 4], wins = MASK, 0
    for word in range(5, 30):
        torch.manual_seed(word)
        config = small_config(num_labels=2, verbalizers=[[word], [word, word]], initializer_range=0.3)
        with torch.no_grad():
            logits = GLMForSequenceClassification(config).double().eval()(ids).logits
        wins += int((logits[:, 1] > logits[:, 0]).sum())
        assert bool((logits.logsumexp(1) < 0).all())  # shares of one whole, that of all pieces
    assert 0 < wins < 25 * 20


def test_answers_of_one_token_have_no_end() -> None:
    """They are disjoint without it, and the original compares the tokens alone."""
    model = noisy(GLMForSequenceClassification(small_config(num_labels=3, verbalizers=[[5], [6], [7]])))
    assert model.config.eop_token_id is None
    ids = torch.tensor([[9, MASK, 8], [MASK, 3, 2]])
    lm = GLMForConditionalGeneration(small_config())
    lm.glm.load_state_dict(model.glm.state_dict())
    for row, at in enumerate((1, 0)):
        whole = [*ids[row].tolist(), SOP]
        logits = logits_of(lm.eval(), whole, block_positions(4, 3, at), prefix(4, 3))
        close(model(ids).logits[row].double(), torch.log_softmax(logits[3], -1)[[5, 6, 7]].double(), 1e-5)


def test_a_cloze_that_was_made_without_ends_is_refused(tmp_path: Path) -> None:
    """It was trained to give numbers that its class would no longer give: said, not silently rescored."""
    GLMForSequenceClassification(small_config(num_labels=2, verbalizers=[[5], [5, 6]])).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert values.pop("eop_token_id") == EOP
    file.write_text(json.dumps(values))
    config = GLMConfig.from_pretrained(tmp_path)
    for again in (config, GLMConfig.from_dict(config.to_dict())):
        with pytest.raises(UserError, match="answers of several tokens end"):
            model_info(again, CLASSIFIER)
    answer_with(config, [[7], [8, 9]], classifies=True)
    with pytest.raises(UserError, match="trained again"):
        model_info(config, CLASSIFIER)
    file.write_text(json.dumps({**values, "verbalizers": [[5], [6]]}))  # single tokens: nothing has changed
    assert model_info(GLMConfig.from_pretrained(tmp_path), CLASSIFIER).cloze


def test_answers_of_the_data_end_in_a_plain_model() -> None:
    config = small_config()
    answer_with(config, [[7], [8, 9]], classifies=True)
    assert config.eop_token_id == EOP


def test_a_cloze_behind_the_taps() -> None:
    """mtkd reads its logits and hidden states; attention over words that no batch holds is not offered."""
    config = small_config(num_labels=2, verbalizers=[[3], [4, 5]])
    assert "probs" not in model_info(config, CLASSIFIER).taps
    plain = AutoModelForSequenceClassification.from_config(config, attn_implementation="mtkd_tap")
    model = TappedModel(noisy(plain), CLASSIFIER, 70).eval()
    model.verify()
    ids = torch.tensor([[5, MASK, 7, 9], [1, 2, MASK, PAD]])
    batch = Batch(torch.arange(2), ids, ids != PAD, torch.tensor([0, 1]))
    found = model(batch, frozenset({"logits", "hidden.2"}))
    assert found["hidden.2"].shape == (2, 4, 24)
    close(found["logits"].rows(torch.arange(2)), plain(ids, attention_mask=(ids != PAD).long()).logits, 1e-6)


def test_taps_give_the_prefix_mask() -> None:
    plain = AutoModelForCausalLM.from_config(small_config(), attn_implementation="mtkd_tap")
    model = TappedModel(noisy(plain), CAUSAL_LM, 64).eval()
    assert model.info.causal
    ids = torch.tensor([rows()[0][0]])
    batch = Batch(torch.arange(1), ids, torch.ones_like(ids).bool(), torch.full_like(ids, NO_LABEL))
    found = model(batch, frozenset({"scores.2", "logits"}))
    assert torch.equal(found["scores.2"][0, 0].isfinite(), prefix(9, 0))
    assert isinstance(found["logits"], HeadLogits)


def test_only_some_logits() -> None:
    model, ids = small_model(), torch.tensor([rows()[0][0]])
    whole = model(ids).logits
    close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    close(model(ids, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]])


def test_labels_are_not_shifted() -> None:
    model, (ids, sep, at) = small_model().float(), rows()[0]
    inputs = {"position_ids": torch.tensor(block_positions(9, sep, at)).T[None], "sep": sep}
    labels = torch.tensor([[-100] * sep + [1, 2, EOP]])
    output = model(torch.tensor([ids]), **inputs, labels=labels)
    expected = -torch.log_softmax(output.logits, -1)[0, [6, 7, 8], [1, 2, EOP]].mean()
    close(output.loss, expected, 1e-6)


def test_fresh_weights() -> None:
    model = GLMForConditionalGeneration(small_config(hidden_size=128, num_hidden_layers=8))
    layer, scaled = model.glm.layers[3], 0.02 / 4
    for weight, std in (
        (model.glm.word_embeddings.weight, 0.02),
        (model.glm.block_position_embeddings.weight, 0.02),
        (layer.attention.query_key_value.weight, 0.02),
        (layer.mlp.dense_h_to_4h.weight, 0.02),
        (layer.attention.dense.weight, scaled),
        (layer.mlp.dense_4h_to_h.weight, scaled),
    ):
        assert float(weight.std()) == pytest.approx(std, rel=0.05)
    assert not any(bool(p.any()) for n, p in model.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"attention_mask": torch.ones(2, 3)}, "allowed is"),
        ({"attention_mask": torch.ones(2, 4, 4)}, "allowed are"),
        ({"attention_mask": torch.ones(2, 1, 3, 4)}, "allowed is"),
        ({"attention_mask": torch.full((2, 1, 4, 4), -1e9)}, "additive"),
        ({"attention_mask": torch.tensor([1, 2, 3])}, "length of part A"),
        ({"attention_mask": torch.tensor([0.5, 1.0])}, "length of part A"),
        ({"attention_mask": torch.tensor([1, 2]), "sep": 2}, "second time"),
        ({"attention_mask": torch.ones(2, 1, 4, 4), "sep": 2}, "drop `sep`"),
        ({"position_ids": torch.zeros(2, 3, 4).long()}, "position_ids have shape"),
        ({"inputs_embeds": torch.zeros(2, 4, 24)}, "either"),
    ],
)
def test_inputs_that_are_refused(inputs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model()(torch.ones(2, 4).long(), **inputs)


def test_caches_of_fixed_size_are_refused() -> None:
    model = small_model()
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(torch.ones(1, 4).long(), past_key_values=cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"verbalizers": [[1], [2]], "sop_token_id": None}, "sop_token_id"),
        ({"verbalizers": [[1], [2]], "tie_word_embeddings": False}, "tied"),
        ({"verbalizers": [[1], [2], [3]]}, "one answer per class"),
        ({"verbalizers": [[1], []]}, "list of token ids"),
        ({"verbalizers": [[1], [70]]}, "0 to 69"),
        ({"verbalizers": [[1], [-1]]}, "0 to 69"),
        ({"verbalizers": [[1], [2] * 20]}, "at most 19"),
        ({"verbalizers": [[1], [1, 2]], "eos_token_id": None}, "end with"),
        ({"verbalizers": [[1], [1, 2]], "eop_token_id": 70}, "end with"),
    ],
)
def test_clozes_that_are_refused(fields: dict[str, object], message: str) -> None:
    """At plan time and where the model is built, for the same reasons."""
    config = small_config(num_labels=2, **fields)
    with pytest.raises(ValueError, match=message):
        GLMForSequenceClassification(config)
    with pytest.raises(UserError, match=message):
        model_info(config, CLASSIFIER)


def test_the_longest_answer_is_scored() -> None:
    model = GLMForSequenceClassification(small_config(num_labels=2, verbalizers=[[1], [2] * (POSITIONS - 1)]))
    assert model(torch.tensor([[5, MASK, 7]])).logits.isfinite().all()


def test_the_attentions_of_a_cloze_are_those_of_its_text() -> None:
    """Part A sees itself alone: the maps are those of the language model that reads it."""
    model = noisy(
        GLMForSequenceClassification(
            small_config(num_labels=2, verbalizers=[[3], [4, 5]], attn_implementation="eager")
        ).double()
    )
    ids = torch.tensor([[5, MASK, 7, 9], [1, 2, MASK, PAD]])
    mask = (ids != PAD).long()
    found = model(ids, attention_mask=mask, output_attentions=True).attentions
    alone = model.glm(ids, attention_mask=mask, sep=mask.sum(1), output_attentions=True).attentions
    assert len(found) == SHAPE["num_hidden_layers"]
    for ours, theirs in zip(found, alone, strict=True):
        close(ours[mask.bool()[:, None].expand(-1, ours.shape[1], -1)], theirs[mask.bool()[:, None].expand(-1, 4, -1)])


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": torch.ones(1, POSITIONS + 2).long()},
        {"input_ids": torch.ones(1, 2).long(), "position_ids": torch.tensor([[[0, 1], [0, POSITIONS + 1]]])},
        {"input_ids": torch.ones(1, 2).long(), "position_ids": torch.tensor([[[0, -1], [0, 0]]])},
    ],
)
def test_texts_longer_than_the_positions_are_refused(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=f"positions are 0 to {POSITIONS}"):
        small_model()(**inputs)
    assert small_model()(torch.ones(1, POSITIONS + 1).long()).logits.isfinite().all()


def test_a_cloze_takes_no_other_mask() -> None:
    model = GLMForSequenceClassification(small_config(num_labels=2, verbalizers=[[1], [2]]))
    with pytest.raises(ValueError, match="part A"):
        model(torch.ones(1, 3).long(), sep=2)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        GLMConfig(hidden_size=30, num_attention_heads=4)


def test_padding_before_the_text_sees_itself() -> None:
    """Otherwise a softmax over nothing: NaN with eager attention, and on the way back."""
    model = small_model()
    model.set_attn_implementation("eager")
    ids, _, mask, places = padded(rows(), "left")
    output = model(ids, attention_mask=mask, output_attentions=True)
    assert torch.isfinite(output.logits).all()
    for row, place in enumerate(places):
        before = output.attentions[0][row, :, : place.start, :]
        close(before, torch.eye(place.start, ids.shape[1], dtype=torch.float64).expand_as(before))
    output.logits.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()  # a cache with gradients cannot be copied
def test_a_mask_of_the_whole_square_serves_a_cache_too() -> None:
    model, (ids, sep, at) = small_model(), rows()[0]
    inputs, positions = torch.tensor([ids]), torch.tensor(block_positions(len(ids), sep, at)).T[None]
    square = prefix(len(ids), sep)[None, None]
    whole = model(inputs, position_ids=positions, attention_mask=square).logits
    first = model(inputs[:, :7], position_ids=positions[:, :, :7], attention_mask=square[..., :7, :7], use_cache=True)
    for mask in (square, square[:, :, 7:]):
        cache = copy.deepcopy(first.past_key_values)
        rest = model(inputs[:, 7:], position_ids=positions[:, :, 7:], attention_mask=mask, past_key_values=cache)
        close(torch.cat([first.logits, rest.logits], 1), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_the_exact_logits(dtype: torch.dtype) -> None:
    exact, (ids, sep, at) = small_model().float(), rows()[0]
    inputs = {"position_ids": torch.tensor(block_positions(len(ids), sep, at)).T[None], "sep": sep}
    wanted = exact(torch.tensor([ids]), **inputs).logits
    for implementation in ("sdpa", "eager"):
        model = copy.deepcopy(exact).to(dtype)
        model.set_attn_implementation(implementation)
        found = model(torch.tensor([ids]), **inputs).logits
        assert found.dtype == dtype
        # some tens of rounded operations follow each other, on logits of a few units
        assert float((found.float() - wanted).abs().max()) < 40 * torch.finfo(dtype).eps * float(wanted.abs().max())


def test_generate_without_a_mask_hides_no_token() -> None:
    """The padding's token also ends every prompt of the GPT-2 vocabulary: guessed from ids, it would be masked."""
    model, prompt = small_model().eval(), [4, MASK, 9, PAD, SOP]
    ids = torch.tensor([prompt])
    positions = torch.tensor([[[0, 1, 2, 3, 1], [0, 0, 0, 0, 1]]])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    said = model.generate(ids, position_ids=positions, sep=4, attention_mask=torch.ones_like(ids), **options)
    assert model.generate(ids, position_ids=positions, sep=4, **options).tolist() == said.tolist()
    assert model.generate(ids, position_ids=positions, attention_mask=4, **options).tolist() == said.tolist()
    first = model(ids, position_ids=positions, sep=4).logits[0, -1].argmax()
    assert said[0, len(prompt)] == first


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_of_the_square_that_sees_nothing_sees_itself(implementation: str) -> None:
    model = small_model(attn_implementation=implementation)
    ids, mask = torch.tensor([[4, 5, 6]]), torch.ones(3, 3).tril()[None, None]
    mask[..., 1, :] = 0
    alone = mask.clone()
    alone[..., 1, 1] = 1
    found = model(ids, attention_mask=mask).logits
    assert found.isfinite().all()
    close(found, model(ids, attention_mask=alone).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "nope"}, "not an activation"),
        ({"verbalizers": [[5], [6], [7]]}, "one answer per class"),
        ({"verbalizers": [[5], [99]]}, "0 to 69"),
        ({"verbalizers": [[5], [-2]]}, "0 to 69"),
        ({"verbalizers": [[5], [6]], "sop_token_id": None}, "sop_token_id"),
    ],
)
def test_what_the_plan_sees_of_a_configuration(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_info(small_config(**fields), CLASSIFIER)


def test_the_taps_of_a_cloze_and_of_its_language_model() -> None:
    config = small_config(verbalizers=[[5], [6]])
    cloze, plain = (model_info(config, name) for name in (CLASSIFIER, CAUSAL_LM))
    assert cloze.cloze
    assert "query" not in cloze.taps
    assert not plain.cloze
    assert "query" in plain.taps
    with pytest.raises(UserError, match="no pooling and prediction layer"):
        check_members({"a": cloze, "b": cloze}, "stages.x.members")
