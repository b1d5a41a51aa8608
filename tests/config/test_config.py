"""Reading configurations: what is refused, and whether the message leads to the mistake."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtkd.config import DataConfig, RunConfig
from mtkd.config.read import config_digest, differences, fingerprint, load_config
from mtkd.errors import EXIT_USAGE, UserError

GOOD = """\
name: demo
data:
  text: {source: python-stdlib}
stages:
  prose:
    kind: finetune
    student: {architecture: llama, layers: 2, width: 8, heads: 2}
    steps: 10
  student:
    kind: distill
    student: {architecture: llama, layers: 1, width: 8, heads: 2}
    teachers:
      - {model: stage:prose}
    method: kd
    steps: 20
    optimizer:
      lr: 5e-4
"""


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """The message for a text (GOOD with replacements, or a whole one) and overrides, its folder taken out."""

    def message(text: str, *overrides: str) -> str:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(file, overrides)
        assert caught.value.exit_code == EXIT_USAGE
        return str(caught.value).replace(str(file), "run.yaml")

    return message


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., RunConfig]:
    def read(text: str, *overrides: str) -> RunConfig:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return load_config(file, overrides)

    return read


Refused = Callable[..., str]
Load = Callable[..., RunConfig]


def changed(old: str, new: str) -> str:
    assert GOOD.count(old) == 1
    return GOOD.replace(old, new)


def test_a_good_file_is_read(load: Load, tmp_path: Path) -> None:
    """Law: values, order of stages and folder are those of the file."""
    config = load(GOOD)
    assert config.stages["student"].optimizer.lr == 5e-4
    assert config.stages["student"].teachers[0].name == "prose"
    assert list(config.stages) == ["prose", "student"]
    assert config.base == tmp_path.resolve()


def test_an_unknown_key_is_told_with_line_allowed_keys_and_nearest(refused: Refused) -> None:
    """Law: an unknown key has line, path, allowed keys and the nearest one."""
    text = refused(changed("    steps: 20", "    stepz: 20"))
    line = next(line for line in text.splitlines() if "stepz" in line)
    assert line.startswith(
        "run.yaml:15: stages.student.stepz: unknown key; found 'stepz'; allowed: kind, data, student"
    )
    assert line.endswith("did you mean 'steps'?")


def test_a_value_under_an_unknown_key_stays_untold(refused: Refused) -> None:
    """Law: a value under an unknown key is in no message: it may be a password."""
    assert "hunter2" not in refused(GOOD + "password: hunter2\n")
    assert "hunter2" not in refused(GOOD, "password=hunter2")


def test_a_wrong_literal_is_told_with_the_allowed_values(refused: Refused) -> None:
    """Law: a wrong choice is answered with all choices and the nearest."""
    text = refused(changed("kind: finetune", "kind: finetun"))
    assert text == (
        "run.yaml:6: stages.prose.kind: not allowed; found 'finetun'; allowed: 'finetune', 'cofinetune', "
        "'distill', 'cache' or 'generate'; did you mean 'finetune'?"
    )


def test_every_problem_is_listed_up_to_a_limit(refused: Refused) -> None:
    """Law: one message has every problem, up to eight lines."""
    two = refused(changed("name: demo", "name: a/b"), "stages.prose.steps=0")
    assert two.splitlines()[0].startswith("run.yaml:1: name: ")
    assert two.splitlines()[1] == "-o stages.prose.steps: should be greater than 0; found 0"
    many = refused(GOOD + "".join(f"key{i}: 1\n" for i in range(20)))
    assert len(many.splitlines()) == 9
    assert many.splitlines()[-1] == "and 12 more problems"


def test_a_union_is_one_problem(refused: Refused) -> None:
    """Law: a value that no member of a union accepts is one line, not one per member."""
    text = refused(GOOD, "stages.student.match=[{feature: hidden, student_layer: top}]")
    (line,) = text.splitlines()
    assert line.startswith("-o stages.student.match: stages.student.match[0].student_layer: ")
    assert "found 'top'" in line
    assert "'last'" in line


def test_rules_over_several_fields_name_their_block_and_the_overrides_in_it(refused: Refused) -> None:
    """Law: a rule of a block has the block's line and the overrides below it."""
    text = refused(GOOD, "stages.student.epochs=2")
    assert text == (
        "run.yaml:9 with -o stages.student.epochs: stages.student: give exactly one of `steps`, `epochs`, `equal_time`"
    )


