"""GLM's blanks against the law of GLM-10B's training, written out here: what is taken out stands in part B once.

The layout is that of the original, transcribed; see the docstring of `mtkd.data.infilling` for what differs by intent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import PreTrainedTokenizerFast

from mtkd.config import DataConfig
from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.data.glm_tokens import trained_tokenizer
from mtkd.data.infilling import Infilling
from mtkd.data.load import LoadedData
from mtkd.data.split import Split
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError

Loader = Callable[..., LoadedData]

_WORDS = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"),
    *("nu", "xi", "omicron", "pi", "rho", "sigma", "tau"),
)
MARKS = (".", "!", "?", ":")
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
        return load({"text": texts}, glm, task="glm-infill", **{"max_length": LENGTH, **fields}).splits["train"]

    return made


@dataclass(frozen=True)
class Told:
    """An example read back.

    Attributes:
        blank: its kind.
        block: the tokens of the text.
        stretches: (begin, end) in the block, in the order of part B.
        ends: whether the text ends with the block; suffix: whether the piece ends as the text does.
        hidden: tokens of pieces that [dBLOCK] hides; shown: the others that are inputs.
    """

    blank: str
    block: list[int]
    stretches: list[tuple[int, int]]
    ends: bool
    suffix: bool
    hidden: int
    shown: int

    @property
    def covered(self) -> int:
        return sum(end - begin for begin, end in self.stretches)

    @property
    def wanted(self) -> int:
        """Tokens in spans or sentences at least: 15% of the text with its special tokens, rounded down."""
        return max(1, math.floor(0.15 * (1 + len(self.block) + self.ends)))


def told(batch: Batch, row: int, glm: PreTrainedTokenizerFast) -> Told:
    """Part A with every piece of part B put back at the place that its positions name."""
    names = ("<|startofpiece|>", "<|endofpiece|>", "[CLS]", "<|endoftext|>", "[dBLOCK]")
    start, end, begin_text, end_text, hidden = glm.convert_tokens_to_ids(list(names))
    blanks = {glm.convert_tokens_to_ids(name): name for name in ("[MASK]", "[sMASK]", "[gMASK]")}
    assert batch.position_ids is not None
    assert batch.sep is not None
    size, sep = int(batch.attention_mask[row].sum()), int(batch.sep[row])
    ids, targets = batch.input_ids[row, :size].tolist(), batch.targets[row].tolist()
    first, second = batch.position_ids[row, :, :size].tolist()
    part_a = ids[:sep]
    assert part_a[0] == begin_text
    assert (first[:sep], second[:sep]) == (list(range(sep)), [0] * sep)
    assert targets[:sep] == [NO_LABEL] * sep
    assert targets[size:] == [NO_LABEL] * (len(targets) - size)
    fillings: dict[int, list[int]] = {}
    order, suffix, covered = [], False, 0
    for place in [i for i in range(sep, size) if ids[i] == start]:
        stop = next((i for i in range(place + 1, size) if ids[i] == start), size)
        piece, inputs = targets[place:stop], ids[place + 1 : stop]
        if piece[-1] == end:
            piece = piece[:-1]
        else:
            suffix = True
            inputs = [*inputs, piece[-1]]
        assert piece
        assert len(inputs) == len(piece)
        assert all(shown in (token, hidden) for shown, token in zip(inputs, piece, strict=True))
        covered += inputs.count(hidden)
        assert len({*first[place:stop]}) == 1
        assert second[place:stop] == list(range(1, stop - place + 1))
        assert first[place] not in fillings
        fillings[first[place]] = piece
        order.append(first[place])
    places = [i for i, token in enumerate(part_a) if token in blanks]
    assert sorted(fillings) == places
    assert not suffix or places == [sep - 1]
    block: list[int] = []
    found = {}
    for i, token in enumerate(part_a[1:], 1):
        found[i] = (len(block), len(block) + len(fillings.get(i, [token])))
        block += fillings.get(i, [token])
    ends = block[-1] == end_text
    if ends:
        block.pop()
    assert end_text not in block
    stretches = [(found[i][0], min(found[i][1], len(block))) for i in order]
    kinds = {blanks[part_a[i]] for i in places}
    assert len(kinds) == 1
    asked = sum(map(len, fillings.values()))
    return Told(kinds.pop(), block, stretches, ends, suffix, covered, asked - covered)


def many(split: Split, glm: PreTrainedTokenizerFast, epochs: int) -> list[Told]:
    read = []
    for epoch in range(epochs):
        batch = split.collate(range(len(split)), epoch=epoch)
        assert batch.input_ids.shape[1] <= LENGTH
        read += [told(batch, row, glm) for row in range(len(split))]
    return read


def test_the_text_can_be_put_together_again(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    """And its end stands behind its last block alone."""
    split = infill()
    texts = [glm(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    # with [CLS] and <|endoftext|>, and two tokens per stretch, of which there are at most 15% of the whole
    room = max(n for n in range(1, LENGTH) if n + 2 + 2 * math.floor(0.15 * (n + 2)) <= LENGTH)
    for epoch in range(5):
        batch = split.collate(range(len(split)), epoch=epoch)
        whole: list[list[int]] = [[] for _ in TEXTS]
        for row in range(len(split)):
            read, document = told(batch, row, glm), split.documents[row]
            assert len(read.block) <= room
            assert int(batch.attention_mask[row].sum()) <= split.lengths[row] <= LENGTH
            whole[document] += read.block
            assert read.ends == (len(whole[document]) == len(texts[document]))
        assert whole == texts


def test_the_mixture_and_what_each_objective_takes(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    read = many(infill(), glm, 20)
    counts = Counter(each.blank for each in read)
    for blank, share in (("[MASK]", 0.5), ("[sMASK]", 0.3), ("[gMASK]", 0.2)):
        assert_share(counts[blank], share, len(read))
    for each in read:
        assert each.blank == "[gMASK]" or not each.suffix
        assert each.blank == "[MASK]" or not each.hidden
        stretches = sorted(each.stretches)
        longest = max(end - begin for begin, end in stretches)
        if each.blank == "[gMASK]":
            assert len(stretches) == 1
            assert 4 * longest >= len(each.block)
            continue
        assert each.covered >= each.wanted
        assert each.covered - longest < each.wanted  # without one of them it was not enough
        if each.blank == "[MASK]":
            assert all(left[1] < right[0] for left, right in pairwise(stretches))
        else:
            ends = [i + 1 for i, token in enumerate(each.block) if glm.decode([token]).strip() in MARKS]
            assert all(begin in (0, *ends) for begin, _ in stretches)
            assert all(end in (*ends, len(each.block)) for _, end in stretches)
            assert not any(begin < end_of < end for begin, end in stretches for end_of in ends)


def assert_share(count: int, share: float, total: int) -> None:
    """Four standard deviations of the binomial law: one seed in 16,000 fails."""
    assert abs(count - share * total) < 4 * math.sqrt(share * (1 - share) * total), (count, total)


def test_a_colon_ends_a_sentence(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    text = "alpha beta: gamma delta epsilon"
    split = infill([text], infill={"smask": 1}, max_length=LENGTH)
    drawn = {told(split.collate([0], epoch=epoch), 0, glm).stretches[0] for epoch in range(20)}
    tokens = glm(text, add_special_tokens=False)["input_ids"]
    cut = 1 + next(i for i, token in enumerate(tokens) if glm.decode([token]).strip() == ":")
    assert drawn == {(0, cut), (cut, len(tokens))}


def drawn_alone(split: Split, glm: PreTrainedTokenizerFast, count: int) -> list[Told]:
    """Example 0 in so many epochs."""
    return [told(split.collate([0], epoch=epoch), 0, glm) for epoch in range(count)]


def test_a_long_span_has_any_length_from_a_quarter_and_any_place(
    infill: Callable[..., Split], glm: PreTrainedTokenizerFast
) -> None:
    text = " ".join(_WORDS[:12])
    size = len(glm(text, add_special_tokens=False)["input_ids"])
    least = math.ceil(size / 4)
    assert 8 <= size <= 24
    read = drawn_alone(infill([text], infill={"gmask": 1}), glm, 2500)
    suffixes = [each for each in read if each.suffix]
    assert_share(len(suffixes), 0.5, len(read))
    spans = [each.stretches[0] for each in read if not each.suffix]
    lengths = Counter(end - begin for begin, end in spans)
    assert sorted(lengths) == list(range(least, size + 1))
    assert chisquare([lengths[n] for n in sorted(lengths)]).pvalue > 1e-4
    places = Counter(begin for begin, end in spans if end - begin == least)
    assert sorted(places) == list(range(size - least + 1))
    assert chisquare([places[n] for n in sorted(places)]).pvalue > 1e-4
    assert {each.stretches[0][1] for each in suffixes} == {size}
    kept = Counter(each.stretches[0][0] for each in suffixes)
    assert sorted(kept) == list(range(1, size - least + 1))  # a token of the text to begin with
    assert chisquare([kept[n] for n in sorted(kept)]).pvalue > 1e-4


def test_what_a_long_span_may_be_is_configured(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    text = " ".join(_WORDS[:12])
    size = len(glm(text, add_special_tokens=False)["input_ids"])
    read = drawn_alone(infill([text], infill={"gmask": 1, "anywhere": 0.0, "min_ratio": 0.5}), glm, 200)
    assert all(each.suffix for each in read)
    assert min(each.covered for each in read) == math.ceil(size / 2)
    read = drawn_alone(infill([text], infill={"gmask": 1, "anywhere": 1.0, "min_ratio": 1.0}), glm, 20)
    assert {(each.suffix, *each.stretches[0]) for each in read} == {(False, 0, size)}


def test_a_suffix_ends_as_the_text_does(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    """With <|endoftext|>, where its block is the last one, and never with <|endofpiece|>: nothing follows it."""
    split = infill(infill={"gmask": 1, "anywhere": 0.0})
    end_text, end_piece = glm.convert_tokens_to_ids(["<|endoftext|>", "<|endofpiece|>"])
    batch, seen = split.collate(range(len(split))), Counter[bool]()
    for row in range(len(split)):
        read = told(batch, row, glm)
        asked = batch.targets[row][batch.target_mask[row]].tolist()
        (begin, end) = read.stretches[0]
        assert read.suffix
        assert asked == read.block[begin:] + ([end_text] if read.ends else [])
        assert end == len(read.block)
        assert end_text not in batch.input_ids[row][batch.attention_mask[row]].tolist()
        assert end_piece not in asked
        seen[read.ends] += 1
    assert min(seen[True], seen[False]) > 5


@pytest.mark.parametrize(
    ("blank", "share", "fields"),
    [
        ("[MASK]", 0.1, {"mask": 1}),
        ("[MASK]", 0.35, {"mask": 1, "block_mask": 0.35}),
        ("[sMASK]", 0.0, {"smask": 1, "block_mask": 0.35}),
        ("[gMASK]", 0.0, {"gmask": 1, "block_mask": 0.35}),
    ],
)
def test_one_input_in_ten_of_a_span_is_hidden(
    infill: Callable[..., Split], glm: PreTrainedTokenizerFast, blank: str, share: float, fields: dict[str, float]
) -> None:
    """Of spans alone; the first token as the last, and all are asked for."""
    read = [each for each in many(infill(infill=fields), glm, 10) if each.blank == blank]
    hidden, total = sum(each.hidden for each in read), sum(each.hidden + each.shown for each in read)
    assert total > 3000
    assert abs(hidden - share * total) <= 4 * math.sqrt(share * (1 - share) * total)


def test_a_share_that_rounds_to_nothing_is_one_token(
    infill: Callable[..., Split], glm: PreTrainedTokenizerFast
) -> None:
    """15% of a text of n tokens and its two special ones: floor(0.15 (n + 2)), and one where that is none."""
    for words in (1, 2, 4, 8, 16):
        text = " ".join(_WORDS[:words])
        size = len(glm(text, add_special_tokens=False)["input_ids"])
        read = drawn_alone(infill([text], infill={"mask": 1, "span": 1e-9}), glm, 20)
        assert {each.covered for each in read} == {max(1, int(0.15 * (size + 2)))}


@pytest.mark.parametrize("last", [True, False])
def test_the_layout_is_the_original_one(glm: PreTrainedTokenizerFast, last: bool) -> None:
    """make_block_data and the suffix of construct_blocks, transcribed: positions by counting what part A keeps."""
    law = Infilling(glm, DataConfig(source="files", task="glm-infill", infill={"block_mask": 0.0}), ([7], [8]))
    names = ["[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>"]
    *blanks, start, end = glm.convert_tokens_to_ids(names)
    chance, kinds = np.random.default_rng(0), set()
    for example in range(300):
        tokens = chance.integers(20, 250, chance.integers(1, 60))
        drawn, laid = law.draw(tokens, example, 0, last=last), law.lay_out(tokens, example, 0, last=last)
        text = np.array([7, *tokens, 8] if last else [7, *tokens])
        kinds.add((drawn.kind, drawn.suffix))
        spans = [(begin + 1, stop + 1) for begin, stop in drawn.spans]
        if drawn.suffix:
            ((begin, _),) = spans
            source, piece = text[:begin], text[begin:]
            inputs = [*source, blanks[2], start, *piece[:-1]]
            targets = [NO_LABEL] * (len(source) + 1) + [*piece]
            first = [*range(len(source) + 1), *[len(source)] * len(piece)]
            second = [*[0] * (len(source) + 1), *range(1, len(piece) + 1)]
            sep = len(source) + 1
        else:
            kept = np.ones(len(text), np.int64)
            for begin, stop in spans:
                kept[begin + 1 : stop] = 0
            place = np.cumsum(kept) - 1
            source = text.copy()
            source[[begin for begin, _ in spans]] = blanks[drawn.kind]
            inputs, first = [*source[kept == 1]], [*place[kept == 1]]
            sep = len(inputs)
            targets, second = [NO_LABEL] * sep, [0] * sep
            order = sorted(spans, key=lambda span: laid.positions[0, sep:].tolist().index(place[span[0]]))
            for begin, stop in order:
                inputs += [start, *text[begin:stop]]
                targets += [*text[begin:stop], end]
                first += [*place[begin:stop], place[begin]]
                second += range(1, stop - begin + 2)
        assert laid.sep == sep
        np.testing.assert_array_equal(laid.inputs, inputs)
        np.testing.assert_array_equal(laid.targets, targets)
        np.testing.assert_array_equal(laid.positions, [first, second])
    assert kinds == {(0, False), (1, False), (2, False), (2, True)}


def test_no_example_is_longer_than_was_reckoned(glm: PreTrainedTokenizerFast) -> None:
    """10,000 draws, over sizes and shares; no position lies beyond the example's length."""
    laws = [
        Infilling(glm, DataConfig(source="files", task="glm-infill", **fields), ([7], [8]))
        for fields in ({}, {"infill": {"mask": 1, "span": 1e-9}}, {"mask_share": 1.0}, {"infill": {"gmask": 1}})
    ]
    chance, reached = np.random.default_rng(0), Counter[bool]()
    for example in range(10_000):
        law, size, last = laws[example % len(laws)], 1 + example // 4 % 64, bool(example // 256 % 2)
        tokens = chance.integers(20, 250, size)
        laid, most = law.lay_out(tokens, example, 0, last=last), law.most(size, last=last)
        assert len(laid.inputs) == len(laid.targets) == laid.positions.shape[1] <= most <= law.most(size)
        assert laid.sep < len(laid.inputs)
        assert laid.positions.max() < most
        assert (laid.targets != NO_LABEL).any()
        reached[len(laid.inputs) == most] += 1
    assert reached[True] > 2000  # no room is kept in vain


