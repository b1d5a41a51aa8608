"""The cached backend: what a teacher said once is read from disk by `Batch.keys`, and the teacher is not run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtkd.config import TeacherConfig
from mtkd.data.batch import STUDENT, Batch
from mtkd.models.features import Features, split_key
from mtkd.models.info import ModelInfo
from mtkd.pool.backend import Backend, Gives, Outlook, Stock
from mtkd.pool.cache import CacheReader
from mtkd.pool.cache.folder import open_cache


class CachedTeacher:
    """The cache of a teacher in the place of the teacher.

    Args:
        name: in metrics and options.
        reader: of its cache, checked against the run. Every rank reads its own examples.
        info, num_parameters: of the model that the cache was made of.
    """

    def __init__(self, name: str, reader: CacheReader, info: ModelInfo, num_parameters: int) -> None:
        self.name, self.info, self.num_parameters, self.view = name, info, num_parameters, STUDENT
        self.num_columns, self.embedding_table = reader.content.columns, None
        self._reader: CacheReader | None = reader
        self._provides = frozenset({"logits", *(split_key(key)[0] for key in reader.content.hidden)})

    def provides(self) -> frozenset[str]:
        return self._provides

    def ahead(self, batch: Batch) -> None:
        pass

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of the batch's examples, looked up by their keys.

        Raises:
            DataError: an example that the cache does not have, or of another length than when it was made.
        """
        assert self._reader is not None
        return self._reader.read(batch.on_host.keys.tolist()).features(self.name, batch, wants)

    def record(self) -> dict[str, Any]:
        assert self._reader is not None
        return self._reader.origin.model

    def close(self) -> None:
        self._reader = None


class Cached(Backend):
    """A cache on disk has what the teacher said once; it takes no memory."""

    stored = True

    def describe(self, teacher: TeacherConfig, outlook: Outlook) -> Gives:
        return outlook.cache()

    def origin(self, teacher: TeacherConfig) -> str:
        return f"cache {teacher.model.path}"

    def source(self, teacher: TeacherConfig, model: Callable[[], str], cache: Callable[[], str], base: Path) -> str:
        return cache() if teacher.model.stage is None else model()

    def open(self, teacher: TeacherConfig, stock: Stock) -> CachedTeacher:
        where = f"{stock.site.where}.model"
        reader, facts = open_cache(stock.cache(), stock.asked.auto_class, where)
        reader.check(stock.cache_origin(reader.origin), where)
        stock.confirm()  # after it said what else it may be: another teacher's
        return CachedTeacher(teacher.name, reader, facts.info, facts.num_parameters)
