"""Writing with a key-value cache: the model's own distribution, whatever the neighbours, and the mode as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_bank import ARCHITECTURES, LM_OF, NUM_IDS, tapped
from torch import Tensor
from transformers import Cache

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models import generate
from mtkd.models.forward import logits_of
from mtkd.models.generate import Written, check_writing, write
from mtkd.models.info import CAUSAL_LM
from mtkd.models.sampling import Sampling, uniforms
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import VocabularyMap

DECODERS = [name for name in ARCHITECTURES if LM_OF[name] == CAUSAL_LM]
PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
HOW = Sampling(7, ends=(2, 5, 6))


def noise(rows: int = 3, seed: int = 0) -> Tensor:
    return uniforms(seed, 0, range(rows), [0] * rows, 7)


def log_probs(model: TappedModel, texts: list[list[int]], how: Sampling) -> Tensor:
    """Log-probabilities of the next token as training reads the texts: padded on the right, no cache. [B,L,V]"""
    longest = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), longest, dtype=torch.int64), torch.zeros(len(texts), longest).bool()
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), True
    with torch.no_grad():
        logits = logits_of(model, Batch(torch.arange(len(texts)), ids, mask, ids), torch.float32)
    rows = logits.rows(torch.arange(ids.numel())).view(*ids.shape, -1)
    return torch.log_softmax(rows / how.temperature, -1)


def texts_of(written: Written) -> list[list[int]]:
    return [[*prompt, *written.of(row)] for row, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", DECODERS)
def test_what_is_written_has_the_probabilities_of_what_is_read(architecture: str, temperature: float) -> None:
    """Law: log-probabilities while writing (left padding, cache) are those while training (right padding, none)."""
    model, how = tapped(architecture, CAUSAL_LM), Sampling(7, temperature, ends=(2, 5, 6))
    written = write(model, PROMPTS, how, noise())
    read = log_probs(model, texts_of(written), how)
    for row, prompt in enumerate(PROMPTS):
        for place, token in enumerate(written.of(row)):
            expected = float(read[row, len(prompt) - 1 + place, token])
            assert float(written.log_probs[row, place]) == pytest.approx(expected, abs=1e-4)


def test_a_text_ends_with_its_end_token_or_is_cut() -> None:
    """Law: the end token belongs to the text and nothing follows; a text without one is as long as it may be."""
    written = [write(tapped("gpt2", CAUSAL_LM), PROMPTS, HOW, noise(seed=seed)) for seed in range(6)]
    kinds = set()
    for texts in written:
        for row in range(3):
            ids = texts.of(row)
            ends = [place for place, token in enumerate(ids) if token in HOW.ends]
            assert ends == ([] if texts.cut[row] else [len(ids) - 1])
            assert not texts.cut[row] or len(ids) == 7
            assert not texts.ids[row, len(ids) :].any()
            assert not texts.log_probs[row, len(ids) :].any()
            kinds.add(bool(texts.cut[row]))
    assert kinds == {True, False}


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    """Law: a row alone is the row of a batch in which others are longer and end earlier."""
    model = tapped("llama", CAUSAL_LM)
    together = write(model, PROMPTS, HOW, noise())
    for row, prompt in enumerate(PROMPTS):
        alone = write(model, [prompt], HOW, noise()[row : row + 1])
        assert alone.of(0) == together.of(row)
    backwards = write(model, PROMPTS[::-1], HOW, noise().flip(0))
    assert [backwards.of(2 - row) for row in range(3)] == [together.of(row) for row in range(3)]


def test_rows_that_ended_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: whether they leave or stay changes no text; they do leave."""
    model, sizes = tapped("qwen2", CAUSAL_LM), list[int]()
    take = generate.Session.take
    monkeypatch.setattr(generate.Session, "take", lambda self, ids: (sizes.append(len(ids)), take(self, ids))[1])
    leaving = [write(model, PROMPTS, HOW, noise(seed=seed)) for seed in range(4)]
    assert {1, 2} & set(sizes)
    monkeypatch.setattr(generate, "_FEWER", -1.0)
    staying = [write(model, PROMPTS, HOW, noise(seed=seed)) for seed in range(4)]
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(leaving, staying, strict=True))


def test_a_row_stays_within_the_longest_text() -> None:
    """Law: prompt and completion have one token more than are read; a prompt that is longer gets nothing."""
    how = Sampling(7, max_length=4)
    written = write(tapped("gpt2", CAUSAL_LM), [*PROMPTS, [1, 2, 3, 4, 5]], how, noise(4))
    assert written.lengths.tolist() == [1, 4, 3, 0]
    assert written.cut.tolist() == [True] * 4
    assert write(tapped("gpt2", CAUSAL_LM), [], how, noise(0)).ids.shape == (0, 0)


def test_writing_is_without_dropout_and_leaves_mode_and_random_state() -> None:
    model = tapped("gpt2", CAUSAL_LM, dropout=0.5)
    calm = write(model, PROMPTS, HOW, noise())
    model.train()
    state = torch.get_rng_state()
    again = write(model, PROMPTS, HOW, noise())
    assert torch.equal(calm.ids, again.ids)
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compressed_vocabulary_writes_run_ids() -> None:
    """Law: it writes ids that it keeps, in the run's numbers, with its own probabilities."""
    kept = torch.arange(0, 2 * NUM_IDS, 2)  # the model's column c is the run's id 2 c
    to_kept = torch.arange(2 * NUM_IDS) // 2
    plain = tapped("gpt2", CAUSAL_LM)
    small = TappedModel(plain.model, CAUSAL_LM, 2 * NUM_IDS, VocabularyMap(kept, to_kept, to_kept, "")).eval()
    prompts = [[2 * token for token in prompt] for prompt in PROMPTS]
    one, other = write(plain, PROMPTS, Sampling(5), noise()), write(small, prompts, Sampling(5), noise())
    assert torch.equal(2 * one.ids, other.ids)
    assert torch.equal(one.log_probs, other.log_probs)


def test_products_in_bfloat16_write_a_text_of_their_own_distribution() -> None:
    """Law: log-probabilities are within bfloat16's rounding of float32's for the same tokens."""
    model = tapped("llama", CAUSAL_LM)
    written = write(model, PROMPTS, Sampling(4), noise(), torch.bfloat16)
    read = log_probs(model, texts_of(written), Sampling(4))
    expected = [float(read[r, len(p) - 1 + t, i]) for r, p in enumerate(PROMPTS) for t, i in enumerate(written.of(r))]
    assert written.log_probs.flatten().tolist() == pytest.approx(expected, abs=0.3)


@pytest.mark.parametrize("architecture", DECODERS)
def test_every_decoder_of_the_bank_writes_what_it_reads(architecture: str) -> None:
    check_writing(tapped(architecture, CAUSAL_LM), "here")


def test_a_model_with_wrong_positions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: positions that count the padding on the left are found out before training."""
    model = tapped("gpt2", CAUSAL_LM)  # learned positions: rotary ones are relative, and a shift would not show
    right = model.inputs.going_on

    def counted(ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> dict[str, Any]:
        return right(ids, mask, torch.arange(mask.shape[1])[-ids.shape[1] :].expand_as(ids), cache)

    monkeypatch.setattr(model.inputs, "going_on", counted)
    with pytest.raises(UserError, match="architecture 'gpt2' does not write with a key-value cache") as refused:
        check_writing(model, "stages.s.rollout")
    assert refused.value.where == "stages.s.rollout"