def test_lengths_are_poisson_without_zero(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
    """Against a simulation of the law: lengths until they cover 15%."""
    read = many(infill(infill={"mask": 1}), glm, 40)
    assert {each.blank for each in read} == {"[MASK]"}
    found = Counter(end - begin for each in read for begin, end in each.stretches)
    chance = np.random.default_rng(1)
    law: Counter[int] = Counter()
    for each in read:
        covered = 0
        while covered < each.wanted:
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
    split = infill([text], infill={"mask": 1, "span": 1e-9}, mask_share=2.5 / (size + 2))
    drawn = drawn_alone(split, glm, 1500)
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
    # every token taken out is predicted once, and every piece's end: that of a suffix is the text's, if it ends
    asked = sum(each.covered + (each.ends if each.suffix else len(each.stretches)) for each in read)
    assert position_counts([batch]) == {
        "tokens": int(batch.attention_mask[:3].sum()),
        "targets": asked,
        "sequences": 3,
        "labels": int((batch.targets >= 0).sum()),
        "written": 0,
    }
    moved = batch.to(torch.device("cpu"))
    assert moved.sep is not None
    assert moved.position_ids is not None
    assert moved.position_ids.shape == (5, 2, batch.input_ids.shape[1])
    empty = split.collate([], size=2)
    assert not empty.target_mask.any()
    assert empty.sep is not None
    assert (empty.sep <= empty.attention_mask.sum(1)).all()


def test_a_single_sentence_has_spans_or_a_long_one(infill: Callable[..., Split], glm: PreTrainedTokenizerFast) -> None:
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


@pytest.mark.parametrize(
    ("lacks", "fields", "message"),
    [
        ("[dBLOCK]", {}, "block_mask"),
        ("[dBLOCK]", {"mask": 1}, "block_mask: 0"),
        ("[dBLOCK]", {"smask": 1}, "block_mask: 0"),
        ("[gMASK]", {}, r"no \[gMASK\]"),
    ],
)
def test_a_tokenizer_without_a_command_is_refused(lacks: str, fields: dict[str, float], message: str) -> None:
    names = {"[MASK]", "[gMASK]", "[sMASK]", "[dBLOCK]", "<|startofpiece|>", "<|endofpiece|>"} - {lacks}
    stub = SimpleNamespace(get_vocab=lambda: {name: number for number, name in enumerate(sorted(names))})
    with pytest.raises(UserError, match=message):
        Infilling(stub, DataConfig(source="files", task="glm-infill", infill=fields), ([7], [8]))
    Infilling(stub, DataConfig(source="files", task="glm-infill", infill={"mask": 1, "block_mask": 0}), ([7], [8]))


def test_too_few_ids_for_the_commands() -> None:
    with pytest.raises(UserError, match="at least 266"):
        trained_tokenizer(TEXTS, 265)
    assert len(trained_tokenizer(TEXTS, 266)) == 266
