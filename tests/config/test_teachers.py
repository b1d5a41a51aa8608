"""Teachers as a union: one block per backend, the same YAML, the same identities, the same words in the same places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtkd.config import StageConfig, teacher_config
from mtkd.config.read import fingerprint, load_config
from mtkd.config.teacher import BUILT_IN
from mtkd.errors import UserError
from mtkd.planning.checks import check
from mtkd.planning.stages import stage_values

FORMS: dict[str, Any] = {
    "text": "stage:big",
    "block": {"model": {"path": "org/name", "revision": "v1"}, "name": "one"},
    "classes": {"model": "folder/x", "classes": ["negative", None, "positive"]},
    "offload": {"model": "stage:big", "backend": "offload"},
    "streamed": {"model": "folder/x", "backend": "streamed", "classes": {"A": "negative", "B": "positive"}},
    "sharded": {"model": "folder/x", "backend": "sharded", "sharded": {"offload": "cpu"}},
    "cached": {"model": "stage:cache/big", "backend": "cached"},
    "fitted": {"model": "folder/x", "calibrate": True},
    "given": {"model": "stage:cache/big", "backend": "cached", "calibrate": 0.4},
    "bias": {"backend": "mine", "calibrate": {"bias": True, "split": "test", "data": "other", "examples": 20}},
    "cut": {"model": {"path": "folder/x", "keep_layers": [1, 2]}},
}
# Digests of `stage_values` of the release before there was a union (commit bc50ec0).
BEFORE = {
    ("text", "distill"): "b0beef4bbf5ccffe",
    ("text", "cache"): "19037107faf8bbe5",
    ("block", "distill"): "e9582d9e520afe22",
    ("block", "cache"): "195d1bce66c34c23",
    ("classes", "distill"): "077a9c2994638889",
    ("classes", "cache"): "29d5592acae603b3",
    ("offload", "distill"): "b0beef4bbf5ccffe",
    ("streamed", "distill"): "715ebc4ee9ae1788",
    ("streamed", "cache"): "cbfdceae2c2596f2",
    ("sharded", "distill"): "6966ae844699b9c9",
    ("cached", "distill"): "9666fd3899dd34ce",
    ("cut", "distill"): "7a59ef2f0dfa6974",
    ("cut", "cache"): "efd50511e4880315",
}


@pytest.mark.parametrize(("form", "kind"), BEFORE)
def test_a_stage_that_is_done_stays_done(form: str, kind: str) -> None:
    """Law: the values that identify a stage are those of the release before."""
    more = {"student": "x", "method": "kd", "steps": 3} if kind == "distill" else {}
    stage = StageConfig.model_validate({"kind": kind, "teachers": [FORMS[form]], **more})
    assert fingerprint(stage_values(stage)).startswith(BEFORE[form, kind])


def test_a_done_stage_with_rows_of_its_own_stays_done() -> None:
    """Law: as above, of commit 875fe03, before rows had `candidates`; where these are read, they count."""
    hidden = {"feature": "hidden", "loss": "mse", "student_layer": 1, "teacher_layer": 1}
    student = {"architecture": "llama", "layers": 1, "width": 16, "heads": 2}
    stage = {"kind": "distill", "student": student, "teachers": ["stage:t"], "steps": 1}

    def values(**row: Any) -> dict[str, Any]:
        match = [{"feature": "logits", "loss": "kl", **row}, hidden]
        return stage_values(StageConfig.model_validate({**stage, "match": match}))

    assert fingerprint(values()).startswith("37a4735b1e3eb11c")
    some, more = (values(positions="teachable", candidates={"top": top}) for top in (4, 8))
    assert fingerprint(some) != fingerprint(more)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_given_is_read_again(form: str) -> None:
    """Law: a teacher's plain values, as run.yaml keeps them, make the same teacher."""
    teacher = teacher_config(FORMS[form])
    assert teacher_config(teacher.model_dump(mode="json", exclude_unset=True)) == teacher


def test_every_built_in_backend_has_a_block() -> None:
    """Law: the tag chooses the block, and a teacher without one is resident; any other name is a plug-in's."""
    blocks = [type(teacher_config({"model": "x", "backend": backend})).__name__ for backend in BUILT_IN]
    assert len(set(blocks)) == len(BUILT_IN)
    assert teacher_config("x").backend == "resident"
    own = teacher_config({"backend": "mine", "options": {"a": 1}})
    assert (type(own).__name__, own.name, own.model.path) == ("OwnTeacher", "mine", None)


