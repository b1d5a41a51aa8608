"""Every number of a configuration has bounds: nonsense is refused by its key, and what is allowed makes a plan."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import tiny_config, write_yaml

from mtkd.config import RunConfig
from mtkd.config.read import load_config
from mtkd.engine.hostfile import read_hostfile
from mtkd.errors import UserError
from mtkd.planning.plan import plan

TEACHER = "stages.teacher"


def schemas(node: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every part of a JSON Schema that describes a number."""
    if isinstance(node, dict):
        if node.get("type") in ("integer", "number") and "enum" not in node:
            yield place, node
        for key, child in node.items():
            yield from schemas(child, f"{place}/{key}")
    elif isinstance(node, list):
        for child in node:
            yield from schemas(child, place)


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    """Law: no number of the configuration is open-ended, by its JSON Schema."""
    found = dict(schemas(RunConfig.model_json_schema()))
    assert len(found) > 50
    open_ended = [
        place
        for place, schema in found.items()
        if not {"minimum", "exclusiveMinimum"} & schema.keys() or not {"maximum", "exclusiveMaximum"} & schema.keys()
    ]
    assert open_ended == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**63),
        ("seed", -1),
        ("data.text.seed", 18446744073709551615),
        (f"{TEACHER}.seed", 2**32),
        (f"{TEACHER}.optimizer.betas", [1.0, 1.0]),
        (f"{TEACHER}.optimizer.lr", 1e300),
        (f"{TEACHER}.optimizer.eps", 0),
        (f"{TEACHER}.steps", 10**12),
        (f"{TEACHER}.steps", True),
        (f"{TEACHER}.student.layers", 10**7),
        (f"{TEACHER}.student.width", 10**9),
        (f"{TEACHER}.student.heads", 0),
        (f"{TEACHER}.student.max_positions", 10**12),
        (f"{TEACHER}.batch.sequences", 10**12),
        (f"{TEACHER}.batch.accumulate", 2**63),
        ("tokenizer.vocab_size", 10**12),
        ("data.text.max_length", 10**12),
        ("engine.threads", 10**9),
        ("engine.processes", 10**9),
        ("engine.timeout_seconds", 1e300),
        ("evaluate.resamples", 10**12),
        ("evaluate.confidence", 1.0),
        ("stages.student.method", {"name": "kd", "options": {"temperature": 1e300}}),
        ("stages.student.method", {"name": "kd", "options": {"soft": 10**30}}),
        ("stages.student.match", [{"options": {"temperature": 1e-300}}]),
        ("stages.student.weighting", {"name": "fixed", "options": {"weights": {"teacher": 1e300}}}),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_by_its_key(tmp_path: Path, key: str, value: object) -> None:
    """Law: a number out of its bounds is a usage error that names its key."""
    with pytest.raises(UserError) as caught:
        plan(load_config(write_yaml(tmp_path), [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"]))
    assert caught.value.exit_code == 2
    assert key.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e400"])
def test_a_number_that_is_not_finite_is_refused_by_its_line(tmp_path: Path, value: str) -> None:
    """Law: NaN and infinity are refused, from YAML and from Python."""
    with pytest.raises(UserError, match=r"-o stages\.teacher\.optimizer\.lr: .*finite"):
        load_config(write_yaml(tmp_path), [f"{TEACHER}.optimizer.lr={value}"])
    with pytest.raises(ValueError, match="finite"):
        RunConfig.model_validate({"name": "x", "engine": {"timeout_seconds": float(value.replace(".", "", 1))}})


def test_a_host_has_at_most_four_digits_of_processes(tmp_path: Path) -> None:
    """Law: a hostfile's number of slots is bounded too."""
    (tmp_path / "hosts").write_text("node-1 slots=1000000000000\n")
    with pytest.raises(UserError, match="not a node and its processes"):
        read_hostfile(str(tmp_path / "hosts"))


AT_THE_BOUNDS = [
    *(f"seed={value}" for value in (0, 2**32 - 1)),
    *(f"{TEACHER}.student.width={value}" for value in (2, 1_000_000)),
    f"{TEACHER}.student.intermediate=1000000",
    f"{TEACHER}.student.max_positions=10000000",
    f"{TEACHER}.steps=1000000000",
    "stages.student.batch.sequences=10000000",
    "stages.student.batch.accumulate=10000000",
    f"{TEACHER}.optimizer={{lr: 1e38, eps: 1e-30, clip: 1e38, betas: [0, 0.999999], weight_decay: 1e38}}",
    "stages.student.method={name: kd, options: {temperature: 1000000}}",
    "engine.tile=1",
    "data.text.limit={train: 1000000000}",
    "evaluate.resamples=10000000",
]


@pytest.mark.parametrize("override", AT_THE_BOUNDS)
def test_what_the_bounds_allow_is_planned(tmp_path: Path, override: str) -> None:
    """Or refused as it is by its key; never an error of ours, and no work that grows with the number."""
    config = load_config(write_yaml(tmp_path), [override])
    assert len(plan(config, memory=True).stages) == len(config.stages)


def test_memory_of_many_tiles_is_that_of_three(tmp_path: Path) -> None:
    """A weighting's traits of a batch 1,000 times as large: the plan does not compute them tile by tile."""
    student = {"weighting": "confidence", "batch": {"sequences": 8_000}}
    config = tiny_config(tmp_path, stages={"student": student}, engine={"tile": 4})
    assert plan(config, memory=True).stages[1].memory is not None
