"""Caches that are finished: their folders, what they say of themselves, and the teachers that they stand for."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from mtkd.data.load import LoadedData
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.engine.manifest import manifest_digest
from mtkd.errors import DataError, UserError
from mtkd.models import glm  # noqa: F401  registers our own type
from mtkd.models.info import ModelInfo, model_info
from mtkd.models.numbers import count_parameters
from mtkd.pool import CachedTeacher
from mtkd.pool.cache import CacheContent, CacheOrigin, CacheReader


@dataclass(frozen=True)
class CacheFacts:
    """What is known of a teacher's cache before it is read.

    Attributes:
        content: what it holds. info, num_parameters: of the teacher that it was, or will be, made of.
        settings: where more can be asked for: the stage that makes it, or the folder.
        origin: None while the cache is only planned.
    """

    content: CacheContent
    info: ModelInfo
    num_parameters: int
    settings: str
    origin: CacheOrigin | None = None


def read_facts(path: str, base: Path, auto_class: str, where: str) -> CacheFacts:
    """What the folder of a cache says of itself.

    Raises:
        DataError: there is no cache, or not one that can be read here.
    """
    return open_cache(cache_folder(path, base, where), auto_class, where)[1]


def open_cache(folder: Path, auto_class: str, where: str) -> tuple[CacheReader, CacheFacts]:
    """A finished cache and what it says of itself.

    Args:
        auto_class: the teacher's head, from the task.
    Raises:
        DataError: as `CacheReader`.
    """
    reader = CacheReader(folder)
    made = _model_config(reader.origin, where)
    info = model_info(made, auto_class)
    if reader.content.targets == "classes":  # of the data: its teacher may have had others besides
        info = replace(info, num_labels=reader.content.columns)
    facts = CacheFacts(reader.content, info, count_parameters(made, auto_class), str(folder), reader.origin)
    return reader, facts


def cache_digest(folder: Path) -> str:
    """What identifies a finished cache: its manifest, which has the digest of every file.

    Raises:
        DataError: the folder is no finished cache.
    """
    CacheReader(folder)
    return manifest_digest(folder)


def model_values(config: PretrainedConfig) -> dict[str, Any]:
    """A model's configuration as a cache keeps it: without the folder it lay in, and the version that wrote it."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # a GLM's field that came later stands there only where it says something: caches made before stay valid
    unsaid = ("eop_token_id",) if values.get("eop_token_id") is None else ()
    return {
        key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version", *unsaid)
    }


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


def _model_config(origin: CacheOrigin, where: str) -> PretrainedConfig:
    values = dict(origin.model)
    try:
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError("the cache does not tell which model its teacher was", where=where, found=str(error)) from None


def check_tokenizer_of(facts: CacheFacts, tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse the cache of a teacher with another tokenizer, where the run's own is known already."""
    assert facts.origin is not None
    facts.origin.check(replace(facts.origin, tokenizer=tokenizer_fingerprint(tokenizer)), where)


def check_precision_of(facts: CacheFacts, precision: str, where: str) -> None:
    """Refuse the cache of a teacher that ran in another precision than this run's teachers would."""
    if facts.origin is not None:  # one that is only planned is this run's own
        facts.origin.check(replace(facts.origin, precision=precision), where)


def origin_of(
    teacher: str, data: LoadedData, tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], precision: str
) -> CacheOrigin:
    """What a cache of a run's train split is made of.

    Args:
        teacher: its digest.
        model: its configuration.
    """
    examples, ids = len(data.splits["train"]), tokenizer_fingerprint(tokenizer)
    return CacheOrigin(teacher, ids, data.fingerprint, "train", examples, model, precision)


def cached_teacher(
    name: str,
    folder: Path,
    data: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    digest: str | None,
    precision: str,
    where: str,
) -> CachedTeacher:
    """The teacher of a cache.

    Args:
        digest: of the teacher that it must be made of; None where the run does not know it.
        precision: the run's.
    Raises:
        DataError: it was made of another teacher, tokenizer or data set, in another precision, or is not finished.
    """
    reader, facts = open_cache(folder, data.task.class_for(data.config), where)
    reader.check(origin_of(digest or reader.origin.teacher, data, tokenizer, reader.origin.model, precision), where)
    return CachedTeacher(name, reader, facts.info, facts.num_parameters)
