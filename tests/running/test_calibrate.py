"""Laws of calibrated teachers in whole runs: cached is live, fitted once, and refused where there is nothing to fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cache_runs
import numpy as np
import pytest
import torch
import yaml
from cache_runs import EXACT, LIVE, largest_difference
from tiny_run import tiny_config, write_yaml

import mtkd
import mtkd.running.calibrate
import mtkd.running.run
from mtkd.config import BatchConfig, CalibrateConfig, EngineConfig
from mtkd.config.read import load_config
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.data.collate import Rows
from mtkd.data.split import Documents, Split
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.errors import DataError, UserError
from mtkd.models.classes import LOW
from mtkd.models.features import DenseLogits
from mtkd.pool import BACKENDS
from mtkd.running.chance import warn_below_chance, warn_uncalibrated

NEAR = 2e-4  # as in test_cache_stage


def asked(teachers: list[dict[str, str]], calibrate: Any) -> list[dict[str, Any]]:
    return [{**teacher, "calibrate": calibrate} for teacher in teachers]


def made_of(folder: Path, made: dict[str, Any], calibrate: Any) -> Path:
    """A run whose cache and whose live stage have calibrated teachers."""
    for stage in ("cache", "live"):
        made["stages"][stage]["teachers"] = asked(LIVE, calibrate)
    return mtkd.running.run.run(cache_runs.config(folder, made)).folder


def fitted(run: Path, stage: str) -> dict[str, Any]:
    (file,) = (run / "stages").glob(f"*-{stage}/calibration.json")
    return dict(json.loads(file.read_text())["teachers"])


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of language models under ca_mkd, which reads the labels' cross entropy."""
    folder = tmp_path_factory.mktemp("calibrated")
    cache = {**EXACT, "traits": ["ce"]}
    return made_of(folder, cache_runs.values(folder, cache=cache, student={"weighting": "ca_mkd"}), True)


def test_a_student_of_calibrated_caches_is_that_of_the_calibrated_teachers(tokens: Path) -> None:
    """Law: cached == live, log-probabilities and traits alike; the cache says what was fitted."""
    assert largest_difference(tokens, "student", "live") < NEAR
    found = fitted(tokens, "live")
    assert found.keys() == {"teacher", "other"}
    (folder,) = (tokens / "stages").glob("*-cache/export/teacher")
    described = json.loads((folder / "cache.json").read_text())["origin"]["model"]["mtkd_calibration"]
    assert described == {"temperature": pytest.approx(found["teacher"]["temperature"]), "bias": []}


def test_what_is_fitted_is_better(tokens: Path) -> None:
    """Law: the cross entropy of the labels it was fitted on falls; how often the teacher is right stays."""
    for found in fitted(tokens, "live").values():
        assert found["after"]["cross_entropy"] <= found["before"]["cross_entropy"]
        assert found["after"]["accuracy"] == found["before"]["accuracy"]
        assert found["temperature"] != 1