def test_a_reference_to_a_missing_stage_is_told_with_its_line(refused: Refused) -> None:
    """Law: a dangling reference has the line where it is written."""
    text = refused(changed("{model: stage:prose}", "{model: stage:code}"))
    assert text.startswith("run.yaml:13: stages.student.teachers[0]: 'stage:code' is not an earlier stage")


BAD_NAMES = ["a/b", "..", "a..b", "../../etc", "-rf", ".hidden", "two\nlines", "x" * 101, "", "a b", "/abs", "a\\b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_run_and_stage_names_are_refused(name: str, refused: Refused) -> None:
    """Law: a name that is no safe folder is refused at its line, in one line."""
    quoted = '"' + name.replace("\\", "\\\\").replace("\n", "\\n") + '"'
    as_run = refused(changed("name: demo", f"name: {quoted}"))
    assert as_run.startswith("run.yaml:1: name: a name has 1 to 100 characters")
    as_stage = refused(changed("  prose:\n", f"  {quoted}:\n"))
    assert as_stage.startswith("run.yaml:5: stages.")
    assert "a name has 1 to 100 characters" in as_stage
    assert len(as_run.splitlines()) == 1  # a name with a line break must not break the message


@pytest.mark.parametrize("name", ["x" * 100, "v1.5", "_a", "7", "on", "no", "1e5", "a+b-c"])
def test_good_names_are_kept_as_written(name: str, load: Load) -> None:
    """Law: a name arrives as written, also where YAML sees a number or a switch."""
    config = load(changed("  prose:\n", f"  {name}:\n").replace("stage:prose", f"stage:{name}"))
    assert list(config.stages) == [name, "student"]


# ---- YAML


def test_python_tags_are_refused_and_not_executed(refused: Refused, tmp_path: Path) -> None:
    """Law: a tag that is not plain data is refused, and no code of it runs."""
    mark = tmp_path / "executed"
    for tag in ("python/object/apply:os.system", "python/object/new:os.system", "python/name:os.system"):
        text = refused(changed("lr: 5e-4", f'lr: !!{tag} ["touch {mark}"]'))
        assert text.startswith("run.yaml:17: a YAML tag that is not plain data")
        assert tag in text
    assert "!!binary" in refused(GOOD + "seed: !!binary aGk=\n")
    assert "!mine" in refused(GOOD + "seed: !mine 3\n")
    assert "!!set" in refused(GOOD + "seed: !!set {a}\n")
    assert not mark.exists()


def test_an_alias_bomb_is_refused_before_it_grows(refused: Refused) -> None:
    """Law: aliases that expand to too many values are counted, never built."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]  # 9**12 values
    text = refused("\n".join(lines))
    assert "aliases expand to too many values" in text
    merged = ["b0: &b0 {x: [1, 2, 3]}"]
    merged += [f"b{i}: &b{i} {{p: *b{i - 1}, q: *b{i - 1}, <<: *b{i - 1}}}" for i in range(1, 60)]
    assert "aliases expand to too many values" in refused("\n".join(merged))


def test_a_cycle_is_refused(refused: Refused) -> None:
    """Law: an alias within its own value is an error, not a recursion."""
    assert "an alias refers to the value it is part of" in refused("name: &a [*a]")
    assert "an alias refers to the value it is part of" in refused("name: &a {x: {<<: *a}}")


def test_an_alias_that_is_no_bomb_is_a_copy(load: Load) -> None:
    """Law: an override reaches one use of an alias only."""
    text = changed("steps: 10", "steps: 10\n    optimizer: &o {lr: 0.5, clip: 3.0}").replace(
        "optimizer:\n      lr: 5e-4", "optimizer: {<<: *o, lr: 0.25}"
    )
    config = load(text, "stages.prose.optimizer.clip=2.0")
    assert config.stages["prose"].optimizer.clip == 2.0
    assert config.stages["student"].optimizer.clip == 3.0  # the override reached one use only
    assert config.stages["student"].optimizer.lr == 0.25


def test_a_duplicate_key_names_both_lines(refused: Refused) -> None:
    """Law: a key that is there twice is refused with both lines."""
    text = refused(GOOD + "name: other\n")
    assert text.startswith("run.yaml:18: key 'name' is there twice")
    assert "run.yaml:1" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping"),
        ("- a\n- b\n", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("a: 1\n---\nb: 2\n", "single document"),
        ("a: [1\nb: 2\n", "run.yaml:2: not YAML"),
        ("a: *nowhere", "undefined alias"),
        ("? [a, b]\n: 1\n", "a key must be plain text"),
        ("log_every: .inf", "a number must be finite"),
        ("seed: .nan", "a number must be finite"),
        ("seed: !!int x", "not a value of its tag"),
        ("name: a\x00b", "not YAML"),
        ("[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "exceeded maximum size"),
    ],
)
def test_what_is_no_configuration_is_refused(text: str, message: str, refused: Refused) -> None:
    """Law: text that is no configuration is a UserError with its reason."""
    assert message in refused(text)


def test_a_chain_of_aliases_that_is_too_deep_is_refused(refused: Refused) -> None:
    """Law: depth by aliases is refused as depth by brackets is."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000)]
    text = refused("\n".join(lines))
    assert "nested too deeply" in text or "too many values" in text


def test_unreadable_files(tmp_path: Path) -> None:
    """Law: a file that is missing, a folder, too large or not UTF-8 is refused with the reason."""
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="it is a folder"):
        load_config(tmp_path)
    (tmp_path / "large.yaml").write_text("#" * 1_000_001)
    with pytest.raises(UserError, match="too large"):
        load_config(tmp_path / "large.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_numbers_with_an_exponent_are_numbers_also_where_the_type_is_free(load: Load) -> None:
    """Law: 5e-4 is a number, a quoted one and a date are text."""
    config = load(
        GOOD, "stages.student.method={name: kd, options: {a: 5e-4, b: 1E3, c: -2e+1, d: '5e-4', e: 2024-01-02}}"
    )
    method = config.stages["student"].method
    assert method is not None
    assert method.options == {"a": 5e-4, "b": 1000.0, "c": -20.0, "d": "5e-4", "e": "2024-01-02"}


# ---- overrides


def test_overrides_are_typed_and_the_last_wins(load: Load) -> None:
    """Law: an override is YAML below a dotted path, and later ones win."""
    config = load(
        GOOD,
        "stages.student.steps=7",
        "stages.student.steps=200",
        "stages.student.optimizer.betas=[0.8, 0.9]",
        "stages.student.teachers.0.name=x",
        "stages.student.batch.tokens=4096",  # a block that the file does not have
        "stages.student.batch.sequences=null",
        "data.text.limit.train=50",
        "engine.precision=bf16",
        "stages.student.method.options.temperature=2",  # below a value in its short form
        "name=7up",
    )
    student = config.stages["student"]
    assert (student.steps, student.optimizer.betas, student.teachers[0].name) == (200, (0.8, 0.9), "x")
    assert (student.batch.tokens, student.batch.sequences) == (4096, None)
    assert config.data["text"].limit == {"train": 50}
    assert config.engine.precision == "bf16"
    assert student.method is not None
    assert student.method.name == "kd"
    assert student.method.options == {"temperature": 2}
    assert config.name == "7up"


def test_a_short_teacher_and_a_name_with_dots_can_be_overridden(load: Load) -> None:
    """Law: a path goes below a short form, and a name may contain dots."""
    text = GOOD.replace("prose", "v1.5").replace("{model: stage:v1.5}", "stage:v1.5")
    config = load(text, "stages.v1.5.steps=3", "stages.student.teachers[0].name=old")
    assert config.stages["v1.5"].steps == 3
    assert config.stages["student"].teachers[0].name == "old"
    assert config.stages["student"].teachers[0].model.path == "stage:v1.5"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.studnt.steps=1", "-o stages.studnt.steps: stages.studnt does not exist.*did you mean 'student'"),
        ("stages.student.optimizr.lr=1", "stages.student.optimizr does not exist.*did you mean 'optimizer'"),
        ("stages.student.stepz=1", "-o stages.student.stepz: unknown key.*did you mean 'steps'"),
        ("stages.student.teachers.3.name=x", r"stages.student.teachers has no such entry.*found:\s+3.*0 to 0"),
        ("stages.student.teachers.first.name=x", "has no such entry"),
        ("stages.student.match.0.loss=kl", "stages.student.match does not exist"),
        ("stages.student.steps.more=1", "nothing is below stages.student.steps"),
        ("stages.student.steps=ten", "-o stages.student.steps: should be a valid integer.*found 'ten'"),
        ("stages.student.steps=[1", "-o stages.student.steps: not YAML"),
        ("stages.student.steps=!!python/name:os.system x", "a YAML tag that is not plain data"),
        ("stages.student.steps", "an override is PATH=VALUE"),
        ("=3", "an override is PATH=VALUE"),
        ("stages=3", "-o stages: should be a valid dictionary"),
    ],
)
def test_bad_overrides_name_themselves_and_the_nearest(override: str, message: str, refused: Refused) -> None:
    """Law: a wrong override is refused by its path, with the nearest key."""
    assert re.search(message, refused(GOOD, override), re.DOTALL)


