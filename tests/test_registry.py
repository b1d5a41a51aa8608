"""Registries: built-ins, plug-ins, and options that are checked before anybody reads them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mtkd
from mtkd import registry
from mtkd.errors import UserError
from mtkd.losses.distributions import kl
from mtkd.losses.spec import LOSSES
from mtkd.methods.spec import METHODS
from mtkd.registry import BUILT_IN, Registry, check_options, keyword_parameters, load_plugins
from mtkd.weightings.spec import WEIGHTINGS

GOOD = """
import torch
from mtkd.methods.spec import method
from mtkd.losses.spec import loss

@loss("test-absolute", inputs=("hidden",))
def absolute(student, teacher, mask, *, power: float = 1.0):
    return (student - teacher).abs().pow(power).mean(-1)

@method("test-method", steps=("fine-tune",), source="nobody")
def rows():
    return {}
"""


@pytest.fixture(autouse=True)
def _forget_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registries as they were, and no installed plug-in package in the way."""
    monkeypatch.setattr(registry, "_loaded_plugins", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    before = set(sys.modules)
    yield
    for kept in (LOSSES, WEIGHTINGS, METHODS):
        for origin in set(kept._origins.values()) - {BUILT_IN}:
            kept.forget(origin)
    for name in set(sys.modules) - before:
        if name.startswith("mtkd_plugin_"):
            del sys.modules[name]


def plugin(folder: Path, text: str, name: str = "mine.py") -> str:
    (folder / name).write_text(text)
    return name


def test_reading_a_registry_brings_the_built_ins() -> None:
    """Law: a registry has the built-ins when it is first read, sorted."""
    assert {"kl", "mse", "ce"} <= set(LOSSES)
    assert LOSSES.origin("kl") == BUILT_IN
    assert LOSSES["kl"].name == "kl"
    assert list(LOSSES) == sorted(LOSSES)
    assert len(LOSSES) == len(list(LOSSES))
    assert "no such loss" not in LOSSES


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    """Law: an unknown name is refused at its place, with the nearest."""
    with pytest.raises(UserError, match="unknown loss") as caught:
        LOSSES.find("reverse_k", "stages.s.match[0].loss")
    text = str(caught.value)
    assert text.startswith("stages.s.match[0].loss: ")
    assert "did you mean 'reverse_kl'?" in text


def test_a_plug_in_is_used_and_its_origin_shown(tmp_path: Path) -> None:
    """Law: a plug-in's names have its file as origin, and it is loaded once."""
    load_plugins((plugin(tmp_path, GOOD),), tmp_path)
    assert LOSSES.find("test-absolute").inputs == ("hidden",)
    assert LOSSES.origin("test-absolute") == "mine.py"
    assert METHODS.origin("test-method") == "mine.py"
    load_plugins(("mine.py",), tmp_path)  # a second time is no second registration
    assert LOSSES.origin("kl") == BUILT_IN


def test_a_plug_in_cannot_shadow_a_built_in_or_another_plug_in(tmp_path: Path) -> None:
    """Law: a name belongs to whom registered it first."""
    built_in = LOSSES["kl"]
    name = plugin(tmp_path, GOOD.replace('"test-absolute"', '"kl"'))
    with pytest.raises(UserError, match="'kl' is already registered by mtkd") as caught:
        load_plugins((name,), tmp_path)
    assert "mine.py" in str(caught.value)
    assert LOSSES["kl"] is built_in
    load_plugins((plugin(tmp_path, GOOD, "first.py"),), tmp_path)
    with pytest.raises(UserError, match=r"'test-absolute' is already registered by first\.py"):
        load_plugins((plugin(tmp_path, GOOD, "second.py"),), tmp_path)
    assert LOSSES.origin("test-absolute") == "first.py"


def test_shadowing_is_refused_before_the_built_ins_were_read(tmp_path: Path) -> None:
    """In a fresh process a plug-in may come first; the built-ins must be compared all the same."""
    plugin(tmp_path, GOOD.replace('"test-absolute"', '"kl"'))
    code = (
        "from pathlib import Path\n"
        "from mtkd.errors import UserError\n"
        "from mtkd import LOSSES\nfrom mtkd.registry import load_plugins\n"
        f"try: load_plugins(('mine.py',), Path({str(tmp_path)!r}))\n"
        "except UserError as error: assert 'registered by mtkd' in str(error)\n"
        "else: raise SystemExit('the plug-in replaced kl')\n"
        "assert LOSSES.origin('kl') == 'mtkd'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_a_plug_in_that_fails_half_way_leaves_nothing_and_can_be_mended(tmp_path: Path) -> None:
    """Law: a failed import registers nothing, and a corrected file loads."""
    name = plugin(tmp_path, GOOD + "\nraise RuntimeError('half-way')\n")
    with pytest.raises(UserError, match="RuntimeError: half-way") as caught:
        load_plugins((name,), tmp_path)
    assert (caught.value.where, caught.value.message.split(":")[0]) == ("plugins", "plug-in mine.py cannot be imported")
    assert "test-absolute" not in LOSSES
    assert "test-method" not in METHODS
    load_plugins((plugin(tmp_path, GOOD),), tmp_path)
    assert "test-absolute" in LOSSES


def test_what_is_registered_after_a_plug_in_is_not_its(tmp_path: Path) -> None:
    """Law: the origin ends with the import, also with one that failed."""
    with pytest.raises(UserError):
        load_plugins((plugin(tmp_path, "raise ValueError"),), tmp_path)
    own: Registry[int] = Registry("thing", __name__)
    own.add("x", 1)
    assert own.origin("x") == BUILT_IN


@pytest.mark.parametrize("name", ["missing.py", "text.txt", "."])
def test_a_plug_in_must_be_a_python_file(name: str, tmp_path: Path) -> None:
    """Law: what is no .py file is refused by its name."""
    (tmp_path / "text.txt").write_text(GOOD)
    with pytest.raises(UserError, match=r"existing \.py file") as caught:
        load_plugins((name,), tmp_path)
    assert caught.value.found == name


def test_an_installed_package_registers_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: packages of the group mtkd.plugins register under their own name."""

    class Entry:
        name = "company-losses"

        def load(self) -> None:
            LOSSES.add("test-entry", LOSSES["kl"])

    groups = []
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.append(group) or [Entry()])
    load_plugins()
    assert groups == ["mtkd.plugins"]
    assert LOSSES.origin("test-entry") == "company-losses"


# ---- options


def example(
    student: object,
    teacher: object,
    mask: object,
    *,
    needed: int,
    ratio: float = 1.0,
    count: int = 2,
    flag: bool = False,
    mode: str = "a",
    layers: tuple[int, ...] = (1,),
    free: object = None,
) -> None: ...


PARAMETERS = keyword_parameters(example)


def test_only_keyword_parameters_are_options() -> None:
    """Law: options are the keyword-only parameters."""
    assert list(PARAMETERS) == ["needed", "ratio", "count", "flag", "mode", "layers", "free"]


def test_good_options_pass() -> None:
    """Law: options of the defaults' types pass; whole numbers are floats, lists are tuples."""
    check_options({"needed": 1}, PARAMETERS, "row")
    every = {"needed": "x", "ratio": 2, "count": 3, "flag": True, "mode": "b", "layers": [1, 2], "free": {"any": 1}}
    check_options(every, PARAMETERS, "row")


def test_an_unknown_option_is_told_with_the_nearest() -> None:
    """Law: an unknown option is refused at its place, with the nearest."""
    with pytest.raises(UserError, match="unknown option") as caught:
        check_options({"needed": 1, "ration": 2.0}, PARAMETERS, "stages.s.match[0]")
    assert caught.value.where == "stages.s.match[0].options"
    assert caught.value.todo == "did you mean 'ratio'?"
    with pytest.raises(UserError, match="none"):
        check_options({"margin": 1.0}, {}, "row")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ratio", "2.0"),
        ("ratio", True),
        ("count", 2.5),
        ("count", "3"),
        ("count", False),
        ("flag", 1),
        ("flag", "yes"),
        ("mode", 3),
        ("layers", 1),
        ("layers", "1"),
    ],
)
def test_a_wrong_type_is_refused(name: str, value: object) -> None:
    """Law: an option has the type of its default, and true is no number."""
    with pytest.raises(UserError, match="wrong type") as caught:
        check_options({"needed": 1, name: value}, PARAMETERS, "row")
    assert caught.value.where == f"row.options.{name}"
    assert caught.value.found == value


