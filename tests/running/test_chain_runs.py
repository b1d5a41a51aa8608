"""Whole chains: killed and restarted until done (F19, F30), a changed rung redone with what depends on it alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import processes
import pytest
from chain_runs import DGKD, RUN, TAKD, copied, count_events, dgkd_file, outcome, stage_folder, takd_file
from tiny_run import NAME, STUDENT_STEPS, with_teacher

from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.evaluate.report.read import read_run
from mtkd.planning.plan import plan

pytestmark = [pytest.mark.xdist_group("chains"), pytest.mark.slow]

KILLS = 5


@pytest.fixture(scope="module")
def takd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    return finished(tmp_path_factory.mktemp("takd"), takd_file)


@pytest.fixture(scope="module")
def dgkd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    return finished(tmp_path_factory.mktemp("dgkd"), dgkd_file)


def finished(folder: Path, write: Callable[[Path], Path]) -> tuple[Path, int]:
    """The folder of an undisturbed run, and its number of events."""
    counter = str(folder / "events")
    code, output = processes.run(folder, "run", str(write(folder)), prepare=partial(count_events, counter))
    assert code == 0, output
    return folder, int(Path(counter).read_text())


@pytest.mark.parametrize(("write", "names"), [(takd_file, TAKD), (dgkd_file, DGKD)], ids=["takd", "dgkd"])
def test_a_chain_killed_at_random_points_ends_bitwise_equal(
    request: pytest.FixtureRequest, tmp_path: Path, write: Callable[[Path], Path], names: tuple[str, ...]
) -> None:
    """F30 with five kills."""
    undisturbed_folder, events = request.getfixturevalue("takd" if write is takd_file else "dgkd")
    chance = random.Random(names[-2])
    file, made = str(write(tmp_path)), 0
    for _ in range(KILLS):
        at = chance.randint(events // 10, events // KILLS)
        prepare = partial(count_events, str(tmp_path / "events"), at)
        code, output = processes.run(tmp_path, "run", file, prepare=prepare)
        assert code == -9, output
        done = len(list((tmp_path / RUN / "stages").glob("*/DONE")))
        assert done >= made, "a finished stage was made again"
        made = done
    assert 0 < made < len(names)
    code, output = processes.run(tmp_path, "resume", str(tmp_path / RUN))
    assert code == 0, output
    assert output.count("skipped") >= made
    assert outcome(tmp_path, names) == outcome(undisturbed_folder, names)


def test_a_kill_between_export_and_done(tmp_path: Path, whole: Path) -> None:
    """F19: the first rerun ends with the identical model, the second one does nothing."""
    file = str(with_teacher(whole, tmp_path))
    student = tmp_path / RUN / "stages" / "02-student"
    code, output = processes.run(
        tmp_path, "run", file, environment={"MTKD_TEST_KILL_AT": f"before-done@{STUDENT_STEPS}"}
    )
    assert code == -9, output
    assert (student / "export" / "MANIFEST.json").exists()
    assert not (student / "DONE").exists()
    code, output = processes.run(tmp_path, "run", file)
    assert (code, f"resumed at step {STUDENT_STEPS}" in output) == (0, True), output
    for path in (whole / f"runs/{NAME}/stages/02-student/export").iterdir():
        assert (student / "export" / path.name).read_bytes() == path.read_bytes()
    before = contents(tmp_path)
    code, output = processes.run(tmp_path, "run", file)
    assert (code, output.count("skipped")) == (0, 2), output
    assert contents(tmp_path) == before


def contents(folder: Path, *stages: str) -> dict[Path, tuple[int, bytes]]:
    """Every file of the run's stages (or of some), with its time of change."""
    places = [stage_folder(folder, name) for name in stages] or [folder / RUN / "stages"]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_changed_rung_is_redone_with_what_depends_on_it_alone(takd: tuple[Path, int], tmp_path: Path) -> None:
    copied(takd[0], tmp_path)
    kept = contents(tmp_path, "teacher", "assistant-1", "direct")
    changed = str(takd_file(tmp_path, overrides={"assistant-2": {"optimizer": {"lr": 0.02}}}))
    advice = ("stage.optimizer.lr: 0.01 -> 0.02", "mtkd run FILE --redo assistant-2\n")
    processes.assert_refused(tmp_path, ("run", changed), 3, *advice)
    processes.assert_refused(tmp_path, ("run", changed, "--redo", "assistant-9"), 2, "did you mean 'assistant-")
    command = ("run", changed, "--redo", "assistant-2")
    code, output = processes.run(tmp_path, *command, environment={"MTKD_TEST_KILL_AT": "while-forgetting"})
    assert code == -9, output
    assert len(list((tmp_path / RUN / "stages").glob("[0-9]*"))) == len(TAKD) - 1  # the student's went first
    code, output = processes.run(tmp_path, *command)
    assert code == 0, output
    made = [name for name in TAKD if f"stage {name}: distill" in output]
    assert made == ["assistant-2", "assistant-3", "student"]
    assert contents(tmp_path, "teacher", "assistant-1", "direct") == kept
    assert len(list((tmp_path / RUN / "stages").iterdir())) == len(TAKD)  # nothing half is left behind
    records = {stage.name: stage.curves["loss"].steps for stage in read_run(tmp_path / RUN).stages}
    assert set(map(tuple, (records[name] for name in TAKD[1:]))) == {(1, 2, 4)}
    lines = [line["stage"] for line in read_jsonl(tmp_path / RUN / "metrics.jsonl") if "loss" in line]
    assert {name: lines.count(name) for name in made} == dict.fromkeys(made, 3)  # none of the stage before
    code, output = processes.run(tmp_path, "run", changed)
    assert (code, output.count("skipped")) == (0, len(TAKD)), output


