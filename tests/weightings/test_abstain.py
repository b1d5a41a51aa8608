"""Specialists with an output "other": their logits, the weights of `abstain`, caches, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cache_runs import largest_difference
from tiny import NUM_IDS, class_batch, classifier, make_objective
from tiny_run import tiny_config
from torch import Tensor

import mtkd.running.run
from mtkd.config import RunConfig, teacher_config
from mtkd.config.match import Match
from mtkd.config.read import load_config
from mtkd.data.batch import Batch
from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import DataError, UserError
from mtkd.models.classes import LOW, ClassMap, match_classes
from mtkd.models.features import DenseLogits
from mtkd.models.info import CLASSIFIER
from mtkd.models.taps import TappedModel
from mtkd.pool.cache import CacheContent
from mtkd.weightings.spec import WEIGHTINGS
from mtkd.weightings.traits import Around, Traits

CLASSES = ("a", "b", "c", "d")
OUTPUTS = torch.tensor([[1.0, -0.5, 2.0], [0.3, 0.1, -3.0]])  # of the specialist of c and a: c, a, other


def traits_of(*teachers: DenseLogits) -> Traits:
    examples = len(teachers[0].values)
    ids = torch.zeros(examples, 2, dtype=torch.int64)
    batch = Batch(torch.arange(examples), ids, ids == 0, torch.zeros(examples, dtype=torch.int64))
    return Traits(teachers, Around(batch), "example", 4)


def abstain(*teachers: DenseLogits, **options: Any) -> Tensor:
    weights: Tensor = WEIGHTINGS["abstain"](**options)(traits_of(*teachers))
    return weights[..., 0]


def specialist(other: str = "other") -> ClassMap:
    return match_classes(("c", "a", "other"), CLASSES, "teacher", other=(other,))


def test_an_output_other_is_dropped_and_classes_without_an_output_have_probability_0() -> None:
    """The softmax is that of the own classes alone, at any temperature; the mass of `other` is over all outputs."""
    found = specialist()
    assert (found.columns, found.other, found.missing) == ((1, -1, 0, -1), (2,), ("b", "d"))
    logits = found.logits(OUTPUTS)
    for temperature in (0.1, 1.0, 4.0, 64.0):
        own = torch.softmax(OUTPUTS[:, [1, 0]].double() / temperature, -1)
        whole = torch.softmax(logits.divided(temperature).values, -1).double()
        torch.testing.assert_close(whole[:, [0, 2]], own, rtol=0, atol=1e-5)
        assert bool((whole[:, [1, 3]] == 0).all())
        other = torch.softmax(OUTPUTS.double() / temperature, -1)[:, 2]
        mass = logits.divided(temperature).own_mass().double()
        torch.testing.assert_close(mass, 1 - other, rtol=1e-5, atol=1e-7)


def test_a_whole_head_and_other_keeps_every_class() -> None:
    found = match_classes(("other", *reversed(CLASSES)), CLASSES, "teacher", other=("0",))
    assert (found.columns, found.missing) == ((4, 3, 2, 1), ())
    assert found.note.endswith("0: other = none of its classes")
    positions = match_classes(("LABEL_0", "LABEL_1", "LABEL_2"), ("x", "y"), "teacher", other=("LABEL_0",))
    assert (positions.columns, positions.how) == ((1, 2), "position")


def test_the_weights_are_those_of_the_formula() -> None:
    """``(1 - p_k(other))^power`` over their sum, in float64 by hand; several outputs `other` count together."""
    drawn = 3 * torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    teachers = [DenseLogits(x[:, :4], x[:, 4:]) for x in drawn]
    own = 1 - drawn.double().softmax(-1)[..., 4:].sum(-1)  # [T,B]
    for power in (1.0, 2.5):
        wanted = own**power / (own**power).sum(0)
        torch.testing.assert_close(abstain(*teachers, power=power).double(), wanted, rtol=1e-5, atol=1e-6)
    order = [2, 0, 1]
    mixed = abstain(*(teachers[k] for k in order))
    torch.testing.assert_close(mixed, abstain(*teachers)[order])


def test_odds_are_the_posterior_of_independent_judges() -> None:
    """All 2^T answers of the teachers enumerated, conditioned on exactly one claim, in float64."""
    drawn = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(1))
    teachers = [DenseLogits(x[:, :2], x[:, 2:]) for x in drawn]
    claim = 1 - drawn.double().softmax(-1)[..., 2]  # [T,B]
    wanted = torch.zeros(3, 4, dtype=torch.float64)
    for answers in itertools.product((0, 1), repeat=3):
        if sum(answers) == 1:
            said = [claim[k] if yes else 1 - claim[k] for k, yes in enumerate(answers)]
            wanted[answers.index(1)] += torch.stack(said).prod(0)
    torch.testing.assert_close(abstain(*teachers, odds=True).double(), wanted / wanted.sum(0), rtol=1e-5, atol=1e-6)


def test_who_has_no_other_claims_everything_and_where_all_abstain_weights_are_uniform() -> None:
    generalist = DenseLogits(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    shy = DenseLogits(torch.zeros(2, 4), torch.full((2, 1), 90.0))
    shyer = DenseLogits(torch.zeros(2, 4), torch.full((2, 1), 900.0))
    torch.testing.assert_close(abstain(shy, shyer), torch.full((2, 2), 0.5))
    torch.testing.assert_close(abstain(generalist, shy)[0], torch.ones(2), rtol=0, atol=2e-6)
    torch.testing.assert_close(abstain(generalist, generalist), torch.full((2, 2), 0.5))
    assert torch.equal(abstain(shyer), torch.ones(1, 2))


@pytest.mark.parametrize("options", [{"power": 0.0}, {"power": -1.0}, {"floor": 0.0}, {"floor": 1.5}])
def test_options_without_a_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        WEIGHTINGS["abstain"](**options)


def test_a_mixture_of_specialists_is_their_own_softmax_weighted() -> None:
    """KL against ``sum_k w_k p_k`` by hand in float64, p_k over the own classes, 0 elsewhere; finite gradients."""
    maps = [
        ClassMap(("a", "b", "no"), CLASSES, (0, 1, -1, -1), "name", (2,)),
        ClassMap(("no", "d", "b", "c"), CLASSES, (-1, 2, 3, 1), "name", (0,)),
    ]
    plain = [classifier(16, 1, seed, num_labels=len(m.outputs)) for seed, m in enumerate(maps)]
    teachers = [TappedModel(t.model, CLASSIFIER, NUM_IDS, None, m) for t, m in zip(plain, maps, strict=True)]
    batch, wants = class_batch((5, 3, 7), num_labels=4), frozenset({"logits"})
    with torch.no_grad():
        outputs = [t(batch, wants)["logits"].rows(torch.arange(3)).double() for t in plain]
    probs = torch.zeros(2, 3, 4, dtype=torch.float64)
    probs[0][:, [0, 1]] = outputs[0][:, :2].softmax(-1)
    probs[1][:, [1, 2, 3]] = outputs[1][:, [2, 3, 1]].softmax(-1)
    own = torch.stack([1 - outputs[0].softmax(-1)[:, 2], 1 - outputs[1].softmax(-1)[:, 0]])
    weights = own / own.sum(0)
    student = classifier(8, 1, 7, num_labels=4)
    with torch.no_grad():
        log_s = student(batch, wants)["logits"].rows(torch.arange(3)).double().log_softmax(-1)
    mixture = (weights[..., None] * probs).sum(0)
    xlogy = torch.special.xlogy
    wanted = {
        "probabilities": (xlogy(mixture, mixture) - mixture * log_s).sum(-1).mean(),
        "losses": (weights[..., None] * (xlogy(probs, probs) - probs * log_s)).sum((0, 2)).mean(),
    }
    for ensemble, value in wanted.items():
        row = Match(feature="logits", loss="kl", ensemble=ensemble)
        objective, pool = make_objective(student, teachers, [row], "abstain")
        loss, _ = objective(batch, pool.forward(batch), {"tokens": 15, "targets": 3, "labels": 3, "sequences": 3})
        assert float(loss.detach()) == pytest.approx(float(value), rel=1e-5)
        loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in student.parameters() if p.grad is not None)


def test_low_is_far_and_finite_in_every_format() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        values = specialist().logits(OUTPUTS.to(dtype)).values
        assert bool(values.isfinite().all())
        assert float(values[:, [0, 2]].min() - values[:, [1, 3]].max()) > LOW / 2


@pytest.mark.parametrize(
    ("outputs", "given", "other", "message"),
    [
        (("c", "a", "other"), None, ("othre",), "no such output"),
        (("c", "a", "other"), None, ("7",), "no such output"),
        (("c", "a", "other"), None, ("other", "2"), "named twice"),
        (("c", "a", "b"), None, ("b",), "name of a class of the data"),
        (("c", "z", "other"), None, ("other",), "no classes of the data"),
        (("other", "none"), None, ("other", "none"), "no output of the model is left"),
        (("c", "a", "other"), {"c": "c", "other": "a"}, ("other",), "is a class of the data"),
        (("c", "a", "other"), ("c", "a"), ("other",), "an entry per output"),
        (("LABEL_0", "LABEL_1", "LABEL_2"), None, ("2",), "no classes of the data"),
    ],
)
def test_what_other_names_must_fit(outputs: tuple[str, ...], given: Any, other: tuple[str, ...], message: str) -> None:
    with pytest.raises((UserError, DataError), match=message) as caught:
        match_classes(outputs, CLASSES, "stages.s.teachers[0]", given, other=other)
    assert caught.value.where.startswith("stages.s.teachers[0]")


def test_the_user_says_which_outputs_are_classes_and_the_others_are_dropped() -> None:
    found = match_classes(("c", "zebra", "other"), CLASSES, "teacher", {"c": "c"}, other=("other",))
    assert (found.columns, found.missing) == ((-1, -1, 0, -1), ("a", "b", "d"))
    assert "1: zebra is dropped" in found.note
    assert "3 of 4 classes have no output" in found.note


_WORDS = {"a": "amber", "b": "birch", "c": "cedar", "d": "dunes"}


def write_texts(folder: Path) -> None:
    """Texts of four classes, each told by one word among noise; once more without labels."""
    chance = random.Random(0)
    noise = ["the", "of", "and", "some", "more", "then", "far", "from"]
    for split, count in (("train", 120), ("test", 60)):
        rows = []
        for i in range(count):
            words = [*chance.choices(noise, k=3), *[_WORDS[CLASSES[i % 4]]] * 2]
            chance.shuffle(words)
            rows.append({"text": " ".join(words), "label": CLASSES[i % 4]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        silent = "".join(json.dumps({"text": row["text"]}) + "\n" for row in rows)
        (folder / f"silent-{split}.jsonl").write_text(silent)


def run_values(folder: Path) -> dict[str, Any]:
    """Two specialists, their caches, and students of both by different weights on texts without labels."""
    files = {split: f"{split}.jsonl" for split in ("train", "test")}
    texts = {"source": "files", "path": ".", "files": files, "task": "classify", "max_length": 16}
    shape = {"architecture": "bert", "layers": 1, "width": 32, "heads": 4, "dropout": 0.0}
    learned = {"student": shape, "steps": 60, "batch": {"sequences": 24}, "optimizer": {"lr": 1e-2}}
    specialists = [{"model": "stage:one", "other": "other"}, {"model": "stage:two", "other": 2}]
    cached = [{"name": n, "model": f"stage:cache/{n}", "backend": "cached"} for n in ("one", "two")]
    rows = [{"feature": "logits", "loss": "kl"}]
    taught = {**learned, "kind": "distill", "data": "silent", "match": rows}
    return {
        "name": "specialists",
        "output": str(folder / "runs"),
        "tokenizer": {"train_on": "all", "vocab_size": 300},
        "data": {
            "all": texts,
            "silent": {**texts, "files": {"train": "silent-train.jsonl"}},
            "one": {**texts, "specialist": {"classes": ["a", "b"]}},
            "two": {**texts, "specialist": {"classes": ["d", "c"]}},
        },
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {
            "one": {**learned, "kind": "finetune", "data": "one"},
            "two": {**learned, "kind": "finetune", "data": "two", "seed": 1},
            "cache": {"kind": "cache", "data": "silent", "teachers": specialists, "batch": {"sequences": 24}},
            "abstain": {**taught, "teachers": specialists, "weighting": "abstain"},
            "cached": {**taught, "teachers": cached, "weighting": "abstain"},
            "uniform": {**taught, "teachers": cached, "weighting": "uniform"},
        },
        "evaluate": {"data": "all", "ensembles": [], "stages": ["abstain", "cached", "uniform"], "resamples": 50},
    }


def write_run(folder: Path, values: dict[str, Any]) -> RunConfig:
    write_texts(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(folder / "run.yaml")


def mean_probability(run: Path, stage: str) -> float:
    """Of the right class, over the test split."""
    (file,) = run.glob(f"stages/*-{stage}/scores.jsonl")
    records = read_jsonl(file)
    return sum(record["probabilities"][record["label"]] for record in records) / len(records)


def test_specialists_that_abstain_teach_more_than_uniform_ones_and_caches_teach_the_same(tmp_path: Path) -> None:
    """A whole run: the student of cached teachers is that of live ones, and `abstain` is surer of the truth."""
    config = write_run(tmp_path, run_values(tmp_path))
    mtkd.running.run.run(config)
    right = {name: mean_probability(config.folder, name) for name in ("abstain", "uniform")}
    assert right["abstain"] > right["uniform"] + 0.2
    assert largest_difference(config.folder, "abstain", "cached") < 1e-4
    assert largest_difference(config.folder, "abstain", "uniform") > 1e-2


def planned(folder: Path, **changes: Any) -> mtkd.Plan:
    """The plan of the run with other stages or data; dicts are merged one level deep, None drops a stage."""
    values = run_values(folder)
    for block, entries in changes.items():
        for name, entry in entries.items():
            values[block][name] = None if entry is None else {**values[block].get(name, {}), **entry}
        values[block] = {name: entry for name, entry in values[block].items() if entry is not None}
    return mtkd.plan(write_run(folder, values))


def test_the_plan_shows_the_outputs_and_names_classes_that_no_teacher_knows(tmp_path: Path) -> None:
    """A stage of one specialist alone, on data of four classes."""
    alone = {"data": "all", "teachers": [{"model": "stage:one", "other": "other"}]}
    notes = [note for stage in planned(tmp_path, stages={"abstain": alone}).stages for note in stage.notes]
    text = "stages.abstain.teachers[0]: 2: other = none of its classes; 2 of 4 classes have no output"
    assert any(note.startswith(text) for note in notes)
    assert "no teacher has an output for c, d: soft targets never name them" in notes


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"loss": "reverse_kl"}, "is infinite where a teacher gives a class probability 0"),
        ({"loss": "kl", "options": {"standardise": True}}, "mean and deviation of logits mean nothing"),
        ({"loss": "adaptive_kl"}, "is infinite"),
        ({"loss": "jsd", "options": {"beta": 1.0}}, "is infinite"),
        ({"loss": "mse"}, "no logit to compare"),
        ({"loss": "kl", "ensemble": "logits"}, "no logit to compare or to average"),
        ({"loss": "kl", "options": {"temperature": 4.0}}, ""),
        ({"loss": "soft_ce", "ensemble": "probabilities"}, ""),
        ({"loss": "jsd"}, ""),
        ({"loss": "skew_kl"}, ""),
        ({"loss": "total_variation"}, ""),
        ({"loss": "reverse_kl", "ensemble": "probabilities"}, ""),
    ],
)
@pytest.mark.parametrize("stage", ["abstain", "cached"])
def test_rows_to_which_probability_0_is_infinite_are_refused(
    stage: str, row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Of live teachers and of their caches; the others are finite, in value and gradient."""
    changes = {stage: {"match": [{"feature": "logits", **row}]}}
    if not message:
        assert planned(tmp_path, stages=changes).stages
        return
    with pytest.raises(UserError, match=message) as caught:
        planned(tmp_path, stages=changes)
    assert caught.value.where.endswith(f"stages.{stage}.match[0]")


