"""Losses on the student's own text: zero against itself, the formula over written tokens, labels of the data alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from tiny import CPU, NUM_IDS, causal_batch, causal_model, make_objective, rows_of
from torch import Tensor

from mtkd.config import RolloutConfig
from mtkd.config.match import Match
from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.engine.dist import Dist
from mtkd.engine.torch_engine import TorchEngine
from mtkd.losses.spec import LOSSES
from mtkd.models.sampling import Sampling
from mtkd.models.taps import TappedModel
from mtkd.objective.objective import Objective
from mtkd.pool import TeacherPool
from mtkd.running.rollout import Rollout

LENGTHS = (9, 5, 7, 6, 8, 4, 7, 5)
PROMPT = 3
HOW = Sampling(5, ends=(1, 2, 3, 4, 5, 6))
DATA = causal_batch(LENGTHS, prompt=PROMPT)
REVERSE = Match(loss="reverse_kl")
CE = Match(loss="ce", target="labels")
POLICY = Match(loss="policy_gradient", options={"gate": (0.8, 1.25)})


class Ranks(Dist):
    """One rank of several, which knows the examples of all of them."""

    def __init__(self, keys: list[list[int]], rank: int) -> None:
        super().__init__(rank, len(keys))
        object.__setattr__(self, "keys", keys)

    def gather_objects(self, value: list[int]) -> list[list[int]]:  # type: ignore[override]
        assert value == self.keys[self.rank]  # type: ignore[attr-defined]
        return self.keys  # type: ignore[attr-defined]

    def broadcast_object(self, value: list[list[int]]) -> list[list[int]]:  # type: ignore[override]
        return value


class Stub:
    """An engine without an optimizer."""

    whole_student = TorchEngine.whole_student

    def __init__(self, objective: Objective, dist: Dist) -> None:
        self.objective, self.dist, self.device = objective, dist, CPU


def roll(
    objective: Objective, parts: Sequence[Sequence[int]], rank: int = 0, ranks: int = 1, **fields: object
) -> list[Batch]:
    """The written micro-batches of a rank; `parts`: the examples of each micro-batch of every rank, rank by rank."""
    own = len(parts) // ranks
    keys = [[e for part in parts[r * own : (r + 1) * own] for e in part] for r in range(ranks)]
    stream = iter([[rows_of(DATA, part) for part in parts[rank * own : (rank + 1) * own]]])
    config = RolloutConfig.model_validate({"max_new_tokens": 5, **fields})
    return Rollout(stream, Stub(objective, Ranks(keys, rank)), config, HOW, 3, 0).batches(4)  # type: ignore[arg-type]


def losses(
    objective: Objective, pool: TeacherPool, batches: list[Batch]
) -> tuple[float, dict[str, float], list[Tensor]]:
    """(loss, values of the rows, gradients) of a step."""
    counts = position_counts(batches)
    student, total, values = objective.student, 0.0, dict[str, float]()
    student.zero_grad()
    for batch in batches:
        loss, metrics = objective(batch, pool.forward(batch), counts)
        loss.backward()
        total += float(loss)
        for name, value in metrics.items():
            values[name] = values.get(name, 0.0) + float(value)
    return total, values, [p.grad.clone() for p in student.parameters() if p.grad is not None]


def log_probs(model: TappedModel, batch: Batch) -> Tensor:
    """By the library's own model, in float64, without this library's logits: [B,L,V]."""
    whole = copy.deepcopy(model.model).double().eval()
    with torch.no_grad():
        return torch.log_softmax(whole(batch.input_ids, batch.attention_mask.long()).logits[..., :NUM_IDS], -1)


SOFT = sorted(
    name
    for name, spec in LOSSES.items()
    if "logits" in spec.inputs and not spec.labels and spec.zero_at_equality and "batch" not in spec.needs
)


@pytest.mark.parametrize("name", SOFT)
def test_a_student_loses_nothing_against_itself_on_its_own_text(name: str) -> None:
    """Law: loss and gradient are zero to float32's rounding, for every row that is zero at equality."""
    student = causal_model(16, 2, seed=1)
    objective, pool = make_objective(student, [copy.deepcopy(student)], [Match(loss=name)])
    loss, _, gradients = losses(objective, pool, roll(objective, [range(8)]))
    assert loss == pytest.approx(0, abs=1e-5)
    assert max(float(g.abs().max()) for g in gradients) < 2e-5


