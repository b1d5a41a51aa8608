"""A stage is another one when its tokenizer cuts texts in another way, though every token keeps its id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data.data_examples import sentences
from tiny_run import NAME, tiny_config
from transformers import PreTrainedTokenizerFast

from mtkd.config.read import differences, fingerprint
from mtkd.data.tokenizers import train_tokenizer
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir
from mtkd.engine.notes import Done
from mtkd.errors import DataError
from mtkd.running.context import RunContext
from mtkd.running.identity import as_known, check_checkpoint, finished, stage_identity

LAYOUT = {"engine": "torch", "world_size": 1, "zero_stage": 0}


class Finished:
    """A stage folder with a DONE record of this identity."""

    path = Path("stages/01-teacher")

    def __init__(self, identity: dict[str, Any]) -> None:
        counts = {"steps": 1, "seconds": 1.0, "tokens": 1, "parameters": 1}
        self.record = Done.of(
            {
                "stage": "teacher",
                "kind": "finetune",
                **counts,
                "fingerprint": fingerprint(identity),
                "identity": identity,
            }
        )

    def done(self) -> Done:
        return self.record


def identity_of(folder: Path) -> dict[str, Any]:
    config = tiny_config(folder, tokenizer={"path": str(folder / "tokenizer"), "train_on": None})
    context = RunContext(config, RunDir(folder / "runs" / NAME), Dist(), torch.device("cpu"))
    return stage_identity(context, "teacher")


def test_other_merges_make_another_stage(tmp_path: Path) -> None:
    """And nothing else does; a stage of an earlier release, which does not know how texts were cut, stays finished."""
    train_tokenizer(sentences(200), 300).save_pretrained(tmp_path / "tokenizer")
    first = identity_of(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "tokenizer")
    assert identity_of(tmp_path) == first
    file = tmp_path / "tokenizer/tokenizer.json"
    spec = json.loads(file.read_text())
    spec["model"]["merges"].reverse()
    file.write_text(json.dumps(spec))
    second = identity_of(tmp_path)
    assert [line.split(":")[0] for line in differences(first, second)] == ["segmentation"]
    with pytest.raises(DataError, match="finished, but with another"):
        finished(Finished(first), "teacher", second)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="segmentation") as caught:
        check_checkpoint("teacher", {"identity": first, **LAYOUT}, second, LAYOUT, tmp_path / "step-3")
    assert str(tmp_path / "step-3") in str(caught.value.found)  # which of the files on disk it is
    before = {key: value for key, value in first.items() if key != "segmentation"}
    assert finished(Finished(before), "teacher", first) is not None  # type: ignore[arg-type]
    check_checkpoint("teacher", {"identity": before, **LAYOUT}, first, LAYOUT)
    assert as_known(first, second) == second