# ---- digests


def test_the_digest_depends_on_meaning_not_on_writing(load: Load) -> None:
    """Law: comments and written defaults leave the digest, a changed value does not."""
    config = load(GOOD)
    same = load("# a comment\n" + GOOD, "log_every=10", "stages.student.optimizer.clip=1")  # defaults, written out
    assert config_digest(config) == config_digest(same)
    assert config_digest(config) != config_digest(load(GOOD, "seed=1"))
    assert len(config_digest(config)) == 64


def test_the_digest_sees_the_order_of_stages(load: Load) -> None:
    """Law: another order of stages is another configuration."""
    a, b = "  a: {kind: finetune, student: x, steps: 1}\n", "  b: {kind: finetune, student: x, steps: 1}\n"
    head = "name: n\ndata: {d: {source: files}}\nstages:\n"
    assert config_digest(load(head + a + b)) != config_digest(load(head + b + a))


def test_fingerprint_is_the_sha256_of_canonical_json() -> None:
    """Law: fingerprint(x) = sha256 of JSON with sorted keys and no spaces."""
    expected = hashlib.sha256('{"a":[1,2.5,null],"é":true}'.encode()).hexdigest()
    assert fingerprint({"é": True, "a": (1, 2.5, None)}) == expected
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(float("nan"))
    with pytest.raises(TypeError):
        fingerprint({1, 2})


