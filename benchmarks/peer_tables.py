"""From the measurements of benchmarks/peers.py to the tables of benchmarks/README.md and the plot.

A figure is the best over rounds and both settings of THP_MEM_ALLOC_ENABLE, on every side alike; the step table shows
both settings. Times are the best round's median (steps) or least (losses); memory the least. Ratios of things that
share a process (slope, floor, cache) are medians over rounds and settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
AGREE = 1e-4
"""First-step losses differ by no more than this, relative, where two arms do the same work."""

Line = dict[str, Any]


class Found:
    """The results of one part; what failed stands apart."""

    def __init__(self, lines: Iterable[Line], part: str) -> None:
        mine = [line for line in lines if line["part"] == part]
        self.lines = [line for line in mine if "result" in line]
        done = {line["key"] for line in self.lines}
        self.failed = {line["arm"]: line["failed"] for line in mine if "failed" in line and line["key"] not in done}

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(line["arm"] for line in self.lines))

    def values(self, arm: str, key: str, huge: str = "") -> list[float]:
        chosen = [x for x in self.lines if x["arm"] == arm and huge in ("", x["huge"])]
        return [line["result"][key] for line in chosen if key in line["result"]]

    def best(self, arm: str, key: str, huge: str = "") -> float:
        """The least value; infinity when there is none."""
        return min(self.values(arm, key, huge), default=float("inf"))

    def same_work(self, arms: Sequence[str], reference: str) -> list[str]:
        """Those of `arms` whose first loss agrees with the reference's."""
        ours = self.best(reference, "first_loss")
        return [a for a in arms if self.values(a, "first_loss") and _agrees(self.best(a, "first_loss"), ours)]

    def notes(self, arms: Sequence[str], reference: str) -> list[str]:
        same = self.same_work(arms, reference)
        other = [a for a in arms if self.values(a, "first_loss") and a not in same]
        lines = [f"`{a}` does other work: first loss {self.best(a, 'first_loss'):.6g}; not compared." for a in other]
        return lines + [f"`{arm}` did not run: {_plain(why)}" for arm, why in self.failed.items()]


def _agrees(a: float, b: float) -> bool:
    return abs(a - b) <= AGREE * abs(b)


def _plain(why: str) -> str:
    return why.replace("|", "/").replace("\n", " ")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(r) + " |" for r in (head, ["---"] * len(head), *rows)]


def _against(value: float, target: float, what: str) -> str:
    """A sentence: the value, and by how much a target is missed."""
    if value == float("inf") or value != value:
        return f"- {what}: not measured"
    verdict = "met" if value <= target else f"**missed by {100 * (value / target - 1):.0f}%**"
    return f"- {what}: **{value:.2f}** (target {target:.2f}: {verdict})"


def _middle(values: Sequence[float]) -> float:
    """Of ratios taken within one process: their median. The least one would be the luckiest, not the best."""
    return statistics.median(values) if values else float("inf")


def _ratio(a: float, b: float) -> float:
    return a / b if b and b != float("inf") else float("inf")


def step(found: Found) -> list[str]:
    """One teacher against the best of the peers' arms."""
    rows = []
    for arm in found.arms:
        for huge in ("0", "1"):
            times = sorted(found.values(arm, "seconds", huge))
            if times:
                peak, grown = found.best(arm, "peak_mb", huge), found.best(arm, "step_mb", huge)
                loss = found.best(arm, "first_loss", huge)
                spread = f"{times[0]:.3f} .. {times[-1]:.3f}"
                rows.append([arm, huge, spread, f"{peak:,.0f}", f"{grown:,.0f}", f"{loss:.6f}"])
    head = ["side", "`THP_MEM_ALLOC_ENABLE`", "s per step, lowest .. highest round"]
    lines = _table([*head, "peak memory, MB", "step memory, MB", "first loss"], rows)
    peers = found.same_work([a for a in found.arms if a != "mtkd"], "mtkd")
    ratios = {
        key: _ratio(found.best("mtkd", key), min((found.best(a, key) for a in peers), default=float("inf")))
        for key in ("seconds", "peak_mb")
    }
    lines += ["", _against(ratios["seconds"], 0.40, "time over the best peer's arm")]
    own = [a for a in peers if a.startswith("trl")]
    if own:
        best = min(found.best(a, "seconds") for a in own)
        lines.append(f"- time over TRL's best arm: {_ratio(found.best('mtkd', 'seconds'), best):.2f}")
    lines.append(_against(ratios["peak_mb"], 0.60, "peak memory over the leanest peer's arm"))
    return lines + [f"- {note}" for note in found.notes(found.arms, "mtkd")]


