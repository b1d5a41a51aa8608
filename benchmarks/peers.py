"""mtkd against trl, liger-kernel and TextBrewer: steps, teachers, losses, floors, caches, encoders. One command.

    pip install trl==1.16.0 liger-kernel textbrewer      # or --peers FOLDER, filled by pip install --no-deps --target
    python benchmarks/peers.py                           # everything, about half an hour on 2 idle cores
    python benchmarks/peers.py --parts step floor        # some parts
    python benchmarks/peers.py --quick                   # does everything run? its figures mean nothing
    python benchmarks/peers.py --tables                  # only the tables and the plot, from what is there

Every measurement is a process of its own; arms alternate over rounds, with THP_MEM_ALLOC_ENABLE=0 and 1 (a switch of
torch that moves such timings by itself, up to two times). Each is kept as a line of OUTPUT/measurements.jsonl with the
digest of the code it measured: stop it and call again, and it goes on. At the end the tables between the markers of
benchmarks/README.md and benchmarks/plots/peers.svg are written again (not with --quick).

First-step losses of the arms of a comparison must agree to 1e-4 relative; an arm that differs is reported as doing
other work and does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, PLOT = ROOT / "benchmarks/README.md", ROOT / "benchmarks/plots/peers.svg"
PARTS = ("step", "teachers", "loss", "floor", "encoders", "cached", "packing")
HUGE = ("0", "1")
VERSIONED = ("torch", "transformers", "trl", "liger-kernel", "textbrewer")


@dataclass(frozen=True)
class Job:
    """One measurement: a function of `sides` and what it is called with.

    Attributes:
        huge: THP_MEM_ALLOC_ENABLE of its process.
        seconds: what it takes on two idle cores, about; no job is begun that would end after the time is over.
    """

    part: str
    arm: str
    call: str
    options: dict[str, Any] = field(default_factory=dict)
    huge: str = "1"
    round: int = 0
    seconds: int = 20

    @property
    def key(self) -> str:
        return json.dumps([self.part, self.arm, self.call, self.options, self.huge, self.round], sort_keys=True)


def step_jobs(quick: bool) -> Iterator[Job]:
    repeats = 1 if quick else 3
    for round_ in range(1 if quick else 2):
        for huge in HUGE:
            yield Job("step", "mtkd", "steps.mtkd", {"teachers": 1, "repeats": repeats}, huge, round_)
            for loss in ("plain", "chunked", "liger"):
                name = {"plain": "trl", "chunked": "trl-chunked"}.get(loss, loss)
                options = {"loss": loss, "teachers": 1, "repeats": repeats}
                yield Job("step", name, "trls.step", options, huge, round_)
            if not (quick and huge == "0"):
                options = {"loss": "liger", "teachers": 1, "repeats": repeats, "compiled": True}
                yield Job("step", "liger-compiled", "trls.step", options, huge, round_, 60)


def teacher_jobs(quick: bool) -> Iterator[Job]:
    for round_ in range(1 if quick else 2):
        for huge in HUGE:
            yield Job("teachers", "slope", "steps.slope", {"repeats": 1 if quick else 5}, huge, round_, 40)
    for huge in HUGE[1:] if quick else HUGE:
        for count in (1, 2) if quick else (1, 2, 3, 4):
            repeats = 1 if quick else 2
            yield Job("teachers", f"mtkd-{count}", "steps.mtkd", {"teachers": count, "repeats": repeats}, huge)
            options = {"loss": "plain", "teachers": count, "repeats": repeats}
            yield Job("teachers", f"trl-{count}", "trls.step", options, huge, seconds=40)


def loss_jobs(quick: bool) -> Iterator[Job]:
    """All sides where they can be compared, at N = 1,024; memory of mtkd everywhere, of the lean peers at V = 32k."""

    def job(side: str, n: int, v: int, huge: str, repeats: int, seconds: int = 20) -> Job:
        options = {"side": side, "positions": n, "columns": v, "repeats": repeats}
        return Job("loss", f"{side}-{n}-{v}", "losses.measure", options, huge, 0, seconds)

    for v in (32_000,) if quick else (32_000, 128_000, 152_000):
        # what is slower than another peer at 128,000 columns, and needs 10 GB, is not asked again at 152,000
        peers = ["trl", "trl-chunked", "liger", "liger-compiled"] if v < 152_000 else ["trl-chunked", "liger-compiled"]
        for huge in HUGE if v == 32_000 and not quick else HUGE[1:]:
            for side in ["mtkd", *peers]:
                yield job(side, 256 if quick else 1_024, v, huge, 0 if quick else 2 if v == 32_000 else 1, 60)
        if not quick and v > 32_000:
            yield job("mtkd", 1_024, v, "0", 1, 20)
        for n in (1_024,) if quick else (256, 4_096):
            yield job("mtkd", n, v, "1", 0, 40)
            if v == 32_000:
                yield job("trl-chunked", n, v, "1", 0, 40)
                yield job("liger-compiled", n, v, "1", 0, 60)


def floor_jobs(quick: bool) -> Iterator[Job]:
    for round_ in range(1 if quick else 2):
        for huge in HUGE:
            yield Job("floor", "floor", "steps.floor", {"repeats": 1 if quick else 9}, huge, round_, 30)


def encoder_jobs(quick: bool) -> Iterator[Job]:
    repeats = 2 if quick else 10
    for round_ in range(1 if quick else 2):
        for huge in HUGE:
            yield Job("encoders", "textbrewer", "encoders.textbrewer", {"repeats": repeats}, huge, round_)
            for hidden in (False, True):
                name = "mtkd-hidden" if hidden else "mtkd-logits"
                yield Job("encoders", name, "encoders.mtkd", {"hidden": hidden, "repeats": repeats}, huge, round_)


def cached_jobs(quick: bool) -> Iterator[Job]:
    for huge in HUGE[1:] if quick else HUGE:
        yield Job("cached", "time", "caches.time", {"quick": quick}, huge, 0, 90)
    yield Job("cached", "quality", "caches.quality", {"quick": quick}, "1", 0, 360)


def packing_jobs(quick: bool) -> Iterator[Job]:
    yield Job("packing", "tokens", "lengths.measure", {"quick": quick}, "1", 0, 120)


JOBS = {
    "step": step_jobs,
    "teachers": teacher_jobs,
    "loss": loss_jobs,
    "floor": floor_jobs,
    "encoders": encoder_jobs,
    "cached": cached_jobs,
    "packing": packing_jobs,
}


def code_digest() -> str:
    """Of the code that is measured: mtkd and the arms."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "mtkd").rglob("*.py"), *(ROOT / "benchmarks/sides").glob("*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def facts(threads: int, peers: str) -> dict[str, str]:
    """Machine and versions; no names of hosts or users."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    read = {a.strip(): b.strip() for a, _, b in (line.partition(":") for line in lines)}
    wide = next((name for name in ("avx512f", "avx2") if name in read.get("flags", "").split()), "")
    program = "import importlib.metadata as m, json, sys\n" + (
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    output = subprocess.check_output([sys.executable, "-c", program, *VERSIONED], env=environment(peers, threads, "0"))
    return {
        "processor": f"{read.get('model name', platform.machine())} ({wide})",
        "threads": str(threads),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **json.loads(output),
    }


def environment(peers: str, threads: int, huge: str) -> dict[str, str]:
    """Of a measurement's process."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *([peers] if peers else []), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "THP_MEM_ALLOC_ENABLE": huge,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Kept:
    """The measurements of the output folder that belong to this code."""

    def __init__(self, folder: Path, digest: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.digest = folder / "measurements.jsonl", digest
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("}")]  # a killed call may leave half a line
        self.lines = [line for line in read if line["digest"] == digest]
        if len(read) > len(self.lines):
            print(f"{len(read) - len(self.lines)} measurements of other code in {self.file} do not count", flush=True)

    def has(self, job: Job) -> bool:
        """Whether it was measured; what failed is tried again."""
        return any(line["key"] == job.key and "result" in line for line in self.lines)

    def add(self, job: Job, found: dict[str, Any], setting: dict[str, str]) -> None:
        line = {"key": job.key, "part": job.part, "arm": job.arm, "huge": job.huge, "round": job.round}
        line |= {"digest": self.digest, "options": job.options, "facts": setting, **found}
        self.lines.append(line)
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def measure(job: Job, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one job in a process of its own: {"result": ...} or {"failed": why}."""
    command = [sys.executable, "-W", "ignore", __file__, "--job", json.dumps([job.call, job.options])]
    command += ["--threads", str(arguments.threads), "--output", str(arguments.output)]
    done = subprocess.run(
        command,
        env=environment(arguments.peers, arguments.threads, job.huge),
        capture_output=True,
        text=True,
        check=False,
        timeout=1_800,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        (arguments.output / f"failed-{job.part}-{job.arm}.txt").write_text(done.stderr)
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
        return {"failed": (named or lines)[-1][:200]}
    return {"result": json.loads(done.stdout.splitlines()[-1])}


def inside(call: str, options: dict[str, Any], threads: int, output: Path) -> None:
    """What the process of a measurement does: one function of `sides`, its result as the last line."""
    import importlib

    import torch

    torch.set_num_threads(threads)
    module, _, name = call.partition(".")
    if module in ("caches", "lengths"):
        # finished runs are not redone: one of other code, or of the other kind of memory, must not be found
        own = output / f"{code_digest()}-{os.environ.get('THP_MEM_ALLOC_ENABLE', '0')}"
        options = {**options, "folder": own, "threads": threads}
    print(json.dumps(getattr(importlib.import_module(f"sides.{module}"), name)(**options)))


def work(kept: Kept, arguments: argparse.Namespace) -> bool:
    """Measure what is missing until the time is over; True when nothing is."""
    jobs = [job for part in arguments.parts for job in JOBS[part](arguments.quick) if not kept.has(job)]
    if not jobs:
        return True
    setting, deadline = facts(arguments.threads, arguments.peers), time.monotonic() + 60 * arguments.minutes
    for number, job in enumerate(jobs):
        if time.monotonic() + job.seconds > deadline:
            print(f"the time is over: {len(jobs) - number} measurements are left for the next call", flush=True)
            return False
        begun = time.monotonic()
        found = measure(job, arguments)
        took = time.monotonic() - begun
        kept.add(job, {**found, "took": round(took, 1)}, setting)
        shown = found.get("result") or found["failed"]
        if isinstance(shown, dict):
            shown = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        print(f"[{number + 1}/{len(jobs)}] {job.part} {job.arm} THP={job.huge} ({took:.0f} s): {shown}", flush=True)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="one round, least sizes: does everything run?")
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing that would end later")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=os.environ.get("MTKD_PEERS", ""), help="folder with the peers (MTKD_PEERS)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs/peers", help="measurements and runs")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        inside(*json.loads(arguments.job), arguments.threads, arguments.output)
        return
    if arguments.quick:
        arguments.output /= "quick"
    import peer_plot
    import peer_tables

    kept = Kept(arguments.output, code_digest())
    if not arguments.tables:
        work(kept, arguments)
    text = peer_tables.tables(kept.lines)
    print(text)
    if not arguments.quick and kept.lines:
        peer_tables.write(README, text)
        peer_plot.plot(PLOT, kept.lines)


if __name__ == "__main__":
    main()
