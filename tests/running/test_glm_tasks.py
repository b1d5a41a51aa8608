"""GLM's tasks behind the objective: rows on part B against the dense formula, and both engines."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import CPU, make_objective
from tiny_glm import ANSWERS, CLOZE, cloze_model, language_model, part_b, split_of, tokenizer

from mtkd.config import OptimizerConfig
from mtkd.config.match import Match
from mtkd.data.batch import Batch
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import UserError
from mtkd.methods.papers import glmd, kd
from mtkd.models.features import DenseLogits
from mtkd.models.taps import TappedModel
from mtkd.running.train import global_counts

NUM_IDS = len(tokenizer())
EPOCH = 3
LABELS = Match(feature="logits", loss="ce", target="labels")


def dense(model: TappedModel, batch: Batch) -> torch.Tensor:
    """Log-probabilities [B,L,V] of the model itself, given the parts as users of GLM give them."""
    logits = model.model(
        batch.input_ids, position_ids=batch.position_ids, attention_mask=batch.attention_mask.long(), sep=batch.sep
    ).logits
    return logits[..., :NUM_IDS]


def test_rows_on_part_b_equal_the_dense_formula() -> None:
    student, *teachers = language_model(16, 1, 0), language_model(24, 2, 1), language_model(16, 2, 2)
    batch = split_of().collate([3, 0, 7, 5], size=5, epoch=EPOCH)
    soft = Match(feature="logits", loss="kl", options={"temperature": 2.0})
    objective, pool = make_objective(student, teachers, [soft, LABELS], tile=7)
    loss, metrics = objective(batch, pool.forward(batch), global_counts([batch], Dist())[0])
    where = part_b(batch) & batch.real[:, None]
    assert torch.equal(where, batch.target_mask)
    ours, targets = dense(student, batch)[where], batch.targets[where]
    kl = torch.zeros(())
    for teacher in teachers:
        theirs = torch.softmax(dense(teacher, batch)[where] / 2, -1)
        kl = kl + 4 * (theirs * (theirs.log() - torch.log_softmax(ours / 2, -1))).sum(-1).mean() / len(teachers)
    ce = -torch.log_softmax(ours, -1).gather(-1, targets[:, None]).mean()
    torch.testing.assert_close(metrics["row/0:logits:kl"], kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["row/1:logits:ce"], ce, rtol=1e-4, atol=1e-5)
    whole = torch.autograd.grad(kl + ce, list(student.model.parameters()))
    tiled = torch.autograd.grad(loss, list(student.model.parameters()))
    for one, other in zip(tiled, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_glmd_compares_every_unpadded_position() -> None:
    student, teacher = language_model(16, 1, 0), language_model(24, 2, 1)
    batch = split_of().collate([3, 0, 7], size=4, epoch=EPOCH)
    objective, pool = make_objective(student, [teacher], list(glmd().values()))
    loss, _ = objective(batch, pool.forward(batch), global_counts([batch], Dist())[0])
    where = batch.attention_mask & batch.real[:, None]
    ours, theirs = (torch.log_softmax(dense(model, batch)[where] / 15, -1) for model in (student, teacher))
    torch.testing.assert_close(loss, 225 * (theirs.exp() * (theirs - ours)).sum(-1).mean(), rtol=1e-4, atol=1e-5)


def test_part_a_is_seen_whole_and_part_b_from_left_to_right() -> None:
    model = language_model(16, 2, 0)
    batch = split_of().collate([1, 2, 6], epoch=EPOCH)
    seen = model(batch, frozenset({"scores.2"}))["scores.2"].isfinite()[:, 0]
    assert batch.sep is not None
    for row in range(3):
        size, sep = int(batch.attention_mask[row].sum()), int(batch.sep[row])
        for i in range(size):
            assert seen[row, i].nonzero().squeeze(-1).tolist() == list(range(max(sep, i + 1)))


def test_padding_and_neighbours_change_nothing() -> None:
    model, split = language_model(16, 2, 0), split_of()
    whole = split.collate([4, 0, 2, 9], size=6, epoch=EPOCH)
    together = dense(model, whole)
    for row, example in enumerate([4, 0, 2, 9]):
        alone = split.collate([example], epoch=EPOCH)
        size = alone.input_ids.shape[1]
        assert size == int(whole.attention_mask[row].sum())
        torch.testing.assert_close(dense(model, alone)[0], together[row, :size], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "cuts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[0, 1, 2, 3, 4, 5, 6], [7], []]]
)
def test_gradient_does_not_depend_on_the_cut(cuts: list[list[int]]) -> None:
    """Micro-batches of GLM's two parts, an empty one among them, add up to the whole batch."""
    split = split_of()

    def gradient(parts: list[list[int]]) -> torch.Tensor:
        student, teacher = language_model(16, 1, 0), language_model(24, 2, 1)
        objective, pool = make_objective(student, [teacher], list(kd(temperature=2.0).values()))
        batches = [split.collate(part, size=max(1, len(part)), epoch=EPOCH) for part in parts]
        counts, _ = global_counts(batches, Dist())
        for batch in batches:
            loss, _ = objective(batch, pool.forward(batch), counts)
            loss.backward()
        return torch.cat([p.grad.reshape(-1) for p in student.parameters() if p.grad is not None])

    whole = gradient([list(range(8))])
    torch.testing.assert_close(gradient(cuts), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_a_few_steps_lower_the_loss() -> None:
    split = split_of(32)
    objective, _ = make_objective(language_model(32, 1, 0), [], [LABELS])
    engine = TorchEngine(objective, OptimizerConfig(lr=1e-2, warmup=0.0), 30, CPU)
    losses = []
    for step in range(30):
        batch = split.collate(range(len(split)), epoch=step)
        loss, _ = engine.forward(batch, [], global_counts([batch], Dist())[0])
        engine.backward(loss)
        engine.step(step)
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_two_parts_are_for_glm_on_rows_of_its_own() -> None:
    from tiny import causal_model

    batch = split_of().collate([0])
    batch.input_ids = batch.input_ids % 60
    with pytest.raises(UserError, match="two parts"):
        causal_model(16, 1, 0)(batch, frozenset({"logits"}))


def test_a_cloze_is_scored_by_the_language_model() -> None:
    """Class logits of task glm-cloze against part B written for each class by hand."""
    model = cloze_model(16, 2, 0)
    plain = language_model(16, 2, 1)
    plain.model.glm.load_state_dict(model.model.glm.state_dict())
    batch = split_of(**CLOZE).collate([2, 5, 1])
    found = model(batch, frozenset({"logits"}))["logits"]
    assert isinstance(found, DenseLogits)
    named = ("<|startofpiece|>", "<|endofpiece|>", "[MASK]")
    start, end, mask = (tokenizer().convert_tokens_to_ids(name) for name in named)
    for row in range(3):
        text = batch.input_ids[row][batch.attention_mask[row]].tolist()
        at, sep = text.index(mask), len(text)
        for label, (_, words) in enumerate(ANSWERS):
            # one class has several tokens: the end of the piece belongs to every answer
            answer = [*tokenizer()(words, add_special_tokens=False)["input_ids"], end]
            ids = [*text, start, *answer[:-1]]
            positions = [[*range(sep), *[at] * len(answer)], [*[0] * sep, *range(1, len(answer) + 1)]]
            logits = plain.model(torch.tensor([ids]), position_ids=torch.tensor([positions]), sep=sep).logits[0, sep:]
            logs = torch.log_softmax(logits, -1)
            wanted = sum(logs[i, word] for i, word in enumerate(answer))
            torch.testing.assert_close(found.rows(torch.tensor([row]))[0, label], wanted, rtol=1e-4, atol=1e-4)


def _losses(kind: str, task: str, zero_stage: int) -> list[float]:
    """The losses of some steps of a student with one teacher, and what its weights add up to."""
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    if task == "glm-cloze":
        split, student, teacher = split_of(**CLOZE), cloze_model(16, 1, 0), cloze_model(24, 2, 1)
    else:
        split, student, teacher = split_of(), language_model(16, 1, 0), language_model(24, 2, 1)
    objective, pool = make_objective(student, [teacher], list(kd(temperature=2.0).values()))
    settings, steps = OptimizerConfig(lr=1e-2), 3
    if kind == "deepspeed":
        engine = DeepSpeedEngine(objective, settings, steps, CPU, zero_stage=zero_stage, accumulate=1, dist=dist)
    else:
        engine = TorchEngine(objective, settings, steps, CPU)
    losses = []
    for step in range(steps):
        mine = list(range(8 * step, 8 * step + 8))[dist.rank :: dist.world_size]
        mine = [] if step == 1 and dist.rank else mine if step != 1 else list(range(8))
        batch = split.collate([i % len(split) for i in mine], size=max(1, len(mine)), epoch=step)
        loss, _ = engine.forward(batch, pool.forward(batch), global_counts([batch], dist)[0])
        engine.backward(loss)
        assert engine.step(step) > 0
        losses += dist.sum([float(loss.detach())])
    state = engine.model_state("student")
    return losses if state is None else [*losses, sum(float(v.double().abs().sum()) for v in state.values())]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "zero_stage"), [("glm-infill", 1), ("glm-cloze", 3)])
def test_deepspeed_equals_torch(task: str, zero_stage: int) -> None:
    """Losses of two ranks are those of one process."""
    expected = _losses("torch", task, 0)
    first, second = run_distributed(partial(_losses, "deepspeed", task, zero_stage), 2, timeout=1200)
    assert first == pytest.approx(expected, rel=1e-5)
    assert second == pytest.approx(expected[:3], rel=1e-5)
