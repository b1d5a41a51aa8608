"""Next-sentence pairs: what follows really follows, the rest is of another document, and both are pure functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mtkd.data.batch import NO_LABEL
from mtkd.data.load import LoadedData
from mtkd.data.pairs import around_pair
from mtkd.errors import DataError, UserError

Loader = Callable[..., LoadedData]
# Every document is a run of letters of its own, in an order that shows what follows what.
TEXTS = [" ".join(f"{letter}{i}" for i in range(n)) for letter, n in zip("QXZJ", (40, 12, 25, 3), strict=True)]
ROOM = 24


@pytest.fixture
def pairs(load: Loader) -> LoadedData:
    return load({"text": TEXTS}, task="masked-lm", next_sentence=True, max_length=ROOM + 3)


def unmasked(data: LoadedData, example: int, epoch: int) -> tuple[list[int], int, torch.Tensor]:
    """Ids before masking, the next-sentence label, token types."""
    batch = data.splits["train"].collate([example], epoch=epoch)
    ids = torch.where(batch.targets != NO_LABEL, batch.targets, batch.input_ids)
    assert batch.nsp_targets is not None
    assert batch.token_type_ids is not None
    real = batch.attention_mask[0]
    return ids[0][real].tolist(), int(batch.nsp_targets[0]), batch.token_type_ids[0][real]


def test_segments_follow_or_are_of_another_document(pairs: LoadedData, tokenizer: PreTrainedTokenizerFast) -> None:
    split = pairs.splits["train"]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    seen: dict[int, list[int]] = {}
    for example in range(len(split)):
        own = documents[split.documents[example]]
        for epoch in range(20):
            ids, label, types = unmasked(pairs, example, epoch)
            assert len(ids) <= split.lengths[example] <= ROOM + 3
            assert (ids[0], ids[-1]) == (begin, end)
            cut = ids.index(end)
            first, second = ids[1:cut], ids[cut + 1 : -1]
            assert types.tolist() == [0] * (cut + 1) + [1] * (len(second) + 1)
            joined = any(own[i : i + len(first + second)] == first + second for i in range(len(own)))
            others = [d for n, d in enumerate(documents) if n != split.documents[example]]
            elsewhere = any(d[i : i + len(second)] == second for d in others for i in range(len(d)))
            assert (joined, elsewhere) == ((True, False) if label == 0 else (False, True))
            if label == 0 and epoch < 20:
                seen[example] = first + second
    assert len(seen) == len(split)  # in 20 epochs every pair was whole once: each document is covered, in order
    for number, own in enumerate(documents):
        assert [i for e in sorted(seen) if split.documents[e] == number for i in seen[e]] == own


def test_pairs_are_a_pure_function_of_seed_epoch_and_example(load: Loader, pairs: LoadedData) -> None:
    def labels(data: LoadedData, epoch: int) -> list[int]:
        batch = data.splits["train"].collate(range(len(data.splits["train"])), epoch=epoch)
        assert batch.nsp_targets is not None
        return batch.nsp_targets.tolist()

    again = load({"text": TEXTS}, task="masked-lm", next_sentence=True, max_length=ROOM + 3)
    other = load({"text": TEXTS}, task="masked-lm", next_sentence=True, max_length=ROOM + 3, seed=1)
    first = [labels(pairs, e) for e in range(100)]
    assert first == [labels(again, e) for e in range(100)]
    assert first != [labels(other, e) for e in range(100)]
    assert first[0] != first[1] or first[1] != first[2]
    one, whole = pairs.splits["train"].collate([2], epoch=3), pairs.splits["train"].collate([0, 2, 1], epoch=3)
    assert one.nsp_targets is not None
    assert whole.nsp_targets is not None
    assert one.nsp_targets[0] == whole.nsp_targets[1]
    width = one.input_ids.shape[1]
    assert torch.equal(one.input_ids[0], whole.input_ids[1, :width])
    # 100 epochs of fair coins: five standard deviations
    assert abs(np.mean(first) - 0.5) < 5 * 0.5 / np.sqrt(np.size(first))


def test_filler_rows_have_no_next_sentence(pairs: LoadedData, load: Loader) -> None:
    batch = pairs.splits["train"].collate([1], size=3)
    assert batch.nsp_targets is not None
    assert batch.nsp_targets[1:].tolist() == [NO_LABEL, NO_LABEL]
    assert load({"text": TEXTS}, task="masked-lm").splits["train"].collate([1]).nsp_targets is None


def test_the_frame_is_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
    core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A </s> </s> $B", special_tokens=ids)
    begin, end = ids[0][1], ids[1][1]
    assert around_pair(tokenizer) == ([begin], [end], [end])
    assert around_pair(PreTrainedTokenizerFast(tokenizer_object=core)) == ([begin], [end, end], [])
    core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B $A", special_tokens=ids[:1])
    with pytest.raises(DataError, match="changes two texts"):
        around_pair(PreTrainedTokenizerFast(tokenizer_object=core))


def test_what_makes_no_pairs_is_refused(load: Loader) -> None:
    with pytest.raises(DataError, match="second document"):
        load({"text": TEXTS[:1]}, task="masked-lm", next_sentence=True)
    with pytest.raises(DataError, match="makes no pair") as caught:
        load({"text": [*TEXTS, "a"]}, task="masked-lm", next_sentence=True)
    assert "row 5" in str(caught.value)
    with pytest.raises(UserError, match="no room"):
        load({"text": TEXTS}, task="masked-lm", next_sentence=True, max_length=5)
    with pytest.raises(UserError, match="does not read this"):
        load({"text": TEXTS}, task="causal-lm", next_sentence=True)