def test_a_missing_required_option_is_named() -> None:
    """Law: an option without a default must be given."""
    with pytest.raises(UserError, match="required option is missing") as caught:
        check_options({}, PARAMETERS, "row")
    assert caught.value.allowed == "needed"


def test_every_built_in_declares_options_that_pass_their_own_check() -> None:
    """A default that its own type check refuses would make the option impossible to write out."""
    for registered in (LOSSES, WEIGHTINGS, METHODS):
        for name, spec in registered.items():
            parameters = spec.options()
            defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
            optional = {n: p for n, p in parameters.items() if n in defaults}
            check_options(defaults, optional, name)


# calls from Python


def test_a_loss_is_called_with_its_options_as_keywords() -> None:
    """The same numbers as the function itself, of class and token logits, with any mask or none."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 6, 7, generator=generator)
    mask = torch.rand(4, 6, generator=generator) > 0.4
    plain = kl(student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), temperature=2.0).reshape(4, 6)
    for given in (mask, mask.long(), mask.float()):
        found = mtkd.LOSSES["kl"](student, teacher, given, temperature=2.0)
        torch.testing.assert_close(found, plain.masked_fill(~mask, 0))
    torch.testing.assert_close(mtkd.LOSSES["kl"](student, teacher, temperature=2.0), plain)
    rows = student[0], teacher[0], mask[0]
    assert torch.equal(mtkd.LOSSES["kl"](*rows, temperature=2.0), mtkd.LOSSES["kl"](*rows, {"temperature": 2.0}))
    assert not torch.equal(mtkd.LOSSES["kl"](*rows, {"temperature": 3.0}, temperature=2.0), mtkd.LOSSES["kl"](*rows))
    labels = torch.randint(0, 7, (4, 6), generator=generator)
    wanted = torch.nn.functional.cross_entropy(student.transpose(1, 2), labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(mtkd.LOSSES["ce"](student, labels, smoothing=0.1), wanted)


@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (3, 2, 5, 5)])
def test_every_feature_needs_no_mask(shape: tuple[int, ...]) -> None:
    """Law: no mask is a mask of ones, for each shape of feature."""
    generator = torch.Generator().manual_seed(1)
    sides = torch.rand(2, *shape, generator=generator)
    name = "attention_mse" if len(shape) == 4 else "mse"
    positions = (shape[0], shape[2]) if len(shape) == 4 else shape[:-1]
    every = torch.ones(positions, dtype=torch.bool)
    found = mtkd.LOSSES[name](*sides)
    assert found.shape == positions
    torch.testing.assert_close(found, mtkd.LOSSES[name](*sides, every))


def test_a_call_names_what_is_wrong_with_it() -> None:
    """Law: a wrong call is refused with option, bound or shape."""
    sides = torch.zeros(2, 5, 7)
    with pytest.raises(UserError, match=r"loss 'kl'\.options: unknown option") as caught:
        mtkd.LOSSES["kl"](*sides, temprature=2.0)
    assert "temperature" in str(caught.value)
    with pytest.raises(UserError, match="wrong type"):
        mtkd.LOSSES["kl"](*sides, temperature="warm")
    with pytest.raises(ValueError, match="temperature must be positive"):
        mtkd.LOSSES["kl"](*sides, temperature=0.0)
    with pytest.raises(ValueError, match=r"mask of loss 'kl' has shape \[5, 7\]; one entry per position is \[5\]"):
        mtkd.LOSSES["kl"](*sides, torch.ones(5, 7, dtype=torch.bool))


def test_methods_and_weightings_are_called_with_their_options() -> None:
    """Law: calling is looking up with options, with the same checks."""
    assert mtkd.METHODS["kd"](temperature=4.0) == mtkd.METHODS["kd"].rows({"temperature": 4.0})
    assert mtkd.METHODS["glmd"](step="prediction") == mtkd.METHODS["glmd"].rows({}, "prediction")
    with pytest.raises(UserError, match=r"method 'kd'\.options: unknown option"):
        mtkd.METHODS["kd"](temp=4.0)
    assert mtkd.WEIGHTINGS["confidence"](tau=0.3).tau == 0.3
    fixed = mtkd.WEIGHTINGS["fixed"](teachers=("a", "b"), weights={"a": 3.0, "b": 1.0})
    assert fixed.values.tolist() == [0.75, 0.25]
    with pytest.raises(UserError, match="for the teachers of a stage"):
        mtkd.WEIGHTINGS["fixed"](weights={"a": 1.0})
    with pytest.raises(UserError, match=r"weighting 'confidence'\.options: unknown option"):
        mtkd.WEIGHTINGS["confidence"](teachers=("a",))
