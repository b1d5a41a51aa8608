"""The objective's tiled rows against formulas written out over dense float64 logits, for every loss on logits.

Student and teachers have heads of different padded sizes, a soft cap and a scale; one sequence has no target at all.
In bfloat16 the error against float64 is at most twice that of the same formulas on plain bfloat16 products.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mtkd.config import EngineConfig
from mtkd.config.match import Match
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.engine.tile import tile_for
from mtkd.losses.spec import LOSSES
from mtkd.models.features import Features, HeadLogits
from mtkd.objective.compile import Row
from mtkd.objective.objective import Objective
from mtkd.objective.settings import Wiring

COLUMNS, WIDTH, BATCH, LENGTH = 13, 6, 3, 5
ON_VECTORS = ("mse", "normalized_mse", "cosine")
OPTIONS = {
    "kl": ({}, {"temperature": 2.0}, {"top": 3}, {"temperature": 2.0, "standardise": True}),
    "reverse_kl": ({"temperature": 2.0}, {"top": 3}, {"standardise": True}),
    "jsd": ({"beta": 0.3, "temperature": 2.0}, {"beta": 0.0}, {"top": 3}),
    "skew_kl": ({"temperature": 2.0}, {"alpha": 0.4, "top": 3}),
    "reverse_skew_kl": ({"temperature": 2.0}, {"alpha": 0.4, "top": 3}),
    "total_variation": ({"temperature": 2.0}, {"top": 3}),
    "adaptive_kl": ({"temperature": 2.0},),
    "todi": ({"temperature": 2.0}, {"top": 3}),
    "soft_ce": ({"temperature": 2.0}, {"top": 3}),
    "dkd": ({"temperature": 2.0}, {"alpha": 0.5, "beta": 2.0, "standardise": True}),
    "dist_inter": ({"temperature": 2.0},),
}


def targets() -> Tensor:
    chosen = torch.tensor([[1, 2, -1, 3, -1], [-1] * LENGTH, [-1, 12, 0, 5, 7]])
    return chosen.masked_fill(chosen < 0, NO_LABEL)


def cap(logits: Tensor) -> Tensor:
    return 6 * torch.tanh(logits / 6)


def double(logits: Tensor) -> Tensor:
    return 2 * logits


class Student(nn.Module):
    """A head over given hidden states, tied to nothing."""

    vocabulary = None
    info = SimpleNamespace(num_layers=1)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.hidden = nn.Parameter(torch.randn(BATCH, LENGTH, WIDTH, generator=generator))
        self.weight = nn.Parameter(padded(torch.randn(COLUMNS, WIDTH, generator=generator), 3))
        self.bias = nn.Parameter(padded(torch.randn(COLUMNS, generator=generator), 3))

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        return {"logits": HeadLogits(self.hidden, self.weight, self.bias, COLUMNS, cap)}


def padded(values: Tensor, more: int) -> Tensor:
    """More columns after the real ones, so large that a softmax over them would see nothing else."""
    return torch.cat([values, values.new_full((more, *values.shape[1:]), 100.0)])


class Given(nn.Module):
    """A weighting that returns what it was given, [T,B,L]."""

    lr = None

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, traits: object) -> Tensor:
        return self.weights

    def penalty(self, traits: object) -> None:
        return None

    def may_read(self) -> frozenset[str]:
        return frozenset()


def teachers(count: int) -> list[HeadLogits]:
    """Of different widths and padded sizes; the first without bias and transform."""
    found = []
    for k in range(count):
        generator = torch.Generator().manual_seed(10 + k)
        hidden = torch.randn(BATCH, LENGTH, WIDTH + k, generator=generator)
        weight = padded(torch.randn(COLUMNS, WIDTH + k, generator=generator), 2 * k)
        bias = padded(torch.randn(COLUMNS, generator=generator), 2 * k) if k else None
        found.append(HeadLogits(hidden, weight, bias, COLUMNS, double if k == 1 else None))
    return found


def dense(head: HeadLogits, dtype: torch.dtype) -> Tensor:
    """All logits [B*L,V]: float64, or float32 after a product in bfloat16."""
    parts = [head.hidden, head.weight[:COLUMNS]]
    hidden, weight = (x.double() if dtype == torch.float64 else x.bfloat16() for x in parts)
    logits = hidden.reshape(-1, hidden.shape[-1]) @ weight.t()
    logits = logits if dtype == torch.float64 else logits.float()
    if head.bias is not None:
        bias = head.bias[:COLUMNS]
        logits = logits + (bias.double() if dtype == torch.float64 else bias.float())
    return logits if head.transform is None else head.transform(logits)


def formula(loss: str, s: Tensor, t: Tensor, options: dict[str, float]) -> Tensor:
    """A loss of student and teacher logits [n,V] as its definition reads, [n]."""
    if loss == "mse":
        return ((s - t) ** 2).mean(-1)
    if loss in ON_VECTORS:
        u, v = s / (s * s).sum(-1, keepdim=True).sqrt(), t / (t * t).sum(-1, keepdim=True).sqrt()
        return ((u - v) ** 2).mean(-1) if loss == "normalized_mse" else 1 - (u * v).sum(-1)
    temperature = options.get("temperature", 1.0)
    if options.get("standardise"):
        s, t = standardised(s), standardised(t)
    q, p = ((x / temperature).exp() / (x / temperature).exp().sum(-1, keepdim=True) for x in (s, t))
    if options.get("top"):
        kept = p.argsort(-1, descending=True)[:, : int(options["top"])]
        q, p = (torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1) for x in (q, p))
    return temperature**2 * divergence(loss, q, p, options)


def standardised(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred * centred).mean(-1, keepdim=True).sqrt()


def decoupled(q: Tensor, p: Tensor, alpha: float, beta: float) -> Tensor:
    """DKD over the labels of `targets`, one position after the other."""
    values = []
    for a, b, y in zip(p, q, targets()[targets() != NO_LABEL].tolist(), strict=True):
        others = [v for v in range(COLUMNS) if v != y]
        c, d = a[others] / (1 - a[y]), b[others] / (1 - b[y])
        target = a[y] * (a[y] / b[y]).log() + (1 - a[y]) * ((1 - a[y]) / (1 - b[y])).log()
        values.append(alpha * target + beta * (c * (c / d).log()).sum())
    return torch.stack(values)


def divergence(loss: str, q: Tensor, p: Tensor, options: dict[str, float]) -> Tensor:
    """Of the student's probabilities q and the teacher's p."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    alpha, beta = options.get("alpha", 0.1), options.get("beta", 0.5)
    if loss == "adaptive_kl":
        ranked = p.argsort(-1, descending=True)
        before = p.gather(-1, ranked).cumsum(-1) - p.gather(-1, ranked)
        gap = (p - q).detach().abs()
        share = (gap.gather(-1, ranked) * (before < 0.5)).sum(-1) / gap.sum(-1)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    if loss == "dkd":
        return decoupled(q, p, options.get("alpha", 1.0), options.get("beta", 8.0))
    if loss == "dist_inter":
        a, b = (x - x.mean(-1, keepdim=True) for x in (q, p))
        return 1 - (a * b).sum(-1) / ((a * a).sum(-1) * (b * b).sum(-1)).sqrt()
    if loss == "jsd" and beta == 0:
        return kl(p, q)
    if loss == "todi":
        share = (1 / (1 + q / p)).detach()
        return (share * p * (p / q).log() + (1 - share) * q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_kl": kl(p, alpha * p + (1 - alpha) * q),
        "reverse_skew_kl": kl(q, (1 - alpha) * p + alpha * q),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "soft_ce": -(p * q.log()).sum(-1),
    }[loss]