def teachers(found: Found) -> list[str]:
    """What a further teacher costs."""
    rows = []
    for k in range(1, 5):
        sides = [f"mtkd-{k}", f"trl-{k}"]
        agree = found.same_work(sides[1:], sides[0])
        times = [found.best("slope", f"kl_{k}"), found.best("slope", f"step_{k}"), found.best(sides[1], "seconds")]
        row = [str(k), *(_number(t, ".3f") for t in times)]
        row += [_number(found.best(side, "peak_mb"), ",.0f") for side in sides]
        rows.append([*row, "yes" if agree else "**no**" if found.values(sides[1], "first_loss") else ""])
    head = [
        "teachers",
        "mtkd KL, s per step",
        "mtkd JSD",
        "trl JSD",
        "mtkd, peak MB",
        "trl, peak MB",
        "same first loss",
    ]
    lines = [*_table(head, rows), ""]
    for loss, key in (("KL", "kl"), ("JSD", "step")):
        for name, what in (
            ("product", "the linear layers and the head as mtkd computes them"),
            ("torch", "all by torch"),
        ):
            per = [
                (x["result"][f"{key}_4"] - x["result"][f"{key}_1"]) / 3 / x["result"][f"bare_{name}"]
                for x in found.lines
                if x["arm"] == "slope"
            ]
            text = f"{loss}: time per further teacher over one bare teacher forward ({what}; in the same process)"
            lines.append(_against(_middle(per), 1.15, text))
    for side in ("mtkd", "trl"):
        first, last = found.best(f"{side}-1", "peak_mb"), found.best(f"{side}-4", "peak_mb")
        size = found.best("mtkd-1", "teacher_mb")
        if last < float("inf"):
            value = (last - first) / 3 / size
            text = f"memory per further teacher over its parameters ({size:,.0f} MB)"
            lines.append(_against(value, 1.10, text) if side == "mtkd" else f"- the same for TRL: {value:.2f}")
    return lines + [f"- `{arm}` did not run: {_plain(why)}" for arm, why in found.failed.items()]


def loss(found: Found) -> list[str]:
    """Head and divergence alone."""
    shapes = list(dict.fromkeys((x["options"]["columns"], x["options"]["positions"]) for x in found.lines))
    sides = list(dict.fromkeys(x["options"]["side"] for x in found.lines))
    rows, notes = [], []
    for v, n in sorted(shapes):
        arms = {side: f"{side}-{n}-{v}" for side in sides}
        same = found.same_work(list(arms.values()), arms["mtkd"])
        row = [f"{v:,}", f"{n:,}"]
        for arm in arms.values():
            time_, over = found.best(arm, "best"), found.best(arm, "over_mb")
            mark = "" if arm in same or time_ == float("inf") else " (other work)"
            row.append("" if time_ == float("inf") else f"{time_:.2f} s, {over:,.0f} MB{mark}")
        rows.append(row)
        peers = [a for a in same if a != arms["mtkd"]]
        if n == 1_024 and peers:
            best = min(peers, key=lambda a: found.best(a, "best"))
            ratio = _ratio(found.best(arms["mtkd"], "best"), found.best(best, "best"))
            notes.append(
                _against(ratio, 0.40, f"V = {v:,}, N = 1,024: time over the best peer (`{best.split('-1024')[0]}`)")
            )
    for v in sorted({v for v, _ in shapes}):
        few, many = (found.best(f"mtkd-{n}-{v}", "over_mb") for n in (256, 4_096))
        if many < float("inf"):
            notes.append(_against(_ratio(many, few), 1.20, f"V = {v:,}: memory of N = 4,096 over N = 256"))
    failed = [f"- `{arm}` did not run: {_plain(why)}" for arm, why in found.failed.items()]
    return [*_table(["V", "N", *sides], rows), "", *notes, *failed]


