"""Damage of a run folder, and what the commands make of it; for `test_damage.py` and `benchmarks/damage.py`.

A damage may be detected (exit code 2 or 3, with the file and what to do), recovered from (the results are those of the
undamaged run, bit by bit) or without effect. A traceback, a hang or another result is a fault.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cache_runs
import processes
from tiny_run import NAME

from mtkd.errors import EXIT_DATA, EXIT_USAGE

STATES = {
    "class-finished": ("class", ""),
    "class-stopped": ("class", "after-rename@6"),
    "lm-finished": ("lm", ""),
    "lm-in-cache": ("lm", "after-cache-shard@2"),
    "lm-stopped": ("lm", "after-rename@6"),
}
"""Name of a run folder -> what is run, and where it was killed: in the student's training, or in the cache."""

_AGAIN = re.compile(r"(again|passed over|left out|skipped a broken checkpoint): ")
_CLOCK = re.compile(r'"(seconds|time|peak_memory_bytes|tokens_per_second|steps_per_second)": [^,}\n]*,? ?')


def values(kind: str, folder: Path) -> dict[str, Any]:
    """A run of a teacher and a student; of token models with a cache between them."""
    cache = {"k": 300, "bits": 12, "shard_examples": 10}
    make = cache_runs.class_values if kind == "class" else cache_runs.values
    made = make(folder, cache=cache, student={"save_every": 3})
    stages = made["stages"]
    if kind == "class":
        live = {**stages["live"], "teachers": ["stage:teacher"]}
        made["stages"] = {"teacher": stages["teacher"], "student": live}
        made["evaluate"] = {"resamples": 100, "comparisons": [{"candidate": "student", "baseline": "teacher"}]}
    else:
        cached = {**stages["student"], "teachers": cache_runs.CACHED[:1]}
        stages["cache"]["teachers"] = cache_runs.LIVE[:1]
        made["stages"] = {"teacher": stages["teacher"], "cache": stages["cache"], "student": cached}
        made["evaluate"] = {"ensembles": ["cache"], "resamples": 100}
    return made


# Damage


