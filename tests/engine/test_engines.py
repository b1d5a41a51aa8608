"""Both engines make the same numbers, and the same gradient however a batch is cut."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny import CPU, causal_batch, causal_model, class_batch, classifier, make_objective, rows_of

from mtkd.config import OptimizerConfig
from mtkd.config.match import Match
from mtkd.engine.base import learning_rate
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.methods.papers import kd
from mtkd.running.train import global_counts

LENGTHS = [9, 3, 7, 1, 8, 2, 5, 6]
ROWS = [*kd(temperature=2.0).values(), Match(feature="hidden", loss="mse", student_layer=(1, 2), teacher_layer=(1, 2))]
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup=0.5, clip=0.5)
STEPS = 4


def causal_objective(tied: bool = False, packing: bool = False, rows=ROWS):
    student, *teachers = causal_model(16, 2, 0, tied=tied), causal_model(24, 2, 1), causal_model(32, 3, 2, padded=3)
    if packing:
        for model in (student, *teachers):
            model.enable_packing("packing")
    return make_objective(student, teachers, rows, "mt_bert")


def gradient(cuts: list[list[int]], packing: bool = False, rows=ROWS) -> torch.Tensor:
    """The gradient of one optimizer step whose batch of 8 is cut into these micro-batches."""
    objective, pool = causal_objective(packing=packing, rows=rows)
    batch = causal_batch(LENGTHS, prompt=1)
    micro_batches = [rows_of(batch, rows) for rows in cuts]
    counts, _ = global_counts(micro_batches, Dist())
    for micro_batch in micro_batches:
        loss, _ = objective(micro_batch, pool.forward(micro_batch), counts)
        loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in objective.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "cuts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)], [[0, 1, 2, 3, 4, 5, 6], [7], []]]
)
def test_gradient_does_not_depend_on_the_cut(cuts):
    """Gradients of micro-batches, an empty one among them, add up to that of the whole batch."""
    whole = gradient([list(range(8))])
    torch.testing.assert_close(gradient(cuts), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_packed_rows_give_the_same_gradient():
    """Of student, projections and weighted teachers, with rows on logits, labels, hidden states and attention."""
    rows = [*ROWS, Match(feature="probs", loss="attention_kl", student_layer=(1, 2), teacher_layer=(1, 2))]
    whole = gradient([list(range(8))], rows=rows)
    for cuts in ([list(range(8))], [[0, 1, 2, 3], [4, 5, 6, 7], []]):
        torch.testing.assert_close(
            gradient(cuts, packing=True, rows=rows), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max())
        )


def _engine_losses(kind: str, zero_stage: int, tied: bool, accumulate: int, packing: bool = False) -> list[float]:
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    objective, pool = causal_objective(tied, packing)
    if kind == "deepspeed":
        engine = DeepSpeedEngine(
            objective, OPTIMIZER, STEPS, CPU, zero_stage=zero_stage, accumulate=accumulate, dist=dist
        )
    else:
        engine = TorchEngine(objective, OPTIMIZER, STEPS, CPU)
    losses = []
    for step in range(STEPS):
        batch = causal_batch(LENGTHS, seed=step, prompt=1)
        parts = dist.world_size * accumulate
        mine = [list(range(8))[dist.rank * accumulate + m :: parts] for m in range(accumulate)]
        if step == 2:  # one rank has nothing at all: it must still take part
            mine = [list(range(8))[m::accumulate] if dist.rank == 0 else [] for m in range(accumulate)]
        micro_batches = [rows_of(batch, rows) for rows in mine]
        counts, _ = global_counts(micro_batches, dist)
        total = 0.0
        for micro_batch in micro_batches:
            loss, _ = engine.forward(micro_batch, pool.forward(micro_batch), counts)
            engine.backward(loss)
            total += float(loss.detach())
        norm = engine.step(step)
        assert norm > 0
        losses += dist.sum([total])
    state = engine.model_state("student")
    if state is not None:
        losses.append(sum(float(v.double().abs().sum()) for v in state.values()))
    return losses


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_gives_the_same_losses(accumulate):
    """2 and 8 micro-batches a step train as one does."""
    expected = _engine_losses("torch", 0, False, 1)
    assert _engine_losses("torch", 0, False, accumulate) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero_stage", "tied", "packing"),
    [(0, False, False), (1, False, True), (2, True, False), (3, False, False), (3, True, True)],
)
def test_deepspeed_equals_torch(zero_stage, tied, packing):
    """Two ranks under every ZeRO stage come to the losses and the exported weights of one process."""
    expected = _engine_losses("torch", 0, tied, 1)  # never packed
    ranks = run_distributed(partial(_engine_losses, "deepspeed", zero_stage, tied, 2, packing), 2, timeout=1200)
    assert ranks[0] == pytest.approx(expected, rel=1e-5)
    assert ranks[1][:STEPS] == pytest.approx(expected[:STEPS], rel=1e-5)


def test_large_products_equal_torchs_own_and_resume_bit_by_bit(tmp_path, monkeypatch):
    """Every linear layer through oneDNN, of student and teachers: the losses of torch's products, and a stop in between
    changes no bit of what follows."""
    plain = _engine_losses("torch", 0, False, 1)
    monkeypatch.setattr("mtkd.models.products._WORTH", 1)
    assert _engine_losses("torch", 0, False, 1) == pytest.approx(plain, rel=1e-5)

    def go_on(steps: range, saved: str = "") -> tuple[TorchEngine, list[float]]:
        objective, pool = causal_objective()
        engine, losses = TorchEngine(objective, OPTIMIZER, STEPS, CPU), []
        if saved:
            engine.load(tmp_path)
        for step in steps:
            batch = causal_batch(LENGTHS, seed=step, prompt=1)
            loss, _ = engine.forward(batch, pool.forward(batch), global_counts([batch], Dist())[0])
            engine.backward(loss)
            engine.step(step)
            losses.append(float(loss.detach()))
        return engine, losses

    whole, expected = go_on(range(STEPS))
    first, _ = go_on(range(2))
    first.save(tmp_path)
    resumed, losses = go_on(range(2, STEPS), "saved")
    assert losses == expected[2:]
    for name, value in resumed.model_state("student").items():
        assert torch.equal(value, whole.model_state("student")[name]), name


def test_padding_changes_nothing():
    """Five more columns of padding: the same loss, the same gradients."""
    objective, pool = causal_objective()
    values = []
    for padding in (0, 5):
        batch = causal_batch(LENGTHS, prompt=1, padding=padding)
        counts, _ = global_counts([batch], Dist())
        objective.zero_grad()
        loss, _ = objective(batch, pool.forward(batch), counts)
        loss.backward()
        grads = torch.cat([p.grad.reshape(-1) for p in objective.parameters() if p.grad is not None])
        values.append((loss.detach(), grads))
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(values[0][1], values[1][1], rtol=1e-4, atol=1e-6)


def test_an_empty_batch_gives_zero_loss_and_zero_gradients():
    objective, pool = causal_objective()
    batch = rows_of(causal_batch(LENGTHS), [])
    loss, _ = objective(batch, pool.forward(batch), {"tokens": 7, "targets": 7, "labels": 7, "sequences": 2})
    loss.backward()
    assert float(loss) == 0
    head = objective.student.output_head[0]
    assert head.grad is not None  # present, so that no rank misses a collective
    assert all(float(p.grad.abs().max()) == 0 for p in objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("make", [causal_objective, None])
def test_one_teacher_equals_the_single_teacher_formula(make):
    """K=1: the objective's loss is a * T^2 KL + b * CE, from the models' own logits."""
    if make is None:
        student, teacher = classifier(16, 2, 0), classifier(24, 2, 1)
        batch = class_batch(LENGTHS)
    else:
        student, teacher = causal_model(16, 2, 0), causal_model(24, 2, 1)
        batch = causal_batch(LENGTHS, prompt=2)
    objective, pool = make_objective(student, [teacher], [*kd(temperature=3.0, soft=0.7, hard=0.3).values()])
    counts, _ = global_counts([batch], Dist())
    loss, _ = objective.eval()(batch, pool.forward(batch), counts)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    with torch.no_grad():
        s, t = (m.model(**inputs).logits.double() for m in (student, teacher))
    keep, labels = batch.target_mask, batch.targets
    if make is None:
        keep = torch.ones(len(LENGTHS), dtype=torch.bool)
    s, t, labels = s[keep], t[keep], labels[keep]
    p, q = torch.softmax(t / 3, -1), torch.softmax(s / 3, -1)
    soft = 9 * (p * (p.log() - q.log())).sum(-1).mean()
    hard = -torch.log_softmax(s, -1)[torch.arange(len(labels)), labels].mean()
    assert float(loss) == pytest.approx(float(0.7 * soft + 0.3 * hard), rel=1e-5)


def test_teacher_stays_in_eval_mode():
    student, teacher = classifier(16, 2, 0), classifier(16, 2, 1, dropout=0.5)
    objective, pool = make_objective(student, [teacher], [*kd().values()])
    teacher.train()
    batch = class_batch(LENGTHS)
    first, second = (pool.forward(batch)[0]["logits"].values for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in objective.parameters()}


def test_mask_is_shifted_with_the_labels():
    """Changing a teacher at the last prompt position changes the loss; at the last token it does not."""
    student, teacher = causal_model(16, 1, 0), causal_model(16, 1, 1)
    objective, pool = make_objective(student, [teacher], [Match(loss="kl")])
    batch = causal_batch([6], prompt=2)
    batch.targets[0, 5] = -100  # position 5 is the last token: it predicts nothing
    counts, _ = global_counts([batch], Dist())

    def loss_with_teacher_changed_at(position: int | None) -> float:
        features = pool.forward(batch)
        if position is not None:
            features[0]["logits"].hidden[0, position] += 3.0
        return float(objective(batch, features, counts)[0])

    plain = loss_with_teacher_changed_at(None)
    assert loss_with_teacher_changed_at(2) != pytest.approx(plain, rel=1e-4)  # predicts the first target
    assert loss_with_teacher_changed_at(1) == plain  # a prompt position that predicts the prompt
    assert loss_with_teacher_changed_at(5) == plain


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate_equals_the_closed_form(schedule):
    import math

    config = OptimizerConfig(lr=2.0, warmup=0.2, schedule=schedule, final_lr=0.1)
    for step in range(10):
        if step < 2:
            expected = 2.0 * (step + 1) / 2
        else:
            x = (step - 2) / 8
            fall = {"constant": 1.0, "linear": 1 - 0.9 * x, "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2}
            expected = 2.0 * fall[schedule]
        assert learning_rate(config, step, 10) == pytest.approx(expected)
