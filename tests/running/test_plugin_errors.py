"""What a plug-in raises, or that it ends the process, is told as its own fault: exit code 2 with file and line."""

from __future__ import annotations

from pathlib import Path

import processes
import pytest
from tiny_run import write_yaml

WEIGHTING = """
import sys, torch, mtkd

@mtkd.weighting("mine")
class Mine(mtkd.Weighting):
    def forward(self, traits):
        {line}
        return torch.full_like(traits.entropy, 1 / len(traits.entropy))
"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys\nsys.exit(0)\n", "ended the process: sys.exit(0)"),
        ("import sys\nsys.exit()\n", "ended the process: sys.exit()"),
        ("raise SystemExit('done')\n", "ended the process: sys.exit('done')"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_a_plug_in_that_ends_at_its_import_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "p.py").write_text(text)
    file = str(write_yaml(tmp_path, plugins=["p.py"]))
    processes.assert_refused(tmp_path, ("run", file), 2, "p.py", told)
    processes.assert_refused(tmp_path, ("check", str(tmp_path / "p.py")), 2, "p.py", told)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [("sys.exit(3)", "sys.exit(3)"), ("{}['x']", "KeyError: 'x'"), ("raise OSError('own')", "OSError: own")],
)
def test_a_plug_in_that_fails_later_is_named_with_its_line(tmp_path: Path, line: str, told: str) -> None:
    (tmp_path / "p.py").write_text(WEIGHTING.replace("{line}", line))
    stages = {"student": {"weighting": "mine"}}
    file = str(write_yaml(tmp_path, plugins=["p.py"], stages=stages))
    processes.assert_refused(tmp_path, ("run", file), 2, f"{tmp_path / 'p.py'}:7", told)