def test_a_run_that_goes_on_does_not_fit_again(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the number of the first session stays, whatever a second fit would give; a damaged record is refused."""
    shutil.copytree(tokens.parents[1], tmp_path / "again")
    run = tmp_path / "again" / "runs" / "tiny"
    values = yaml.safe_load((tmp_path / "again" / "run.yaml").read_text())
    (tmp_path / "again" / "run.yaml").write_text(yaml.safe_dump({**values, "output": str(run.parent)}, sort_keys=False))
    before = fitted(run, "live")
    (live,) = (run / "stages").glob("*-live")
    (live / "DONE").unlink()
    monkeypatch.setattr(mtkd.running.calibrate, "fit_temperature", lambda seen: 9.0)
    config = load_config(tmp_path / "again" / "run.yaml")
    mtkd.running.run.run(config)
    assert fitted(run, "live") == before
    (live / "DONE").unlink()
    record = live / "calibration.json"
    record.write_text(record.read_text().replace('"bias": []', '"bias": [1.0]', 1))
    with pytest.raises(DataError, match="its digest differs"):
        mtkd.running.run.run(config)


def test_biases_and_classes(tmp_path: Path) -> None:
    """Law: cached == live for whole class logits with a bias per class, bit for bit."""
    made = cache_runs.class_values(tmp_path, cache={"shard_examples": 10}, student={})
    run = made_of(tmp_path, made, {"bias": True, "split": "test"})
    assert largest_difference(run, "student", "live") < 1e-6
    for found in fitted(run, "live").values():
        assert len(found["bias"]) == 3
        assert found["labels"] == 12
        assert found["split"] == "test"


@pytest.mark.parametrize(("split", "noted"), [("test", True), ("validation", False)])
def test_a_plan_says_that_a_temperature_is_fitted_on_what_is_scored(split: str, noted: bool, tmp_path: Path) -> None:
    made = cache_runs.class_values(tmp_path, cache={}, student={})
    made["evaluate"] = {**made.get("evaluate", {}), "split": "test"}
    made["stages"]["live"]["teachers"] = [*asked(LIVE[:1], {"split": split}), *asked(LIVE[1:], 0.5)]
    notes = {stage.name: " ".join(stage.notes) for stage in mtkd.plan(cache_runs.config(tmp_path, made)).stages}
    assert ("stages.live.teachers[0].calibrate: fitted on the texts that are scored" in notes["live"]) == noted
    assert "teachers[1].calibrate" not in notes["live"]
    assert "calibrate" not in notes["cache"]


def test_a_temperature_acts_on_what_the_student_learns(tmp_path: Path) -> None:
    """Law: temperature 1 is the teacher itself, bit for bit; another one makes another student."""
    run = mtkd.running.run.run(
        tiny_config(
            tmp_path,
            stages={
                "one": STUDENT | {"teachers": asked([{"model": "stage:teacher"}], 1)},
                "sharp": STUDENT | {"teachers": asked([{"model": "stage:teacher"}], 0.4)},
            },
        )
    ).folder
    assert largest_difference(run, "student", "one") == 0
    assert largest_difference(run, "student", "sharp") > 1e-3


STUDENT = {
    "kind": "distill",
    "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "dropout": 0.1},
    "method": "kd",
    "steps": 8,
    "batch": {"sequences": 8},
    "optimizer": {"lr": 1e-2},
}
REFUSED: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no split": ({"validation_share": 0, "files": {"validation": None}}, True, "no labelled validation split"),
    "no labels": ({"task": "classify", "labels": ["a", "b"], "label": "none"}, True, "no labels to calibrate on"),
    "bias of tokens": ({}, {"bias": True}, "a bias is fitted per class"),
    "numbers": ({"task": "classify", "label_kind": "number", "label": "n"}, True, "predicts a number"),
    "a number for numbers": ({"task": "classify", "label_kind": "number", "label": "n"}, 0.5, "predicts a number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused_by_the_plan(case: str, tmp_path: Path) -> None:
    """Law: at the teacher's `calibrate`, before anything is loaded."""
    data, calibrate, words = REFUSED[case]
    stages: dict[str, Any] = {"student": {"teachers": asked([{"model": "stage:teacher"}], calibrate)}}
    if "task" in data:
        stages = {
            name: {**stages.get(name, {}), "student": {"architecture": "bert"}} for name in ("teacher", "student")
        }
    write_yaml(tmp_path)
    for file in (tmp_path / "data").iterdir():
        rows = [json.loads(line) | {"n": i / 7} for i, line in enumerate(file.read_text().splitlines())]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=words) as caught:
        mtkd.plan(tiny_config(tmp_path, data={"text": data}, stages=stages))
    assert "stages.student.teachers[0].calibrate" in str(caught.value)


