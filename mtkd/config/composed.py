"""Data that are made of other entries: mixed, or written by a stage to the prompts of one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr

from mtkd.config.source import STAGE, SourceConfig

TEXTS = "texts.jsonl"
"""The file of a generate stage's export that later stages read."""


class ComposedConfig(SourceConfig):
    """Where rows come from, and the entries that they are made of; `mtkd.config.run` sets these."""

    _parts: dict[str, Any] = PrivateAttr(default_factory=dict)
    _run: Path | None = PrivateAttr(None)

    @property
    def parts(self) -> Mapping[str, Self]:
        """The `data` entries that are mixed here, by name; {} where there is nothing to mix."""
        return {} if self.source == STAGE else self._parts

    @property
    def answered(self) -> tuple[str, Self]:
        """Name and values of the entry whose prompts `stage` answers."""
        assert self.source == STAGE, "data that a stage writes"
        ((name, part),) = self._parts.items()
        return name, part

    def with_parts(self, parts: Mapping[str, Self], columns: Mapping[str, Any], run: Path | None = None) -> Self:
        """This entry with what it mixes, and the names of the columns that mixed rows have.

        Args:
            run: the folder of the run in which `stage` answers the prompts of the only part.
        """
        made = self.model_copy(update={**columns})
        made._parts, made._run = dict(parts), run
        return made

    @property
    def texts(self) -> Path | None:
        """The file that `stage` wrote; None where it has not, and for other data."""
        found = [] if self._run is None else sorted(self._run.glob(f"stages/[0-9]*-*/export/{TEXTS}"))
        # NN-NAME, and a name may have dashes: no pattern tells 01-very-cold from 02-cold
        return next((file for file in found if file.parents[1].name.partition("-")[2] == self.stage), None)

    @property
    def made_by(self) -> tuple[str, ...]:
        """The stages that write these data or a part of them."""
        return (*((self.stage,) if self.stage else ()), *(s for part in self._parts.values() for s in part.made_by))

    @property
    def state(self) -> str:
        """Which files of stages are there now; "" for none, and for other data."""
        facts = None if self.texts is None else self.texts.stat()
        own = "" if facts is None else f"{facts.st_mtime_ns} {facts.st_size};"
        return own + "".join(part.state for part in self._parts.values())
