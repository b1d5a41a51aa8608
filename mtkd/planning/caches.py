"""Plan caches: what a cache stage keeps of its teachers, and what a later stage may read from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mtkd.config import RANDOM_TOKENS, CacheConfig, DataConfig, RunConfig, StageConfig
from mtkd.data.load import PLACES
from mtkd.data.paths import DataFile, bytes_of, file_digest, find_files
from mtkd.data.tasks import varies
from mtkd.errors import UserError
from mtkd.models.features import split_key
from mtkd.models.info import ModelInfo
from mtkd.objective.compile import Row
from mtkd.objective.kept import check_cached_rows
from mtkd.pool.cache import CacheContent
from mtkd.pool.cache.codec import SampledCodec, TopCodec
from mtkd.pool.cache.content import TEXT_TRAITS
from mtkd.pool.cache.folder import CacheFacts
from mtkd.registry import TASKS
from mtkd.weightings.make import stage_reads

_FOR_TOKENS = {"targets", "k", "temperature", "bits", "proposal", "traits"}


def content_of(
    cache: CacheConfig,
    *,
    token_level: bool,
    columns: int,
    seed: int,
    others: int = 0,
    missing: tuple[str, ...] = (),
) -> CacheContent:
    """The content that a cache stage keeps of a teacher.

    Args:
        columns: number of real ids, or of classes.
        seed: of the draws.
        others, missing: of a specialist: see `CacheContent`.
    """
    if not token_level:
        hidden, dtype = cache.hidden, cache.dtype
        return CacheContent("classes", 0, 1.0, columns, hidden=hidden, dtype=dtype, others=others, missing=missing)
    return CacheContent(
        cache.targets,
        cache.k,
        cache.temperature,
        columns,
        hidden=cache.hidden,
        ce="ce" in cache.traits,
        dtype=cache.dtype,
        bits=cache.bits,
        proposal=cache.proposal,
        seed=seed if cache.targets == "sampled" else 0,
        scalars=tuple(name for name in cache.traits if name != "ce"),
    )


def check_cacheable(stage: StageConfig, data: DataConfig, where: str) -> None:
    """Refuse data whose inputs change with the epoch, and settings that its task does not read.

    Raises:
        UserError: naming the field.
    """
    if varies(data):
        raise UserError(
            f"a {data.task} teacher sees other masked tokens in every epoch, so what it says once is not what it would "
            "say the next time",
            where=f"{where}.data",
            found=f"task {data.task}",
            allowed="inputs that are the same in every epoch",
            todo=f"set redraw: false in the data block, or use resident teachers for {data.task}",
        )
    unread = sorted(_FOR_TOKENS & stage.cache.model_fields_set)
    if not TASKS.find(data.task).token_level and unread:
        raise UserError(
            "a classification cache keeps every class logit, which serves any temperature and trait",
            where=f"{where}.cache.{unread[0]}",
            found=getattr(stage.cache, unread[0]),
            todo=f"drop {', '.join(unread)}",
        )
    text = sorted(set(TEXT_TRAITS) & set(stage.cache.traits))
    if text and not TASKS.find(data.task).left_to_right:
        raise UserError(
            "only causal language models say how probable every token of a text is, given those before it",
            where=f"{where}.cache.traits",
            found=f"{text[0]}, task '{data.task}'",
            todo=f"drop {text[0]}",
        )
    if "ce" in stage.cache.traits and not data.labelled:
        raise UserError("the tokens of these data are made up: a cross entropy with them means nothing",
                        where=f"{where}.cache.traits", found="ce")  # fmt: skip


def check_layers(content: CacheContent, info: ModelInfo, where: str, teacher: str) -> None:
    """Refuse content that a teacher cannot give.

    Raises:
        UserError: a layer it does not have, or more ids than there are.
    """
    content.check(where)
    for key in content.hidden:
        feature, layer = split_key(key)
        if feature not in info.taps:
            raise UserError(
                f"teacher '{teacher}' does not give this feature",
                where=f"{where}.hidden",
                found=key,
                allowed=sorted(info.taps),
            )
        if layer is not None and layer > info.num_layers:
            raise UserError(
                f"teacher '{teacher}' has no such layer",
                where=f"{where}.hidden",
                found=key,
                allowed=f"0 to {info.num_layers}",
            )


def check_same_data(config: RunConfig, earlier: StageConfig, stage: StageConfig, where: str) -> None:
    """Refuse a cache of other examples than those of the stage that reads it, judged by the options."""
    names = [config.data_name(s.data) for s in (earlier, stage)]
    earlier_data, data = (config.data[name] for name in names)
    earlier_values, values = (each.model_dump(mode="json", exclude=PLACES) for each in (earlier_data, data))
    differing = sorted(key for key in values if values[key] != earlier_values[key])
    differing += _other_places(earlier_data, data, config.base, names)
    if differing:
        raise UserError(
            f"the cache holds what its teacher says about data '{names[0]}'; this stage trains on '{names[1]}'",
            where=where,
            found=f"{', '.join(differing)} differ",
            todo="cache the teacher on this stage's data",
        )


def _other_places(earlier: DataConfig, data: DataConfig, base: Path, names: Sequence[str]) -> list[str]:
    """The fields by which two `data` entries read other rows; equal files in two places are the same rows."""
    if names[0] == names[1]:
        return []
    if earlier.source != data.source:
        return ["source"]
    if data.source != "files":
        return [field for field in ("path", "revision") if getattr(earlier, field) != getattr(data, field)]
    earlier_files, data_files = (
        find_files(d, base, f"data.{name}") for d, name in zip((earlier, data), names, strict=True)
    )
    if earlier_files.keys() != data_files.keys():
        return ["files"]
    return [f"files.{split}" for split, files in data_files.items() if not _same(files, earlier_files[split])]


def _same(files: Sequence[DataFile], others: Sequence[DataFile]) -> bool:
    """Whether two lists of files have equal contents in one order."""
    if [file.path for file in files] == [other.path for other in others]:
        return True
    return file_digest({"train": files}) == file_digest({"train": others})


def check_cached(
    stage: StageConfig, rows: Sequence[Row], caches: Mapping[str, CacheFacts], *, token_level: bool, where: str
) -> None:
    """Refuse a stage that reads what the caches of its teachers lack.

    Args:
        rows: compiled against all teachers.
        caches: by name of the cached teacher.
    Raises:
        UserError: naming teacher, what is missing and where to ask for it.
    """
    for k, teacher in enumerate(stage.teachers):
        if teacher.name not in caches:
            continue
        facts = caches[teacher.name]
        for row in rows:
            if not row.from_labels:
                _check_row(row, k, teacher.name, facts, row.place)
        try:
            check_cached_rows(rows, facts.content, f"{where}.teachers[{k}]")
        except UserError as error:
            error.message = f"cache of teacher '{teacher.name}': {error.message}"
            raise
    if caches and token_level:  # whole class logits give every trait
        _check_traits(stage, caches, f"{where}.weighting")


def compressed_from_cache(teacher: str, where: str) -> UserError:
    """The error for a student with a part of the ids: it needs the teacher's distribution over these alone."""
    return UserError(
        f"the student keeps a part of the ids, and the cache of teacher '{teacher}' holds a few of them per position",
        where=where,
        todo="make the teacher resident, or give the student the whole vocabulary",
    )


