"""`posterior` and the fact it reads: exact Bayes, its recursion, what it may see, where it is refused."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import causal_batch, causal_model, make_objective, rows_of
from tiny_run import tiny_config
from torch import Tensor

import mtkd
from mtkd.config import Named
from mtkd.config.match import Match
from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.data.completions import Completion, completed
from mtkd.errors import UserError
from mtkd.models.features import DenseLogits
from mtkd.weightings import Around, Traits, Weighting
from mtkd.weightings.posterior import Posterior, faded_sums

# Two authors of texts over three letters: the chance of the next letter in twelfths, by the letter before it.
AUTHORS = (((6, 3, 3), (2, 9, 1), (4, 5, 3)), ((2, 4, 6), (3, 3, 6), (1, 3, 8)))
TEXT = (0, 1, 1, 2, 0, 0, 1, 2, 2, 2, 1, 0)


def batch_of(texts: Sequence[Sequence[int]], *, before: int = 0, after: int = 0, prompt: int = 0) -> Batch:
    """Texts with padding on both sides; every token but a text's first `prompt + 1` is a target."""
    size = before + max(map(len, texts)) + after
    ids = torch.full((len(texts), size), 2)  # padding is a letter too: who reads it is found out
    mask, targets = torch.zeros(len(texts), size).bool(), torch.full((len(texts), size), NO_LABEL)
    for row, text in enumerate(texts):
        ids[row, before : before + len(text)], mask[row, before : before + len(text)] = torch.tensor(text), True
        targets[row, before + prompt : before + len(text) - 1] = torch.tensor(text[1 + prompt :])
    return Batch(torch.arange(len(texts)), ids, mask, targets)


def traits_of(batch: Batch, authors: Sequence[Any] = AUTHORS, per: str = "token", tile: int = 4) -> Traits:
    """The authors as teachers: at every position the logarithms of the row of the letter there."""
    tables = [(torch.tensor(table, dtype=torch.float64) / 12).log() for table in authors]
    return Traits([DenseLogits(table[batch.input_ids]) for table in tables], Around(batch), per, tile)


def chances(author: Any, text: Sequence[int]) -> list[Fraction]:
    return [Fraction(1), *(Fraction(author[a][b], 12) for a, b in pairwise(text))]


