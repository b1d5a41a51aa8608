"""Open finished caches, and check them against a run's tokenizer, precision and data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mtkd.data.batch import Batch
from mtkd.data.load import LoadedData
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.engine.manifest import manifest_digest
from mtkd.errors import UserError
from mtkd.models.features import DenseLogits, Features, SparseLogits, SparseRows
from mtkd.models.info import ModelInfo
from mtkd.models.numbers import Numbers
from mtkd.pool.cache.content import CacheContent, CacheOrigin
from mtkd.pool.cache.made_of import CALIBRATION, shape_of
from mtkd.pool.cache.reader import CacheReader


@dataclass(frozen=True)
class CacheFacts:
    """What is known of a teacher's cache before it is read.

    Attributes:
        content: kinds of values in it.
        info, num_parameters: of its teacher.
        settings: the stage or folder to name where more is needed.
        origin: None while the cache is only planned.
        calibrated: what is stored are the logits of a calibrated teacher.
    """

    content: CacheContent
    info: ModelInfo
    num_parameters: int
    settings: str
    origin: CacheOrigin | None = None
    calibrated: bool = False

    @property
    def numbers(self) -> Numbers:
        """The size of its model, which takes no memory here."""
        return Numbers(self.num_parameters)

    def stand_in(self, wants: frozenset[str], batch: Batch) -> Features:
        """Features of the shapes that the cache gives, without values, for a count of memory."""
        (sequences, length), content = batch.input_ids.shape, self.content
        width, positions = self.info.width, sequences * length
        features: Features = {
            key: torch.zeros((sequences, width) if key.startswith("cls") else (sequences, length, width))
            for key in wants - {"logits"}
        }
        if not content.per_token:
            other = torch.zeros(sequences, content.others) if content.others else None
            features["logits"] = DenseLogits(torch.zeros(sequences, content.columns), other)
            return features
        tail = torch.zeros(positions) if content.targets == "top" else None
        ids = torch.zeros((positions, content.k), dtype=torch.int64)
        values = SparseRows(ids, torch.zeros(ids.shape), tail, content.temperature)
        text = {name: torch.zeros(sequences, length) for name in content.text_traits}
        traits = {name: torch.zeros(positions) for name in content.stored_traits if name not in text}
        at = torch.zeros(positions, dtype=torch.int64)
        features["logits"] = SparseLogits("cached", at, values, content.columns, traits, text)
        return features


def read_facts(path: str, base: Path, auto_class: str, where: str) -> CacheFacts:
    """Read the facts of a finished cache.

    Raises:
        DataError: there is no cache, or not one that can be read here.
    """
    return open_cache(cache_folder(path, base, where), auto_class, where)[1]


def open_cache(folder: Path, auto_class: str, where: str) -> tuple[CacheReader, CacheFacts]:
    """Open a finished cache and read its facts.

    Args:
        auto_class: the teacher's head, from the task.
    Raises:
        DataError: as `CacheReader`.
    """
    reader = CacheReader(folder)
    info, parameters = shape_of(reader.origin.model, auto_class, where)
    if reader.content.targets == "classes":  # the cache keeps the data's classes; its teacher may have more
        info = replace(info, num_labels=reader.content.columns)
    facts = CacheFacts(reader.content, info, parameters, str(folder), reader.origin, CALIBRATION in reader.origin.model)
    return reader, facts


def cache_digest(folder: Path) -> str:
    """The digest of a finished cache: that of its manifest, which has the digests of all files.

    Raises:
        DataError: the folder is no finished cache.
    """
    CacheReader(folder)
    return manifest_digest(folder)


def cache_folder(path: str, base: Path, where: str) -> Path:
    """The folder of a cache, relative to `base` or to the working directory.

    Raises:
        UserError: there is none.
    """
    for candidate in (base / path, Path(path)):
        if candidate.is_dir():
            return candidate
    raise UserError(
        "there is no folder of a cache here",
        where=where,
        found=path,
        todo="give a folder that a cache stage made (stages/NN-NAME/export/TEACHER), or stage:CACHESTAGE/TEACHER",
    )


def check_tokenizer_of(facts: CacheFacts, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse the cache of a teacher with another tokenizer than the run's."""
    assert facts.origin is not None
    facts.origin.check(replace(facts.origin, tokenizer=tokenizer_fingerprint(tokenizer)), where)


def check_precision_of(facts: CacheFacts, precision: str, where: str) -> None:
    """Refuse the cache of a teacher that ran in another precision than this run's teachers would."""
    if facts.origin is not None:  # one that is only planned is this run's own
        facts.origin.check(replace(facts.origin, precision=precision), where)


def origin_of(
    teacher: str, data: LoadedData, tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], precision: str
) -> CacheOrigin:
    """The origin of a cache of the train split.

    Args:
        teacher: digest of the teacher.
        model: values of its configuration.
    """
    examples, ids = len(data.splits["train"]), tokenizer_fingerprint(tokenizer)
    return CacheOrigin(teacher, ids, data.fingerprint, "train", examples, model, precision)