def _check_row(row: Row, k: int, name: str, facts: CacheFacts, where: str) -> None:
    for key in sorted(row.teacher_wants(k) - {"logits", *facts.content.hidden}):
        if split_key(key)[0] in ("hidden", "cls", "embedding"):
            todo = f"add {key} to `hidden` of the cache ({facts.settings}), or drop the row"
        else:
            todo = "attention is not kept in caches: make the teacher resident, or drop the row"
        raise UserError(
            f"feature '{key}' of teacher '{name}' is not in its cache",
            where=where,
            found=key,
            allowed=["logits", *facts.content.hidden],
            todo=todo,
        )


def _check_traits(stage: StageConfig, caches: Mapping[str, CacheFacts], where: str) -> None:
    reads = stage_reads(stage, where.removesuffix(".weighting"), token_level=True)
    for name, facts in caches.items():
        if "gram" in reads.names and facts.content.targets == "sampled" and len(stage.teachers) > 1:
            raise UserError(
                f"weighting '{stage.weighting.name}' reads inner products of the teachers' gradients; drawn targets "
                "are unbiased in a gradient, not in those",
                where=where,
                found=f"the cache of '{name}' has targets: sampled",
                todo=f"make it with targets: top ({facts.settings}), or choose another weighting",
            )
        missing = sorted(reads.traits - facts.content.known_traits())
        if missing:
            other = ", keep k: 2 or more" if facts.content.knows_with_two(missing) else ""
            if any(teacher.name == name and teacher.calibrate is not None for teacher in stage.teachers):
                todo = f"give `calibrate` to the teacher where the cache is made ({facts.settings}), not here: stored "
                todo += "traits are those of the teacher as it was; or choose a weighting that does not read it"
            else:
                todo = f"add it to `traits` of the cache ({facts.settings}){other}, or choose a weighting that does "
                todo += "not read it"
            raise UserError(
                f"weighting '{stage.weighting.name}' reads the trait '{missing[0]}' of every teacher, which the cache "
                f"of '{name}' lacks",
                where=where,
                found=", ".join(missing),
                allowed=sorted(facts.content.known_traits()) or "no trait",
                todo=todo,
            )


def bytes_per_token(content: CacheContent, info: ModelInfo) -> float:
    """The most bytes on disk per token position; for classes per example, without hidden states of tokens."""
    size = 4 if content.dtype == "float32" else 2
    total = 4.0 * len(content.stored_traits)
    if content.targets == "top":
        total += TopCodec(content.columns, content.k, content.bits).bytes_per_position
    elif content.targets == "sampled":
        total += 2 + content.k * SampledCodec(content.columns, content.k, content.proposal != 1).bytes_per_id
    elif content.targets == "classes":
        total += 4 * (content.columns + content.others)
    return total + sum(size * info.width for key in content.hidden)


def train_tokens(data: DataConfig, base: Path) -> int | None:
    """An upper bound of the train split's tokens, None where only the data tells: a text has at most one per byte."""
    if data.source == RANDOM_TOKENS:
        return data.documents and data.documents * data.max_length
    if data.source != "files":
        return None
    return bytes_of(find_files(data, base)["train"])


def describe(content: CacheContent, info: ModelInfo, tokens: int | None) -> str:
    """The plan's line about a cache: its content and the most bytes it takes."""
    text = {
        "top": f"top {content.k} of {content.columns:,} ids, {content.bits} bits",
        "sampled": f"{content.k} draws from {content.columns:,} ids",
        "classes": f"{content.columns} class logits" + f" and {content.others} of none of them" * bool(content.others),
    }[content.targets]
    if content.per_token:
        text += f", temperature {content.temperature:g}"
    text = ", ".join([text, *content.stored_traits, *content.hidden])
    each = bytes_per_token(content, info)
    unit = "token" if content.per_token else "example or token"
    size = "" if tokens is None else f", <= {each * tokens / 1e9:.3g} GB"
    return f"{text}; <= {each:.0f} bytes per {unit}{size}"
