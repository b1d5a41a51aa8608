"""Teachers of domains in whole runs: one per domain is the route by name, and a plan refuses what fits nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cache_runs import TEACHERS, values, write

import mtkd.planning.plan
import mtkd.running.run
from mtkd.config.read import load_config
from mtkd.errors import UserError

KINDS = ("law", "code", "law", None)


def of(folder: Path, domains: tuple[Any, Any], column: str | None = "kind", weighting: str = "uniform") -> Path:
    """A run of two teachers, a student of domains, and one that takes the teacher that a row names."""
    made = values(folder, cache={}, student={})
    for name in ("cache", "live"):
        del made["stages"][name]
    made["stages"]["teacher"] = {**made["stages"]["teacher"], "steps": 2}
    made["stages"]["other"] = {**made["stages"]["other"], "steps": 2}
    teachers = [{"name": t, "model": f"stage:{t}", "domain": d} for t, d in zip(TEACHERS, domains, strict=True)]
    student = {**made["stages"]["student"], "steps": 3}
    made["stages"]["student"] = {**student, "teachers": teachers, "weighting": weighting}
    made["stages"]["routed"] = {**student, "teachers": [f"stage:{t}" for t in TEACHERS], "weighting": "route"}
    made["data"]["text"] |= {"domain": column} if column else {}
    made["evaluate"] = {"resamples": 10, "comparisons": []}
    file = write(folder, made)
    for split in (folder / "data").iterdir():
        rows = [json.loads(line) for line in split.read_text().splitlines()]
        for number, row in enumerate(rows):
            row["kind"] = KINDS[number % 4]
            row["teacher"] = TEACHERS[row["kind"] != "law"]
        split.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def test_one_teacher_per_domain_is_the_route_by_name(tmp_path: Path) -> None:
    """Law: the same bits, and a row without a domain is the default teacher's."""
    run = mtkd.running.run.run(load_config(of(tmp_path, ("law", ["code", "default"])))).folder
    student, routed = (next((run / "stages").glob(f"*-{name}")) for name in ("student", "routed"))
    assert (student / "export/model.safetensors").read_bytes() == (routed / "export/model.safetensors").read_bytes()
    scored = json.loads((run / "results.json").read_text())["models"]["student"]["domains"]
    assert sorted(scored) == ["code", "law"]  # test rows without a domain are in the overall score alone


@pytest.mark.parametrize(
    ("domains", "column", "weighting", "texts"),
    [
        (("law", "code"), "kind", "uniform", ("train.jsonl", "line 4", "a row has no domain", "domain: default")),
        (("law", "default"), "kind", "route", ("stages.student.weighting", "one of them decides")),
        (("law", "default"), None, "uniform", ("stages.student.teachers", "set data.NAME.domain")),
        (("laws", "default"), "kind", "uniform", ("no training text has the domain", "did you mean 'law'?")),
    ],
)
def test_a_plan_refuses_domains_that_fit_nothing(
    tmp_path: Path, domains: tuple[str, str], column: str | None, weighting: str, texts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        mtkd.planning.plan.plan(load_config(of(tmp_path, domains, column, weighting)))
    for text in texts:
        assert text in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_cache_stage_has_no_domains(tmp_path: Path) -> None:
    file = of(tmp_path, ("law", "default"))
    made = yaml.safe_load(file.read_text())
    made["stages"]["student"] = {"kind": "cache", "teachers": made["stages"]["student"]["teachers"]}
    file.write_text(yaml.safe_dump(made))
    with pytest.raises(UserError, match="where the cache is read"):
        load_config(file)
