"""`engine.precision: auto`: what it means on which processor, that a run keeps it, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_run import tiny_config, write_yaml

import mtkd
from mtkd.config import EngineConfig, RunConfig
from mtkd.engine import precision
from mtkd.engine.dist import Dist
from mtkd.engine.precision import Choice, begun_in, choose, here, of_processor, slowdown, warning, with_precision
from mtkd.engine.testing import run_distributed
from mtkd.errors import UserError
from mtkd.running.agreement import agree_on_precision
from mtkd.running.identity import identity
from mtkd.running.remember import reopen

SAPPHIRE = {"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx2": True, "avx512_bf16": True, "amx_bf16": True}
ZEN = {"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx2": True, "avx512_bf16": True, "amx_bf16": False}
LAPTOP = {"architecture": "x86_64", "cpu_name": "Intel Core", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
GRAVITON = {"architecture": "aarch64", "neon": True, "bf16": True}
FAST, SLOW = Choice("bf16", "it is fast"), Choice("fp32", "bf16 is slow")


@pytest.mark.parametrize(
    ("facts", "level", "environment", "wanted", "why"),
    [
        (SAPPHIRE, "AVX512", {}, "bf16", "AMX"),
        (SAPPHIRE, "AVX512", {"ONEDNN_MAX_CPU_ISA": "ALL"}, "bf16", "AMX"),
        (SAPPHIRE, "AVX512", {"ONEDNN_MAX_CPU_ISA": "avx2"}, "fp32", "ONEDNN_MAX_CPU_ISA=avx2"),
        (SAPPHIRE, "AVX512", {"DNNL_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "fp32", "DNNL_MAX_CPU_ISA"),
        (SAPPHIRE, "AVX2", {}, "fp32", "ATEN_CPU_CAPABILITY"),
        (SAPPHIRE, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "fp32", "without AMX"),
        (SAPPHIRE | {"amx_bf16": False}, "AVX512", {}, "fp32", "without AMX"),  # the system does not let it
        (ZEN, "AVX512", {}, "bf16", "AVX-512"),
        (ZEN, "AVX512", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, "bf16", "AVX-512"),
        (LAPTOP, "AVX2", {}, "fp32", "does not multiply bf16"),
        (GRAVITON, "DEFAULT", {}, "bf16", "ARM"),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, "DEFAULT", {}, "fp32", "does not multiply"),
        ({"architecture": "ppc64le"}, "VSX", {}, "fp32", "does not multiply"),
    ],
)
def test_processors(facts: dict[str, Any], level: str, environment: dict[str, str], wanted: str, why: str) -> None:
    found = of_processor(facts, level=level, onednn=True, environment=environment)
    assert found.precision == wanted
    assert why in found.why
    assert of_processor(facts, level=level, onednn=False, environment=environment).precision == "fp32"


@pytest.mark.parametrize(("bf16", "wanted"), [(True, "bf16"), (False, "fp32")])
def test_a_gpu_is_asked_for_what_it_does_without_emulation(
    bf16: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    assert here("cuda").precision == wanted
    assert precision.device_of(EngineConfig()) == "cuda"
    refused = RunConfig.model_validate(
        {"name": "x", "data": {"d": {"source": "python-stdlib"}}, "engine": {"attention": "flash"}}
        | {"stages": {"s": {"kind": "finetune", "student": {"path": "x"}, "steps": 1}}}
    )
    if wanted == "fp32":
        with pytest.raises(UserError, match="no kernel for fp32"):
            with_precision(refused)
    else:
        assert with_precision(refused).engine.in_bf16


def test_a_machine_chooses_the_same_every_time() -> None:
    assert here("cpu") == here("cpu")
    assert 0 < slowdown("cpu") < 1e4


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("engine: {precision: bf16}", "bf16"),
        ("engine: {precision: fp32}", "fp32"),
        ("engine: {precision: auto}", None),
        ("engine: {kind: torch}", "fp32"),  # made when fp32 was the default, and not written
        ("name: x", "fp32"),
        (None, None),
    ],
)
def test_the_precision_of_a_run_that_is_there(text: str | None, wanted: str | None, tmp_path: Path) -> None:
    """Read from its run.yaml; a file without the key is from before `auto`, when it was fp32."""
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    assert begun_in(tmp_path) == wanted


def test_of_a_damaged_run_yaml_nothing_is_believed(tmp_path: Path) -> None:
    """The run writes it anew; its precision is that of its stages, see tests/running/test_damaged_config.py."""
    for text in ("engine: {precision: ", "", "\0", "- a list"):
        (tmp_path / "run.yaml").write_text(text)
        (tmp_path / "env.json").write_text('{"format": 2}')
        assert begun_in(tmp_path) is None


def test_nothing_that_counts_sees_auto(tmp_path: Path) -> None:
    """`auto` is decided before an identity is taken, which refuses it."""
    config = tiny_config(tmp_path, engine={"precision": "auto"})
    with pytest.raises(AssertionError):
        identity(config, "teacher", data="d", tokenizer="t", segmentation="s", models={}, steps=1)
    decided = with_precision(config)
    assert with_precision(decided) is decided
    made = identity(decided, "teacher", data="d", tokenizer="t", segmentation="s", models={}, steps=1)
    assert made["precision"] == here("cpu").precision


def auto(folder: Path) -> RunConfig:
    """A run of two stages of two steps whose file leaves the precision open."""
    few = {name: {"steps": 2, "save_every": None} for name in ("teacher", "student")}
    return tiny_config(folder, engine={"precision": None}, stages=few)


def on(monkeypatch: pytest.MonkeyPatch, found: Choice) -> None:
    """This machine multiplies as `found` says from here on."""
    monkeypatch.setattr(precision, "here", lambda device: found)
    monkeypatch.setattr(precision, "slowdown", lambda device: 6.8)


def test_a_run_keeps_its_precision_on_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run, the same file again, and resume: one precision, and a line with the factor where it is slow."""
    on(monkeypatch, FAST)
    first = mtkd.run(auto(tmp_path))
    assert "precision: bf16 (auto: it is fast)" in capsys.readouterr().err
    written = yaml.safe_load((first.folder / "run.yaml").read_text())
    assert written["engine"]["precision"] == "bf16"
    assert {stage["identity"]["precision"] for stage in first.stages.values()} == {"bf16"}

    on(monkeypatch, SLOW)
    plan = mtkd.plan(auto(tmp_path))
    assert {stage.state for stage in plan.stages} == {"done, skipped"}
    assert "as this run was begun" in plan.precision[0]
    assert "6.8 times" in plan.precision[1]
    assert mtkd.run(auto(tmp_path)).stages == first.stages
    said = " ".join(capsys.readouterr().err.split())
    assert "precision: bf16 (auto: as this run was begun" in said
    assert "6.8 times as long as in fp32 (measured)" in said
    assert mtkd.run(reopen(first.folder)).stages == first.stages
    assert "6.8 times as long as in fp32 (measured)" in " ".join(capsys.readouterr().err.split())


