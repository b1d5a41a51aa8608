"""What a weighting reads is known before it is constructed, and is all that it can read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, get_args

import cache_runs
import pytest
import tiny_run
import torch
import yaml
from cache_runs import EXACT
from test_weightings import LOGITS, TARGETS, batch_of
from tiny import causal_batch, causal_model, make_objective
from torch import Tensor

import mtkd
from mtkd.config import Named, StageConfig
from mtkd.config.cache import Trait
from mtkd.config.match import Match
from mtkd.config.read import load_config
from mtkd.data.batch import position_counts
from mtkd.errors import LawBroken, UserError
from mtkd.models.features import DenseLogits
from mtkd.pool.cache.content import TEXT_TRAITS
from mtkd.weightings import FACTS, TRAITS, Around, StageFacts, Traits, Weighting
from mtkd.weightings.correctness import CAMKD
from mtkd.weightings.laws import check_weighting
from mtkd.weightings.learned import Learned
from mtkd.weightings.make import check_weighting as plan_weighting
from mtkd.weightings.make import make_weighting, stage_reads
from mtkd.weightings.spec import WEIGHTINGS, Reads, WeightingSpec
from mtkd.weightings.traits import Fact
from mtkd.weightings.trial import try_weighting
from mtkd.weightings.uncertainty import Uncertainty

# What the classes' docstrings say that each reads of two teachers.
READS: dict[str, set[str]] = {
    "uniform": set(), "fixed": set(), "drop": set(), "route": {"route"}, "ae_kd": {"gram"}, "mgda": {"gram"},
    "ca_mkd": {"ce"}, "mt_bert": {"ce"}, "entropy": {"entropy"}, "confidence": {"confidence"}, "margin": {"margin"},
    "learned": {"ce"}, "rl_kd": {"ce", "class_probabilities", "pooled", "student_loss"},
    "uncertainty": {"student_uncertainty"}, "abstain": {"own_mass"}, "energy": {"energy"},
    "posterior": {"token_log_probs"}, "exopd": set(),
}  # fmt: skip
ALONE = {"ca_mkd": set[str](), "entropy": set[str](), "learned": set[str](), "posterior": set[str]()}
"""Those that read less of a single teacher: its weight is 1."""
OPTIONS: dict[str, dict[str, Any]] = {"fixed": {"weights": {"a": 1.0, "b": 2.0}}, "exopd": {"reference": "a"}}


@pytest.mark.parametrize("name", sorted(READS))
def test_a_declaration_is_what_a_trial_finds(name: str) -> None:
    """For two teachers and for one: the names that the spec declares, the docstring's, and those that are read."""
    spec, options = WEIGHTINGS[name], OPTIONS.get(name, {})
    for teachers, wanted in (("a", "b"), READS[name]), (("a",), ALONE.get(name, READS[name])):
        declared = spec.reads(options, len(teachers))
        assert declared is not None
        assert declared.names == wanted
        if name == "fixed" and len(teachers) == 1:
            continue
        weighting = make_weighting(Named(name=name, options=options), StageFacts.stand_in(teachers), "weighting")
        for per, token_level in ("example", True), ("example", False), ("token", True):
            if (per == "token" and not declared.per_token) or (name == "rl_kd" and not token_level):
                continue  # rl_kd's policy is as wide as the stage has classes, which a stand-in does not know
            if declared.text and not token_level:
                continue  # the plan refuses it: classes have no text so far
            trial = try_weighting(weighting, len(teachers), per=per, token_level=token_level)
            # ae_kd and mgda name the Gram matrix for one teacher too: the stage then still needs a row on logits
            assert trial.names == wanted - ({"gram"} if len(teachers) == 1 else set())


def test_every_built_in_weighting_declares_what_it_reads() -> None:
    """The table of this file has every built-in weighting."""
    assert READS.keys() == {name for name in WEIGHTINGS if WEIGHTINGS.origin(name) == "mtkd"}


def test_a_gate_reads_the_student_and_has_no_weight_per_token() -> None:
    """Options decide what `learned` reads, and whether it can weigh tokens."""
    gated = WEIGHTINGS["learned"].reads({"gate": "pooled"}, 2)
    plain = WEIGHTINGS["learned"].reads({}, 2)
    assert gated is not None
    assert plain is not None
    assert (gated.names, gated.per_token) == ({"ce", "pooled"}, False)
    assert plain.per_token


