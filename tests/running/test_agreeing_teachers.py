"""How far the teachers of a stage agree: measured once, the same of caches as of the teachers, and no bit changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cache_runs
import numpy as np
import pytest
from tiny_run import EPOCH_STEPS, NAME

import mtkd
from mtkd.config import BatchConfig, teacher_config
from mtkd.config.read import load_config
from mtkd.data.split import Split
from mtkd.engine.jsonlines import read_jsonl
from mtkd.evaluate.report.wording import agreement_text
from mtkd.running import consensus, foretell
from mtkd.running import run as running
from mtkd.running.foretell import agreements


@pytest.fixture(autouse=True)
def _at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consensus, "_SHARE", 1.0)


def config(folder: Path, classes: bool = False, **evaluate: Any) -> Any:
    values = (cache_runs.class_values if classes else cache_runs.values)(
        folder, cache=cache_runs.EXACT, student={"steps": EPOCH_STEPS}
    )
    if classes:
        values["stages"]["cache"]["cache"] = {}
    values["evaluate"] |= evaluate
    return load_config(cache_runs.write(folder, values))


def losses(folder: Path) -> list[tuple[str, float]]:
    return [
        (line["stage"], line["loss"]) for line in read_jsonl(folder / "runs" / NAME / "metrics.jsonl") if "loss" in line
    ]


@pytest.mark.parametrize("classes", [False, True])
def test_cached_as_live_and_no_bit_changes(
    classes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "judge", lambda context: {})
    done = mtkd.run(config(tmp_path / "with", classes)).stages
    cached, live = done["student"]["agreement"], done["live"]["agreement"]
    assert live["teachers"] == ["teacher", "other"]
    assert cached["cases"] == live["cases"] == (48 if classes else done["live"]["tokens"])  # both saw every text once
    assert cached["same"] == pytest.approx(live["same"], abs=0.01)
    assert cached["divergence"]["teacher, other"] == pytest.approx(
        live["divergence"]["teacher, other"], rel=0.02, abs=1e-5
    )
    assert "teacher" not in json.dumps(done["teacher"].get("agreement", {}))  # it has none itself
    assert capsys.readouterr().err.count("these teachers agree in") == 2
    assert "agreement" not in mtkd.run(config(tmp_path / "without", classes, agreement=False)).stages["live"]
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_resumed_stage_does_not_measure_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "judge", lambda context: {})
    first = mtkd.run(config(tmp_path)).stages["live"]["agreement"]
    stage = next((tmp_path / "runs" / NAME / "stages").glob("*-live"))
    (stage / "DONE").unlink()

    def again(*_: Any) -> Any:
        raise AssertionError("measured twice")

    monkeypatch.setattr(consensus, "_measured", again)
    assert mtkd.run(config(tmp_path)).stages["live"]["agreement"] == first


def test_it_costs_a_share_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teachers read one text of a hundred that the stage shows them, at most 256."""
    monkeypatch.undo()

    class Texts:
        lengths = np.full(10_000, 50)

        def __len__(self) -> int:
            return 10_000

    split: Split = Texts()  # type: ignore[assignment]
    for steps, batch, texts in (
        (100, {"sequences": 20}, 20),
        (10**6, {"sequences": 20}, 256),
        (100, {"tokens": 1000}, 20),
    ):
        assert len(consensus._texts(split, BatchConfig(**batch), steps)) == texts


@pytest.mark.parametrize("classes", [False, True])
def test_the_plan_foretells_what_the_stage_finds(
    classes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run it says what is missing, after it the same as the stages themselves, and nothing is written."""
    monkeypatch.setattr(running, "judge", lambda context: {})
    assert "before stage 'teacher' is done" in agreements(config(tmp_path, classes))["live"]
    assert not (tmp_path / "runs").exists()
    asked = config(tmp_path, classes)
    done = mtkd.run(asked).stages
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = agreements(asked)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert found == {name: agreement_text(done[name]["agreement"]) for name in found}
    assert {"live", "student"} <= found.keys()


def test_offloaded_and_calibrated_teachers_are_asked_where_nothing_is_written() -> None:
    values = {"model": {"path": "somewhere"}, "name": "a", "calibrate": True, "backend": "offload", "other": "none"}
    asked = foretell._here(teacher_config(values))
    assert (asked.backend, asked.calibrate, asked.name, asked.others) == ("resident", None, "a", ("none",))
    assert foretell._here(teacher_config({**values, "calibrate": 0.5})).calibrate is not None
