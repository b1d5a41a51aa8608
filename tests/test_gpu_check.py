"""`launch/gpu-check` at toy sizes on a CPU: every part of it runs, and what did not run is told from what did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest

ROOT = Path(__file__).parents[1]


def check(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = folder / "results.json"
    command = [str(ROOT / "launch" / "gpu-check"), "--device", "cpu", "--toy", "--out", str(out), *arguments]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": sys.executable}, timeout=1200, capture_output=True, text=True
    )
    assert out.is_file(), done.stderr
    return done.returncode, json.loads(out.read_text())


@pytest.mark.slow
def test_every_part_runs_at_toy_sizes(tmp_path: Path) -> None:
    """Its parts are forks here, and new interpreters in the test below."""
    out = tmp_path / "results.json"
    arguments = ("--device", "cpu", "--toy", "--out", str(out), "--seconds", "1100")
    code, output = processes.run(tmp_path, *arguments, program=[str(ROOT / "benchmarks" / "gpu_check.py")])
    assert out.is_file(), output
    found = json.loads(out.read_text())
    parts = found["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("machine", "numerics", "tiles", "target", "steps"), "done"
    ), parts
    assert (code, found["toy"]) == (0, True)
    assert parts["numerics"]["figures"]["tests"]["passed"] > 3
    tiles, target = parts["tiles"]["figures"], parts["target"]["figures"]
    for way in ("tiles", "whole"):  # both against float32: bf16's own rounding and no more
        assert max(tiles[way]["error"].values()) < 0.02
    assert tiles["positions"] == 64
    # GLM by hand: embeddings, two tables of positions, 12 H^2 + 13 H per layer, the last norm
    assert target["student_parameters"] == (500 + 2 * 1025) * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert target["seconds"] > 0
    assert target["planned_bytes"] > 12 * target["student_parameters"] + 2 * target["teacher_parameters"]
    assert target["losses"][-1] == pytest.approx(target["losses"][0], rel=0.2)


def test_what_did_not_run_says_so(tmp_path: Path) -> None:
    code, found = check(tmp_path, "--seconds", "0")
    assert code == 1
    assert {part["status"] for part in found["parts"].values()} == {"not run"}
    assert not any("figures" in part for part in found["parts"].values())


@pytest.mark.slow
def test_the_command_runs_a_part(tmp_path: Path) -> None:
    code, found = check(tmp_path, "--seconds", "1100", "--only", "machine")
    assert (code, {name: part["status"] for name, part in found["parts"].items()}) == (0, {"machine": "done"}), found