def flip(path: Path, chance: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
    return bool(content)


def cut(path: Path, chance: random.Random) -> bool:
    size = path.stat().st_size
    if size:
        os.truncate(path, chance.randrange(size))
    return size > 0


def empty(path: Path, _: random.Random) -> bool:
    size = path.stat().st_size
    os.truncate(path, 0)
    return size > 0


def delete(path: Path, _: random.Random) -> bool:
    _remove(path)
    return True


def double(path: Path, chance: random.Random) -> bool:
    lines = path.read_bytes().splitlines(keepends=True)
    if lines:
        at = chance.randrange(len(lines))
        path.write_bytes(b"".join([*lines[: at + 1], *lines[at:]]))
    return bool(lines)


def other_json(path: Path, chance: random.Random) -> bool:
    path.write_text(chance.choice(["[]", "{}", "null", "3", '"x"', "NaN", "[" * 3000 + "]" * 3000, '{"files": []}']))
    return True


def other_value(path: Path, chance: random.Random) -> bool:
    """Another number, text or type in one place of a JSON or YAML file."""
    text = path.read_text(errors="replace")
    places = list(re.finditer(r"(?<=[:\[,] )[^\s,{}\[\]]+", text))
    if places:
        at = chance.choice(places)
        new = chance.choice(["-1", "7", "1e400", "null", '"x"', "[]", "true", '"\\ud800"'])
        path.write_text(text[: at.start()] + new + text[at.end() :])
    return bool(places)


def garbage(path: Path, chance: random.Random) -> bool:
    with path.open("ab") as file:
        file.write(chance.randbytes(chance.randrange(1, 40)))
    return True


def as_folder(path: Path, _: random.Random) -> bool:
    _remove(path)
    path.mkdir()
    return True


def as_file(path: Path, _: random.Random) -> bool:
    _remove(path)
    path.write_text("x\n")
    return True


def as_link(path: Path, _: random.Random) -> bool:
    _remove(path)
    path.symlink_to("nothing-is-here")
    return True


def as_fifo(path: Path, _: random.Random) -> bool:
    _remove(path)
    os.mkfifo(path)
    return True


def swap(path: Path, chance: random.Random) -> bool:
    siblings = [p for p in sorted(path.parent.iterdir()) if p != path and p.is_file() == path.is_file()]
    if siblings:
        other, aside = chance.choice(siblings), path.with_name("aside")
        path.rename(aside)
        other.rename(path)
        aside.rename(other)
    return bool(siblings)


FILE_KINDS: tuple[Callable[[Path, random.Random], bool], ...] = (
    *(flip, cut, empty, delete, double, other_json, other_value, garbage, as_folder, as_link, as_fifo, swap),
)
FOLDER_KINDS: tuple[Callable[[Path, random.Random], bool], ...] = (delete, as_folder, as_file, as_link, as_fifo, swap)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


@dataclass(frozen=True)
class Damage:
    """One damage: the folder's state, the path below the run folder, what is done to it, by which seed."""

    state: str
    path: str
    kind: str
    seed: int

    def apply(self, run: Path) -> bool:
        """Damage a run folder; whether anything was changed."""
        kinds = {kind.__name__: kind for kind in (*FILE_KINDS, *FOLDER_KINDS)}
        return kinds[self.kind](run / self.path, random.Random(self.seed))


def type_of(path: str) -> str:
    """A path without its numbers: shards and checkpoints are of one type."""
    return re.sub(r"(?<=tfevents).*|\d+", "N", path)


def damages(folders: dict[str, Path], count: int, seed: int) -> Iterator[Damage]:
    """Random damages over every type of file and folder of every state; each type comes once before any twice.

    Args: folders: state -> run folder.
    """
    chance = random.Random(seed)
    types: dict[tuple[str, str], list[str]] = {}
    for state, run in sorted(folders.items()):
        for path in sorted(str(p.relative_to(run)) for p in run.rglob("*")):
            types.setdefault((state, type_of(path)), []).append(path)
    order: list[tuple[str, str]] = []
    kinds: dict[bool, list[Any]] = {True: [], False: []}
    for _ in range(count):
        if not order:
            order = chance.sample(sorted(types), len(types))
        state, kind = order.pop()
        path = chance.choice(types[state, kind])
        is_folder = (folders[state] / path).is_dir()
        if not kinds[is_folder]:
            kinds[is_folder] = chance.sample(FOLDER_KINDS if is_folder else FILE_KINDS, k=6 if is_folder else 12)
        yield Damage(state, path, kinds[is_folder].pop().__name__, chance.randrange(2**31))


# What comes of it


def facts(run: Path) -> dict[str, str]:
    """Everything that a finished run came to, without clock times: file -> digest."""
    found = {}
    for pattern in ("stages/*/export/**/*", "stages/*/*scores*.jsonl", "results.json"):
        for path in sorted(run.glob(pattern)):
            if path.is_file() and path.name != "seconds.json":
                content = path.read_bytes()
                if path.name == "results.json":
                    content = _without_clock(content)
                elif path.name == "identity.json":  # a line that stands twice says the same
                    with suppress(ValueError):
                        content = json.dumps(json.loads(content)).encode()
                found[str(path.relative_to(run))] = hashlib.sha256(content).hexdigest()
    return found


def _without_clock(content: bytes) -> bytes:
    text = json.dumps({k: v for k, v in json.loads(content).items() if k not in ("sha256", "inputs")})
    return _CLOCK.sub("", text).encode()


def count_no_memory() -> None:
    """For `processes.start(prepare=...)`: plans do not count memory, which takes longer than all else they do."""
    import mtkd.planning.plan

    plan = mtkd.planning.plan.plan
    mtkd.planning.plan.plan = lambda config, *, memory=False, **more: plan(config, **more)


@dataclass
class Bench:
    """Undamaged run folders of every state, and one place in which they are damaged and run.

    Args:
        folder: where all of it is; ``undamaged/STATE`` next to ``work``, where every run was made.
        limit: seconds for one command.
        draws: runs draw their report, which takes longer than they do, and plans count memory; else the report alone,
            where a picture is damaged.
    """

    folder: Path
    limit: float = 300
    draws: bool = True

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def run(self) -> Path:
        return self.work / "runs" / NAME

    def undamaged(self, state: str) -> Path:
        return self.folder / "undamaged" / state

    def make(self, state: str) -> None:
        """Make the folder of a state, and note what its run comes to when nothing is damaged; once."""
        kind, point = STATES[state]
        if (self.undamaged(state) / "facts.json").exists():
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        file = cache_runs.write(self.work, values(kind, self.work))
        draws = self.draws or not point
        code, output = self._command("run", str(file), point=point, report=draws)
        assert code == (-9 if point else 0), output
        shutil.rmtree(self.undamaged(state), ignore_errors=True)
        shutil.copytree(self.work, self.undamaged(state))
        shown = self._command("report", str(self.run), "--json")
        code, output = self._command("run", str(file), report=draws)
        assert code == 0, output
        noted = {"facts": facts(self.run), "shown": shown[1] if point else self._shown()}
        (self.undamaged(state) / "facts.json").write_text(json.dumps(noted))

    def judge(self, damage: Damage) -> tuple[str, str]:
        """``detected``, ``recovered``, ``no effect`` or ``FAULT``, and what was said or went wrong."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.undamaged(damage.state), self.work, symlinks=True)
        noted = json.loads((self.work / "facts.json").read_text())
        if not damage.apply(self.run):
            return "no effect", "nothing to change"
        file, said, refused = str(self.work / "run.yaml"), "", False
        commands = [("status", str(self.run)), ("plan", file), ("report", str(self.run), "--json")]
        commands += [("resume", str(self.run))] if damage.seed % 3 == 0 else []
        commands += [("cache", "verify", str(p)) for p in self.run.glob("stages/*-cache/export/*/")]
        draws = self.draws or damage.path.startswith("plots")
        for command in (*commands, ("run", file)):
            code, output = self._command(*command, report=draws or command[0] == "report")
            if code not in (0, EXIT_USAGE, EXIT_DATA) or "Traceback" in output or "bug in mtkd" in output:
                return "FAULT", f"{command[0]}: exit {code}\n{output}"
            if code and not self._is_told(damage, output) and command[0] != "cache":
                return "FAULT", f"{command[0]}: exit {code} without file or remedy\n{output}"
            refused = code != 0
            said += output if code or (command[0] != "report" and _AGAIN.search(output)) else ""
            if command[0] == "report" and code == 0 and (wrong := self._differs(damage, noted["shown"], output)):
                return "FAULT", f"report shows something else: {wrong}\n{output}"
        if refused or f"is gone, nothing needs it: {self.run / damage.path}" in output:
            return "detected", said
        if (now := facts(self.run)) != noted["facts"]:
            changed = sorted(k for k in {*now, *noted["facts"]} if now.get(k) != noted["facts"].get(k))
            return "FAULT", f"exit 0, but other results: {', '.join(changed)}\n{said}"
        return ("recovered" if said else "no effect"), said

    def _is_told(self, damage: Damage, output: str) -> bool:
        path = self.run / damage.path
        near = (path.name, str(path.parent.relative_to(self.work)), *self._stage_of(damage))
        return "  do:  " in output and any(name in output for name in near)

    def _stage_of(self, damage: Damage) -> list[str]:
        match = re.match(r"stages/\d+-(\w+)", damage.path)
        return [f"'{match[1]}'", match[0]] if match else []

    def _differs(self, damage: Damage, before: str, now: str) -> str:
        """The part of what `mtkd report --json` shows that differs.

        What it says it left out is no difference, nor that fewer stages are finished where a stage or its DONE is gone.
        """
        old, new = _json_of(before), _json_of(now)
        if new is None or new["problems"] != (old or {})["problems"]:
            return "" if new else "no JSON"
        if not damage.state.endswith("-finished") and re.fullmatch(r"stages(/[^/]+(/DONE)?)?", damage.path):
            return ""
        return next((key for key in ("models", "comparisons", "headline") if new[key] != (old or {})[key]), "")

    def _shown(self) -> str:
        return self._command("report", str(self.run), "--json")[1]

    def _command(self, *arguments: str, point: str = "", report: bool = True) -> tuple[int, str]:
        environment = {"MTKD_TEST_KILL_AT": point, "HF_HUB_OFFLINE": "1"}
        log = self.folder / "log"
        log.mkdir(exist_ok=True)
        command = processes.start(
            log, *arguments, environment=environment, report=report, prepare=None if self.draws else count_no_memory
        )
        command.process.join(self.limit)
        if command.process.exitcode is None:
            command.process.kill()
            return 124, f"no end within {self.limit} s\n{command.output}"
        output = command.output
        with suppress(OSError):
            command.file.unlink()
        return command.process.exitcode, output


def _json_of(output: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        found = json.loads(output[output.index("{\n") :])
        return found if isinstance(found, dict) else None
    return None
