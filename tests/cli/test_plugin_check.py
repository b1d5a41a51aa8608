"""`mtkd check PLUGIN`: what it prints, and that a broken plug-in is told which law, of what, and what was found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mtkd.registry
from mtkd.cli.app import app
from mtkd.cli.check import check_plugin
from mtkd.errors import EXIT_USAGE, UserError

EXAMPLE = Path(__file__).parents[2] / "configs" / "custom_weighting.py"
_numbers = itertools.count()


@pytest.fixture(autouse=True)
def _forget_plugins() -> object:
    """Names registered by a test are dropped after it."""
    before = dict(mtkd.registry._loaded_plugins)
    yield
    for key in set(mtkd.registry._loaded_plugins) - set(before):
        origin = mtkd.registry._loaded_plugins.pop(key)
        for kind in (mtkd.LOSSES, mtkd.WEIGHTINGS, mtkd.METHODS):
            kind.forget(origin)


def plugin(folder: Path, code: str) -> Path:
    file = folder / f"plugin_{next(_numbers)}.py"
    file.write_text("import torch\nimport mtkd\nfrom mtkd import Match\n" + code)
    return file


def test_the_documented_example_keeps_the_laws() -> None:
    """Law: the example of the documentation passes `mtkd check` in at most 20 lines."""
    result = CliRunner().invoke(app, ["check", str(EXAMPLE)])
    assert result.exit_code == 0, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("weighting 'softmax_ce': keeps the weighting laws (reads, values, one teacher, ")
    code = [x for x in EXAMPLE.read_text().split('"""\n', 1)[1].splitlines() if x.strip()]
    assert len(code) <= 20, "the example is meant to be short"


ALL_KINDS = """
@mtkd.loss("l1", inputs=("hidden", "cls"))
def l1(student, teacher, mask, *, scale: float = 1.0):
    "Mean absolute difference."
    return scale * (student - teacher).abs().mean(-1)

@mtkd.loss("mine_mse", inputs=("logits",))
def mine(student, teacher, mask):
    return (student - teacher).square().mean(-1)

@mtkd.weighting("halves", sums_to_one=False)
class Halves(mtkd.Weighting):
    def forward(self, traits):
        return traits.full(0.5)

@mtkd.method("both", steps=("fine-tune",), source="nobody")
def both(weight: float = 1.0):
    return {"layers": Match(feature="hidden", loss="l1", weight=weight), "soft": Match(loss="mine_mse")}
"""


def test_every_kind_is_checked_by_its_own_laws(tmp_path: Path) -> None:
    """Law: each registered name meets the laws of its kind."""
    result = CliRunner().invoke(app, ["check", str(plugin(tmp_path, ALL_KINDS)), "--json"])
    assert result.exit_code == 0, result.output
    families = [(x["kind"], x["name"], x["family"]) for x in json.loads(result.output)]
    assert families == [
        ("loss", "l1", "loss"),
        ("loss", "mine_mse", "loss"),
        ("loss", "mine_mse", "tiled"),
        ("weighting", "halves", "weighting"),
        ("method", "both", "rows"),
    ]
    assert all(x["laws"] for x in json.loads(result.output))


BATCH_MEAN = """
@mtkd.weighting("batch_mean")
class BatchMean(mtkd.Weighting):
    "Confident on average over the micro-batch: depends on how the batch is cut."
    def forward(self, traits):
        return torch.softmax(traits.confidence.mean(1, keepdim=True), 0).expand(traits.shape)
"""
CONSTANT_PENALTY = """
@mtkd.weighting("regularised")
class Regularised(mtkd.Weighting):
    "A penalty that is added once per micro-batch."
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.ones(1))
    def forward(self, traits):
        return torch.softmax(traits.confidence * self.theta, 0)
    def penalty(self, traits):
        return self.theta.square().sum()
"""
SUMMED = """
@mtkd.loss("summed", inputs=("hidden",))
def summed(student, teacher, mask):
    return (student - teacher).square().mean()
"""
SIGNED = """
@mtkd.loss("signed", inputs=("hidden",))
def signed(student, teacher, mask):
    return (student - teacher).mean(-1)
"""
UNREAD = """
@mtkd.weighting("unread")
class Unread(mtkd.Weighting):
    def forward(self, traits):
        return torch.softmax(traits.full(1.0) * traits.pooled.mean(), 0)
"""
NO_DEFAULT = """
@mtkd.weighting("needs_tau")
class NeedsTau(mtkd.Weighting):
    def __init__(self, tau: float):
        super().__init__()
    def forward(self, traits):
        return traits.full(1 / traits.num_teachers)
"""
WRONG_ROW = """
@mtkd.method("wrong", steps=("fine-tune",), source="nobody")
def wrong():
    return {"layers": Match(feature="hidden", loss="kl")}
"""


@pytest.mark.parametrize(
    ("code", "thing", "texts"),
    [
        (BATCH_MEAN, "weighting 'batch_mean'", ("breaks the law 'cut'", "depend on the other examples")),
        (CONSTANT_PENALTY, "weighting 'regularised'", ("breaks the law 'penalty'", "do not add up to")),
        (SUMMED, "loss 'summed'", ("breaks the law 'shape'", "one value per position")),
        (SIGNED, "loss 'signed'", ("breaks the law 'non-negative'", "-")),
        (UNREAD, "weighting 'unread'", ("breaks the law 'reads'", "`reads`")),
        (NO_DEFAULT, "weighting 'needs_tau'", ("an option has no default", "tau")),
        (WRONG_ROW, "method 'wrong'", ("cannot read feature 'hidden'",)),
        ("x = 1", "", ("registers nothing",)),
        ("x = 1 / 0", "", ("ZeroDivisionError",)),
    ],
)
def test_a_broken_plugin_is_told_what_is_wrong(tmp_path: Path, code: str, thing: str, texts: tuple[str, ...]) -> None:
    """Law: a broken law is refused with law, name and value."""
    file = plugin(tmp_path, code)
    with pytest.raises(UserError) as caught:
        list(check_plugin(file))
    assert caught.value.exit_code == EXIT_USAGE
    for text in (thing, file.name, *texts):
        assert text in str(caught.value)