def test_a_change_of_several_stages_is_told_at_once(takd: tuple[Path, int], tmp_path: Path) -> None:
    """The student's settings are the control's too; what goes with an earlier stage is not named."""
    copied(takd[0], tmp_path)
    changed = str(takd_file(tmp_path, overrides={"student": {"seed": 5}, "assistant-3": {"seed": 5}}))
    processes.assert_refused(tmp_path, ("run", changed), 3, "mtkd run FILE --redo assistant-3 --redo direct\n")


def test_redone_without_a_change_it_is_the_same_again(takd: tuple[Path, int], tmp_path: Path) -> None:
    copied(takd[0], tmp_path)
    kept = contents(tmp_path, "teacher", "assistant-1", "assistant-2", "assistant-3", "student")
    code, output = processes.run(tmp_path, "resume", str(tmp_path / RUN), "--redo", "direct")
    assert (code, output.count("skipped"), "stage direct: distill" in output) == (0, len(TAKD) - 1, True), output
    assert outcome(tmp_path, TAKD) == outcome(takd[0], TAKD)
    assert contents(tmp_path, "teacher", "assistant-1", "assistant-2", "assistant-3", "student") == kept


def test_a_finished_stage_is_found_whatever_its_number(takd: tuple[Path, int], tmp_path: Path) -> None:
    """A rung is put between others, and a stage before all: nothing that is done is lost."""
    copied(takd[0], tmp_path)
    file = takd_file(tmp_path)
    first = load_config(file)
    chain = first.chain
    assert chain is not None
    names = ("assistant-1", "assistant-2", "assistant-3")
    rungs = [{"name": n, **r.model_dump(exclude_none=True)} for n, r in zip(names, chain.rungs, strict=True)]
    rungs.insert(2, {"name": "between", "layers": 1, "width": 14, "heads": 2})
    values = first.model_dump(mode="json", exclude_unset=True)
    early = {"early": {**values["stages"]["teacher"], "seed": 1}}
    config = load_config(takd_file(tmp_path, rungs=rungs)).model_copy()
    config = type(config).model_validate(
        {
            **config.model_dump(mode="json", exclude_unset=True),
            "stages": {**early, "teacher": values["stages"]["teacher"]},
        }
    )
    config._base = first.base
    states = {stage.name: stage.state for stage in plan(config).stages}
    assert states == {
        "early": "to do",
        "teacher": "done, skipped",
        "assistant-1": "done, skipped",
        "assistant-2": "done, skipped",
        "between": "to do",
        "assistant-3": "done, but differs",
        "student": "done, but assistant-3 is not",
        "direct": "done, skipped",
    }


def test_status_and_report_see_the_stages_of_a_chain(dgkd: tuple[Path, int]) -> None:
    folder = dgkd[0]
    code, output = processes.run(folder, "status", str(folder / RUN), "--json")
    assert code == 0, output
    assert [stage["state"] for stage in json.loads(output)["stages"]] == ["done"] * len(DGKD)
    assert [stage.name for stage in read_run(folder / RUN).stages] == list(DGKD)
