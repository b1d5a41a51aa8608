"""A whole run on a mix: a cache of it, a student that is killed in the middle of an epoch, scores of each part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from cache_runs import EXACT, config, largest_difference, values, weights, write
from tiny_run import NAME

import mtkd


def mixed(folder: Path) -> dict[str, Any]:
    """Three of four examples of an epoch are of `small`, which has 6 rows of the 54 in the train split."""
    made = values(folder, cache=EXACT, student={"save_every": 3})
    made["data"]["text"].pop("path")
    large = made["data"]["text"] | {"path": "data"}
    del made["stages"]["other"]
    for stage in made["stages"].values():
        if "teachers" in stage:
            stage["teachers"] = stage["teachers"][:1]
    made["data"] = {
        "large": large,
        "small": {**large, "files": dict.fromkeys(("train", "test"), "small.jsonl")},
        "text": {"source": "mix", "mix": {"large": 1, "small": 3}},
    }
    for stage in made["stages"].values():
        stage["data"] = "text"
    made["evaluate"] = {"data": "text", "resamples": 50}
    write(folder, made)
    rows = [{"text": f"one word follows another {n}", "label": "a"} for n in range(6)]
    (folder / "data" / "small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


@pytest.mark.slow
def test_a_killed_student_of_a_cached_mix_is_the_same_student(tmp_path: Path) -> None:
    """Bit for bit; and the one with the live teacher agrees: the cache answers for the rows that are asked."""
    one, two = tmp_path / "one", tmp_path / "two"
    result = mtkd.run(config(one, mixed(one)))
    assert largest_difference(result.folder, "student", "live") < 1e-3
    assert set(result.results["models"]["student"]["domains"]) == {"large", "small"}
    file = two / "run.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(mixed(two), sort_keys=False))
    code, output = processes.run(two, "run", str(file), environment={"MTKD_TEST_KILL_AT": "after-rename@6"})
    assert code == -9, output
    code, output = processes.run(two, "run", str(file))
    assert (code, "resumed at step 6" in output) == (0, True), output
    whole, again = (weights(place / "runs" / NAME, "student") for place in (one, two))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
