"""The report of a made-up run directory: its numbers are the files' numbers, its text is text, and gaps are gaps."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from mtkd.engine.record import write_record
from mtkd.errors import DataError
from mtkd.evaluate.report import summary, terminal_tables, write_report
from mtkd.evaluate.report.html import caches_table, calibration_table, stages_table
from mtkd.evaluate.report.read import read_run
from mtkd.evaluate.report.wording import count_text, p_text, seconds_text, sentence, signed_text, value_text

STAGES = {
    "prose-teacher": ("finetune", 400, 5_347_328, [], 5.1),
    "code-teacher": ("finetune", 400, 4_200_960, [], 4.9),
    "assistant": ("distill", 300, 2_360_832, ["prose-teacher", "code-teacher"], 5.0),
    "student": ("distill", 300, 918_784, ["assistant", "prose-teacher", "code-teacher"], 5.2),
    "student-labels": ("finetune", 300, 918_784, [], 5.4),
    "student-labels-equal-time": ("finetune", 471, 918_784, [], 5.3),
}
HOSTILE = "<script>alert('x')</script>"


def metric_lines(name: str, *, steps: int, teachers: list[str], final: float) -> list[dict[str, Any]]:
    random = np.random.default_rng(len(name))
    lines: list[dict[str, Any]] = []
    for step in [1, *range(10, steps + 1, 10)]:
        loss = final + 3.2 * math.exp(-step / 80) + 0.04 * random.normal()
        line = {"stage": name, "step": step, "time": 1.7e9 + step, "loss": loss, "lr": 5e-4, "grad_norm": 1.1}
        line |= {"seconds": 0.2 * step, "tokens": 2048 * step, "something/new": "tolerated"}
        if teachers:
            raw = np.exp(0.4 * np.arange(len(teachers)) * step / steps + 0.05 * random.normal(size=len(teachers)))
            weights = raw / raw.sum()
            line |= {f"weight/{t}": float(w) for t, w in zip(teachers, weights, strict=True)}
            line |= {"weight_entropy": float(-np.sum(weights * np.log(weights))), "row/0:logits:kl": 2.1}
        lines.append(line)
        if step % 100 == 0 or step == steps:
            lines.append({"stage": name, "step": step, "time": 1.7e9, "validation/loss": loss + 0.1})
    return lines


def comparison(candidate: str, baseline: str, domain: str, difference: float, p: float, better: bool | None) -> dict:
    return {
        "candidate": candidate,
        "baseline": baseline,
        "metric": "bits_per_byte",
        "domain": domain,
        "candidate_value": 2.6172 + difference,
        "baseline_value": 2.6172,
        "difference": difference,
        "low": difference - 0.0123,
        "high": difference + 0.0117,
        "confidence": 0.95,
        "p": p,
        "p_holm": min(1.0, 6 * p),
        "test": "permutation",
        "n": 214,
        "better": better,
    }


def comparisons() -> list[dict]:
    rows = []
    for baseline, shift in (("student-labels", 0.0), ("student-labels-equal-time", 0.06)):
        for domain, gap in (("overall", -0.0913), ("prose", -0.0731), ("code", -0.1082)):
            gap += shift
            better = True if gap < -0.02 else None
            rows.append(comparison("student", baseline, domain, gap, 1 / 10_001 if gap < -0.02 else 0.2107, better))
    return rows


def results() -> dict[str, Any]:
    models = {}
    for i, (name, (kind, steps, parameters, _, final)) in enumerate(STAGES.items()):
        part = {
            "bits_per_byte": final / 2.1,
            "perplexity": math.exp(final),
            "documents": 214,
            "bytes": 1_234_567,
            "tokens": 345_678,
        }
        domains = {
            d: part | {"bits_per_byte": final / 2.1 + 0.1 * k - 0.07, "documents": 107}
            for k, d in enumerate(("prose", "code"))
        }
        models[name] = {
            "overall": part,
            "domains": domains,
            "parameters": parameters,
            "seconds": 80.5 + i,
            "steps": steps,
            "kind": kind,
        }
    overall = {"bits_per_byte": 2.2222, "perplexity": 101.25, "documents": 214, "bytes": 1_234_567, "tokens": 345_678}
    models["ensemble:student"] = {
        "overall": overall,
        "domains": {},
        "parameters": None,
        "seconds": None,
        "steps": None,
        "kind": "ensemble",
    }
    return {"task": "causal-lm", "split": "test", "data": "stdlib", "models": models, "comparisons": comparisons()}


def write_run(folder: Path, *, stages: int = len(STAGES), with_results: bool = True) -> Path:
    """A run with all of its files; with fewer `stages`, one that was looked at while it trained."""
    folder.mkdir(parents=True, exist_ok=True)
    planned: dict[str, Any] = {}
    for name, (kind, steps, _, teachers, _) in STAGES.items():
        planned[name] = {"kind": kind, "student": {"architecture": "llama", "layers": 2, "width": 128, "heads": 4}}
        planned[name] |= {"steps": steps, "teachers": [{"name": t, "model": {"path": f"stage:{t}"}} for t in teachers]}
    config = {"name": folder.name, "seed": 0, "data": {"stdlib": {"source": "python-stdlib"}}, "stages": planned}
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "env.json").write_text(json.dumps({"python": "3.11.2", "packages": {"torch": "2.13.0"}, "cores": 2}))
    lines = []
    for i, (name, (kind, steps, parameters, teachers, final)) in enumerate(list(STAGES.items())[:stages]):
        lines += metric_lines(name, steps=steps, teachers=teachers, final=final)
        stage = folder / "stages" / f"{i + 1:02d}-{name}"
        stage.mkdir(parents=True)
        done = {"stage": name, "kind": kind, "steps": steps, "seconds": 80.5 + i, "parameters": parameters}
        done |= {
            "tokens": 2048 * steps,
            "fingerprint": "ab12",
            "peak_memory_bytes": 1_288_490_189,
            "teachers": teachers,
        }
        (stage / "DONE").write_text(json.dumps(done))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if with_results:
        (folder / "results.json").write_text(json.dumps(results()))
    return folder


class Page(HTMLParser):
    """Tables by id as rows of (text, tooltip), text per element kind, and everything a browser would load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str]]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self._open: list[str] = []
        self._table: list[list[tuple[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.loads += [v for k, v in given.items() if k in ("src", "href", "xlink:href", "srcset", "data", "action")]
        self.handlers += [k for k in given if k.startswith("on")]
        if tag in ("meta", "br", "link", "img"):
            return
        self._open.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self._table = self.tables[given["id"].removeprefix("table-")] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append(("", given.get("title", "")))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.texts[self._open[-1]][-1] += data
        if self._open[-1] in ("td", "th"):
            text, title = self._table[-1][-1]
            self._table[-1][-1] = (text + data, title)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "quickstart")
    assert write_report(run) == run / "report.html"
    return run


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page((finished / "report.html").read_text())


def column(page: Page, table: str, heading: str, *, header: int = 0) -> list[tuple[str, str]]:
    rows = page.tables[table]
    index = [text for text, _ in rows[header]].index(heading)
    return [row[index] for row in rows[header + 1 :]]


def test_comparisons_are_those_of_the_file(page: Page):
    """Law: every number of the table is in results.json, exact in the tooltip."""
    rows = comparisons()
    assert len(page.tables["comparisons"]) == 1 + len(rows)
    for heading, key in (("difference", "difference"), ("p", "p"), ("p (Holm)", "p_holm"), ("documents", "n")):
        assert [float(title) for _, title in column(page, "comparisons", heading)] == [row[key] for row in rows]
    intervals = [title for _, title in column(page, "comparisons", "95% interval")]
    assert [tuple(map(float, t.split(", "))) for t in intervals] == [(r["low"], r["high"]) for r in rows]
    assert [text for text, _ in column(page, "comparisons", "domain")] == [r["domain"] for r in rows]
    shown = [text for text, _ in column(page, "comparisons", "difference")]
    assert [float(text.replace("−", "-")) for text in shown] == [round(r["difference"], 4) for r in rows]
    verdicts = [text for text, _ in column(page, "comparisons", "verdict")]
    assert verdicts == ["better" if r["better"] else "no difference shown" for r in rows]


def test_results_are_those_of_the_file(page: Page):
    """Law: every metric of the table is in results.json, exact in the tooltip."""
    models = results()["models"]
    table = page.tables["results"]
    assert [text for text, _ in table[0]] == ["", "overall", "prose", "code"]
    assert [row[0][0] for row in table[2:]] == list(models)
    metrics = [text for text, _ in table[1]][5:]
    assert metrics == ["bits per byte", "perplexity"] * 3
    for row, model in zip(table[2:], models.values(), strict=True):
        expected = [model["overall"], model["domains"].get("prose", {}), model["domains"].get("code", {})]
        flat = [part.get(m) for part in expected for m in ("bits_per_byte", "perplexity")]
        assert [float(title) if title else None for _, title in row[5:]] == flat
        for (text, _), value in zip(row[5:], flat, strict=True):
            assert text == "–" if value is None else float(text.replace(",", "")) == pytest.approx(value, rel=5e-3)


def test_the_best_of_each_column_is_marked(finished: Path):
    """Law: the best of each column is the extreme of the file."""
    models = results()["models"]
    parts = [[m["overall"] for m in models.values()]]
    parts += [[m["domains"][d] for m in models.values() if m["domains"]] for d in ("prose", "code")]
    lowest = [min(p[metric] for p in part) for part in parts for metric in ("bits_per_byte", "perplexity")]
    marked = re.findall(r'class="n best" title="([^"]*)"', (finished / "report.html").read_text())
    assert sorted(map(float, marked)) == sorted(lowest)


def test_stages_are_those_of_the_files(page: Page):
    """Law: stages, steps, times and sizes are those of run.yaml and DONE."""
    assert [text for text, _ in column(page, "stages", "stage")] == list(STAGES)
    assert [text for text, _ in column(page, "stages", "kind")] == [s[0] for s in STAGES.values()]
    assert [text for text, _ in column(page, "stages", "steps")] == [str(s[1]) for s in STAGES.values()]
    assert [float(title) for _, title in column(page, "stages", "parameters")] == [s[2] for s in STAGES.values()]
    assert [text for text, _ in column(page, "stages", "teachers")] == [", ".join(s[3]) or "–" for s in STAGES.values()]
    assert {text for text, _ in column(page, "stages", "status")} == {"done"}
    assert [float(title) for _, title in column(page, "stages", "time")] == [80.5 + i for i in range(len(STAGES))]
    assert {text for text, _ in column(page, "stages", "peak memory")} == {"1.20 GiB"}


def test_the_headline_claims_what_is_significant_and_no_more(page: Page):
    """Law: a claim stands in the headline only where `better` says so."""
    verdicts = [text for text in page.texts["p"] if "interval" in text and "documents)" in text]
    assert verdicts[0].startswith("student is better than student-labels: 2.526 against 2.617 bits per byte, 3.5% less")
    assert "p = 0.0001" in verdicts[0]
    assert "No difference shown" not in verdicts[0]
    assert len(verdicts) == 2
    worse = comparison("student", "labels", "overall", 0.03, 0.001, False)
    assert sentence(worse).startswith("student is worse than labels")
    unclear = comparison("student", "labels", "code", -0.03, 0.2, None)
    assert sentence(unclear).startswith("No difference shown between student and labels on code")
    assert "better" not in sentence(unclear)


def test_configuration_and_environment_are_shown(page: Page, finished: Path):
    """Law: the page holds run.yaml as it is, and env.json."""
    assert page.texts["pre"] == [(finished / "run.yaml").read_text()]
    assert list(zip(page.texts["dt"], page.texts["dd"], strict=True)) == [
        ("cores", "2"),
        ("packages.torch", "2.13.0"),
        ("python", "3.11.2"),
    ]


def test_every_figure_is_there_twice(page: Page, finished: Path):
    """Law: each figure is a PNG file and an SVG in the page."""
    expected = {"validation", "training", "weights-03", "weights-04", "differences-bits-per-byte"}
    assert {p.stem for p in (finished / "plots").glob("*.png")} == expected
    assert {i.removeprefix("figure-") for i in page.ids if i.startswith("figure-")} >= expected
    assert page.tags.count("svg") == len(expected)
    for file in (finished / "plots").glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    labels = page.texts["text"]
    assert {"prose-teacher", "code-teacher", "assistant", "training loss", "nats per target"} <= set(labels)


def test_ids_are_unique_and_every_reference_is_inside_the_page(page: Page, finished: Path):
    """Law: ids are unique, and links stay in the page."""
    assert len(set(page.ids)) == len(page.ids)
    assert page.loads
    assert {load[0] for load in page.loads} == {"#"}
    assert {load[1:] for load in page.loads} <= set(page.ids)
    clips = re.findall(r"url\(#([^)]*)\)", (finished / "report.html").read_text())
    assert clips
    assert set(clips) <= set(page.ids)


def test_nothing_is_loaded_or_run(page: Page, finished: Path):
    """Law: a browser loads nothing and runs nothing."""
    text = (finished / "report.html").read_text()
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    assert not page.handlers
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    for address in re.findall(r"[^\s<>]*https?://[^\s<>]*", text):
        assert address.startswith(("xmlns", 'xmlns:xlink="')), address


def test_names_and_configuration_are_text(tmp_path: Path):
    """Law: markup in names and configuration is shown, never read."""
    run = write_run(tmp_path / "run")
    teacher = f'$a_1$ {HOSTILE}" onload="x'
    record = run / "stages" / "04-student" / "DONE"
    done = json.loads(record.read_text())
    record.write_text(json.dumps(done | {"teachers": [teacher], "kind": HOSTILE}))
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(
            json.dumps({"stage": "student", "step": s, "loss": 1.0, f"weight/{teacher}": 0.5}) + "\n"
            for s in (301, 302)
        )
        file.write(json.dumps({"stage": HOSTILE, "step": 1, "loss": 1.0, "validation/loss": 2.0}) + "\n")
    with (run / "run.yaml").open("a") as file:
        file.write(f'plugins: ["{HOSTILE}"]\n')
    (run / "env.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    found = results()
    found["models"][HOSTILE] = found["models"].pop("student")
    found["models"][HOSTILE]["overall"][HOSTILE] = 1.0
    found["comparisons"][0] |= {"candidate": HOSTILE, "domain": HOSTILE, "test": HOSTILE}
    found["data"] = HOSTILE
    (run / "results.json").write_text(json.dumps(found))
    text = write_report(run).read_text()
    page = Page(text)
    assert "<script" not in text.lower()
    assert not {"script"} & set(page.tags)
    assert not page.handlers
    assert teacher in [text for text, _ in column(page, "stages", "teachers")]
    assert any(label.startswith("$a_1$ <script>") for label in page.texts["text"]), "the name is drawn, as text"
    assert HOSTILE in page.texts["dd"]
    assert HOSTILE in page.texts["pre"][0]


def test_the_later_line_wins_after_a_resume(tmp_path: Path):
    """Law: of two lines of one step the later one counts, in its own stage alone."""
    run = tmp_path / "run"
    run.mkdir()
    first = [{"stage": "s", "step": s, "loss": 9.0, "seconds": s, "tokens": s} for s in (10, 20, 30, 40)]
    first.insert(3, {"stage": "s", "step": 30, "validation/loss": 8.0})
    first.append({"stage": "s", "step": 40, "validation/loss": 8.0})
    again = [{"stage": "s", "step": s, "loss": 1.0, "seconds": s, "tokens": s} for s in (20, 30)]
    again.append({"stage": "s", "step": 30, "validation/loss": 2.0})
    other = [{"stage": "t", "step": 40, "loss": 5.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*first, *other, *again]))
    stage, untouched = read_run(run).stages
    assert dict(zip(stage.curves["loss"].steps, stage.curves["loss"].values, strict=True)) == {
        10: 9.0,
        20: 1.0,
        30: 1.0,
    }
    assert (stage.validation["loss"].steps, stage.validation["loss"].values) == ([30], [2.0])
    assert (stage.steps, stage.seconds) == (30, 30)
    assert untouched.curves["loss"].values == [5.0]


def test_a_repeated_validation_wins_too(tmp_path: Path):
    """Killed between the last validation and the stage's end: it is validated again, no step is trained."""
    lines = [{"stage": "s", "step": step, "validation/loss": loss} for step, loss in ((10, 3.0), (20, 2.0), (20, 1.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage,) = read_run(tmp_path).stages
    assert (stage.validation["loss"].steps, stage.validation["loss"].values) == ([10, 20], [3.0, 1.0])


def test_a_run_in_progress(tmp_path: Path):
    """Law: a run in progress is shown as far as it is, with what is missing named."""
    run = write_run(tmp_path / "run", stages=3, with_results=False)
    (run / "stages" / "03-assistant" / "DONE").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "assistant", "step": 310, "lo')  # being written just now
    text = write_report(run).read_text()
    page = Page(text)
    assert [t for t, _ in column(page, "stages", "status")] == [
        "done",
        "done",
        "running",
        "planned",
        "planned",
        "planned",
    ]
    assert [t for t, _ in column(page, "stages", "steps")][2:4] == ["300 of 300", "0 of 300"]
    assert "4 of 6 stages are not finished" in text
    assert "No comparisons yet" in text
    assert "No results yet" in text
    assert "unreadable" not in text
    assert summary(run)["state"] == "training"


@pytest.mark.parametrize("missing", ["run.yaml", "env.json", "metrics.jsonl", "results.json", "stages"])
def test_any_missing_file_leaves_a_gap(tmp_path: Path, missing: str):
    """Law: without one of its files the page is still written, and says so."""
    run = write_run(tmp_path / "run")
    shutil.rmtree(run / missing) if missing == "stages" else (run / missing).unlink()
    page = Page(write_report(run).read_text())
    expected = {"run.yaml": "There is no run.yaml.", "env.json": "There is no env.json."}
    expected |= {"metrics.jsonl": "No training metrics yet (metrics.jsonl).", "results.json": "No comparisons yet."}
    if missing in expected:
        assert expected[missing] in page.texts["p"]
    assert [text for text, _ in column(page, "stages", "stage")] == list(STAGES)
    assert terminal_tables(run)


def test_an_empty_folder_and_none(tmp_path: Path):
    """Law: an empty folder gives an empty page, no folder an error."""
    assert "No stages are known" in write_report(tmp_path).read_text()
    assert terminal_tables(tmp_path) == []
    with pytest.raises(DataError):
        write_report(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["metrics.jsonl", "results.json", "env.json"])
def test_a_pipe_is_named_and_not_waited_for(tmp_path: Path, name: str):
    """Law: a pipe in a file's place is a problem of the report, never read."""
    run = write_run(tmp_path / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    assert f"{name}: not a plain file" in read_run(run).problems


def test_lines_of_no_stage_are_left_out(tmp_path: Path):
    """A flipped bit in a name makes no stage of its own."""
    run = write_run(tmp_path / "run")
    whole = read_run(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "teache\ufffd", "step": 1, "loss": 1.0}\n')
    damaged = read_run(run)
    assert damaged.stages == whole.stages
    assert damaged.problems == [
        *whole.problems,
        "metrics.jsonl: 1 lines are of no stage of this run, and were left out",
    ]


def test_broken_files_are_named(tmp_path: Path):
    """Law: each damaged file is named on the page."""
    run = write_run(tmp_path / "run")
    (run / "results.json").write_text('{"models": ')
    (run / "run.yaml").write_text("stages: [")
    (run / "stages" / "01-prose-teacher" / "DONE").write_text("[]")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("\x00garbage\n" + lines)
    warnings = Page(write_report(run).read_text()).texts["p"]
    for file in ("results.json is not", "run.yaml is not", "DONE is not", "metrics.jsonl: 1 unreadable"):
        assert any(text.startswith(file) for text in warnings), file


def test_values_that_are_not_finite(tmp_path: Path):
    """Law: NaN and infinity are shown as gaps and signs, and are null in JSON."""
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in ((310, "NaN"), (320, "null"), (330, "Infinity")):
            file.write(f'{{"stage": "student", "step": {step}, "loss": {loss}, "weight/assistant": {loss}}}\n')
        file.write('{"stage": "empty", "step": 1, "loss": NaN, "validation/loss": NaN}\n')
    found = results()
    found["models"]["student"]["overall"] |= {"bits_per_byte": math.nan, "perplexity": math.inf}
    for key in ("candidate_value", "difference", "low", "high"):
        found["comparisons"][0][key] = math.nan
    found["comparisons"][0] |= {"p": 1.0, "p_holm": None, "better": None}
    (run / "results.json").write_text(json.dumps(found))
    page = Page(write_report(run).read_text())
    assert "stage student: 3 logged values of loss are not finite" in page.texts["p"]
    row = next(row for row in page.tables["results"] if row[0][0] == "student")
    assert [text for text, _ in row[5:7]] == ["–", "∞"]
    assert column(page, "comparisons", "difference")[0][0] == "–"
    assert column(page, "comparisons", "verdict")[0][0] == "no difference shown"
    strict = summary(run)
    assert json.loads(json.dumps(strict, allow_nan=False))["models"]["student"]["overall"]["perplexity"] is None
    assert terminal_tables(run)


def test_classification_without_domains(tmp_path: Path):
    """Law: the columns are the metrics of the file, the best by their own direction."""
    run = write_run(tmp_path / "run")
    models = {
        "student": {
            "overall": {"accuracy": 0.9123, "f1": 0.9, "matthews": 0.8, "documents": 872},
            "domains": {},
            "kind": "distill",
        },
        "labels": {
            "overall": {"accuracy": 0.8874, "f1": 0.91, "matthews": 0.7, "documents": 872},
            "domains": {},
            "kind": "finetune",
        },
    }
    (run / "results.json").write_text(json.dumps({"task": "classify", "models": models, "comparisons": []}))
    text = write_report(run).read_text()
    page = Page(text)
    assert [t for t, _ in page.tables["results"][0]][5:] == ["accuracy", "F1", "Matthews"]
    assert [t for t, _ in column(page, "results", "accuracy")] == ["0.9123", "0.8874"]
    best = re.findall(r'class="n best" title="([^"]*)"', text)
    assert best == ["0.9123", "0.8", "0.91"]
    assert any("no comparisons were asked for" in p for p in page.texts["p"])


def test_summary_carries_the_files(finished: Path):
    """Law: the summary's numbers are those of the files."""
    found = summary(finished)
    assert (found["run"], found["state"]) == ("quickstart", "done")
    assert found["models"] == results()["models"]
    assert found["comparisons"] == comparisons()
    assert [s["name"] for s in found["stages"]] == list(STAGES)
    student = found["stages"][3]
    assert (student["steps"], student["parameters"], student["status"]) == (300, 918_784, "done")
    assert set(student["weights"]) == set(STAGES["student"][3])
    assert sum(student["weights"].values()) == pytest.approx(1)
    assert len(found["headline"]) == 2


def rendered(run: Path, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    for table in terminal_tables(run):
        console.print(table)
    return console.export_text()


def test_terminal_tables_show_the_numbers(finished: Path):
    """Law: the terminal has the page's numbers."""
    text = rendered(finished, 200)
    assert [table.title for table in terminal_tables(finished)] == ["Stages", "Results", "Comparisons", None]
    for expected in ("ensemble:student", "2.222", "−0.0913", "[−0.1036, −0.0796]", "no difference shown", "918.784"):
        assert (expected in text) == (expected != "918.784"), expected
    assert "student is better than student-labels" in text


def test_brackets_in_names_are_not_markup(tmp_path: Path):
    """Law: rich's markup in names is text."""
    run = write_run(tmp_path / "run")
    record = run / "stages" / "03-assistant" / "DONE"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"teachers": ["[red]loud[/red]", "[/]"]}))
    assert "[red]loud[/red], [/]" in rendered(run, 250)


def test_the_page_is_the_same_twice(finished: Path):
    """Law: equal files give equal pages, byte by byte."""
    page = (finished / "report.html").read_text()
    assert write_report(finished).read_text() == page
    assert [path.name for path in finished.glob(".*")] == [".report.json"]  # nothing else stays


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (value_text(2.61724), "2.617"),
        (value_text(0.91234), "0.9123"),
        (value_text(0.0123456), "0.01235"),
        (value_text(1234.5), "1,234"),
        (value_text(-0.5), "−0.5000"),
        (value_text(None), "–"),
        (signed_text(0.00012345), "+0.00012"),
        (signed_text(-1.23456), "−1.2346"),
        (p_text(1 / 10_001), "0.0001"),
        (p_text(1 / 100_001), "1e-05"),
        (p_text(0.04871), "0.0487"),
        (p_text(0.5), "0.50"),
        (count_text(5_347_328), "5.35 M"),
        (count_text(9_999), "9,999"),
        (seconds_text(3725), "1 h 02 min"),
        (seconds_text(59.96), "60.0 s"),
        (seconds_text(80.5), "1 min 20 s"),
    ],
)
def test_numbers_in_words(text: str, expected: str):
    """Law: each kind of number has one form."""
    assert text == expected


def test_a_cache_stage_shows_what_it_holds_not_steps(tmp_path: Path):
    """Law: a cache stage shows its caches, and no optimizer steps."""
    facts = {
        "examples": 48,
        "shards": 5,
        "positions": 1234,
        "bytes": 3 * 2**20,
        "bytes_per_position": 60.5,
        "kl": 0.012,
    }
    record = {"stage": "cache", "kind": "cache", "steps": 5, "teachers": ["a"], "caches": {"a": facts}}
    folder = tmp_path / "stages" / "01-cache"
    folder.mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("name: r\nstages: {cache: {kind: cache}}\n")
    line = {"stage": "cache", "step": 5, "seconds": 1.0, "examples": 48}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_run(tmp_path).stages[0].steps is None
    (folder / "DONE").write_text(json.dumps(record))
    (stage,) = read_run(tmp_path).stages
    row = dict(zip((table := stages_table([stage])).header, table.rows[0], strict=True))
    assert row["steps"].text == "–"
    made = caches_table([stage])
    assert made is not None
    assert [cell.text for cell in made.rows[0]] == ["cache/a", "48", "1,234", "3 MiB", "60.50", "0.01200"]
    assert caches_table([]) is None
    assert summary(tmp_path)["stages"][0]["caches"]["a"]["kl"] == 0.012
    assert [table.title for table in terminal_tables(tmp_path)] == ["Stages", "Caches"]
    assert "cache/a" in write_report(tmp_path).read_text()


def test_calibrated_teachers_are_shown(tmp_path: Path) -> None:
    """Law: the table has the record's numbers, before -> after; a stage with them has a reliability diagram."""
    run = tmp_path / "calibrated"
    stage = run / "stages" / "01-student"
    stage.mkdir(parents=True)
    (run / "run.yaml").write_text("name: calibrated\nstages: {student: {kind: distill, teachers: [a, b]}}\n")
    before = {"confidence": 0.21, "accuracy": 0.7, "cross_entropy": 1.88, "ece": 0.49, "bins": [[0.21, 0.7, 90]]}
    after = {"confidence": 0.72, "accuracy": 0.7, "cross_entropy": 0.92, "ece": 0.03, "bins": [[0.72, 0.7, 90]]}
    fit = {"key": "k", "temperature": 0.38, "bias": [], "labels": 1000, "data": "x", "split": "validation"}
    facts = {**fit, "before": before, "after": after}
    write_record(stage / "calibration.json", {"teachers": {"a": facts, HOSTILE: facts}})
    page = write_report(run).read_text()
    assert (run / "plots" / "reliability-01.png").exists()
    assert "<script>" not in page
    table = calibration_table(read_run(run).stages)
    assert table is not None
    texts = [cell.text for cell in table.rows[0]]
    assert texts[:2] == ["student/a", "0.3800"]
    assert "0.2100 → 0.7200" in texts
    assert "1.880 → 0.9200" in texts
    assert calibration_table([]) is None
    assert any("Calibration" in str(each.title) for each in terminal_tables(run))
