"""What a user writes in his YAML file is what arrives where text is asked for; what mtkd writes is read back the same.

The other reader is PyYAML's own; TAKEN is what YAML 1.1 or 1.2 takes for something else than text.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from mtkd.config import RunConfig, yamlfile
from mtkd.config.read import config_digest, load_config
from mtkd.engine.folder import RunDir
from mtkd.errors import UserError

NOTHING = ["null", "Null", "NULL", "~"]
_TAKEN = """
yes no Yes NO on off On OFF true false True FALSE y n Y N
1 0 -7 +7 007 010 0x1F 0b11 0o14 1_000 1:30 12:30:45 1.0 1.10 .5 5. -0.0 1e5 1E5 1e-05 5e-4 6.8523e+5
.inf -.INF .nan .NaN 2020-01-01 2020-01-01T10:00:00Z = 0b_ 1__0 0.1.2
"""
TAKEN = _TAKEN.split()

RECIPE = """\
name: run
data:
  d: {{source: files, files: {{train: {0}}}, task: classify, text: {0}, label: {0}, columns: [{0}, other]}}
  e: {{source: files, task: classify, labels: [{0}, other], label: {0}, files: {{test: [{0}, other.csv]}}}}
  f: {{source: files, task: glm-cloze, cloze: "{{text}} [MASK]", verbalizers: {{{0}: {0}, other: word}}}}
stages:
  s: {{kind: finetune, data: d, student: {{path: model}}, steps: 1}}
evaluate: {{data: d}}
"""
OPTIONAL = """\
name: run
data: {{d: {{source: files, path: {0}, subset: {0}, name: {0}, domain: {0}, text_pair: {0}}}}}
stages:
  s:
    kind: distill
    student: {0}
    teachers: [{{name: t, model: {0}, classes: {{{0}: {0}}}}}, {{name: u, model: {{path: {0}}}, classes: [{0}, null]}}]
    method: {{name: {0}}}
    weighting: {0}
    steps: 1
"""


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load_config(file, overrides)


@pytest.mark.parametrize("written", [*TAKEN, *NOTHING])
def test_text_arrives_as_it_is_written(written: str, tmp_path: Path) -> None:
    """Law: labels, columns, files, words and the user's own keys are the text of the file, never a reading of it."""
    d, e, f = load(tmp_path, RECIPE.format(written)).data.values()
    assert (d.files["train"], d.text, d.label, d.columns) == (written, written, written, (written, "other"))
    assert (e.labels, e.label, e.files["test"]) == ((written, "other"), written, (written, "other.csv"))
    assert f.verbalizers == {written: written, "other": "word"}


@pytest.mark.parametrize("written", TAKEN)
def test_text_arrives_where_nothing_is_allowed_too(written: str, tmp_path: Path) -> None:
    """Law: only null is nothing in an optional key; a model or a registered name in short form is text too."""
    config = load(tmp_path, OPTIONAL.format(written))
    data, stage = config.data["d"], config.stages["s"]
    assert {data.path, data.subset, data.name, data.domain, data.text_pair} == {written}
    assert stage.student is not None
    assert stage.method is not None
    assert {stage.student.path, stage.method.name, stage.weighting.name} == {written}
    assert [t.model.path for t in stage.teachers] == [written, written]
    assert [t.classes for t in stage.teachers] == [{written: written}, (written, None)]


def test_a_name_of_a_run_and_of_stages_may_look_like_a_number(tmp_path: Path) -> None:
    """Law: names of runs, stages and data are the text of the file."""
    text = RECIPE.format("x").replace("name: run", "name: 007").replace("  s:", "  1.0:").replace("  d:", "  yes:")
    config = load(tmp_path, text.replace("data: d", "data: yes"))
    assert (config.name, list(config.stages), next(iter(config.data))) == ("007", ["1.0"], "yes")
    assert (config.stages["1.0"].data, config.evaluate.data) == ("yes", "yes")


def test_an_override_is_text_where_text_is_asked_for(tmp_path: Path) -> None:
    """Law: an override is read by the type of its key, as the file is."""
    config = load(tmp_path, RECIPE.format("x"), "data.e.labels=[no, 1.0]", "data.d.text=on", "engine.compile=yes")
    assert (config.data["e"].labels, config.data["d"].text) == (("no", "1.0"), "on")
    assert config.engine.compile is True