def test_a_run_from_before_auto_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its run.yaml has no precision: the default was fp32."""
    on(monkeypatch, SLOW)
    first = mtkd.run(auto(tmp_path))
    values = yaml.safe_load((first.folder / "run.yaml").read_text())
    del values["engine"]["precision"]
    (first.folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    environment = json.loads((first.folder / "env.json").read_text())
    for later in ("format", "sha256"):  # neither file had a digest then
        environment.pop(later, None)
    (first.folder / "env.json").write_text(json.dumps(environment))
    on(monkeypatch, FAST)
    assert mtkd.run(reopen(first.folder)).stages == first.stages
    assert yaml.safe_load((first.folder / "run.yaml").read_text())["engine"]["precision"] == "fp32"


def test_what_is_written_is_taken_and_bf16_warned_of_where_it_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, SLOW)
    plan = mtkd.plan(tiny_config(tmp_path, engine={"precision": "bf16"}))
    assert plan.engine.endswith("bf16")
    assert "6.8 times" in plan.precision[1]
    assert mtkd.plan(tiny_config(tmp_path, engine={"precision": "fp32"})).precision == [
        "fp32 (as the configuration says)"
    ]
    on(monkeypatch, FAST)
    assert warning(EngineConfig(precision="bf16")) == ""
    assert choose(tiny_config(tmp_path, engine={"precision": "fp32"})).precision == "fp32"


def test_the_plan_for_a_gpu_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mtkd plan` counts its memory in bf16; a run here would ask this machine."""
    on(monkeypatch, SLOW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = tiny_config(tmp_path, engine={"precision": None, "device": "auto", "gpu_memory_gb": 80})
    assert choose(config, planned=True).precision == "bf16"
    assert choose(config).precision == "fp32"


def _decide(folder: str) -> tuple[str, str]:
    """What this rank ends with, and what it says; every rank but the first is on a machine with slow bf16."""
    import mtkd.running.agreement

    dist, said = Dist.current(), list[str]()
    precision.here = lambda device: FAST if dist.is_main else SLOW  # type: ignore[assignment]
    precision.slowdown = lambda device: 7.1  # type: ignore[assignment]
    mtkd.running.agreement.say = lambda text, main=True: said.append(text) if main else None  # type: ignore[assignment]
    config = RunConfig.model_validate(yaml.safe_load(Path(folder, "run.yaml").read_text()))
    return agree_on_precision(dist, config).engine.precision, "\n".join(said)


@pytest.mark.slow
def test_the_main_rank_decides_and_speaks_for_the_others(tmp_path: Path) -> None:
    """Ranks on unlike machines train in one precision, and one line names the slow ones."""
    write_yaml(tmp_path, engine={"precision": "auto"})
    (first, said), (second, silent) = run_distributed(_decide, 2, str(tmp_path))
    assert (first, second, silent) == ("bf16", "bf16", "")
    assert "precision: bf16 (auto: it is fast)" in said
    assert "on " in said
    assert "7.1 times" in said


def test_the_doctor_says_what_auto_means() -> None:
    """With the measured ratio of times."""
    from typer.testing import CliRunner

    from mtkd.cli.app import app

    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert told["engine.precision: auto"] == str(here(device))
    assert float(told["time of a product in bf16 / in fp32"].partition(",")[0]) > 0