@pytest.mark.parametrize(
    ("stages", "message", "where"),
    [
        ({"abstain": {"teachers": [{"model": "stage:one", "other": "othre"}]}}, "no such output", "teachers[0].other"),
        ({"abstain": {"teachers": [{"model": "stage:one", "other": "a"}]}}, "name of a class", "teachers[0].other"),
        ({"abstain": {"data": "one", "teachers": ["stage:one"]}}, "outputs that mean", "stages.abstain.weighting"),
        (
            {
                "bare": {"kind": "cache", "data": "one", "teachers": ["stage:one"], "batch": {"sequences": 24}},
                "student": {
                    "kind": "distill",
                    "student": {"architecture": "bert", "layers": 1, "width": 8, "heads": 2},
                    "data": "one",
                    "teachers": [{"name": "one", "model": "stage:bare/one", "backend": "cached"}],
                    "weighting": "abstain",
                    "batch": {"sequences": 24},
                    "method": {"name": "kd", "options": {"hard": 0}},
                    "steps": 1,
                },
            },
            "outputs that mean",
            "stages.student.weighting",
        ),
    ],
)
def test_the_plan_refuses_what_abstain_cannot_read(
    stages: dict[str, Any], message: str, where: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        planned(tmp_path, data={"silent": {"labels": list(CLASSES)}}, stages=stages)
    assert where in caught.value.where


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ({"model": "stage:c/one", "backend": "cached", "other": "x"}, "a cache keeps the output"),
        ({"model": "m", "backend": "mine", "other": "x"}, "other is for models"),
        ({"model": "m", "other": ["x", "x"]}, "once"),
        ({"model": "m", "other": [" "]}, "once"),
    ],
)
def test_other_is_for_models_that_run(teacher: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        teacher_config(teacher)


def test_other_arrives_as_it_is_written(tmp_path: Path) -> None:
    """`other: no` is the output "no", 26 the number; one text and a list of it are the same teacher."""
    values = run_values(tmp_path)
    values["stages"]["abstain"]["teachers"][0]["other"] = ["OTHER"]
    write_run(tmp_path, values)
    file = tmp_path / "run.yaml"
    file.write_text(file.read_text().replace("- OTHER", "- no"))
    teachers = load_config(file).stages["abstain"].teachers
    assert [t.others for t in teachers] == [("no",), ("2",)]
    assert teacher_config({"model": "m", "other": "x"}) == teacher_config({"model": "m", "other": ["x"]})


def test_language_models_have_no_other(tmp_path: Path) -> None:
    stages = {"student": {"teachers": [{"model": "stage:teacher", "other": "1"}]}}
    with pytest.raises(UserError, match="other is for classifiers") as caught:
        mtkd.plan(tiny_config(tmp_path, stages=stages))
    assert caught.value.where.endswith("teachers[0].other")


def test_a_cache_of_before_is_still_read() -> None:
    """What a cache without such outputs says of itself is what it said before they existed."""
    plain = CacheContent("classes", 0, 1.0, 4)
    assert not {"others", "missing"} & plain.as_json().keys()
    assert CacheContent.from_json(plain.as_json(), "here") == plain
    kept = CacheContent("classes", 0, 1.0, 4, others=1, missing=("a",))
    assert CacheContent.from_json(json.loads(json.dumps(kept.as_json())), "here") == kept
    with pytest.raises(DataError, match="malformed"):
        CacheContent.from_json({**plain.as_json(), "more": 1}, "here")