def test_an_override_goes_below_a_short_form_that_looks_like_a_number(tmp_path: Path) -> None:
    """Law: 007 in short form is the path 007 when a key is set below it."""
    config = load(tmp_path, OPTIONAL.format("007"), "stages.s.student.dropout=0")
    student = config.stages["s"].student
    assert student is not None
    assert (student.path, student.dropout) == ("007", 0)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    """Law: a lone surrogate is refused, since no file can hold it."""
    with pytest.raises(UserError, match="half a character"):
        load(tmp_path, RECIPE.format('"\\ud83d"'))


@pytest.mark.parametrize(
    ("written", "value"), [("true", True), ("yes", True), ("On", True), ("no", False), ("off", False), ("FALSE", False)]
)
def test_a_switch_is_still_a_switch(written: str, value: bool, tmp_path: Path) -> None:
    """Law: where a switch or a number is asked for, YAML 1.1's words for it are read."""
    text = RECIPE.format("x") + f"engine: {{activation_checkpointing: {written}}}\nseed: 7\nlog_every: 1_000\n"
    config = load(tmp_path, text)
    assert config.engine.activation_checkpointing is value
    assert (config.seed, config.log_every) == (7, 1000)


@pytest.mark.parametrize("written", ["010", "-010", "1:30", "00"])
def test_a_number_that_versions_of_yaml_read_differently_is_refused(written: str, tmp_path: Path) -> None:
    """Law: 010 steps are 8 in YAML 1.1 and 10 in YAML 1.2; nobody is given one of them in silence."""
    with pytest.raises(UserError, match="read differently") as caught:
        load(tmp_path, RECIPE.format("x").replace("steps: 1", f"steps: {written}"))
    assert "config.yaml:7" in str(caught.value)


def test_an_option_is_read_by_its_own_writing(tmp_path: Path) -> None:
    """Law: options have no declared type, so they are what YAML says; a quoted one is text, in run.yaml too."""
    text = OPTIONAL.format("x").replace("weighting: x", 'weighting: {name: w, options: {a: yes, b: "yes", c: "5e-4"}}')
    config = load(tmp_path, text)
    assert config.stages["s"].weighting.options == {"a": True, "b": "yes", "c": "5e-4"}
    assert kept(config, tmp_path).stages["s"].weighting.options == {"a": True, "b": "yes", "c": "5e-4"}


@pytest.mark.parametrize("written", [*TAKEN, *NOTHING])
def test_run_yaml_says_the_same_again(written: str, tmp_path: Path) -> None:
    """Law: what a run keeps of its configuration has the digest of the file it was made from."""
    config = load(tmp_path, RECIPE.format(written))
    assert config_digest(kept(config, tmp_path)) == config_digest(config)


def kept(config: RunConfig, tmp_path: Path) -> RunConfig:
    """The configuration after a way through run.yaml."""
    folder = RunDir(tmp_path)
    folder.write_config(config)
    return load_config(folder.config_file)


PIECES = [
    *(*TAKEN, *NOTHING, *":#-?,[]{}&*!|>'\"%@`\\ \t\n\r\0\x1b\x7f\x85\u2028\u2029\ufeff"),
    *("", "é", "你好", "😀", "<<", "---", "...", "- a", "a: b", "a #b", "x" * 150, "word " * 40, "\n\n "),
]


def test_every_text_is_read_back_the_same() -> None:
    """Law: read(write(x)) = x for texts and keys made of all that YAML gives a meaning, by our reader and PyYAML's."""
    source = random.Random(7)
    for _ in range(600):
        texts = ["".join(source.choices(PIECES, k=source.randint(1, 4))) for _ in range(4)]
        values = {"list": texts, texts[0]: texts[1], "deep": {texts[2]: [texts[3], {"a": texts}]}}
        written = yamlfile.write(values)
        assert yamlfile.parse(written, "x").plain() == values
        assert yaml.safe_load(written) == values


def test_values_that_are_no_text_are_read_back_the_same() -> None:
    """Law: read(write(x)) = x for values that are no text, by our reader and PyYAML's."""
    values = {"a": [True, False, None, 0, -3, 10**12, 0.1, 1e-5, 5e-4, 1e38, -2.5e-30, 1.0], "b": {}, "c": []}
    written = yamlfile.write(values)
    assert yamlfile.parse(written, "x").plain() == values
    assert yaml.safe_load(written) == values
