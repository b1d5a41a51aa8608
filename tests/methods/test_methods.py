"""Every method through the real objective, padding included: value and gradients against its formula written out.

A stand-in for the student hands random leaves to the objective; the formulas read the same leaves in plain float64
torch, sequence by sequence, so that what they leave out is padding by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from tiny import causal_batch, causal_model, class_batch, classifier, make_objective
from torch import Tensor, nn

from mtkd.config import Named
from mtkd.config.match import Match
from mtkd.data.batch import Batch, position_counts
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES
from mtkd.methods.rows import default_step
from mtkd.methods.spec import METHODS
from mtkd.models.features import ATTENTION, Features
from mtkd.models.info import ModelInfo
from mtkd.objective.compile import compile_rows
from mtkd.objective.objective import Objective
from mtkd.objective.projection import make_projections
from mtkd.objective.settings import Wiring
from mtkd.registry import check_options
from mtkd.weightings.base import StageFacts
from mtkd.weightings.make import make_weighting

STUDENT_LAYERS, TEACHER_LAYERS, HEADS, WIDTH, COLUMNS = 3, 6, 2, 12, 9
LENGTHS = (5, 3, 4)
TOKENS = sum(LENGTHS)


@dataclass
class Side:
    """Leaves of one model: "logits", "hidden.k", and per layer "query.k", "key.k", "value.k", "attention.k" (raw)."""

    leaves: dict[str, Tensor]
    mask: Tensor

    def features(self) -> Features:
        """What a tapped model of these leaves would give."""
        blocked = ~self.mask[:, None, None, :]
        found: Features = {"embedding": self.leaves["hidden.0"]}
        for key, leaf in self.leaves.items():
            name, _, layer = key.partition(".")
            if name == "attention":
                found[f"scores.{layer}"] = leaf.masked_fill(blocked, -torch.inf)
                found[f"probs.{layer}"] = torch.softmax(leaf.masked_fill(blocked, -torch.inf), -1)
            else:
                found[key] = leaf
            if name == "hidden":
                found[f"cls.{layer}"] = leaf[:, 0]
        return found

    def each(self, key: str) -> list[Tensor]:
        """Per sequence the unpadded part: [n,H] of hidden states, [A,n,D] of heads, [A,n,n] of attention."""
        leaf = self.leaves[key].double()
        if leaf.dim() == 3:
            return [x[:n] for x, n in zip(leaf, LENGTHS, strict=True)]
        square = key.startswith("attention")
        return [x[:, :n, : n if square else None] for x, n in zip(leaf, LENGTHS, strict=True)]


def side(layers: int, seed: int, mask: Tensor, *, classes: bool, gradients: bool) -> Side:
    generator = torch.Generator().manual_seed(seed)
    size, length = mask.shape
    vectors = (size, HEADS, length, WIDTH // HEADS)
    shapes = {"logits": (size, COLUMNS) if classes else (size, length, COLUMNS)}
    for k in range(layers + 1):
        shapes |= {f"hidden.{k}": (size, length, WIDTH), f"attention.{k}": (size, HEADS, length, length)}
        shapes |= {f"{name}.{k}": vectors for name in ("query", "key", "value")}
    leaves = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return Side({key: leaf.requires_grad_(gradients) for key, leaf in leaves.items()}, mask)


class StandIn(nn.Module):
    """A student that hands out the features of a side."""

    def __init__(self, held: Side) -> None:
        super().__init__()
        self.held = held
        self.info, self.vocabulary = info(STUDENT_LAYERS, classes=False), None

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        features = self.held.features()
        return {key: features[key] for key in wants}


def info(layers: int, *, classes: bool) -> ModelInfo:
    return ModelInfo(
        "bert", layers, WIDTH, HEADS, HEADS, WIDTH // HEADS, COLUMNS, COLUMNS if classes else 0, 32, False,
        frozenset({"logits", "hidden", "embedding", "cls", *ATTENTION}),
    )  # fmt: skip


@dataclass
class Case:
    """A batch and both sides of it; `classes`: one label per sequence, else at some tokens."""

    batch: Batch
    s: Side
    t: Side
    classes: bool

    def loss(self, rows: Mapping[str, Match]) -> Tensor:
        """The objective's loss for one teacher of weight 1."""
        infos = [info(STUDENT_LAYERS, classes=self.classes), info(TEACHER_LAYERS, classes=self.classes)]
        compiled = compile_rows(
            tuple(rows.values()),
            infos[0],
            {"t": infos[1]},
            token_level=not self.classes,
            regression=False,
            where="rows",
        )
        objective = Objective(
            StandIn(self.s),  # type: ignore[arg-type]
            compiled,
            make_weighting(Named(name="uniform"), StageFacts.stand_in(("t",)), "weighting"),
            make_projections(compiled, infos[0], infos[1:], seed=0),
            ["t"],
            Wiring("example", not self.classes),
        )
        loss, _ = objective(self.batch, [self.t.features()], position_counts([self.batch]))
        return loss


