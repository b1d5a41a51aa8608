"""The ladder of a chain in the report: its numbers from the files, written out again by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtkd.evaluate.report import summary, terminal_tables, write_report
from mtkd.evaluate.report.ladder import Ladder, ladder_table, read_ladder
from mtkd.evaluate.report.read import read_run

SCORES = {"top": 2.0, "assistant-1": 2.5, "assistant-2": 3.2, "student": 4.0, "direct": 4.4}
SECONDS = {"top": 100.0, "assistant-1": 20.0, "assistant-2": 7.0, "student": 3.0, "direct": 5.0}
TEACHERS = {
    "assistant-1": ["top"],
    "assistant-2": ["assistant-1"],
    "student": ["assistant-2"],
    "direct": ["top"],
}


def write_chain(folder: Path, metric: str = "bits_per_byte", task: str = "causal-lm", **chain: Any) -> Path:
    model = {"architecture": "llama", "layers": 1, "width": 16, "heads": 2}
    written = {"mode": "takd", "teachers": ["stage:top"], "student": model, "num_rungs": 2, "steps": 5, **chain}
    stages = {name: {"kind": "distill", "teachers": [f"stage:{t}" for t in TEACHERS.get(name, [])]} for name in SCORES}
    (folder / "run.yaml").write_text(yaml.safe_dump({"name": "c", "stages": stages, "chain": written}, sort_keys=False))
    for i, name in enumerate(SCORES, 1):
        stage = folder / "stages" / f"{i:02d}-{name}"
        stage.mkdir(parents=True)
        done = {"seconds": SECONDS[name], "parameters": 1000 * i, "steps": 5, "teachers": TEACHERS.get(name, [])}
        (stage / "DONE").write_text(json.dumps(done))
    higher = metric == "accuracy"
    scores = {name: 1 / score if higher else score for name, score in SCORES.items()}
    row = {"candidate": "student", "baseline": "direct", "metric": metric, "domain": "overall", "p": 0.002}
    row |= {"difference": scores["student"] - scores["direct"], "p_holm": 0.004, "better": True, "confidence": 0.95}
    row |= {"candidate_value": scores["student"], "baseline_value": scores["direct"], "n": 50}
    models = {name: {"overall": {metric: score}} for name, score in scores.items()}
    results = {"task": task, "models": models, "comparisons": [row]}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def ladder_of(folder: Path) -> Ladder:
    found = read_ladder(read_run(folder))
    assert found is not None
    return found


@pytest.mark.parametrize(("metric", "task"), [("bits_per_byte", "causal-lm"), ("accuracy", "classify")])
def test_shares_times_and_gain(tmp_path: Path, metric: str, task: str) -> None:
    """The same shares where lower is better and, with 1 / score, where higher is."""
    ladder = ladder_of(write_chain(tmp_path, metric, task))
    rungs = {rung.name: rung for rung in ladder.rungs}
    assert (list(rungs), ladder.metric) == (list(SCORES), metric)
    assert {name: rung.kept for name, rung in rungs.items()} == pytest.approx(
        {"top": 1.0, "assistant-1": 0.8, "assistant-2": 0.625, "student": 0.5, "direct": 2.0 / 4.4}
    )
    assert {name: rung.all_seconds for name, rung in rungs.items()} == {
        "top": None,
        "assistant-1": 20.0,
        "assistant-2": 27.0,
        "student": 30.0,
        "direct": 5.0,
    }
    gain = 4.4 - 4.0 if metric == "bits_per_byte" else 1 / 4.0 - 1 / 4.4
    assert rungs["student"].gain == pytest.approx(gain)
    assert (rungs["student"].p, rungs["student"].word, rungs["student"].parameters) == (0.004, "better", 4000)
    assert rungs["assistant-1"].gain is None


def test_page_terminal_and_json_show_it(tmp_path: Path) -> None:
    """Law: page, terminal and JSON have the same ladder."""
    run = write_chain(tmp_path)
    page = write_report(run).read_text()
    assert page.count('id="table-ladder"') == 1
    assert "top's score / score" in page.replace("&#39;", "'")
    assert "bits per byte better than direct" in page
    (ladder,) = [table for table in terminal_tables(run) if table.title == "Ladder"]
    assert next(iter(ladder.columns[0].cells)).plain == "top"
    found = summary(run)["ladder"]
    assert json.loads(json.dumps(found))["rungs"][3]["kept"] == 0.5
    assert ladder_table(ladder_of(run)).rows[3][4].text == "50.0%"


def test_several_teachers_are_held_as_their_ensemble(tmp_path: Path) -> None:
    """Law: shares are of the teachers' ensemble where it is scored."""
    run = write_chain(tmp_path, teachers=["stage:top", "somewhere/else"])
    results = json.loads((run / "results.json").read_text())
    results["models"]["ensemble:assistant-1"] = {"overall": {"bits_per_byte": 1.6}}
    (run / "results.json").write_text(json.dumps(results))
    ladder = ladder_of(run)
    assert [rung.name for rung in ladder.rungs][:3] == ["top", "ensemble:assistant-1", "assistant-1"]
    assert [rung.kept for rung in ladder.rungs][:3] == pytest.approx([0.8, 1.0, 0.64])


def test_before_the_results_there_are_gaps(tmp_path: Path) -> None:
    """Law: a missing score is a gap, not an error."""
    run = write_chain(tmp_path)
    (run / "results.json").unlink()
    rungs = ladder_of(run).rungs
    assert [(rung.score, rung.kept, rung.gain, rung.p) for rung in rungs] == [(None,) * 4] * 5
    assert "–" in ladder_table(ladder_of(run)).rows[0][3].text
    write_report(run)


def test_no_chain_no_ladder(tmp_path: Path) -> None:
    """Law: a run without a readable chain has no ladder."""
    run = write_chain(tmp_path, mode="another")
    assert read_ladder(read_run(run)) is None
    assert 'id="ladder"' not in write_report(run).read_text()
    assert summary(run)["ladder"] is None