RUN = """
data: {{a: {{source: random-tokens, task: causal-lm}}}}
name: x
stages:
  s:
    kind: distill
    student: y
    method: kd
    steps: 1
    teachers:
      - {teacher}
"""
MISTAKES = {
    "{model: x, sharded: {}}": ":11: stages.s.teachers[0]: sharded is for backend: sharded, not for resident; drop it",
    "{model: x, backend: offload, sharded: {}}": "sharded is for backend: sharded, not for offload; drop it",
    "{model: x, backend: sharded, sharded: {offload: nvme}}": (
        ":11: stages.s.teachers[0].sharded: offload: nvme and nvme_path go together"
    ),
    "{model: x, backend: sharded, sharded: {offload: disk}}": (
        "stages.s.teachers[0].sharded.offload: not allowed; found 'disk'; allowed: 'none', 'cpu' or 'nvme'"
    ),
    "{model: x, backend: cached, classes: [a]}": (
        "stages.s.teachers[0]: a cache holds the logits of the data's classes; give classes where the cache is made"
    ),
    "{model: {path: x, revision: r}, backend: cached}": "teacher is read as it was written; drop model.revision",
    "{model: {path: x, keep_layers: [1]}, backend: streamed}": (
        "a streamed teacher is read from its files as it is; drop keep_layers and slice"
    ),
    "{model: {path: x, vocabulary: {keep: 0.5}}}": "stages.s.teachers[0]: vocabulary is for students",
    "{model: {path: x, layers: 2}}": "stages.s.teachers[0].model: a loaded model has its own layers",
    "{model: x, bckend: offload}": "stages.s.teachers[0].bckend: unknown key; found 'bckend'; allowed: name, domain",
    "{backend: offload}": "stages.s.teachers[0].model: is missing",
    "{model: x, classes: [null]}": "stages.s.teachers[0].classes: classes names no class of the data",
    "{model: x, options: {}}": "options is for a teacher of your own, not for backend: resident; drop it",
    "{backend: mine, classes: [a]}": "classes is for models: a teacher of your own answers in the order of the data's",
    "{backend: mine, model: {path: x, dropout: 0.1}}": "your own reads its model itself; drop model.dropout",
    "{model: x, calibrate: hot}": "calibrate.temperature: a temperature is a number from 0.001 to 1,000,000, or fit",
    "{model: x, calibrate: 0}": "stages.s.teachers[0].calibrate.temperature: a temperature is a number from 0.001",
    "{model: x, calibrate: {temprature: 2}}": "stages.s.teachers[0].calibrate.temprature: unknown key",
    "{model: x, calibrate: {temperature: true}}": "calibrate.temperature: a temperature is a number",
    "{model: x, calibrate: {data: none}}": "stages.s.teachers[0].calibrate.data: no data named 'none'",
    "{model: x, calibrate: {temperature: 2, bias: true}}": "teachers[0].calibrate: bias is for temperature: fit",
    "{model: x, calibrate: [1]}": "stages.s.teachers[0].calibrate: calibrate is true, a number, or a block",
    "[a]": "stages.s.teachers[0]: should be a valid dictionary",
}


@pytest.mark.parametrize("teacher", MISTAKES)
def test_a_mistake_is_told_at_its_place(teacher: str, tmp_path: Path) -> None:
    """Law: file, line, path of the user's YAML and the words of before; the union shows nowhere."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(teacher=teacher))
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert MISTAKES[teacher] in str(caught.value), caught.value


def test_an_override_reaches_a_key_of_one_backend(tmp_path: Path) -> None:
    """Law: `-o` finds a key of any backend's block, and opens the short form."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(teacher="x"))
    place = "stages.s.teachers.0"
    overrides = [f"{place}.backend=sharded", f"{place}.sharded.offload=cpu", "engine.kind=deepspeed"]
    (teacher,) = load_config(file, overrides).stages["s"].teachers
    assert teacher.model_dump(exclude_unset=True)["sharded"] == {"offload": "cpu"}
    assert teacher.model.path == "x"


def test_an_unknown_backend_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    """Law: before a plug-in can have registered it, any name may stand there; `check` knows them all."""
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(teacher="{model: x, backend: ofload}"))
    with pytest.raises(UserError) as caught:
        check(load_config(file))
    error = caught.value
    assert (error.where, error.line) == ("stages.s.teachers[0].backend", f"{file}:11")
    assert error.found == "ofload"
    assert "offload" in error.todo


def test_the_short_forms_of_calibrate() -> None:
    """Law: true is a fit, false is none, a number is the temperature; none leaves the identity of a stage as it was."""
    forms = {True: "fit", "fit": "fit", 0.4: 0.4, 2: 2.0}
    for form, temperature in forms.items():
        calibrate = teacher_config({"model": "x", "calibrate": form}).calibrate
        assert calibrate is not None
        assert calibrate.temperature == temperature
    assert teacher_config({"model": "x", "calibrate": False}).calibrate is None