@pytest.mark.parametrize("teachers", [1, 2])
def test_reverse_kl_is_the_mean_over_written_tokens(teachers: int) -> None:
    """Law: one teacher is that teacher; two are weighted per token. Written out in float64, a token at a time."""
    student, models = causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2 + k) for k in range(teachers)]
    objective, pool = make_objective(student, models, [REVERSE], "entropy", per="token")
    (batch,) = roll(objective, [range(8)], per_prompt=2)
    assert len(batch.keys) == 16
    mine, others = log_probs(student, batch), [log_probs(model, batch) for model in models]
    total, count = 0.0, 0
    for row, place in batch.target_mask.nonzero().tolist():
        entropies = torch.stack([-(p[row, place].exp() * p[row, place]).sum() for p in others])
        weights = 1 - entropies / entropies.sum() if teachers == 2 else torch.ones(1)
        kls = [(mine[row, place].exp() * (mine[row, place] - p[row, place])).sum() for p in others]
        total += float(sum(w * kl for w, kl in zip(weights, kls, strict=True)))
        count += 1
    assert count == position_counts([batch])["targets"] < 16 * 5
    assert losses(objective, pool, [batch])[0] == pytest.approx(total / count, rel=1e-4)


def test_what_was_drawn_is_what_is_asked_with_its_probability() -> None:
    """Law: targets begin after the prompt; each has the student's own probability as `behaviour`."""
    objective, _ = make_objective(causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2)], [REVERSE])
    (batch,) = roll(objective, [range(8)])
    assert batch.behaviour is not None
    own = log_probs(objective.student, batch)
    asked = batch.target_mask
    assert not asked[:, :PROMPT].any()
    assert bool(asked[:, PROMPT].all())
    expected = own.gather(-1, batch.targets.clamp_min(0)[..., None]).squeeze(-1)
    assert torch.allclose(batch.behaviour[asked].double(), expected[asked], atol=1e-4)
    assert not batch.behaviour[~asked].any()


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_text_is_the_same_however_the_batch_is_cut(share: float) -> None:
    """Law: 8 in one micro-batch, 2 x 4, and two ranks: the same examples, texts, loss and gradient."""
    objective, pool = make_objective(causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2)], [REVERSE])
    order = [2, 0, 7, 5, 1, 4, 6, 3]
    one = roll(objective, [order], share=share)
    two = roll(objective, [order[:4], order[4:]], share=share)
    ranks = [batch for rank in range(2) for batch in roll(objective, [order[:4], order[4:]], rank, 2, share=share)]
    expected = texts(one)
    assert texts(two) == texts(ranks) == expected
    assert len([key for key, written, _ in expected if written]) == 8 * share
    whole = losses(objective, pool, one)
    for cut in (two, ranks):
        other = losses(objective, pool, cut)
        assert other[0] == pytest.approx(whole[0], rel=1e-5)
        for a, b in zip(other[2], whole[2], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("teachers", [1, 2])
def test_policy_gradient_is_the_mean_over_written_tokens(teachers: int, packing: bool) -> None:
    """Law: written out in float64 for a student that moved since it wrote, a part of the rows the data's; packed too.

    The data's targets count in neither sum nor number; tiles of 5 cut the rows.
    """
    student, models = causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2 + k) for k in range(teachers)]
    objective, pool = make_objective(student, models, [POLICY], "entropy", per="token")
    batches = roll(objective, [range(4), range(4, 8)], share=0.5)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    student.packing = packing
    total, count, dropped = 0.0, 0, 0
    for batch in batches:
        mine, others = log_probs(student, batch), [log_probs(model, batch) for model in models]
        assert batch.written is not None
        assert batch.behaviour is not None
        for row, place in (batch.target_mask & batch.written[:, None]).nonzero().tolist():
            word = int(batch.targets[row, place])
            entropies = torch.stack([-(p[row, place].exp() * p[row, place]).sum() for p in others])
            weights = 1 - entropies / entropies.sum() if teachers == 2 else torch.ones(1)
            now, count = mine[row, place, word], count + 1
            ratio = (now - batch.behaviour[row, place]).exp()
            wanted = sum(w * p[row, place, word] for w, p in zip(weights, others, strict=True))
            inside = 0.8 <= ratio <= 1.25
            dropped += not inside
            total += float(-ratio * (wanted - now)) if inside else 0.0
    assert 0 < dropped < count == position_counts(batches)["written"] < position_counts(batches)["targets"]
    assert losses(objective, pool, batches)[0] == pytest.approx(total / count, rel=1e-4)


