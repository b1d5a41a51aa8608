"""Metrics reach every sink: metrics.jsonl and TensorBoard hold the same numbers, validation scores among them."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir
from mtkd.engine.jsonlines import VALIDATION, read_jsonl
from mtkd.running.metrics import MetricsLog


def session(run: RunDir, done: int, last: int, value: float) -> None:
    """A session that goes on from step `done`, logs each step to `last`, and a score of every second one."""
    with MetricsLog(run, "student", Dist(), done) as log:
        for step in range(done + 1, last + 1):
            log.log(step, {"loss": value, "lr": 0.5}, {"seconds": 1.5, "tokens": 8 * step})
            if step % 2 == 0:
                log.log(step, {VALIDATION + "loss": 2 * value})
        log.sync()


def curves(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of the stage."""
    events = EventAccumulator(str(run.path / "tensorboard" / "student"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(run: RunDir, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in read_jsonl(run.metrics_file) if name in line]


def test_both_sinks_have_every_step_once(tmp_path: Path) -> None:
    """Law: after a kill and a resume, each curve of TensorBoard is that of metrics.jsonl; powers of 2 are exact."""
    run = RunDir(tmp_path)
    session(run, 0, 5, 1.0)
    session(run, 3, 6, 0.25)
    found = curves(run)
    assert found["loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 0.25), (5, 0.25), (6, 0.25)]
    assert found[VALIDATION + "loss"] == [(2, 2.0), (4, 0.5), (6, 0.5)]
    assert found.keys() == {"loss", "lr", VALIDATION + "loss"}
    for name, curve in found.items():
        assert curve == lines(run, name)