def test_it_is_the_bayes_posterior_of_two_authors() -> None:
    """At every position prior times likelihood of the text so far, over the authors' sum, in fractions."""
    prior = {"a": 1, "b": 3}
    found = Posterior(("a", "b"), beta=1, forget=1, prior=prior)(traits_of(batch_of([TEXT])))[:, 0]
    joint = [Fraction(1), Fraction(3)]
    for place in range(len(TEXT)):
        joint = [value * chances(author, TEXT)[place] for value, author in zip(joint, AUTHORS, strict=True)]
        expected = [float(value / sum(joint)) for value in joint]
        torch.testing.assert_close(found[:, place], torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("beta", "forget"), [(0.5, 0.95), (2.0, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_it_follows_the_recursion(beta: float, forget: float) -> None:
    """``S(t) = forget S(t-1) + log p(x_(t-1))`` in plain Python, weights ``exp(beta S)`` over their sum."""
    text = TEXT * 5
    found = Posterior(("a", "b"), beta=beta, forget=forget)(traits_of(batch_of([text])))[:, 0].double()
    sums = [0.0, 0.0]
    for place in range(len(text)):
        logs = [torch.tensor(float(chances(author, text)[place])).double().log().item() for author in AUTHORS]
        sums = [forget * s + log for s, log in zip(sums, logs, strict=True)]
        share = 1 / (1 + torch.tensor(beta * (sums[1] - sums[0])).double().exp().item())
        torch.testing.assert_close(found[:, place], torch.tensor([share, 1 - share]).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13, 64])
@pytest.mark.parametrize("forget", [0.0, 0.5, 0.999, 1.0])
def test_faded_sums_are_those_of_a_loop(length: int, forget: float) -> None:
    values = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)
    expected, total = [], torch.zeros(2, 3, dtype=torch.float64)
    for place in range(length):
        total = forget * total + values[..., place]
        expected.append(total)
    torch.testing.assert_close(faded_sums(values, forget), torch.stack(expected, -1), rtol=1e-12, atol=1e-12)


def written_batch(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> Batch:
    """What a student wrote after some prompts; the data had other answers."""
    data = batch_of([[*prompt, 2, 2] for prompt in prompts], prompt=max(map(len, prompts)) - 1)
    texts_ = [Completion(i, p, t, torch.zeros(len(t))) for i, (p, t) in enumerate(zip(prompts, texts, strict=True))]
    return completed(data, [], texts_, pad_id=2)


def test_it_is_the_bayes_posterior_of_a_written_text() -> None:
    """Law: in fractions, at each written token: prior times likelihood of prompt and what was written before it."""
    prompts, texts = [(0, 1, 1), (2, 0)], [(2, 0, 0, 1), (1, 1, 0, 2, 2)]
    batch = written_batch(prompts, texts)
    found = Posterior(("a", "b"), beta=1, forget=1, prior={"a": 1, "b": 3})(traits_of(batch))
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        asked = batch.target_mask[row].nonzero().squeeze(-1).tolist()
        assert asked == list(range(len(prompt) - 1, len(prompt) + len(text) - 1))
        for number, place in enumerate(asked):
            before = [*prompt, *text[:number]]
            joint = [prior * prod(chances(author, before)) for prior, author in zip((1, 3), AUTHORS, strict=True)]
            expected = torch.tensor([float(value / sum(joint)) for value in joint])
            torch.testing.assert_close(found[:, row, place], expected, rtol=1e-5, atol=1e-7)


def test_no_later_word_of_a_written_text_is_seen() -> None:
    """Law: another word changes the weights after it, and none up to the position that predicts it."""
    prompt, text = (0, 1), (2, 0, 0, 1, 2)
    first = Posterior(("a", "b"))(traits_of(written_batch([prompt], [text])))[:, 0]
    for changed in range(len(text)):
        other = [*text[:changed], (text[changed] + 1) % 3, *text[changed + 1 :]]
        again = Posterior(("a", "b"))(traits_of(written_batch([prompt], [other])))[:, 0]
        at = len(prompt) + changed  # where the changed word is read, if it is
        assert torch.equal(again[:, :at], first[:, :at])
        assert at == again.shape[-1] or not torch.equal(again[:, at], first[:, at])


@pytest.mark.parametrize("changed", range(1, len(TEXT)))
def test_no_weight_sees_what_it_weighs(changed: int) -> None:
    """Another token at t leaves the weights before t, one of which weighs it, and changes the one at t."""
    other = list(TEXT)
    other[changed] = (TEXT[changed] + 1) % 3
    weighting = Posterior(("a", "b"))
    before, after = (weighting(traits_of(batch_of([text])))[0, 0] for text in (TEXT, other))
    assert torch.equal(before[:changed], after[:changed])  # position t - 1 predicts the token at t
    assert before[changed] != after[changed]


def test_every_example_begins_with_the_prior_and_stands_for_itself() -> None:
    """Next to longer texts, with padding on either side or a filler row: the same weights; the first is the prior."""
    texts = (TEXT, TEXT[3:8], TEXT[:1])
    weighting = Posterior(("a", "b"), prior={"a": 2.0, "b": 1.0})
    together = batch_of(texts, before=2, after=3)
    together.keys = torch.tensor([0, 1, -1])
    found = weighting(traits_of(together))
    for row, text in enumerate(texts[:2]):
        alone = weighting(traits_of(batch_of([text])))[:, 0]
        torch.testing.assert_close(found[:, row, 2 : 2 + len(text)], alone, rtol=1e-6, atol=0)
        torch.testing.assert_close(alone[:, 0], torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(found[0, 2], torch.full((len(found[0, 2]),), 2 / 3))


def test_one_weight_per_example_is_that_after_the_prompt() -> None:
    """At the first target; of an example without any at its last token."""
    batch = batch_of([TEXT, TEXT[2:9]], before=1, after=1, prompt=4)
    batch.targets[1] = NO_LABEL
    weighting = Posterior(("a", "b"))
    per_token = weighting(traits_of(batch))
    found = weighting(traits_of(batch, per="example"))
    torch.testing.assert_close(found[..., 0], torch.stack([per_token[:, 0, 1 + 4], per_token[:, 1, 1 + 6]], 1))


def test_an_impossible_token_leaves_numbers() -> None:
    """A teacher that gives a token of the text no chance has the weight 0; where all do, weights are still shares."""
    impossible = (AUTHORS[0][0], (3, 9, 0), AUTHORS[0][2])
    batch = batch_of([TEXT])  # the third step is from letter 1 to letter 2
    found = Posterior(("a", "b"), forget=1.0)(traits_of(batch, (impossible, AUTHORS[1])))[:, 0]
    assert found[0, 3:].tolist() == [0.0] * 9
    assert float(found[0, 2]) > 0
    both = Posterior(("a", "b"))(traits_of(batch, (impossible, impossible)))
    torch.testing.assert_close(both, torch.full_like(both, 0.5))


class Watched(DenseLogits):
    """Counts the most rows that existed at a time."""

    largest = 0

    def rows(self, index: Tensor) -> Tensor:
        self.largest = max(self.largest, len(index))
        return super().rows(index)


def test_a_tile_of_logits_exists_at_a_time() -> None:
    """The fact asks for at most a tile of positions, and its values do not depend on the tile."""
    batch = batch_of([TEXT, TEXT[:5]])
    whole = traits_of(batch, tile=1000).token_log_probs
    traits = traits_of(batch, tile=3)
    watched = [Watched(logits.values) for logits in traits.logits if isinstance(logits, DenseLogits)]
    found = Traits(watched, Around(batch), "token", tile=3).token_log_probs
    assert [logits.largest for logits in watched] == [3, 3]
    torch.testing.assert_close(found, whole)


class BestSoFar(Weighting):
    """A user's own: the mean log-probability of the text, per example; nothing is declared."""

    def forward(self, traits: Traits) -> Tensor:
        return torch.softmax(traits.token_log_probs.mean(-1, keepdim=True), 0).expand(traits.shape)


def test_the_fact_is_what_a_model_says_of_the_next_token() -> None:
    """Against log-softmax of the whole logits of plain transformers, one example at a time, prompts included."""
    teachers = [causal_model(16, 2, seed) for seed in (1, 2)]
    batch = causal_batch((9, 4, 7), prompt=3, padding=2)
    objective, pool = make_objective(causal_model(16, 1, 0), teachers, [Match(loss="kl")], "posterior", "token")
    logits = objective.teacher_logits(pool.forward(batch))
    found = Traits(logits, Around(batch), "token", tile=5).token_log_probs
    expected = torch.zeros(2, 3, 11)
    for k, teacher in enumerate(teachers):
        for row, length in enumerate((9, 4, 7)):
            ids = batch.input_ids[row : row + 1, :length]
            with torch.no_grad():
                log_probs = teacher.model(input_ids=ids).logits[0].log_softmax(-1)
            for place in range(1, length):
                expected[k, row, place] = log_probs[place - 1, ids[0, place]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    mean = BestSoFar()(Traits(logits, Around(batch), "token", tile=5))
    torch.testing.assert_close(mean, expected.mean(-1, keepdim=True).softmax(0).expand(2, 3, 11), rtol=1e-4, atol=1e-5)


def test_packed_rows_and_micro_batches_train_the_same() -> None:
    """Loss and gradient of a step: padded, packed, and in two micro-batches with a filler row."""
    rows = [Match(loss="kl"), Match(target="labels", loss="ce", weight=0.5)]
    batch = causal_batch((9, 3, 7, 2, 5), prompt=2)
    counts = position_counts([batch])

    def step(*parts: Batch, packing: bool = False) -> tuple[Tensor, Tensor]:
        student, teachers = causal_model(16, 1, 0), [causal_model(16, 2, seed) for seed in (1, 2)]
        for model in (student, *teachers) if packing else ():
            model.enable_packing("packing")
        objective, pool = make_objective(student, teachers, rows, Named(name="posterior"), "token")
        losses = torch.stack([objective(part, pool.forward(part), counts)[0] for part in parts])
        losses.sum().backward()
        return losses.detach().sum(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    loss, gradient = step(batch)
    for other in (
        step(batch, packing=True),
        step(rows_of(batch, [0, 3]), rows_of(batch, [1, 2, 4]), rows_of(batch, [])),
    ):
        torch.testing.assert_close(other[0], loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(other[1], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"beta": -0.5}, "beta must not be negative"),
        ({"forget": 1.5}, "forget must be 0 to 1"),
        ({"forget": -0.1}, "forget must be 0 to 1"),
        ({"prior": {"a": 1.0}}, "weights of a prior name every teacher once"),
        ({"prior": {"a": 1.0, "b": -1.0}}, "weights of a prior are non-negative"),
        ({"prior": 0.5}, "weights of a prior name every teacher once"),
    ],
)
def test_options_that_make_no_posterior_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises((ValueError, UserError), match=why):
        mtkd.WEIGHTINGS["posterior"](teachers=("a", "b"), **options)


def planned(
    folder: Path, data: dict[str, Any], student: dict[str, Any], architecture: str = "gpt2", *, memory: bool = False
) -> mtkd.Plan:
    teachers = [{"name": name, "model": "stage:teacher"} for name in ("a", "b")]
    model = {"architecture": architecture, **student.pop("student", {})}
    learner = {"teachers": teachers, "weighting": "posterior", "per": "token", "student": model, **student}
    stages = {"teacher": {"student": {"architecture": architecture}}, "student": learner}
    return mtkd.plan(tiny_config(folder, data={"text": data}, stages=stages), memory=memory)


@pytest.mark.parametrize(
    ("data", "student", "architecture", "why"),
    [
        ({"task": "classify", "labels": ["a", "b"]}, {"per": "example"}, "bert", "only causal language models"),
        ({"task": "masked-lm"}, {}, "bert", "only causal language models"),
        ({"task": "glm-infill"}, {}, "glm_blocklm", "only causal language models"),
        ({}, {"per": "example"}, "gpt2", "is that after its prompt, and these texts have none"),
        ({}, {"student": {"vocabulary": {"keep": 0.95}}}, "gpt2", "keeps a part of the ids"),
    ],
)
def test_where_no_teacher_reads_the_text_the_plan_says_so(
    tmp_path: Path, data: dict[str, Any], student: dict[str, Any], architecture: str, why: str
) -> None:
    with pytest.raises(UserError, match=why):
        planned(tmp_path, data, student, architecture)


def test_its_memory_is_planned(tmp_path: Path) -> None:
    """The step is counted with this weighting, not with a stand-in for one that reads values."""
    stages = planned(tmp_path, {}, {}, memory=True).stages
    memory = stages[-1].memory
    assert memory is not None
    assert not any("counted as uniform" in note for note in memory.notes)