def test_predictions_that_nothing_reads_are_not_calibrated(tmp_path: Path) -> None:
    """Law: refused where rows compare hidden states alone; a weighting that reads predictions is enough."""
    rows = [{"feature": "hidden", "loss": "mse"}]
    student = {"method": None, "match": rows, "teachers": asked([{"model": "stage:teacher"}], True)}
    evaluate = {"ensembles": [], "comparisons": []}
    with pytest.raises(UserError, match="no row, weighting, cache or score reads the predictions"):
        mtkd.plan(tiny_config(tmp_path, stages={"student": student}, evaluate=evaluate))
    two = asked([{"model": "stage:teacher"}, {"model": "stage:teacher", "name": "twin"}], True)
    student |= {"teachers": two, "weighting": "confidence"}
    mtkd.plan(tiny_config(tmp_path, stages={"student": student}, evaluate=evaluate))


class Reader:
    """Reads another text than the data's."""

    def forward(self, batch: Batch, wants: frozenset[str]) -> dict[str, torch.Tensor]:
        raise AssertionError("the plan refuses it before it is asked")


def test_a_teacher_of_another_text_takes_a_number_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: held-out texts have no such view, so there is nothing to fit on."""
    monkeypatch.setattr(BACKENDS, "_values", dict(BACKENDS._values))  # other tests read which backends there are
    mtkd.teacher("calibrated_reader", view="other")(Reader)
    teachers = [{"backend": "calibrated_reader", "calibrate": True}]
    config = tiny_config(tmp_path, stages={"student": {"teachers": teachers}})
    with pytest.raises(UserError, match="reads the view 'other'"):
        mtkd.plan(config)


def elsewhere(folder: Path, **labelled: Any) -> dict[str, Any]:
    """A run of classes whose student learns from texts without labels, its teacher calibrated on other data."""
    made = cache_runs.class_values(folder, cache={}, student={"steps": 2, "method": None, "match": [{"loss": "kl"}]})
    text, held = made["data"]["text"], {**made["data"]["text"], **labelled}
    if held["task"] != "classify":
        del held["labels"]
    made["data"] |= {"bare": {**text, "label": "none"}, "held": held}
    teachers = asked(LIVE[:1], {"data": "held", "split": "test"})
    made["stages"] = {
        "teacher": made["stages"]["teacher"] | {"data": "text"},
        "live": made["stages"]["live"] | {"data": "bare", "teachers": teachers},
    }
    made["evaluate"] = {"data": "text", "resamples": 100}
    return made


def test_labels_may_be_elsewhere(tmp_path: Path) -> None:
    """Law: `data: NAME` is the fit on the stage's own labels, where both have the same."""
    made = elsewhere(tmp_path)
    made["stages"]["own"] = made["stages"]["live"] | {"data": "text", "teachers": asked(LIVE[:1], {"split": "test"})}
    run = mtkd.running.run.run(cache_runs.config(tmp_path, made)).folder
    (there,), (here,) = (fitted(run, stage).values() for stage in ("live", "own"))
    assert (there.pop("data"), here.pop("data")) == ("held", "text")
    assert there.pop("key") != here.pop("key")
    assert there == here
    made["data"]["held"]["limit"] = {"test": 6}
    with pytest.raises(DataError, match="teacher teacher calibration"):
        mtkd.running.run.run(cache_runs.config(tmp_path, made))


