"""The rows of several `data` entries as one source, each with the names of its entry, row and domain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.choice import SPLITS
from mtkd.data.encode import PART, teachers_of
from mtkd.data.files import Origin, read_domains, read_texts, values_of
from mtkd.data.prompts import prompt_texts
from mtkd.data.raw import Raw
from mtkd.data.turns import Turn, learned, read_turns
from mtkd.errors import DataError, UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig


@dataclass(frozen=True)
class MixedOrigin(Origin):
    """Where mixed rows come from: `begins` is the first row of each of `origins`."""

    origins: tuple[Origin, ...] = ()

    def where(self, index: int) -> str:
        """The place of a row in the entry that it is of."""
        row = int(self.rows[index])
        part = int(np.searchsorted(self.begins, row, side="right")) - 1
        return self.origins[part].where(row - self.begins[part])

    def select(self, indices: np.ndarray) -> MixedOrigin:
        """The origin of a selection of rows."""
        return MixedOrigin(self.name, self.rows[indices], (), self.begins, self.origins)


def mixed_rows(config: DataConfig, raws: Mapping[str, Raw]) -> Raw:
    """The rows of entries one after another.

    Args:
        config: of the mix. raws: rows of each entry, after its own hold-out and limit.
    Raises:
        DataError: rows that hold no text, or no train split.
    """
    from datasets import Dataset

    for name, raw in raws.items():
        if "train" not in raw.splits:
            raise DataError("there is no train split to mix", where=f"data.{name}", allowed=list(raw.splits))
    splits, origins = {}, {}
    for split in SPLITS:
        parts = {name: raw for name, raw in raws.items() if split in raw.splits}
        if not parts:
            continue
        made = [_Rows(name, config.parts[name], raw, split) for name, raw in parts.items()]
        columns = [part.columns() for part in made]
        splits[split] = Dataset.from_dict({key: [v for each in columns for v in each[key]] for key in columns[0]})
        sizes = [len(part.kept) for part in made]
        begins = tuple(int(begin) for begin in np.cumsum([0, *sizes[:-1]]))
        every = tuple(part.origin for part in made)
        name = " and ".join(parts)
        origins[split] = MixedOrigin(name, np.arange(sum(sizes)), (), begins, every)
    prints = {
        name: [raw.fingerprint, config.parts[name].values({"path", "files", "revision"})] for name, raw in raws.items()
    }
    digest = hashlib.sha256(json.dumps(prints, sort_keys=True).encode()).hexdigest()
    described = "; ".join(f"{name}: {raw.description}" for name, raw in raws.items())
    notes = [f"{name}: {note}" for name, raw in raws.items() for note in raw.notes]
    for split in splits:
        if without := [name for name, raw in raws.items() if split not in raw.splits]:
            notes.append(f"the {split} split has nothing of {', '.join(without)}, which came without one")
    return Raw(splits, digest, described, origins, notes=tuple(notes))


def check_parts(config: DataConfig, raw: Raw) -> None:
    """Refuse a mix whose own hold-out or limit has left nothing of a part; raises UserError."""
    there = {*values_of(raw.splits["train"], PART)}
    if lost := [name for name in config.parts if name not in there]:
        field = "limit.train" if "train" in config.limit else "validation_share"
        raise UserError(
            f"no row of data.{lost[0]} is left in the mix",
            where=f"@data.{field}",
            found=f"{len(raw.splits['train']):,} rows, all of {', '.join(sorted(there))}",
            todo=f"set it in data.{lost[0]} and the other parts, which keep their share by weight",
        )


def plain_rows(name: str, config: DataConfig, raw: Raw, split: str) -> dict[str, list[str]]:
    """The rows of one entry's split with the columns of a mix: `prompt` and `text`, or `messages`; `name`, `domain`."""
    return _Rows(name, config, raw, split).columns()


class _Rows:
    """The rows of an entry's split, as all rows of the mix look; those without a text are left out."""

    def __init__(self, name: str, config: DataConfig, raw: Raw, split: str) -> None:
        self._name, self._config, self._split = name, config, split
        self._names, self._domains = config.name or raw.names, config.domain or raw.domains
        rows, origin = raw.splits[split], raw.origin(split)
        needed = [config.text] if config.prompt is None or not config.prompts_only else []
        texts = [read_texts(rows, column, origin, "text") for column in needed if config.messages is None]
        if config.prompt is not None and (config.chat or config.prompts_only):
            texts.append(prompt_texts(rows, config, origin))
        filled = [all(text[row].strip() for text in texts) for row in range(len(rows))]
        self.kept = np.flatnonzero(filled)
        if not len(self.kept):
            raise DataError("all texts are blank", where=origin.name, found=f"{len(rows)} blank rows")
        self._rows: Dataset = rows.select(self.kept)
        self.origin = origin.select(self.kept)

    def columns(self) -> dict[str, list[str]]:
        """A list per column of the mix."""
        rows, origin = self._rows, self.origin
        names = [f"{self._split}:{row + 1}" for row in origin.rows]
        if self._names:
            names = read_texts(rows, self._names, origin, "name")
        domains = read_domains(rows, self._domains, origin) if self._domains else [self._name] * len(rows)
        return {
            **self._texts(),
            "name": [f"{self._name}/{name}" for name in names],
            "domain": domains,
            PART: [self._name] * len(rows),
            "teacher": teachers_of(rows, self._config.teacher) or [""] * len(rows),
        }

    def _texts(self) -> dict[str, list[str]]:
        config, rows, origin = self._config, self._rows, self.origin
        if config.messages is not None:
            texts = read_texts(rows, config.messages, origin, "messages")
            return {"messages": [_last_only(text) for text in texts] if config.mask_history else texts}
        answers = [] if config.prompts_only else read_texts(rows, config.text, origin, "text")
        if config.prompt is None:
            return {"text": answers}
        prompts = prompt_texts(rows, config, origin)
        if config.chat:
            return {"messages": _as_turns(prompts, answers)}
        return {"prompt": prompts, "text": answers} if answers else {"prompt": prompts}


def _as_turns(prompts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Prompts with their answers, if there are any, as JSON of chats."""
    chats: list[list[Turn]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for turns, answer in zip(chats, answers, strict=False):
        turns.append({"role": "assistant", "content": answer})
    return [json.dumps(turns, ensure_ascii=False) for turns in chats]


def _last_only(text: str) -> str:
    """The chat with the weight 0 in all answers but the last one."""
    turns = read_turns(text)
    for turn in turns[:-1]:
        if learned(turn):
            turn["weight"] = 0
    return json.dumps(turns, ensure_ascii=False)
