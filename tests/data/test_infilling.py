"""GLM's blanks against their law, written out here: what is taken out stands in part B once, nothing else changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from mtkd.data.batch import Batch, position_counts
from mtkd.data.collate import LoadedData, Split
from mtkd.data.glm_tokens import trained_tokenizer
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.features import NO_LABEL

Loader = Callable[..., LoadedData]

_WORDS = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"),
    *("nu", "xi", "omicron", "pi", "rho", "sigma", "tau"),
)
MARKS = (".", "!", "?")
LENGTH = 96


def prose(number: int, sentences: int = 12) -> str:
    """Sentences of 4 to 9 words, each ended by a mark of its own."""
    chance = np.random.default_rng(number)
    written = []
    for _ in range(sentences):
        written.append(" ".join(chance.choice(_WORDS, chance.integers(4, 10))) + str(chance.choice(MARKS)))
    return " ".join(written)


TEXTS = [prose(n) for n in range(24)]


@pytest.fixture(scope="module")
def glm() -> PreTrainedTokenizerFast:
    return trained_tokenizer(TEXTS, 400)


@pytest.fixture
def infill(load: Loader, glm: PreTrainedTokenizerFast) -> Callable[..., Split]:
    def made(texts: list[str] = TEXTS, **fields: object) -> Split:
        return load({"text": texts}, glm, task="glm-infill", **{"max_length": LENGTH, **fields}).split("train")

    return made


@dataclass(frozen=True)
class Told:
    """An example read back: its blank, its block, its stretches (begin, end) in the block in the order of part B."""

    blank: str
    block: list[int]
    stretches: list[tuple[int, int]]

    @property
    def covered(self) -> int:
        return sum(end - begin for begin, end in self.stretches)


def told(batch: Batch, row: int, glm: PreTrainedTokenizerFast) -> Told:
    """Part A with every piece of part B put back at the place that its positions name."""
    names = ("<|startofpiece|>", "<|endofpiece|>", "[CLS]", "<|endoftext|>")
    start, end, begin_text, end_text = glm.convert_tokens_to_ids(list(names))
    blanks = {glm.convert_tokens_to_ids(name): name for name in ("[MASK]", "[sMASK]", "[gMASK]")}
    assert batch.position_ids is not None
    assert batch.sep is not None
    size, sep = int(batch.attention_mask[row].sum()), int(batch.sep[row])
    ids, targets = batch.input_ids[row, :size].tolist(), batch.targets[row].tolist()
    first, second = batch.position_ids[row, :, :size].tolist()
    part_a = ids[:sep]
    assert (part_a[0], part_a[-1]) == (begin_text, end_text)
    assert (first[:sep], second[:sep]) == (list(range(sep)), [0] * sep)
    assert targets[:sep] == [NO_LABEL] * sep
    assert targets[size:] == [NO_LABEL] * (len(targets) - size)
    fillings: dict[int, list[int]] = {}
    order = []
    for place in [i for i in range(sep, size) if ids[i] == start]:
        stop = next((i for i in range(place + 1, size) if ids[i] == start), size)
        piece = ids[place + 1 : stop]
        assert piece
        assert targets[place:stop] == [*piece, end]
        assert len({*first[place:stop]}) == 1
        assert second[place:stop] == list(range(1, len(piece) + 2))
        assert first[place] not in fillings
        fillings[first[place]] = piece
        order.append(first[place])
    places = [i for i, token in enumerate(part_a) if token in blanks]
    assert sorted(fillings) == places
    block: list[int] = []
    found = {}
    for i, token in enumerate(part_a[1:-1], 1):
        if i in fillings:
            found[i] = (len(block), len(block) + len(fillings[i]))
        block += fillings.get(i, [token])
    kinds = {blanks[part_a[i]] for i in places}
    assert len(kinds) == 1
    return Told(kinds.pop(), block, [found[i] for i in order])


def many(split: Split, glm: PreTrainedTokenizerFast, epochs: int) -> list[Told]:
    read = []
    for epoch in range(epochs):
        batch = split.collate(range(len(split)), epoch=epoch)
        assert batch.input_ids.shape[1] <= LENGTH
        read += [told(batch, row, glm) for row in range(len(split))]
    return read


def test_the_text_can_be_put_together_again(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    split = infill()
    texts = [glm(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    # with [CLS] and <|endoftext|>, and two tokens per stretch, of which there are at most 15% of the block
    room = max(n for n in range(1, LENGTH) if n + 2 + 2 * math.ceil(0.15 * n) <= LENGTH)
    for epoch in range(5):
        batch = split.collate(range(len(split)), epoch=epoch)
        whole: list[list[int]] = [[] for _ in TEXTS]
        for row in range(len(split)):
            read = told(batch, row, glm)
            assert len(read.block) <= room
            assert int(batch.attention_mask[row].sum()) <= split.lengths[row] <= LENGTH
            whole[split.documents[row]] += read.block
        assert whole == texts


def test_the_mixture_and_what_each_objective_takes(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    split = infill()
    read = many(split, glm, 20)
    counts = Counter(each.blank for each in read)
    for blank, share in (("[MASK]", 0.5), ("[sMASK]", 0.3), ("[gMASK]", 0.2)):
        deviation = math.sqrt(share * (1 - share) * len(read))
        assert abs(counts[blank] - share * len(read)) < 4 * deviation, counts
    suffixes = []
    for each in read:
        wanted, stretches = math.ceil(0.15 * len(each.block)), sorted(each.stretches)
        longest = max(end - begin for begin, end in stretches)
        if each.blank == "[gMASK]":
            ((begin, end),) = stretches
            assert end == len(each.block)
            assert 2 * (end - begin) >= len(each.block)
            suffixes.append((end - begin) / len(each.block))
            continue
        assert each.covered >= wanted
        assert each.covered - longest < wanted  # without one of them it was not enough
        if each.blank == "[MASK]":
            assert all(left[1] < right[0] for left, right in pairwise(stretches))
        else:
            ends = [i + 1 for i, token in enumerate(each.block) if glm.decode([token]).strip() in MARKS]
            assert all(begin in (0, *ends) for begin, _ in stretches)
            assert all(end in (*ends, len(each.block)) for _, end in stretches)
            assert not any(begin < end_of < end for begin, end in stretches for end_of in ends)
    assert min(suffixes) < 0.55
    assert max(suffixes) > 0.95
    assert abs(np.mean(suffixes) - 0.75) < 0.03


def test_lengths_are_poisson_without_zero(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    """Against a simulation of the law: lengths until they cover 15%."""
    read = many(infill(infill={"mask": 1}), glm, 40)
    assert {each.blank for each in read} == {"[MASK]"}
    found = Counter(end - begin for each in read for begin, end in each.stretches)
    chance = np.random.default_rng(1)
    law: Counter[int] = Counter()
    for each in read:
        covered = 0
        while covered < math.ceil(0.15 * len(each.block)):
            length = int(chance.poisson(3.0))
            law[length] += length > 0
            covered += length
    most = max(found | law)
    ours, theirs = (np.array([c[n] for n in range(1, most + 1)]) / c.total() for c in (found, law))
    assert np.abs(ours - theirs).sum() / 2 < 0.03
    assert abs(found.total() - law.total()) < 0.03 * law.total()


def test_every_arrangement_is_equally_likely(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    """Two single tokens in six, not side by side: ten arrangements; and the two pieces in either order."""
    text = "alpha beta gamma delta"
    size = len(glm(text, add_special_tokens=False)["input_ids"])
    split = infill([text], infill={"mask": 1, "span": 1e-9}, mask_share=1.5 / size)
    drawn = [told(split.collate([0], epoch=epoch), 0, glm) for epoch in range(1500)]
    pairs = [(a, b) for a in range(size) for b in range(a + 2, size)]
    counts = Counter(tuple(sorted(begin for begin, _ in each.stretches)) for each in drawn)
    assert sorted(counts) == pairs
    assert chisquare([counts[pair] for pair in pairs]).pvalue > 1e-4
    in_order = sum(each.stretches == sorted(each.stretches) for each in drawn)
    assert abs(in_order - 750) < 4 * math.sqrt(1500 / 4)


def test_draws_are_a_pure_function_of_seed_epoch_and_example(infill: Callable[..., Split]) -> None:
    def drawn(split: Split, epoch: int, examples: list[int] | None = None) -> list[list[int]]:
        batch = split.collate(list(range(len(split))) if examples is None else examples, epoch=epoch)
        return [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]

    one, again, other = infill(), infill(), infill(seed=1)
    assert drawn(one, 3) == drawn(again, 3)
    assert drawn(one, 3) != drawn(one, 4)
    assert drawn(one, 3) != drawn(other, 3)
    assert drawn(one, 3, [5])[0] == drawn(one, 3)[5] == drawn(one, 3, [7, 5])[1]
    fixed = infill(redraw=False)
    assert drawn(fixed, 3) == drawn(fixed, 0) == drawn(one, 0)


def test_only_part_b_counts(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    split = infill()
    batch = split.collate([0, 4, 1], size=5, epoch=2)
    read = [told(batch, row, glm) for row in range(3)]
    # every token taken out is predicted once, and every piece's end
    asked = sum(each.covered + len(each.stretches) for each in read)
    assert position_counts([batch]) == {
        "tokens": int(batch.attention_mask[:3].sum()),
        "targets": asked,
        "sequences": 3,
    }
    moved = batch.to(torch.device("cpu"))
    assert moved.sep is not None
    assert moved.position_ids is not None
    assert moved.position_ids.shape == (5, 2, batch.input_ids.shape[1])
    empty = split.collate([], size=2)
    assert not empty.target_mask.any()
    assert empty.sep is not None
    assert (empty.sep <= empty.attention_mask.sum(1)).all()


def test_a_single_sentence_has_spans_or_a_suffix(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    text = " ".join(_WORDS)
    for fields, blanks in (({"smask": 1}, {"[MASK]"}), ({"smask": 0.9, "gmask": 0.1}, {"[gMASK]"})):
        split = infill([text], infill=fields)
        assert {told(split.collate([0], epoch=epoch), 0, glm).blank for epoch in range(30)} == blanks


def test_what_is_refused(load: Loader, infill: Callable[..., Split]) -> None:
    plain = train_tokenizer(TEXTS, 400)
    with pytest.raises(DataError, match="commands"):
        load({"text": TEXTS}, plain, task="glm-infill")
    with pytest.raises(UserError, match="no room"):
        infill(max_length=3)
    with pytest.raises(UserError, match="no token would be a target"):
        infill(mask_share=0.0)
    with pytest.raises(ValueError, match=r"sum to 0\.9"):
        infill(infill={"mask": 0.9})
    with pytest.raises(UserError, match="does not read"):
        load({"text": TEXTS}, plain, task="causal-lm", redraw=False)


def test_too_few_ids_for_the_commands() -> None:
    with pytest.raises(UserError, match="at least 266"):
        trained_tokenizer(TEXTS, 265)
    assert len(trained_tokenizer(TEXTS, 266)) == 266
