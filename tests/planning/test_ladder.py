"""Derived shapes of a chain: valid, a geometric series in parameters, layers taken from the model above."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import write_yaml

from mtkd.config.read import load_config
from mtkd.errors import UserError
from mtkd.planning.ladder import even_layers
from mtkd.planning.plan import plan, resolve

TOLERANCE = 0.15
"""Of the log parameters: what is near enough when layers and widths are whole numbers."""


def chain_file(folder: Path, top: dict[str, Any], student: dict[str, Any], **chain: Any) -> Path:
    architecture = {"architecture": chain.pop("architecture", "llama")}
    written = {
        "mode": "takd",
        "teachers": ["stage:teacher"],
        "student": architecture | student,
        "steps": 2,
        **chain,
    }
    return write_yaml(
        folder,
        stages={"teacher": {"student": architecture | top}, "student": None},
        chain=written,
        evaluate={"ensembles": [], "comparisons": []},
    )


def shape(layers: int, width: int, heads: int) -> dict[str, Any]:
    return {"layers": layers, "width": width, "heads": heads}


@pytest.mark.parametrize(
    ("top", "bottom", "extra", "rungs"),
    [
        (shape(12, 768, 12), shape(2, 64, 2), {}, 3),
        (shape(12, 384, 12), shape(3, 96, 4), {"intermediate": 256}, 4),
        (shape(6, 256, 8), shape(1, 64, 4), {"kv_heads": 2}, 2),
    ],
)
def test_sizes_are_geometric_and_shapes_valid(
    tmp_path: Path, top: dict[str, Any], bottom: dict[str, Any], extra: dict[str, Any], rungs: int
) -> None:
    config = load_config(chain_file(tmp_path, top, bottom | extra, num_rungs=rungs))
    assert list(config.stages) == ["teacher"]  # not known before the teacher has been looked at
    made = plan(config)
    sizes = [stage.models[0].parameters for stage in made.stages[: rungs + 2]]  # counted on whole models
    for i, size in enumerate(sizes):
        wanted = sizes[0] ** (1 - i / (rungs + 1)) * sizes[-1] ** (i / (rungs + 1))
        assert abs(math.log(size / wanted)) < TOLERANCE, sizes
    models = [stage.models[0] for stage in made.stages[: rungs + 2]]
    for upper, lower in pairwise(models):
        assert lower.parameters < upper.parameters
        assert lower.width % lower.heads == 0
        assert (lower.width // lower.heads) % 2 == 0
        assert bottom["layers"] <= lower.layers <= top["layers"]
        assert bottom["width"] <= lower.width <= top["width"]
        assert lower.width % 16 == 0
    described = resolve(config).stages["assistant-1"].student
    assert bool(described.kv_heads) == ("kv_heads" in extra)
    assert bool(described.intermediate) == ("intermediate" in extra)


def test_the_run_folders_copy_has_the_same_stages(tmp_path: Path) -> None:
    config = resolve(load_config(chain_file(tmp_path, shape(4, 64, 4), shape(1, 16, 2), num_rungs=2)))
    file = tmp_path / "copy.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False))
    copy = load_config(file)
    assert copy == config
    assert list(copy.stages) == ["teacher", "assistant-1", "assistant-2", "student", "direct"]
    assert resolve(copy) is copy


def test_classifiers_have_a_ladder_too(tmp_path: Path) -> None:
    file = chain_file(tmp_path, shape(6, 128, 4), shape(1, 32, 2), architecture="bert", num_rungs=1)
    values = yaml.safe_load(file.read_text())
    values["data"]["text"] |= {"task": "classify", "labels": ["a", "b", "c"]}
    for data in (tmp_path / "data").glob("*.jsonl"):
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        data.write_text("".join(json.dumps({**row, "label": "abc"[i % 3]}) + "\n" for i, row in enumerate(rows)))
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    made = plan(load_config(file))
    sizes = [stage.models[0].parameters for stage in made.stages]
    assert abs(math.log(sizes[1] / math.sqrt(sizes[0] * sizes[2]))) < TOLERANCE


def test_layers_of_the_model_above(tmp_path: Path) -> None:
    rungs = [shape(6, 32, 4), shape(3, 32, 4)]
    file = chain_file(tmp_path, shape(12, 32, 4), shape(2, 32, 4), rungs=rungs, initial="teacher")
    config = resolve(load_config(file))
    starts = {name: (s.student.path, s.student.keep_layers) for name, s in list(config.stages.items())[1:]}
    assert starts == {
        "assistant-1": ("stage:teacher", (2, 4, 6, 8, 10, 12)),
        "assistant-2": ("stage:assistant-1", (2, 4, 6)),
        "student": ("stage:assistant-2", (2, 3)),
        "direct": ("stage:teacher", (6, 12)),
    }
    assert [stage.models[0].layers for stage in plan(config).stages] == [12, 6, 3, 2, 2]


@pytest.mark.parametrize("sizes", [{"rungs": [shape(6, 32, 4), shape(3, 16, 2)]}, {"num_rungs": 2}])
def test_slices_of_the_model_above(tmp_path: Path, sizes: dict[str, Any]) -> None:
    file = chain_file(tmp_path, shape(12, 64, 8), shape(2, 16, 2), initial="slice", **sizes)
    config = resolve(load_config(file))
    above = {"assistant-1": "teacher", "assistant-2": "assistant-1", "student": "assistant-2", "direct": "teacher"}
    for name, other in above.items():
        student = config.stages[name].student
        assert student.path == f"stage:{other}"
        assert student.slice is not None
        assert student.keep_layers is not None
    planned = plan(config).stages
    last = planned[-2].models[0]
    assert (last.layers, last.width, last.heads) == (2, 16, 2)
    assert last.parameters == planned[-1].models[0].parameters  # the control has the student's shape


def test_derived_sizes_keep_the_width_of_layers_from_above(tmp_path: Path) -> None:
    file = chain_file(tmp_path, shape(12, 32, 4), shape(2, 32, 4), num_rungs=1, initial="teacher")
    rung = resolve(load_config(file)).stages["assistant-1"].student
    assert rung.path == "stage:teacher"
    assert rung.keep_layers is not None
    assert 4 <= len(rung.keep_layers) <= 6


@pytest.mark.parametrize("count", range(1, 13))
def test_even_layers_are_different_and_end_at_the_last(count: int) -> None:
    layers = even_layers(count, 12)
    assert len(set(layers)) == count
    assert layers == sorted(layers)
    assert layers[-1] == 12
    gaps = [b - a for a, b in zip([0, *layers[:-1]], layers, strict=True)]
    assert max(gaps) - min(gaps) <= 1


def test_what_cannot_be_derived_is_refused(tmp_path: Path) -> None:
    def told(**chain: Any) -> str:
        with pytest.raises(UserError) as caught:
            resolve(load_config(chain_file(tmp_path, shape(2, 32, 4), chain.pop("student"), **chain)))
        return str(caught.value)

    assert "smaller than its largest teacher" in told(student=shape(4, 64, 4), num_rungs=1)
    assert "not so many different shapes" in told(student=shape(1, 32, 4), num_rungs=3)
    text = told(student=shape(1, 16, 4), rungs=[shape(2, 32, 4)], initial="teacher")
    assert "chain.student: cannot begin with layers of the model above it" in text
    assert "llama 1x16, 4 heads" in text
    text = told(student=shape(1, 16, 4), rungs=[shape(2, 48, 4)], initial="slice")
    assert "chain.rungs[0]: cannot be sliced from the model above it" in text
    for initial in ("teacher", "slice"):  # inherited: nobody would read these
        text = told(student=shape(1, 32, 4) | {"max_positions": 99}, rungs=[shape(2, 32, 4)], initial=initial)
        assert "has these from there" in text
        assert "max_positions" in text


def test_the_recipes_are_ladders() -> None:
    """Both from about 3.7 million parameters down to an eighth of one, each rung about a third of the one before."""
    folder = Path(__file__).parents[2] / "configs" / "chains"
    for file, overrides in (("takd.yaml", []), ("dgkd.yaml", [])):
        stages = plan(load_config(folder / file, overrides)).stages
        assert [s.name for s in stages] == ["teacher", "assistant-1", "assistant-2", "student", "direct"]
        sizes = [s.models[0].parameters for s in stages]
        assert all(2 < upper / lower < 5 for upper, lower in pairwise(sizes[:4]))
        assert stages[3].models[0] == stages[4].models[0]
