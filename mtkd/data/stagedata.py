"""Data that a stage writes: its texts as the train split, and the held-out rows of the prompts that it answers.

While the stage is still to be run, a placeholder stands for each answer, so that the run can be planned.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.data.encode import PART
from mtkd.data.files import Origin
from mtkd.data.mixed import plain_rows
from mtkd.data.raw import Raw
from mtkd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig

PLACEHOLDER = "..."
"""Stands for an answer that is not written yet."""


def stage_rows_of(config: DataConfig, prompts: Raw) -> Raw:
    """The rows of a `source: stage` entry.

    Args:
        prompts: rows of the entry that the stage answers, after hold-out and limit.
    Raises:
        DataError: the stage kept no text, or the file is not what it wrote.
    """
    name, part = config.answered
    file = config.texts
    if file is None:
        columns = plain_rows(name, part, prompts, "train")
        columns = _answered(columns, [PLACEHOLDER] * len(columns["name"]))
        digest = "to be written"
        note = f"stage '{config.stage}' is still to write these texts: {PLACEHOLDER} stands for each"
    else:
        columns, digest, note = _read(file), hashlib.sha256(file.read_bytes()).hexdigest(), ""
    splits = {"train": _dataset(columns)}
    origins = {"train": Origin(f"texts of stage '{config.stage}'", np.arange(len(columns["name"])))}
    for split in ("validation", "test"):
        if split in prompts.splits and not part.prompts_only:
            held_out = plain_rows(name, part, prompts, split)
            splits[split] = _dataset(held_out)
            origins[split] = Origin(f"data.{name} {split}", np.arange(len(held_out["name"])))
    fingerprint = hashlib.sha256(f"{digest} {prompts.fingerprint}".encode()).hexdigest()
    described = f"texts of stage '{config.stage}': {len(columns['name'])} rows"
    return Raw(splits, fingerprint, described, origins, notes=(note,) if note else ())


def _answered(columns: dict[str, list[str]], answers: list[str]) -> dict[str, list[str]]:
    """Rows of prompts with an answer each, in the place of those that they have."""
    if "messages" not in columns:
        return {**columns, "text": answers}
    chats = [json.dumps(answered_turns(json.loads(chat), answer), ensure_ascii=False)
             for chat, answer in zip(columns["messages"], answers, strict=True)]  # fmt: skip
    return {**columns, "messages": chats}


def answered_turns(turns: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    """A chat up to its last answer, and another answer there."""
    asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    return [*asked, {"role": "assistant", "content": answer}]


def _read(file: Path) -> dict[str, list[str]]:
    try:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    except ValueError as error:
        raise DataError("the file is damaged", where=str(file), found=str(error)) from None
    if not rows:
        raise DataError(
            "the stage kept no text", where=str(file), todo="look at all.jsonl next to it, and set another write.keep"
        )
    asked = "messages" if "messages" in rows[0] else "prompt"
    columns = {key: [str(row[key]) for row in rows] for key in ("name", "domain", PART)}
    columns["teacher"] = [str(row["writer"]) for row in rows]
    if asked == "messages":
        columns["messages"] = [json.dumps(row["messages"], ensure_ascii=False) for row in rows]
    else:
        columns |= {key: [str(row[key]) for row in rows] for key in ("prompt", "text")}
    return columns


def _dataset(columns: dict[str, list[str]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict(columns)
