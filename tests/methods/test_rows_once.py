"""The rows of a stage are made once: its method is called and its labels are resolved for plan and run together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run

import mtkd
from mtkd.config.match import Match
from mtkd.methods import rows as methods_rows
from mtkd.planning import specify


def test_rows_are_compiled_once_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's rows meet its models once in a plan, and once in a run, whose build takes them from the spec."""
    places: list[str] = []
    original = specify.compile_rows

    def counted(matches: Any, *sides: Any, **options: Any) -> Any:
        places.extend(matches)
        return original(matches, *sides, **options)

    monkeypatch.setattr(specify, "compile_rows", counted)
    tiny_run.write_data(tmp_path / "data")
    config = tiny_run.tiny_config(tmp_path)
    mtkd.plan(config)
    once = list(places)
    assert len(once) == len(set(once))
    mtkd.run(config)
    assert places == once + once


def test_a_method_is_read_once_for_a_plan_and_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks, heads, labels, plan, identity and build share one call."""
    calls: list[str] = []
    original = methods_rows.method_rows

    def counted(named: Any, token_level: bool, where: str) -> Any:
        calls.append(where)
        return original(named, token_level, where)

    monkeypatch.setattr(methods_rows, "method_rows", counted)
    tiny_run.write_data(tmp_path / "data")
    config = tiny_run.tiny_config(tmp_path)
    mtkd.plan(config)
    mtkd.run(config)
    assert calls == ["stages.student.method"]


@pytest.mark.parametrize("stage", ["teacher", "student", "cache"])
def test_rows_that_callers_share_cannot_be_changed(tmp_path: Path, stage: str) -> None:
    """A caller that wrote into them would change the rows of all others."""
    cache = {"kind": "cache", "teachers": ["stage:teacher"]}
    config = tiny_run.tiny_config(tmp_path, stages={"cache": cache})
    rows = methods_rows.placed_rows(config.stages[stage], config.data["text"], f"stages.{stage}")
    with pytest.raises(TypeError):
        rows["more"] = Match(loss="kl")  # type: ignore[index]