@pytest.mark.parametrize(("name", "looks"), [("uniform", False), ("uncertainty", False), ("mgda", True), ("ce", True)])
def test_who_reads_predictions(name: str, looks: bool) -> None:
    """Only what is made of the teachers' predictions needs their heads; an undeclared weighting is taken to."""
    spec = WEIGHTINGS["mt_bert" if name == "ce" else name]
    reads = spec.reads({}, 2)
    assert reads is not None
    assert reads.predictions == looks


def test_the_configuration_names_the_built_in_traits() -> None:
    """The one list besides the registry is the YAML's, which is read before torch; this keeps them equal."""
    at_targets = {name for name, function in TRAITS.items() if function.__module__ == "mtkd.weightings.traits"}
    of_text = {name for name, fact in FACTS.items() if fact.text and not fact.own}
    assert set(get_args(Trait)) == at_targets | of_text
    assert set(TEXT_TRAITS) == of_text


class Undeclared(Weighting):
    """Declares the entropy, and reads the margin too."""

    def forward(self, traits: Traits) -> Tensor:
        values = traits.entropy + traits.margin
        return values / values.sum(0)


def test_an_undeclared_trait_breaks_a_law_and_stops_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mtkd check` and training refuse a name outside the declaration."""
    spec = WeightingSpec("mine", Undeclared, asks=("entropy",))
    with pytest.raises(LawBroken, match="it reads margin") as caught:
        check_weighting(spec)
    assert caught.value.law == "reads"
    monkeypatch.setitem(WEIGHTINGS._values, "mine", spec)
    objective, pool = make_objective(causal_model(16, 1, 0), [causal_model(16, 1, 1)] * 2, (Match(loss="kl"),), "mine")
    batch = causal_batch((7, 4))
    with pytest.raises(UserError, match="reads 'margin' and does not declare it"):
        objective(batch, pool.forward(batch), position_counts([batch]))


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_fact_that_a_stage_prepares_is_refused_unless_it_is_named(name: str) -> None:
    """A weighting without a declaration reads every trait, and the facts that cost nothing before the step."""

    class Reader(Weighting):
        def forward(self, traits: Traits) -> Tensor:
            return traits.read(name)

    allowed = WeightingSpec("mine", Reader)().may_read()
    assert (name in allowed) == (not FACTS[name].asked)
    traits = Traits([DenseLogits(x) for x in LOGITS], Around(batch_of(TARGETS)), "example", 3, reads=allowed)
    if FACTS[name].asked:
        with pytest.raises(UserError, match=f"reads '{name}' and does not declare it"):
            Reader()(traits)
    else:
        Reader()(traits)


def test_a_plug_in_without_a_declaration_works_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class names the facts that a stage prepares; a trial finds its traits; training serves all."""

    class Mine(Weighting):
        reads = frozenset({"pooled"})
        per_token = False

        def forward(self, traits: Traits) -> Tensor:
            return torch.softmax(traits.margin + 0 * traits.pooled.mean(), 0)

    spec = WeightingSpec("mine", Mine)
    monkeypatch.setitem(WEIGHTINGS._values, "mine", spec)
    student = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}
    values = {"kind": "distill", "student": student, "teachers": ["a", "b"], "method": "kd", "steps": 1}
    stage = StageConfig.model_validate({**values, "weighting": "mine"})
    assert spec.reads({}, 2) is None
    found = stage_reads(stage, "stages.s", token_level=True)
    assert found == Reads(frozenset({"pooled", "margin"}), labels=False, per_token=False, declared=False)
    assert found.traits == {"margin"}
    assert found.predictions
    assert spec().may_read() >= {"pooled", "entropy", "agreement"}
    assert "gram" not in spec().may_read()


def stage_of(monkeypatch: pytest.MonkeyPatch, spec: WeightingSpec, per: str = "example", **options: Any) -> StageConfig:
    """A stage of two teachers and decoders, whose weighting is `spec`."""
    monkeypatch.setitem(WEIGHTINGS._values, spec.name, spec)
    student = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}
    values = {"kind": "distill", "student": student, "teachers": ["a", "b"], "method": "kd", "steps": 1, "per": per}
    return StageConfig.model_validate({**values, "weighting": {"name": spec.name, "options": options}})


class MyUncertainty(Uncertainty):
    """Adds nothing."""


class Gated(Learned):
    """Takes its gate from the stage."""


class AlwaysGated(Learned):
    """Sets its gate itself."""

    def __init__(self, facts: StageFacts) -> None:
        super().__init__(facts, gate="pooled")


@pytest.mark.parametrize(
    ("cls", "options", "fact"),
    [(MyUncertainty, {}, "student_uncertainty"), (Gated, {"gate": "pooled"}, "pooled"), (AlwaysGated, {}, "pooled")],
)
def test_a_class_without_a_declaration_has_that_of_the_class_it_extends(
    monkeypatch: pytest.MonkeyPatch, cls: type[Weighting], options: dict[str, Any], fact: str
) -> None:
    """The plan knows the facts that the library's class reads, and the first step gets them."""
    spec = WeightingSpec("mine", cls)
    stage = stage_of(monkeypatch, spec, **options)
    plan_weighting(stage, (), "stages.s", token_level=True)
    assert fact in stage_reads(stage, "stages.s", token_level=True).names
    objective, pool = make_objective(
        causal_model(16, 1, 0), [causal_model(16, 1, 1)] * 2, (Match(loss="kl"),), stage.weighting
    )
    batch = causal_batch((7, 4))
    objective(batch, pool.forward(batch), {**position_counts([batch]), **objective.weighting.counts(batch)})
    if fact == "pooled":
        by_token = stage_of(monkeypatch, spec, "token", **options)
        with pytest.raises(UserError, match="one weight per example"):
            plan_weighting(by_token, (), "stages.s", token_level=True)


def test_a_weighting_that_python_makes_may_read_what_its_class_declares() -> None:
    """Without the registry's construction the class still has the declaration."""
    facts = StageFacts.stand_in(("a", "b"))
    assert "student_uncertainty" in Uncertainty(facts).may_read()
    assert "pooled" in Learned(facts, gate="pooled").may_read()
    assert "pooled" not in Learned(facts).may_read()
    assert "ce" in CAMKD().may_read()


def test_reads_may_be_a_property() -> None:
    """A class may work out the facts that it reads."""

    class Mine(Weighting):
        @property
        def reads(self) -> frozenset[str]:  # type: ignore[override]
            return frozenset({"pooled"})

    assert "pooled" in WeightingSpec("mine", Mine)().may_read()
    assert WeightingSpec("mine", Mine, asks=("ce",))().may_read() == {"ce"}


def test_a_fact_that_no_attribute_names_is_refused_at_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice names all facts that the stage prepares, in the attribute and not in the decorator."""

    class Mine(Weighting):
        reads = frozenset({"pooled"})

        def forward(self, traits: Traits) -> Tensor:
            facts = traits.student_loss.mean() + traits.student_uncertainty.mean() + traits.pooled.mean()
            return torch.softmax(traits.margin, 0) + 0 * facts

    stage = stage_of(monkeypatch, WeightingSpec("mine", Mine))
    with pytest.raises(UserError, match="reads 'student_loss' and does not declare it") as caught:
        plan_weighting(stage, (), "stages.s", token_level=True)
    assert caught.value.where == "stages.s.weighting"
    assert "reads = frozenset({'pooled', 'student_loss', 'student_uncertainty'})" in caught.value.todo
    Mine.reads = frozenset({"pooled", "student_loss", "student_uncertainty"})
    again = stage_of(monkeypatch, WeightingSpec("mine2", Mine))
    plan_weighting(again, (), "stages.s", token_level=True)


def test_a_constructor_may_rule_out_weights_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A declaration of names does not override what an instance says of tokens."""

    class Mine(Weighting):
        def __init__(self, whole: bool = False) -> None:
            super().__init__()
            self.per_token = not whole

        def forward(self, traits: Traits) -> Tensor:
            return torch.softmax(traits.margin, 0)

    spec = WeightingSpec("mine", Mine, asks=("margin",))
    plan_weighting(stage_of(monkeypatch, spec, "token"), (), "stages.s", token_level=True)
    with pytest.raises(UserError, match="one weight per example"):
        plan_weighting(stage_of(monkeypatch, spec, "token", whole=True), (), "stages.s", token_level=True)


def test_an_unknown_name_lists_the_nearest() -> None:
    """A misspelt name is refused with the known one."""
    traits = Traits([DenseLogits(x) for x in LOGITS], Around(batch_of(TARGETS)), "example", 3)
    with pytest.raises(UserError, match="no trait or fact") as caught:
        traits.read("entropie")
    assert "entropy" in caught.value.todo


def test_a_new_fact_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws, trial and objective serve a fact of the batch and of the student's states, of which none of them knows."""

    def spread(traits: Traits) -> Tensor:
        hidden = traits.around.student["hidden"]
        assert isinstance(hidden, Tensor)
        return hidden.float().std((1, 2)) / traits.around.batch.attention_mask.sum(1)

    class BySpread(Weighting):
        def forward(self, traits: Traits) -> Tensor:
            share = torch.sigmoid(traits.read("spread"))[:, None]  # [B,1]
            others = (1 - share) / max(traits.num_teachers - 1, 1)
            first = torch.tensor(self.names) == min(self.names)
            weights = torch.where(first[:, None, None], share, others)
            return (weights if traits.num_teachers > 1 else torch.ones_like(weights)).expand(traits.shape)

        def __init__(self, teachers: tuple[str, ...]) -> None:
            super().__init__()
            self.names = [int(name[1:]) for name in teachers]

    monkeypatch.setitem(FACTS, "spread", Fact(spread, student=("hidden",)))
    spec = WeightingSpec("mine", BySpread, asks=("spread",))
    check_weighting(spec)
    weighting = spec(teachers=("t0", "t1"))
    assert try_weighting(weighting, 2, per="token", token_level=True).names == {"spread"}
    monkeypatch.setitem(WEIGHTINGS._values, "mine", spec)
    objective, pool = make_objective(
        causal_model(16, 1, 0), [causal_model(16, 1, 1)] * 2, (Match(loss="kl"),), "mine", names=("t0", "t1")
    )
    batch = causal_batch((7, 4))
    _, metrics = objective(batch, pool.forward(batch), position_counts([batch]))
    hidden = objective.student(batch, frozenset({"hidden.1"}))["hidden.1"]
    assert isinstance(hidden, Tensor)
    wanted = torch.sigmoid(hidden.std((1, 2)) / torch.tensor([7, 4])).mean()
    assert float(metrics["weight/t0"]) == pytest.approx(float(wanted), rel=1e-5)


PLUGIN = """
import mtkd
made = []
@mtkd.weighting("counting"{declared})
class Counting(mtkd.Weighting):
    def __init__(self, facts):
        super().__init__()
        made.append(facts.width)
    def forward(self, traits):
        return traits.full(1 / traits.num_teachers) + 0 * traits.confidence
"""


@pytest.mark.parametrize("declared", ["", ", reads=('confidence',)"])
def test_a_plan_constructs_a_weighting_once_and_a_run_once_more(tmp_path: Path, declared: str) -> None:
    """Whether it declares what it reads or not: checks, routes, heads and caches ask the spec."""
    tiny_run.write_data(tmp_path / "data")
    (tmp_path / "counting.py").write_text(PLUGIN.format(declared=declared).replace("counting", f"c{len(declared)}"))
    values = tiny_run.tiny_values(tmp_path)
    values["plugins"] = ["counting.py"]
    values["stages"]["student"] |= {"weighting": f"c{len(declared)}"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    config = load_config(file)
    mtkd.plan(config)
    loaded = [m for name, m in sys.modules.items() if name.startswith("mtkd_plugin_counting")]
    (module,) = (m for m in loaded if m.__file__ == str((tmp_path / "counting.py").resolve()))
    assert len(module.made) == 1  # a stand-in
    mtkd.run(config)
    assert len(module.made) == 2
    assert module.made[1] > module.made[0]  # the student's own width


def test_a_declaration_is_what_a_cache_must_know(tmp_path: Path) -> None:
    """The plan of a cached teacher asks the spec: a declared trait that the cache lacks is refused."""
    (tmp_path / "mine.py").write_text(
        "import mtkd\n@mtkd.weighting('declares', reads=('entropy',))\nclass Mine(mtkd.Weighting):\n"
        "    def forward(self, traits):\n        return traits.full(1 / traits.num_teachers)\n"
    )
    values = {**cache_runs.values(tmp_path, cache=EXACT, student={"weighting": "declares"}), "plugins": ["mine.py"]}
    with pytest.raises(UserError, match="reads the trait 'entropy'"):
        mtkd.plan(cache_runs.config(tmp_path, values))