def test_the_mean_gradient_of_drawn_words_is_that_of_reverse_kl() -> None:
    """Law: through model and tiles: over all words at one position, by their probability, the parameters' gradient."""
    student, models = causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2 + k) for k in range(2)]
    objective, pool = make_objective(student, models, [POLICY], "entropy", per="token")
    exact, others = make_objective(student, models, [REVERSE], "entropy", per="token")
    (batch,) = roll(objective, [range(1)])
    prompt = batch.input_ids[:, : PROMPT + 1]
    probs = log_probs(student, batch)[0, PROMPT].exp().float()

    def drawn(word: int) -> Batch:
        targets, behaviour = torch.full_like(prompt, NO_LABEL), torch.zeros(prompt.shape)
        targets[0, PROMPT], behaviour[0, PROMPT] = word, probs[word].log()
        written = torch.ones(1).bool()
        return Batch(batch.keys, prompt, torch.ones_like(prompt).bool(), targets, written=written, behaviour=behaviour)

    each = [losses(objective, pool, [drawn(word)])[2] for word in range(len(probs))]
    wanted = losses(exact, others, [drawn(0)])[2]
    for number, gradient in enumerate(wanted):
        mean = torch.stack([p * gradients[number] for p, gradients in zip(probs, each, strict=True)]).sum(0)
        torch.testing.assert_close(mean, gradient, rtol=1e-3, atol=1e-5)
    assert max(float(g.abs().max()) for g in wanted) > 0.01


def texts(batches: list[Batch]) -> list[tuple[int, bool, list[int]]]:
    """(example, whether the student wrote it, its targets) of every row."""
    return sorted(
        (int(batch.keys[row]), bool(batch.written[row]), batch.targets[row][batch.target_mask[row]].tolist())
        for batch in batches
        if batch.written is not None
        for row in range(len(batch.keys))
    )


def test_other_steps_and_seeds_write_other_texts() -> None:
    objective, _ = make_objective(causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2)], [REVERSE])
    first = texts(roll(objective, [range(8)], share=0.5))
    stream = iter([[rows_of(DATA, range(8))]])
    config = RolloutConfig(max_new_tokens=5, share=0.5)
    rollout = Rollout(stream, Stub(objective, Ranks([list(range(8))], 0)), config, HOW, 3, 0)  # type: ignore[arg-type]
    other = texts(rollout.batches(5))
    assert [row[:2] for row in first] != [row[:2] for row in other]
    assert [row[2] for row in first] != [row[2] for row in other]


def test_labels_are_those_of_the_data_alone() -> None:
    """Law: cross entropy is the mean over the data's own answers; the teacher's row is one over all of them."""
    student = causal_model(16, 2, seed=1)
    objective, pool = make_objective(student, [causal_model(16, 1, seed=2)], [CE, REVERSE])
    batches = roll(objective, [range(4), range(4, 8)], share=0.5)
    _, values, _ = losses(objective, pool, batches)
    own = []
    for batch in batches:
        assert batch.written is not None
        picked = log_probs(student, batch).gather(-1, batch.targets.clamp_min(0)[..., None]).squeeze(-1)
        own.append(-picked[batch.target_mask & ~batch.written[:, None]])
    assert len(torch.cat(own)) == position_counts(batches)["labels"]
    assert values["row/0:logits:ce"] == pytest.approx(float(torch.cat(own).mean()), rel=1e-4)
    alone, more = make_objective(student, pool_models(pool), [REVERSE])
    assert losses(alone, more, batches)[0] == pytest.approx(values["row/1:logits:reverse_kl"], rel=1e-5)


def pool_models(pool: TeacherPool) -> list[TappedModel]:
    return [teacher._model for teacher in pool.teachers]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["mt_bert", "ca_mkd", "learned", "rl_kd"])
def test_weightings_of_labels_take_no_written_word_for_one(name: str) -> None:
    """Law: other written targets of the same length change neither weights nor penalty: no label loss is read there."""
    student = causal_model(16, 2, seed=1)
    objective, pool = make_objective(student, [causal_model(16, 1, seed=2 + k) for k in range(2)], [REVERSE], name)
    (batch,) = roll(objective, [range(8)], share=0.5)
    other = copy.copy(batch)
    assert batch.written is not None
    other.targets = torch.where(batch.written[:, None] & batch.target_mask, 60 - batch.targets, batch.targets)
    assert not torch.equal(other.targets, batch.targets)
    weights = []
    for each in (batch, other):
        objective.begin_step(0)
        counts = {**position_counts([each]), **objective.step_counts(each)}
        _, metrics = objective(each, pool.forward(each), counts)
        weights.append({name: float(value) for name, value in metrics.items() if "weight" in name or name == "penalty"})
    assert weights[0] == weights[1]