def floor(found: Found) -> list[str]:
    """The step over the sum of its parts, per measurement: parts and step share a process."""
    rows, ratios = [], {"product": [], "torch": []}
    for line in found.lines:
        r = line["result"]
        models = {"product": r["student"] + r["teacher"], "torch": r["student_torch"] + r["teacher_torch"]}
        for name, kept in ratios.items():
            kept.append(r["step"] / (models[name] + r[f"head_{name}"] + r["optimizer"]))
        pairs = [f"{1000 * r[a]:.0f} / {1000 * r[b]:.0f}" for a, b in PAIRS]
        rows.append([line["huge"], f"{1000 * r['step']:.0f}", *pairs, f"{1000 * r['optimizer']:.0f}"])
    head = ["`THP_MEM_ALLOC_ENABLE`", "step, ms", "student below the head: mtkd's products / torch's"]
    head += ["teacher below the head", "head products", "clipping and AdamW"]
    lines = [*_table(head, rows), ""]
    for name, what in (("product", "all products by the step's routines"), ("torch", "all by torch")):
        lines.append(_against(_middle(ratios[name]), 1.10, f"step over its floor, {what}"))
    return lines + [f"- `{arm}` did not run: {_plain(why)}" for arm, why in found.failed.items()]


def encoders(found: Found) -> list[str]:
    rows = []
    for arm in found.arms:
        for huge in ("0", "1"):
            times = sorted(found.values(arm, "seconds", huge))
            if times:
                spread = f"{1000 * times[0]:.0f} .. {1000 * times[-1]:.0f}"
                cells = [f"{found.best(arm, key, huge):,.0f}" for key in ("peak_mb", "step_mb")]
                rows.append([arm, huge, spread, *cells, f"{found.best(arm, 'first_loss', huge):.6f}"])
    head = ["side", "`THP_MEM_ALLOC_ENABLE`", "ms per step, lowest .. highest round", "peak MB", "step MB"]
    lines = [*_table([*head, "first loss (logits row)"], rows), ""]
    theirs = found.best("textbrewer", "seconds")
    if found.same_work(["textbrewer"], "mtkd-hidden"):
        text = "time with hidden-state matching over TextBrewer's logits alone"
        lines.append(_against(_ratio(found.best("mtkd-hidden", "seconds"), theirs), 1.0, text))
        equal = _ratio(found.best("mtkd-logits", "seconds"), theirs)
        lines.append(f"- time on logits alone over TextBrewer's, the same work: {equal:.2f}")
    return lines + [f"- {note}" for note in found.notes(found.arms, "mtkd-logits")]


def cached(found: Found) -> list[str]:
    lines = []
    per = [(x["result"]["cached"] / x["result"]["labels"], x) for x in found.lines if x["arm"] == "time"]
    for ratio, line in per:
        r = line["result"]
        lines.append(
            f"- `THP_MEM_ALLOC_ENABLE={line['huge']}`: label-only step {r['labels']:.3f} s, step from the cache of "
            f"four teachers {r['cached']:.3f} s, ratio {ratio:.2f}; {r['bytes_per_token']:.0f} bytes per token, teacher"
        )
    if per:
        lines.append(_against(_middle([ratio for ratio, _ in per]), 1.10, "cached step over the label-only step"))
    for line in found.lines:
        if line["arm"] == "quality":
            lines += ["", *_quality(line["result"])]
    return lines + [f"- `{arm}` did not run: {_plain(why)}" for arm, why in found.failed.items()]