def test_differences_name_every_changed_value() -> None:
    """Law: each changed value is one line with its path, old and new."""
    old: dict[str, Any] = {"stages": {"s": {"steps": 1, "teachers": ["a", "b"], "seed": 0}}, "same": [1, {"x": 2}]}
    new: dict[str, Any] = {"stages": {"s": {"steps": 2, "teachers": ("a",), "lr": None}}, "same": (1, {"x": 2})}
    assert differences(old, new) == [
        "stages.s.steps: 1 -> 2",
        "stages.s.teachers[1]: 'b' -> (absent)",
        "stages.s.seed: 0 -> (absent)",
        "stages.s.lr: (absent) -> None",
    ]
    assert differences(old, old) == []


def test_reading_a_configuration_does_not_import_torch(tmp_path: Path) -> None:
    """Law: reading a configuration imports nothing heavy."""
    (tmp_path / "run.yaml").write_text(GOOD)
    code = (
        "import sys, mtkd.config.read, mtkd.engine.folder\n"
        f"mtkd.config.read.load_config({str(tmp_path / 'run.yaml')!r})\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_stages_made_before_a_field_came_are_told_by_the_same_values() -> None:
    """Finished stages and caches of the time before GLM's tasks are found again."""
    before = (
        "chat documents domains files label labels limit mask_share max_length next_sentence path prompt revision seed "
        "source splits subset task teacher text text_pair transfer validation_share"
    )
    assert sorted(DataConfig(source="files").values()) == before.split()
    assert sorted(DataConfig(source="files").values({"path", "files"})) == sorted({*before.split()} - {"path", "files"})
    said = DataConfig(source="files", task="glm-infill", infill={"mask": 1}, redraw=False).values()
    assert said.keys() - {*before.split()} == {"infill", "redraw"}


def test_blanks_of_another_law_are_made_again() -> None:
    """Before the law had a version, the default mixture was not said at all."""
    assert DataConfig(source="files", task="glm-infill").values()["infill"]["law"] == 2
    assert "infill" not in DataConfig(source="files", task="glm-cloze").values()
