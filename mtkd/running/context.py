"""Hold what the stages of a run share: configuration, folder, processes, tokenizer, data, finished stages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from mtkd.config import RunConfig, StageRef
from mtkd.data.load import LoadedData, load_data
from mtkd.data.progress import say
from mtkd.data.raw import Raw
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir, StageDir
from mtkd.engine.notes import Done
from mtkd.planning.data import DataReader
from mtkd.planning.exports import check_foreign, open_export
from mtkd.planning.locate import given_tokenizer, resolve_path, trained_tokenizer
from mtkd.planning.places import placed
from mtkd.planning.spec import StageSpec


class RunContext:
    """The shared state of a run's stages.

    Args:
        config: the run, resolved.
        run: its folder.
        dist: this process's rank.
        device: where tensors live.
        reader: of its data, if the plan has read them already.
        specs: of the stages, from the plan; empty for a run that is done.
    Attributes:
        dtype: of the matrix products.
        records: DONE records of finished stages, from the main rank: over a network file system other ranks may see
            the file seconds later.
    """

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        dist: Dist,
        device: torch.device,
        reader: DataReader | None = None,
        specs: Mapping[str, StageSpec] | None = None,
    ) -> None:
        self.config, self.run, self.dist, self.device, self.specs = config, run, dist, device, specs or {}
        self.dtype = torch.bfloat16 if config.engine.in_bf16 else torch.float32
        self.records: dict[str, Done] = {}
        self._reader = reader or DataReader(config.base)
        self._data: dict[str, LoadedData] = {}

    def folder(self, stage: str) -> StageDir:
        """The folder of a stage of this run."""
        return self.run.stage(list(self.config.stages).index(stage) + 1, stage)

    def record(self, stage: str) -> Done:
        """The DONE record of a finished stage."""
        record = self.records.get(stage) or self.folder(stage).done()
        assert record is not None, "earlier stages are done before later ones start"
        return record

    def raw(self, name: str) -> Raw:
        """The rows of a `data` entry, read once."""
        with placed(data=f"data.{name}"):
            for stage in self.config.data[name].made_by:
                self.export_of(StageRef(stage))
            return self._reader.raw(self.config.data[name])

    def data(self, name: str) -> LoadedData:
        """A `data` entry as token ids, made once."""
        if name not in self._data:
            with placed(data=f"data.{name}"):
                loaded = load_data(name, self.config.data[name], self.raw(name), self.tokenizer)
            self._data[name] = loaded
            for note in (*self.raw(name).notes, *(split.note for split in loaded.splits.values() if split.note)):
                say(f"data.{name}: {note}", main=self.dist.is_main)
        return self._data[name]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's one tokenizer: trained (and kept in the run folder), configured, or the first loaded model's."""
        settings = self.config.tokenizer
        if settings is not None and settings.train_on is not None:
            return trained_tokenizer(self.config, self.raw(settings.train_on), self.run.path, self.dist)
        return given_tokenizer(self.config)

    def resolve(self, path: str) -> Path | str:
        """Resolve stage:NAME[/MEMBER] to its export, a folder to its path, a card to its source; a hub id stays.

        The export of a run is compared with its seal, once per process.
        """
        if (ref := StageRef.parse(path)) is not None:
            return self.export_of(ref)
        place = resolve_path(path, self.config.base)
        if isinstance(place, Path):
            check_foreign(place)
        return place

    def export_of(self, ref: StageRef) -> Path:
        """The folder of an earlier stage's export, compared with its seal."""
        return open_export(ref.stage, self.folder(ref.stage), self.record(ref.stage), ref.part)
