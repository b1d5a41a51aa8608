"""One command for a GPU machine without a network: numerics, steps and the target's real shapes, in under 9 minutes.

    launch/gpu-check --out results.json                       # on a GPU
    launch/gpu-check --out results.json --device cpu --toy    # every line of it, at toy sizes

Each part is a process of its own with a budget of seconds; what failed, or had no time left, says so in the results
next to what was measured. Nothing is estimated. Kept results lie in `benchmarks/gpu/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGETS = {"machine": 40, "numerics": 150, "tiles": 60, "target": 210, "steps": 90}
"""Seconds per part, in the order they run; a part gets what is left if that is less."""
TOTAL = 500
_LEAST = 5  # seconds with which no part is begun
_SHOWN = 1_500  # characters of a failed part's output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--toy", action="store_true", help="tiny shapes, to see that all runs; no figures to keep")
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the results, JSON")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for everything")
    parser.add_argument("--only", nargs="+", choices=BUDGETS, default=list(BUDGETS), help="these parts")
    parser.add_argument("--part", choices=BUDGETS, help=argparse.SUPPRESS)  # what a process of ours is told
    arguments = parser.parse_args()
    if arguments.part:
        return measure(arguments.part, arguments.device, arguments.toy, arguments.out)
    begun = time.monotonic()
    results: dict[str, object] = {"device": arguments.device, "toy": arguments.toy, "code": code(), "parts": {}}
    parts: dict[str, dict[str, object]] = {}
    for name, budget in BUDGETS.items():
        if name in arguments.only:
            left = arguments.seconds - (time.monotonic() - begun)
            # toy sizes are for tests on any machine, busy ones too
            parts[name] = run_part(name, arguments, left if arguments.toy else min(budget, left))
            results |= {"parts": parts, "seconds": round(time.monotonic() - begun, 1)}
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")  # after each: the lease may end
            print(line(name, parts[name]), flush=True)
    return 0 if all(part["status"] == "done" for part in parts.values()) else 1


def run_part(name: str, arguments: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Status ("done", "failed", "not run"), seconds and figures of one part."""
    if seconds < _LEAST:
        return {"status": "not run", "why": "no time was left"}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--part", name, "--device", arguments.device, "--out", str(file)]
        try:
            done = subprocess.run(
                command + ["--toy"] * arguments.toy,
                cwd=ROOT,
                timeout=seconds,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            )
            problem = "" if done.returncode == 0 else f"exit code {done.returncode}: {done.stdout[-_SHOWN:]}"
        except subprocess.TimeoutExpired as error:
            output = error.stdout or b""
            text = output if isinstance(output, str) else output.decode(errors="replace")
            problem = f"stopped after {seconds:.0f} s: {text[-_SHOWN:]}"
        figures = json.loads(file.read_text()) if file.is_file() else {}
    record: dict[str, object] = {
        "status": "failed" if problem else "done",
        "seconds": round(time.monotonic() - begun, 1),
    }
    return {**record, **({"why": problem} if problem else {}), "figures": figures}


def measure(name: str, device: str, toy: bool, file: Path) -> int:
    """A part, in this process; its figures go to `file` as soon as there are any."""
    if name == "numerics":
        return numerics(device, toy, file)
    from sides import gpu

    parts = {"machine": gpu.machine, "tiles": gpu.tiles, "target": gpu.target, "steps": gpu.steps}
    for figures in parts[name](device, toy):
        file.write_text(json.dumps(figures))
    return 0


def numerics(device: str, toy: bool, file: Path) -> int:
    """The tests that compute on a device of one's choice."""
    import pytest

    class Count:
        """How many tests ended how, and the first words of those that failed."""

        def __init__(self) -> None:
            self.counts: dict[str, int] = {}
            self.failed: dict[str, str] = {}

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            if report.outcome == "failed":
                self.failed[report.nodeid] = str(report.longrepr)[-300:]

    count = Count()
    chosen = ["-k", "kl or llama"] if toy else []
    test = ROOT / "tests" / "test_on_device.py"
    # Libraries that are imported already keep plain assertions: no reason to end.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([str(test), "-q", "-p", "no:cacheprovider", "--device", device, *quiet, *chosen], [count])
    file.write_text(json.dumps({"tests": count.counts, "failed": count.failed}))
    return int(status)


def code() -> str:
    """Digest of the library's sources: figures belong to them."""
    import hashlib

    digest = hashlib.sha256()
    for source in sorted((ROOT / "mtkd").rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def line(name: str, part: dict[str, object]) -> str:
    """One part for the terminal."""
    text = f"{name}: {part['status']}" + (f", {part['seconds']} s" if "seconds" in part else "")
    text += f"\n  {part['why']}" if "why" in part else ""
    figures = part.get("figures") or {}
    assert isinstance(figures, dict)
    return text + "".join(f"\n  {key}: {value}" for key, value in figures.items())


if __name__ == "__main__":
    sys.exit(main())