def ensemble(row: Row, s: Tensor, ts: list[Tensor], w: Tensor) -> Tensor:
    """A row's losses over weighted teachers, [n]; w [T,n]."""
    loss, options, kind = row.match.loss, row.match.options, row.match.ensemble
    if kind == "losses":
        return sum(w[k] * formula(loss, s, t, options) for k, t in enumerate(ts))  # type: ignore[return-value]
    share = (w / w.sum(0))[..., None]
    if options.get("standardise"):  # every teacher by itself; the mixture is compared as it is
        s, ts = standardised(s), [standardised(t) for t in ts]
        options = {**options, "standardise": False}
    if kind == "logits":
        mixture = (share * torch.stack(ts)).sum(0)
    else:
        temperature = options.get("temperature", 1.0)
        mixture = temperature * (share * torch.softmax(torch.stack(ts) / temperature, -1)).sum(0).log()
    return w.sum(0) * formula(loss, s, mixture, options)


def expected(
    student: Student, rows: list[Row], heads: list[HeadLogits], weights: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """[loss, gradients of hidden states, head and bias]; every row divided by the number of targets."""
    at = (targets() != NO_LABEL).flatten()
    s = dense(student(None, frozenset())["logits"], dtype)[at]  # type: ignore[arg-type]
    ts = [dense(head, dtype)[at] for head in heads]
    total = s.new_zeros(())
    for row in rows:
        if row.from_labels:
            values = -torch.log_softmax(s, -1).gather(-1, targets().flatten()[at][:, None])[:, 0]
        else:
            values = ensemble(row, s, ts, weights.flatten(1)[:, at].to(s.dtype))
        total = total + row.match.weight * values.sum() / int(at.sum())
    return [total.detach(), *torch.autograd.grad(total, list(student.parameters()))]


def found(
    student: Student, rows: list[Row], heads: list[HeadLogits], weights: Tensor, dtype: torch.dtype, tile: int
) -> list[Tensor]:
    names = [f"t{k}" for k in range(len(heads))]
    objective = Objective(
        student,  # type: ignore[arg-type]
        rows,
        Given(weights),  # type: ignore[arg-type]
        nn.ModuleDict(),
        names,
        Wiring("token", True, tile, dtype),
    )
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    batch = Batch(torch.arange(BATCH), ids, torch.ones_like(ids).bool(), targets())
    count = int(batch.target_mask.sum())
    counts = {"targets": count, "labels": count, "tokens": 15, "sequences": BATCH}
    loss, _ = objective(batch, [{"logits": h} for h in heads], counts)
    return [loss.detach(), *torch.autograd.grad(loss, list(student.parameters()))]


def errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Root mean square error of the loss and of each gradient, as a share of the exact one's."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(values, exact, strict=True)]


def make_rows(loss: str, options: dict[str, float], kind: str, *, alone: bool = False) -> list[Row]:
    """The loss under test, with labels and, unless it is the teachers' only row, another temperature in the same pass.

    Of a row alone several teachers take turns; with another one they are read together.
    """
    matches = [
        Match(loss=loss, options=options, ensemble=kind, weight=2.0),
        *([] if alone else [Match(loss="kl", options={"temperature": 3.0}, weight=0.5)]),
        Match(loss="ce", target="labels"),
    ]
    return [Row(m, LOSSES[m.loss], f"{i}:logits", ()) for i, m in enumerate(matches)]


CASES = [
    (loss, options)
    for loss in LOSSES
    if "logits" in LOSSES[loss].inputs
    and not LOSSES[loss].labels
    and not {"batch", "behaviour"} & set(LOSSES[loss].needs)
    for options in OPTIONS.get(loss, ({},))
]


@pytest.mark.parametrize(("num_teachers", "alone"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_rows_in_tiles_are_the_formulas_over_all_logits(
    loss: str, options: dict[str, float], num_teachers: int, alone: bool
) -> None:
    """Every loss and ensemble against its definition in float64; in bfloat16 at most twice the dense error."""
    student, heads = Student(), teachers(num_teachers)
    weights = 0.1 + torch.rand(num_teachers, BATCH, LENGTH, generator=torch.Generator().manual_seed(2))
    kinds = ("losses", "logits") if loss in ON_VECTORS else ("losses", "probabilities", "logits")
    for kind in kinds if num_teachers > 1 else kinds[:1]:
        rows = make_rows(loss, options, kind, alone=alone)
        exact = expected(student, rows, heads, weights, torch.float64)
        plain = errors(expected(student, rows, heads, weights, torch.bfloat16), exact)
        for tile in (1, 3, 64):
            assert max(errors(found(student, rows, heads, weights, torch.float32, tile), exact)) < 2e-5
            coarse = errors(found(student, rows, heads, weights, torch.bfloat16, tile), exact)
            # the errors of a loss cancel by chance, on either side: a quarter of bfloat16's rounding is granted
            assert coarse[0] <= max(2 * plain[0], 2**-10)
            assert all(a <= 2 * b for a, b in zip(coarse[1:], plain[1:], strict=True)), (kind, tile, coarse, plain)


def test_the_padding_would_be_seen() -> None:
    student, heads = Student(), teachers(2)
    for head in (student(None, frozenset())["logits"], heads[1]):  # type: ignore[arg-type]
        assert isinstance(head, HeadLogits)
        assert float(torch.softmax(head.hidden @ head.weight.t(), -1)[..., COLUMNS:].sum(-1).amax()) > 0.9


@pytest.mark.parametrize(
    ("columns", "device", "wanted"),
    [
        (13, "cpu", 256),
        (32_000, "cpu", 256),
        (128_256, "cpu", 64),
        (151_936, "cpu", 48),
        (2**23, "cpu", 16),
        (13, "cuda", 4096),
        (32_000, "cuda", 2096),
        (151_936, "cuda", 432),
    ],
)
def test_tiles_by_themselves(columns: int, device: str, wanted: int) -> None:
    assert tile_for(EngineConfig(), columns, device) == wanted
    assert tile_for(EngineConfig(tile=7), columns, device) == 7


def test_tiles_stay_within_their_memory() -> None:
    for columns, (device, limit) in itertools.product((10, 999, 50_257, 262_144), (("cpu", 2**25), ("cuda", 2**28))):
        assert 4 * columns * tile_for(EngineConfig(), columns, device) <= limit


@dataclass
class Counted:
    """Logits that note how many of the tensors given by all of them are still there."""

    logits: HeadLogits
    alive: set[int]
    most: list[int]
    num_columns: int = COLUMNS

    def rows(self, index: Tensor) -> Tensor:
        given = self.logits.rows(index)
        self.alive.add(id(given))
        self.most.append(len(self.alive))
        weakref.finalize(given, self.alive.discard, id(given))
        return given

    def in_dtype(self, dtype: torch.dtype) -> Counted:
        return self


@pytest.mark.parametrize(
    ("loss", "kind", "together"), [("kl", "losses", 1), ("jsd", "losses", 1), ("jsd", "logits", 4)]
)
def test_teachers_take_turns_where_they_need_not_meet(loss: str, kind: str, together: int) -> None:
    alive: set[int] = set()
    most: list[int] = []
    heads = [Counted(head, alive, most) for head in teachers(4)]
    found(Student(), make_rows(loss, {}, kind, alone=True), heads, torch.ones(4, BATCH, 1), torch.float32, 2)  # type: ignore[arg-type]
    assert max(most) == together
    assert len(most) == 4 * 4  # each teacher once per tile: 7 targets, tiles of 2


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_a_batch_without_targets_reads_every_teacher_once(
    loss: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as a tile with targets: the head of a sharded teacher is a collective."""
    monkeypatch.setitem(globals(), "targets", lambda: torch.full((BATCH, LENGTH), NO_LABEL))
    most: list[int] = []
    heads = [Counted(head, set(), most) for head in teachers(3)]
    found(Student(), make_rows(loss, {}, "losses", alone=alone), heads, torch.ones(3, BATCH, 1), torch.float32, 2)  # type: ignore[arg-type]
    assert len(most) == 3