def case(*, classes: bool) -> Case:
    batch = class_batch(LENGTHS, num_labels=COLUMNS) if classes else causal_batch(LENGTHS, prompt=1)
    if not classes:
        batch.targets = torch.where(batch.target_mask, batch.targets % COLUMNS, batch.targets)
    mask = batch.attention_mask
    sides = [
        side(n, seed, mask, classes=classes, gradients=seed == 0)
        for seed, n in enumerate((STUDENT_LAYERS, TEACHER_LAYERS))
    ]
    return Case(batch, sides[0], sides[1], classes)


# The formulas: float64, one line of the paper each.


def logits(c: Case, *, everywhere: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of logits that count: of every sequence; or of the tokens with a label, or of all of them."""
    at = slice(None) if c.classes else c.batch.attention_mask if everywhere else c.batch.targets != -100
    return c.s.leaves["logits"][at].double(), c.t.leaves["logits"][at].double()


def kl(c: Case, temperature: float, *, everywhere: bool = False) -> Tensor:
    s, t = (torch.softmax(x / temperature, -1) for x in logits(c, everywhere=everywhere))
    return temperature**2 * (t * (t / s).log()).sum(-1).mean()


def top_kl(c: Case, temperature: float, top: int) -> Tensor:
    s, t = (torch.softmax(x / temperature, -1) for x in logits(c, everywhere=True))
    best = t >= t.sort(-1, descending=True).values[:, top - 1 : top]
    rest = [(x * ~best).sum(-1) for x in (s, t)]
    return temperature**2 * ((t * (t / s).log() * best).sum(-1) + rest[1] * (rest[1] / rest[0]).log()).mean()


def soft_ce(c: Case, temperature: float, *, scale: bool = False) -> Tensor:
    """Without T^2 unless it is asked for: TinyBERT, MT-BERT and GLMD have none."""
    s, t = (torch.softmax(x / temperature, -1) for x in logits(c))
    return -(temperature**2 if scale else 1) * (t * s.log()).sum(-1).mean()


def ce(c: Case) -> Tensor:
    labels = c.batch.targets if c.classes else c.batch.targets[c.batch.targets != -100]
    return -torch.softmax(logits(c)[0], -1)[range(len(labels)), labels].log().mean()


def standardised_kl(c: Case, temperature: float) -> Tensor:
    s, t = (torch.softmax((x - x.mean(-1, True)) / x.std(-1, False, keepdim=True) / temperature, -1) for x in logits(c))
    return temperature**2 * (t * (t / s).log()).sum(-1).mean()


def dkd(c: Case, temperature: float, alpha: float, beta: float) -> Tensor:
    labels = c.batch.targets if c.classes else c.batch.targets[c.batch.targets != -100]
    total = []
    for s, t, y in zip(*(torch.softmax(x / temperature, -1) for x in logits(c)), labels.tolist(), strict=True):
        others = [v for v in range(COLUMNS) if v != y]
        among = (t[others] / (1 - t[y]) * (t[others] / (1 - t[y]) / (s[others] / (1 - s[y]))).log()).sum()
        against = t[y] * (t[y] / s[y]).log() + (1 - t[y]) * ((1 - t[y]) / (1 - s[y])).log()
        total.append(alpha * against + beta * among)
    return temperature**2 * torch.stack(total).mean()


def dist(c: Case, temperature: float, inter: float, intra: float) -> Tensor:
    s, t = (torch.softmax(x / temperature, -1) for x in logits(c))
    rows = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s, t, strict=True)])
    columns = torch.stack([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s.T, t.T, strict=True)])
    return temperature**2 * (inter * rows.mean() + intra * columns.mean())


def hidden(c: Case, s: int, t: int) -> Tensor:
    pairs = zip(c.s.each(f"hidden.{s}"), c.t.each(f"hidden.{t}"), strict=True)
    return sum(((x - y) ** 2).mean(1).sum() for x, y in pairs) / TOKENS


def scores(c: Case, s: int, t: int) -> Tensor:
    pairs = zip(c.s.each(f"attention.{s}"), c.t.each(f"attention.{t}"), strict=True)
    return sum(((x - y) ** 2).mean((0, 2)).sum() for x, y in pairs) / TOKENS


def divergence(c: Case, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """KL of softmaxes over keys, [A,n,n] per sequence: mean over heads, then over tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(ours, theirs, strict=True):
        p, q = torch.softmax(y, -1), torch.softmax(x, -1)
        total = total + (p * (p / q).log()).sum(-1).mean(0).sum()
    return total / TOKENS


def probs(c: Case) -> Tensor:
    return divergence(c, c.s.each(f"attention.{STUDENT_LAYERS}"), c.t.each(f"attention.{TEACHER_LAYERS}"))


def relation(c: Case, name: str, heads: int, layer: int = TEACHER_LAYERS) -> Tensor:
    def products(x: Tensor) -> Tensor:
        joined = torch.cat(list(x), -1)
        parts = torch.stack(joined.split(WIDTH // heads, -1))
        return parts @ parts.transpose(1, 2) / (WIDTH / heads) ** 0.5

    sides = c.s.each(f"{name}.{STUDENT_LAYERS}"), c.t.each(f"{name}.{layer}")
    return divergence(c, *([products(x) for x in found] for found in sides))


def patient(c: Case, pairs: tuple[tuple[int, int], ...], *, summed: bool = False) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t in pairs:
        x, y = c.s.leaves[f"hidden.{s}"][:, 0].double(), c.t.leaves[f"hidden.{t}"][:, 0].double()
        squares = (x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)) ** 2
        total = total + (squares.sum(1) if summed else squares.mean(1)).mean()
    return total / len(pairs)


def cosine(c: Case) -> Tensor:
    pairs = zip(c.s.each(f"hidden.{STUDENT_LAYERS}"), c.t.each(f"hidden.{TEACHER_LAYERS}"), strict=True)
    return sum((1 - (x * y).sum(1) / x.norm(dim=1) / y.norm(dim=1)).sum() for x, y in pairs) / TOKENS


UNIFORM = ((1, 2), (2, 4), (3, 6))
SKIP, LAST = ((1, 2), (2, 4)), ((1, 4), (2, 5))


def layers(c: Case) -> Tensor:
    return sum(hidden(c, s, t) for s, t in ((0, 0), *UNIFORM))


def attentions(c: Case) -> Tensor:
    return sum(scores(c, s, t) for s, t in UNIFORM)


def relations(c: Case, heads: int) -> Tensor:
    return sum(relation(c, name, heads) for name in ("query", "key", "value"))


def every_map(c: Case) -> Tensor:
    return layers(c) + attentions(c) + probs(c) + relations(c, HEADS)


Formula = Callable[[Case], Tensor]
ON_TOKENS: list[tuple[str, dict[str, object], Formula]] = [
    ("kd", {"temperature": 4.0, "soft": 0.7, "hard": 0.3}, lambda c: 0.7 * kl(c, 4) + 0.3 * ce(c)),
    ("kd", {}, lambda c: 0.5 * kl(c, 1) + 0.5 * ce(c)),
    ("kd", {"loss": "soft_ce", "soft": 1.0, "hard": 0.0, "temperature": 2.0}, lambda c: soft_ce(c, 2, scale=True)),
    (
        "kd",
        {"standardise": True, "temperature": 2.0, "soft": 9.0, "hard": 0.1},
        lambda c: 9 * standardised_kl(c, 2) + 0.1 * ce(c),
    ),
    ("dkd", {"temperature": 2.0}, lambda c: dkd(c, 2, 1, 8) + ce(c)),
    ("dist", {"intra": 0.0}, lambda c: dist(c, 1, 2, 0) + ce(c)),
    ("pd", {}, ce),
    ("distilbert", {}, lambda c: 5 * kl(c, 2) + 2 * ce(c) + cosine(c)),
    ("minilm", {}, lambda c: probs(c) + relation(c, "value", HEADS)),
    ("minilmv2", {"heads": 4}, lambda c: relations(c, 4)),
    (
        "minilmv2",
        {"heads": 6, "teacher_layer": 5},
        lambda c: sum(relation(c, x, 6, 5) for x in ("query", "key", "value")),
    ),
    ("tinybert", {}, lambda c: layers(c) + attentions(c)),
    ("mixbaseline", {}, lambda c: every_map(c) + 5 * kl(c, 2) + 2 * ce(c)),
    ("best_mix", {}, lambda c: layers(c) + 5 * kl(c, 2) + 2 * ce(c)),
    ("glmd", {}, lambda c: kl(c, 15, everywhere=True)),
    ("glmd", {"step": "fine-tune", "temperature": 3.0}, lambda c: kl(c, 3, everywhere=True)),
    ("glmd", {"top": 4, "temperature": 2.0}, lambda c: top_kl(c, 2, 4)),
]
ON_CLASSES: list[tuple[str, dict[str, object], Formula]] = [
    ("kd", {"temperature": 3.0}, lambda c: 0.5 * kl(c, 3) + 0.5 * ce(c)),
    ("kd", {"standardise": True, "temperature": 2.0}, lambda c: 0.5 * standardised_kl(c, 2) + 0.5 * ce(c)),
    ("dkd", {"alpha": 0.5, "beta": 3.0, "soft": 2.0}, lambda c: 2 * dkd(c, 4, 0.5, 3) + ce(c)),
    ("dist", {"temperature": 4.0, "inter": 1.0, "intra": 3.0}, lambda c: dist(c, 4, 1, 3) + ce(c)),
    ("pd", {}, lambda c: kl(c, 1)),
    ("pkd", {}, lambda c: 0.5 * ce(c) + 0.5 * kl(c, 10) + 100 * patient(c, SKIP)),
    (
        "pkd",
        {"layers": "last", "alpha": 0.2, "temperature": 5.0, "beta": 10.0, "sum_over_width": True},
        lambda c: 0.8 * ce(c) + 0.2 * kl(c, 5) + 10 * patient(c, LAST, summed=True),
    ),
    ("tinybert", {}, lambda c: layers(c) + attentions(c)),
    ("tinybert", {"step": "prediction"}, lambda c: soft_ce(c, 1)),
    ("tinybert", {"step": "prediction", "temperature": 3.0}, lambda c: soft_ce(c, 3)),
    ("mixbaseline", {}, every_map),
    ("mixbaseline", {"step": "prediction"}, lambda c: 0.5 * kl(c, 10) + 0.5 * ce(c)),
    ("best_mix", {}, layers),
    ("best_mix", {"step": "prediction"}, lambda c: kl(c, 10)),
    ("glmd", {}, lambda c: soft_ce(c, 1)),
    ("glmd", {"prediction_temperature": 4.0}, lambda c: soft_ce(c, 4)),
    (
        "mt_bert",
        {"temperature": 2.0, "soft": 0.5, "hidden": 3.0, "hard": 0.25},
        lambda c: 0.5 * soft_ce(c, 2) + 3 * sum(hidden(c, s, t) for s, t in UNIFORM) + 0.25 * ce(c),
    ),
]
EVERY = [(False, *entry) for entry in ON_TOKENS] + [(True, *entry) for entry in ON_CLASSES]


def rows(name: str, options: Mapping[str, object], *, classes: bool = False) -> dict[str, Match]:
    check_options(options, METHODS[name].options(), "method")
    return METHODS[name].rows(options, default_step(METHODS[name], options, not classes))


@pytest.mark.parametrize(("classes", "name", "options", "formula"), EVERY)
def test_value_and_gradients_are_those_of_the_formula(
    classes: bool, name: str, options: dict[str, object], formula: Formula
) -> None:
    c = case(classes=classes)
    leaves = list(c.s.leaves.values())
    sides = [c.loss(rows(name, options, classes=classes)), formula(c)]
    found, wanted = (torch.autograd.grad(x, leaves, allow_unused=True, materialize_grads=True) for x in sides)
    torch.testing.assert_close(sides[0].double(), sides[1], rtol=1e-4, atol=0)
    assert any(bool(gradient.any()) for gradient in wanted)
    for key, ours, theirs in zip(c.s.leaves, found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


def test_every_method_and_every_step_has_a_formula_here() -> None:
    def covered(name: str, step: str) -> bool:
        tried = [o for n, o, _ in (*ON_TOKENS, *ON_CLASSES) if n == name]
        defaults = {default_step(METHODS[name], {}, token_level) for token_level in (True, False)}
        return any(o.get("step", step if step in defaults else "") == step for o in tried)

    for name in METHODS:
        if METHODS.origin(name) == "mtkd":
            assert all(covered(name, step) for step in METHODS[name].steps), name


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_a_few_labelled_rows_with_a_source(name: str) -> None:
    spec = METHODS[name]
    assert "arXiv" in spec.source
    for step in spec.steps:
        found = spec.rows({}, step)
        assert 1 <= len(found) <= 9  # Mixbaseline is everything
        assert all(row.loss in LOSSES and row.weight > 0 and row.replace is None for row in found.values())
    needs_heads = any(
        row.feature in ("scores", "probs") or (row.feature in ATTENTION and not row.options.get("heads"))
        for step in spec.steps
        for row in spec.rows({}, step).values()
    )
    assert needs_heads == ("heads" in spec.must_be_equal)
    with pytest.raises(ValueError, match="step is one of"):
        spec.rows({}, "third")


@pytest.mark.parametrize(
    ("name", "on_tokens", "on_classes"),
    [
        ("tinybert", "pre-train", "fine-tune"),
        ("glmd", "pre-train", "prediction"),  # its other steps ask for token positions
        ("distilbert", "pre-train", "pre-train"),
        ("kd", "fine-tune", "fine-tune"),
        ("pd", "pre-train", "fine-tune"),
    ],
)
def test_the_default_step_follows_the_targets(name: str, on_tokens: str, on_classes: str) -> None:
    assert default_step(METHODS[name], {}, True) == on_tokens
    assert default_step(METHODS[name], {}, False) == on_classes
    if len(METHODS[name].steps) > 1:
        assert default_step(METHODS[name], {"step": "prediction"}, True) == "prediction"


def in_double(name: str, student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    """A registered loss summed over positions, in float64."""
    mask = torch.ones(len(student), dtype=torch.bool)
    return LOSSES[name].function(student, teacher, mask, **options).sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
def test_gradient_of_kd(temperature: float) -> None:
    s, t = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s.requires_grad_()
    (found,) = torch.autograd.grad(in_double("kl", s, t, temperature=temperature), s)
    wanted = temperature * (torch.softmax(s / temperature, -1) - torch.softmax(t / temperature, -1))
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-12)


def test_kd_at_high_temperature_matches_centred_logits() -> None:
    """Hinton et al. 2015, section 2.1: T to infinity gives 1/C of the gradient of half the centred squared error."""
    s, t = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s.requires_grad_()
    (found,) = torch.autograd.grad(in_double("kl", s, t, temperature=1e5), s)
    centred = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    torch.testing.assert_close(found, centred.detach() / 7, rtol=1e-4, atol=1e-7)


def test_top_is_the_divergence_of_the_top_and_a_tail() -> None:
    s, t = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    full = in_double("kl", s, t, temperature=2.0)
    assert in_double("kl", s, t, temperature=2.0, top=6) == pytest.approx(float(full))  # one column is its own tail
    assert in_double("kl", s, t, temperature=2.0, top=7) == in_double("kl", s, t, temperature=2.0, top=99) == full
    values = [float(in_double("kl", s, t, top=n)) for n in (1, 2, 4, 6)]
    assert values == sorted(values)  # merging outcomes never raises a divergence
    inside = torch.arange(7) < 3
    moved = t + torch.where(
        inside, 0.0, torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    )
    order = t.clone()
    order[:, :3] += 50  # the first three are the top, whatever stands in the tail
    moved[:, :3] += 50
    assert float(in_double("kl", moved, order, top=3)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="number of columns"):
        in_double("kl", s, t, top=-1)


def rotation(width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator)).Q


def test_minilmv2_between_12_and_16_heads_ignores_rotations_inside_relation_heads() -> None:
    generator, relation_heads = torch.Generator().manual_seed(0), 8
    student = torch.randn(2, 12, 5, 4, dtype=torch.float64, generator=generator)
    teacher = torch.randn(2, 16, 5, 6, dtype=torch.float64, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])

    def turned(x: Tensor) -> Tensor:
        joined = x.transpose(1, 2).flatten(2)
        width = joined.shape[-1] // relation_heads
        parts = [part @ rotation(width, generator) for part in joined.split(width, -1)]
        return torch.cat(parts, -1).unflatten(2, x.shape[1::2]).transpose(1, 2)

    value = LOSSES["relation_kl"].function(student, teacher, mask, heads=relation_heads)
    for ours, theirs in ((turned(student), teacher), (student, turned(teacher))):
        found = LOSSES["relation_kl"].function(ours, theirs, mask, heads=relation_heads)
        torch.testing.assert_close(found[mask], value[mask], rtol=1e-9, atol=1e-12)
    across = rotation(student.shape[1] * student.shape[3], generator)  # over the heads: another loss
    mixed = (student.transpose(1, 2).flatten(2) @ across).unflatten(2, (12, 4)).transpose(1, 2)
    found = LOSSES["relation_kl"].function(mixed, teacher, mask, heads=relation_heads)
    assert float((found - value)[mask].abs().max()) > 1e-3


def pairs(name: str, label: str, student: int = 6, teacher: int = 12, **options: object) -> list[tuple[int, int]]:
    return rows(name, options, classes=True)[label].layer_pairs(student, teacher)


def test_layer_maps_of_the_papers() -> None:
    assert [t for _, t in pairs("pkd", "patient")] == [2, 4, 6, 8, 10]
    assert [t for _, t in pairs("pkd", "patient", layers="last")] == [7, 8, 9, 10, 11]
    assert [s for s, _ in pairs("pkd", "patient")] == [1, 2, 3, 4, 5]
    assert pairs("tinybert", "scores") == [(k, 2 * k) for k in range(1, 7)]
    assert [(0, 0), *pairs("tinybert", "hidden")] == [(k, 2 * k) for k in range(7)]  # 0 is the row `embedding`
    for name, label in (("tinybert", "hidden"), ("tinybert", "scores"), ("pkd", "patient"), ("mixbaseline", "hidden")):
        with pytest.raises(UserError, match="do not divide"):
            pairs(name, label, 4, 10)
    with pytest.raises(UserError, match="no layers are compared"):
        pairs("pkd", "patient", 1, 12)


@pytest.mark.parametrize(("classes", "name"), [(False, "mixbaseline"), (False, "glmd"), (True, "pkd")])
def test_what_stands_at_padding_changes_nothing(classes: bool, name: str) -> None:
    results = []
    for garbage in (0.0, 1e3, float("nan")):
        c = case(classes=classes)
        padded = ~c.batch.attention_mask
        with torch.no_grad():
            for held in (c.s, c.t):
                for key, leaf in held.leaves.items():
                    if leaf.dim() == 3:
                        leaf[padded] = garbage
                    elif leaf.dim() == 4 and not key.startswith("attention"):
                        leaf.transpose(1, 2)[padded] = garbage
        loss = c.loss(rows(name, {}, classes=classes))
        leaves = list(c.s.leaves.values())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if leaf.dim() == 3:
                assert not bool(gradient[padded].any())
        results.append([loss.detach(), *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_pkd_ignores_the_size_of_either_side() -> None:
    only = {"patient": rows("pkd", {}, classes=True)["patient"]}
    values = []
    for ours, theirs in ((1.0, 1.0), (7.0, 1.0), (1.0, 0.01)):
        c = case(classes=True)
        with torch.no_grad():
            for held, scale in ((c.s, ours), (c.t, theirs)):
                for key, leaf in held.leaves.items():
                    if key.startswith("hidden"):
                        leaf.mul_(scale)
        values.append(float(c.loss(only)))
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


def gradients(objective: Objective, loss: Tensor) -> dict[str, Tensor]:
    named = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


def test_tinybert_on_real_models_of_other_width_with_padding() -> None:
    """Layers of transformers' own outputs, scores as taps give them; one W for the embedding and one for the layers."""
    student, teacher = classifier(8, 2, 0), classifier(16, 4, 1)
    batch = class_batch((7, 3, 5))
    objective, pool = make_objective(student, [teacher], tuple(rows("tinybert", {}, classes=True).values()))
    loss, _ = objective(batch, pool.forward(batch), position_counts([batch]))
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), "output_hidden_states": True}
    ours, theirs = student.model(**inputs).hidden_states, teacher.model(**inputs).hidden_states
    w = objective.projections
    assert sorted(w) == ["row0_teacher0", "row1_teacher0"]
    wanted, valid = torch.zeros(()), batch.attention_mask
    for k, matrix in ((0, w["row0_teacher0"]), (1, w["row1_teacher0"]), (2, w["row1_teacher0"])):
        difference = ours[k] @ matrix.weight.t() - theirs[2 * k]
        wanted = wanted + difference[valid].square().mean()
    for k in (1, 2):
        a = student(batch, frozenset({f"scores.{k}"}))[f"scores.{k}"]
        b = teacher(batch, frozenset({f"scores.{2 * k}"}))[f"scores.{2 * k}"]
        for row, n in enumerate((7, 3, 5)):
            wanted = wanted + (a[row, :, :n, :n] - b[row, :, :n, :n]).square().mean((0, 2)).sum() / 15
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=0)
    sides = [gradients(objective, x) for x in (loss, wanted)]
    for name, found in sides[0].items():
        torch.testing.assert_close(found, sides[1][name], rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_the_prediction_step_has_no_projection() -> None:
    student, teacher = classifier(8, 2, 0), classifier(16, 4, 1)
    matches = tuple(rows("tinybert", {"step": "prediction"}, classes=True).values())
    objective, _ = make_objective(student, [teacher], matches)
    assert not objective.projections
    assert not any("projection" in name for name, _ in objective.student.named_parameters())


def test_glmd_on_real_models_with_padding_counts_every_unpadded_position() -> None:
    """The tiled head against whole logits of transformers, prompt positions included."""
    student, teacher = causal_model(16, 2, 0), causal_model(24, 3, 1)
    batch = causal_batch((7, 3, 5), prompt=2)
    for options, top in (({}, 0), ({"top": 5}, 5)):
        objective, pool = make_objective(student, [teacher], tuple(rows("glmd", options).values()))
        loss, _ = objective(batch, pool.forward(batch), position_counts([batch]))
        plain = [
            nn.functional.linear(
                m.model.model(batch.input_ids, attention_mask=batch.attention_mask.long()).last_hidden_state,
                m.output_head[0],
            )[batch.attention_mask]
            for m in (student, teacher)
        ]
        s, t = (torch.softmax(x.double() / 15, -1) for x in plain)
        if top:
            best = t.topk(top, -1).indices
            s, t = (torch.cat([x.gather(-1, best), 1 - x.gather(-1, best).sum(-1, keepdim=True)], -1) for x in (s, t))
        wanted = 15**2 * (t * (t / s).log()).sum(-1).mean()
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=0)
        sides = [gradients(objective, x) for x in (loss, wanted)]
        for name, found in sides[0].items():
            torch.testing.assert_close(found, sides[1][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_must_be_equal_where_a_method_needs_them() -> None:
    student, teacher = info(STUDENT_LAYERS, classes=False), info(TEACHER_LAYERS, classes=False)
    wide = ModelInfo(**{**teacher.__dict__, "num_heads": 4, "num_kv_heads": 4, "head_width": WIDTH // 4})
    for name, options in (
        ("tinybert", {}),
        ("minilm", {}),
        ("mixbaseline", {}),
        ("minilmv2", {"heads": 4}),
        ("best_mix", {}),
    ):
        matches = tuple(rows(name, options).values())
        settings = {"token_level": True, "regression": False, "where": "match"}
        if "heads" in METHODS[name].must_be_equal:
            with pytest.raises(UserError, match="needs equal head counts"):
                compile_rows(matches, student, {"wide": wide}, **settings)  # type: ignore[arg-type]
        else:
            assert compile_rows(matches, student, {"wide": wide}, **settings)  # type: ignore[arg-type]