def _quality(result: dict[str, float]) -> list[str]:
    rows = []
    kinds = ("labels", "live", "cached", "teacher")
    for kind in kinds:
        values = [v for k, v in result.items() if k.startswith(f"{kind}-")]
        if values:
            mean = sum(values) / len(values)
            rows.append([kind, str(len(values)), f"{mean:.4f}", f"{min(values):.4f} .. {max(values):.4f}"])
    if "ensemble:live-0" in result:
        rows.append(["ensemble of the four", "1", f"{result['ensemble:live-0']:.4f}", ""])
    seeds = [k.removeprefix("live-") for k in result if k.startswith("live-")]
    gaps = [result[f"cached-{s}"] - result[f"live-{s}"] for s in seeds]
    lines = _table(["model", "runs", "nats per test token, mean", "lowest .. highest"], rows)
    stored = f"{result['bytes_per_token']:.0f} bytes per token and teacher at V = 4,096, k = 50"
    kl = f", KL of the reconstruction {result['kl']:.1e} nats" if "kl" in result else ""
    return [*lines, "", f"- cached minus live, per seed: {', '.join(f'{g:+.4f}' for g in gaps)}", f"- {stored}{kl}"]


def packing(found: Found) -> list[str]:
    rows = []
    for line in found.lines:
        r = line["result"]
        for name, value in r.items():
            task, arm, key = name.split("/")
            if key == "tokens_per_second":
                share = r[f"{task}/{arm}/useful_share"]
                gain = value / r[f"{task}/padded/tokens_per_second"]
                rows.append([task, arm, f"{value:,.0f}", f"{gain:.2f}", f"{share:.0%}"])
    head = ["data", "batches", "useful tokens per second", "over padded", "useful positions before packing"]
    return [*(_table(head, rows) if rows else []), *(f"- did not run: {_plain(w)}" for w in found.failed.values())]


def _number(value: float, form: str) -> str:
    return "" if value == float("inf") else format(value, form)


PAIRS = (("student", "student_torch"), ("teacher", "teacher_torch"), ("head_product", "head_torch"))
"""Parts of the floor, as mtkd computes them and as torch does."""

TITLES = {
    "step": (step, "One step, one teacher"),
    "teachers": (teachers, "One to four teachers"),
    "loss": (loss, "Head and divergence alone (time, memory over inputs and gradients)"),
    "floor": (floor, "The step over its own floor"),
    "encoders": (encoders, "A classifier and two teachers, against TextBrewer"),
    "cached": (cached, "From the cache of four teachers"),
    "packing": (packing, "Useful tokens per second on real lengths"),
}


def tables(lines: list[Line]) -> str:
    """All parts that were measured."""
    if not lines:
        return "nothing was measured"
    facts = lines[-1]["facts"]
    versions = ", ".join(f"{k} {v}" for k, v in facts.items() if k not in ("date", "processor", "threads"))
    days = sorted({line["facts"]["date"] for line in lines})
    when = days[0] if len(days) == 1 else f"{days[0]} .. {days[-1]}"
    made = f"{when}, {facts['processor']}, {facts['threads']} threads, no GPU; {versions}; code {lines[-1]['digest']}."
    text = [made]
    for part, (make, title) in TITLES.items():
        found = Found(lines, part)
        if found.lines or found.failed:
            text += ["", f"### {title}", "", *make(found)]
    return "\n".join(text)


def write(readme: Path, text: str) -> None:
    """Put the text between the markers; at the end, with markers, where there are none."""
    whole = readme.read_text()
    if BEGIN not in whole:
        whole = f"{whole.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = whole.split(BEGIN, 1)
    readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