@pytest.mark.parametrize(
    ("labelled", "words"),
    [
        ({"labels": ["c", "b", "a"]}, "on the classes that it teaches, in their order"),
        ({"task": "causal-lm"}, "on labels of the task that it teaches"),
        ({"files": {"train": "train.jsonl"}}, "no labelled test split; labels: train"),
    ],
)
def test_labels_elsewhere_must_be_of_the_same_kind(labelled: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Law: the same task, the same classes in the same order, a split that is there."""
    with pytest.raises(UserError, match=words) as caught:
        mtkd.plan(cache_runs.config(tmp_path, elsewhere(tmp_path, **labelled)))
    assert "stages.live.teachers[0].calibrate" in str(caught.value)


def test_a_cache_of_another_run_is_calibrated_too(tmp_path: Path) -> None:
    """Law: named by its folder it gives what it gives under its stage's name."""
    made = cache_runs.class_values(tmp_path, cache={}, student={"steps": 2})
    made["evaluate"] = {"resamples": 100}
    cached = asked(cache_runs.CACHED, {"split": "train"})
    made["stages"]["student"]["teachers"] = cached
    del made["stages"]["live"]
    first = mtkd.running.run.run(cache_runs.config(tmp_path, made)).folder
    folders = [str(first / "stages" / "03-cache" / "export" / teacher["name"]) for teacher in cached]
    teachers = [{**teacher, "model": folder} for teacher, folder in zip(cached, folders, strict=True)]
    made |= {"name": "second", "stages": {"student": made["stages"]["student"] | {"teachers": teachers}}}
    second = mtkd.running.run.run(cache_runs.config(tmp_path, made)).folder
    found = [{name: each["temperature"] for name, each in fitted(run, "student").items()} for run in (first, second)]
    assert found[0] == found[1]


def test_a_trait_that_a_calibrated_cache_lacks_is_kept_by_calibrating_before(tmp_path: Path) -> None:
    """Law: the advice is to calibrate where the cache is made; more `traits` would not help, they are dropped."""
    made = cache_runs.values(tmp_path, cache={**EXACT, "traits": ["ce"]}, student={"weighting": "ca_mkd"})
    mtkd.plan(cache_runs.config(tmp_path, made))
    made["stages"]["student"]["teachers"] = asked(cache_runs.CACHED, 0.5)
    with pytest.raises(UserError, match="reads the trait 'ce'") as caught:
        mtkd.plan(cache_runs.config(tmp_path, made))
    assert "give `calibrate` to the teacher where the cache is made (stages.cache), not here" in str(caught.value)


def test_a_calibrated_cache_is_not_calibrated_twice(tmp_path: Path) -> None:
    """Law: refused; a cache of the teacher as it is takes a number, and a fit on its own train split alone."""
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    cached = made["stages"]["student"]["teachers"]
    made["stages"]["student"]["teachers"] = asked(cached, 0.5)
    mtkd.plan(cache_runs.config(tmp_path, made))
    made["stages"]["student"]["teachers"] = asked(cached, {"split": "train"})
    mtkd.plan(cache_runs.config(tmp_path, made))
    made["stages"]["student"]["teachers"] = asked(cached, True)
    with pytest.raises(UserError, match="has the train split of data 'text' alone"):
        mtkd.plan(cache_runs.config(tmp_path, made))
    made["stages"]["cache"]["teachers"] = asked(LIVE, 0.7)
    made["stages"]["student"]["teachers"] = asked(cached, 0.5)
    with pytest.raises(UserError, match="was made of a calibrated teacher"):
        mtkd.plan(cache_runs.config(tmp_path, made))


def test_a_cache_fitted_on_its_rows_is_the_live_teacher_fitted_there(tmp_path: Path) -> None:
    """Law: the k + 1 outcomes of a cache of all ids are the teacher's own: both fits agree, and both students."""
    made = cache_runs.values(tmp_path, cache=EXACT, student={})
    made["evaluate"] = {"resamples": 100}
    for stage in ("student", "live"):
        made["stages"][stage]["teachers"] = asked(made["stages"][stage]["teachers"], {"split": "train"})
    run = mtkd.running.run.run(cache_runs.config(tmp_path, made)).folder
    for name, found in fitted(run, "student").items():
        assert found["temperature"] == pytest.approx(fitted(run, "live")[name]["temperature"], rel=1e-3)
    assert largest_difference(run, "student", "live") < 5e-4


CLASSES = 5


def held_out(
    logits: torch.Tensor, labels: torch.Tensor, split: str = "validation", other: torch.Tensor | None = None
) -> tuple[Any, Any]:
    """(data with a split of these labels, a teacher that gives these logits [n,C], a specialist's `other` [n,1])."""

    def forward(batch: Batch, wants: frozenset[str]) -> dict[str, Any]:
        return {"logits": DenseLogits(logits[batch.keys], None if other is None else other[batch.keys])}

    def batch_of(rows: Rows) -> Batch:
        keys = torch.full((rows.num_rows,), -1)
        keys[: len(rows.indices)] = torch.tensor(list(rows.indices)).long()
        targets = torch.where(keys < 0, NO_LABEL, labels[keys])
        return Batch(keys, torch.ones(len(keys), 2).long(), torch.ones(len(keys), 2).bool(), targets)

    documents = Documents(np.arange(len(labels)), [], [], np.zeros(len(labels)))
    texts = Split(batch_of, np.full(len(labels), 2), documents, labels=labels.numpy())
    data: Any = SimpleNamespace(
        splits={split: texts},
        num_labels=logits.shape[1],
        name="text",
        task=SimpleNamespace(token_level=False),
        config=SimpleNamespace(labelled=True),
    )
    teacher: Any = SimpleNamespace(name="t", view="", num_columns=logits.shape[1], forward=forward)
    return data, teacher


def honest(count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a teacher that is as sure as it is right, and labels."""
    chance = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, CLASSES, generator=chance)
    return logits, torch.multinomial(torch.softmax(logits, -1), 1, generator=chance)[:, 0]


def look(data: Any, dist: Any = None, **asked: Any) -> mtkd.running.calibrate._Look:
    """A look at such a teacher."""
    engine = EngineConfig(kind="torch", device="cpu")
    context: Any = SimpleNamespace(
        dist=dist or Dist(), device=torch.device("cpu"), dtype=torch.float32, config=SimpleNamespace(engine=engine)
    )
    batch = BatchConfig(sequences=24, accumulate=2)
    return mtkd.running.calibrate._Look(context, data, CalibrateConfig(**asked), batch, "here")


@pytest.mark.parametrize(("scale", "word"), [(0.1, "is flat"), (1.0, ""), (4.0, "is overconfident")])
def test_a_start_says_that_a_teacher_is_flat_or_overconfident(
    scale: float, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: more than 10 points between mean confidence and accuracy on validation labels; none where it is honest."""
    logits, labels = honest()
    data, teacher = held_out(scale * logits, labels)
    found = warn_uncalibrated({"here": teacher}, data, BatchConfig(sequences=50), torch.device("cpu"), Dist())
    sure = float(torch.softmax(scale * logits, -1).max(-1).values.mean())
    assert found["t"] == pytest.approx((sure, float((logits.argmax(-1) == labels).double().mean())))
    said = capsys.readouterr().err
    assert (word in said and "here: teacher 't'" in said and "calibrate: true" in said) if word else said == ""


@pytest.mark.parametrize(
    ("right", "words"), [(True, ""), (False, "of 40 labelled train texts, less often than a guess (1 of 2)")]
)
def test_a_specialist_is_compared_with_a_guess_among_its_classes(
    right: bool, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: on a rare class of its own it may be right on fewer of all texts than a guess, which means nothing."""
    labels = torch.arange(200) % 5
    own = torch.tensor([-LOW, -LOW, -LOW, 0.0, 0.0]).repeat(200, 1)
    own[torch.arange(200), torch.where((labels == 3) == right, 3, 4)] += 1.0
    labels[labels == 4] = 0  # of its two classes one does not occur: 20% of the texts are its own
    data, teacher = held_out(own, labels, "train")
    found = warn_below_chance({"here": teacher}, data, BatchConfig(sequences=50), torch.device("cpu"), Dist())
    assert found["t"] == (1.0 if right else 0.0)
    said = capsys.readouterr().err
    assert words in said if words else said == ""


@pytest.mark.parametrize("bias", [False, True])
def test_a_specialist_is_fitted_on_other_as_well(bias: bool) -> None:
    """Law: its outcomes are its own classes and "none of them"; the probabilities it was made with come back.

    Drawn from a softmax over two classes and "other", then scaled and shifted; the third class is not its own.
    """
    draw = torch.Generator().manual_seed(5)
    true = 1.5 * torch.randn(6_000, 3, generator=draw)  # class 0, class 1, other
    outcome = torch.multinomial(torch.softmax(true, -1), 1, generator=draw).squeeze(-1)
    given = 0.4 * (true - torch.tensor([0.5, 0.0, 0.0]) * bias)
    logits = torch.cat([given[:, :2], torch.full((6_000, 1), -2 * LOW)], -1)
    data, teacher = held_out(logits, outcome, other=given[:, 2:])
    found = look(data, bias=bias, examples=6_000).fit(teacher)
    assert found["labels"] == 6_000
    assert found["temperature"] == pytest.approx(0.4, rel=0.06)
    if bias:
        assert found["bias"][:2] == pytest.approx([0.5, 0.0], abs=0.12)


def test_a_specialist_without_any_of_the_labels_is_refused() -> None:
    """Law: there are labels, and it knows none of their classes; a temperature of nothing would be NaN."""
    logits, labels = honest(20)
    logits[:, :2] -= 2 * LOW
    data, teacher = held_out(logits, labels % 2)
    with pytest.raises(DataError, match="has no output for any of the labels"):
        look(data).fit(teacher)


def test_logits_that_are_not_finite_are_refused() -> None:
    """Law: also where the infinite one is not the label's, which looks like a class that a specialist does not know."""
    logits, labels = honest(20)
    logits[7, (labels[7] + 1) % CLASSES] = torch.inf
    data, teacher = held_out(logits, labels)
    with pytest.raises(DataError, match="not finite"):
        look(data).fit(teacher)


@pytest.mark.parametrize("count", [1, 7, 50])
def test_every_rank_asks_the_teacher_equally_often(count: int) -> None:
    """Law: a sharded teacher's forward is a collective. Together the ranks read each labelled text once."""
    _, labels = honest(count)
    data, _ = held_out(torch.zeros(count, CLASSES), labels)
    batches = [list(look(data, SimpleNamespace(rank=rank, world_size=3))._batches()) for rank in range(3)]
    assert len({len(each) for each in batches}) == 1
    read = [int(key) for each in batches for batch in each for key in batch.keys if key >= 0]
    assert sorted(read) == list(range(count))


def _temperatures(file: str) -> dict[str, float]:
    """What each rank trains with."""
    seen: dict[str, float] = {}
    inner = mtkd.running.calibrate.CalibratedTeacher

    def note(teacher: Any, calibration: Any) -> Any:
        seen[teacher.name] = calibration.temperature
        return inner(teacher, calibration)

    mtkd.running.calibrate.CalibratedTeacher = note  # type: ignore[assignment,misc]
    mtkd.running.run.write_report = lambda folder: folder / "report.html"
    mtkd.running.run.run(load_config(file))
    return seen


@pytest.mark.slow
def test_two_ranks_fit_what_one_fits(tmp_path: Path) -> None:
    """Law: every rank has the same number, and it is that of one rank up to rounding."""
    found = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        tiny_config(
            folder,
            engine={"kind": "deepspeed", "processes": ranks, "zero_stage": 2},
            stages={
                "teacher": {"student": {"dropout": 0.0}},
                "student": {"teachers": asked([{"model": "stage:teacher"}], True), "steps": 2},
            },
        )
        found.append(run_distributed(_temperatures, ranks, str(folder / "run.yaml"), timeout=1200))
    (alone,), (first, second) = found
    assert first == second
    assert first["teacher"] == pytest.approx(alone["teacher"], rel=1e-3)
    assert torch.isfinite(torch.tensor(list(alone.values()))).all()
