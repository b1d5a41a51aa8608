"""Random damage of run folders: what do the commands make of it?

Every damage (a flipped bit, a file that is cut, emptied or deleted, a folder, a link, a fifo, other JSON, swapped with
its sibling, ...) is done to a copy of a finished or a stopped run: a classification, and a language model with a cache.
Then `mtkd status`, `plan`, `report`, `cache verify`, `resume` and `run`. It has to be detected (exit code 2 or 3, with
the file and what to do), recovered from (results of the undamaged run, bit by bit), or without effect.

    python benchmarks/damage.py                 # 200 damages, about 10 minutes on two cores
    python benchmarks/damage.py --count 20 --seed 3

What was judged is kept with the digest of the code: stop it and call again, and it goes on. Exit code 1 after a fault.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}

import multiprocessing  # noqa: E402

import processes  # noqa: E402
from damages import STATES, Bench, Damage, damages  # noqa: E402
from tiny_run import NAME  # noqa: E402


def code_digest() -> str:
    """Of the code that is tried: mtkd and the damages."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "mtkd").rglob("*.py"), ROOT / "tests/damages.py"]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def judged(file: Path, code: str) -> dict[Damage, tuple[str, str]]:
    """What an earlier call judged with this code."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {Damage(**line["damage"]): (line["verdict"], line["said"]) for line in lines if line["code"] == code}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=120, help="seconds that a command may take")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing after so many")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/damage", help="folders and verdicts")
    arguments = parser.parse_args()
    multiprocessing.set_forkserver_preload(list(processes.PRELOADED))
    begun, code = time.monotonic(), code_digest()
    bench = Bench(arguments.output.resolve(), arguments.limit)
    for state in STATES:
        bench.make(state)
    folders = {state: bench.undamaged(state) / "runs" / NAME for state in STATES}
    kept = judged(bench.folder / "verdicts.jsonl", code)
    count: collections.Counter[str] = collections.Counter()
    for number, damage in enumerate(damages(folders, arguments.count, arguments.seed), 1):
        if damage not in kept:
            if time.monotonic() - begun > 60 * arguments.minutes:
                print(f"stopped before damage {number}: call it again to go on")
                return 1
            kept[damage] = bench.judge(damage)
            line = {"code": code, "damage": vars(damage), "verdict": kept[damage][0], "said": kept[damage][1]}
            with (bench.folder / "verdicts.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        verdict, said = kept[damage]
        count[verdict] += 1
        print(f"{number} {damage.state}: {damage.kind} {damage.path} ({damage.seed}): {verdict}", flush=True)
        if verdict == "FAULT":
            print("  | " + "\n  | ".join(said.strip().splitlines()[:25]), flush=True)
    print(f"{arguments.count} damages, seed {arguments.seed}: {dict(sorted(count.items()))}; code {code}")
    return int(count["FAULT"] > 0)


if __name__ == "__main__":
    sys.exit(main())
