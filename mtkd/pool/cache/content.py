"""What a teacher cache holds and what it was made from: plain values that stand as JSON in its files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar, get_args

from mtkd.config.cache import Dtype, Trait
from mtkd.errors import DataError, UserError
from mtkd.models.features import split_key

TARGETS = ("top", "sampled", "classes")
DTYPES: tuple[str, ...] = get_args(Dtype)
TEXT_TRAITS = ("token_log_probs",)
"""Stored traits with a value at every unpadded token, target or not, 4 bytes each."""
SCALARS: tuple[str, ...] = tuple(name for name in get_args(Trait) if name not in ("ce", *TEXT_TRAITS))
"""Traits that may be stored with the targets, 4 bytes per position each; `ce` has a field of its own."""
PER_EXAMPLE = ("cls",)
"""Stored features with one vector per example; `hidden` and `embedding` have one per token."""

FORMAT = 1

_LATER = {"others", "missing"}
"""Fields that came later: they stand in a file only where they say something, so older caches stay valid."""


@dataclass(frozen=True)
class CacheContent:
    """What is stored of every example.

    Attributes:
        targets: ``top``: the k most probable columns with log-probabilities, and the mass of all others;
            ``sampled``: k draws from the teacher's distribution; ``classes``: whole class logits in float32.
        k: kept columns or draws per position; 0 without token targets.
        temperature: of the stored distribution (``top``, ``sampled``); class logits serve any.
        columns: V, the number of real ids, or C.
        hidden: feature keys stored whole: "hidden.k", "embedding" per token; "cls.k" per example.
        ce: the label's cross entropy is stored per position, nats at temperature 1.
        dtype: of the stored features.
        bits: per log-probability of a kept column, 4 to 12; see `mtkd.pool.cache.codec`.
        proposal: draws come from ``softmax(logits / (temperature * proposal))``; at 1 their weights are shares of k.
        seed: of the draws.
        scalars: traits stored exactly; per position of `SCALARS`, per token of `TEXT_TRAITS`.
        others: ``classes``: logits of so many outputs that mean "none of my classes", stored after the classes.
        missing: ``classes``: the data's classes that the teacher has no output for.
    """

    targets: str
    k: int
    temperature: float
    columns: int
    hidden: tuple[str, ...] = ()
    ce: bool = False
    dtype: str = "float16"
    bits: int = 6
    proposal: float = 1.0
    seed: int = 0
    scalars: tuple[str, ...] = ()
    others: int = 0
    missing: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "scalars", tuple(self.scalars))
        object.__setattr__(self, "missing", tuple(self.missing))

    @property
    def per_token(self) -> bool:
        """Targets are tokens: several positions per example."""
        return self.targets in ("top", "sampled")

    @property
    def stored_traits(self) -> tuple[str, ...]:
        """Names of the traits with a column of their own."""
        return (("ce",) if self.ce else ()) + self.scalars

    @property
    def text_traits(self) -> tuple[str, ...]:
        """Those of them that every unpadded token has; the others are stored at targets."""
        return tuple(name for name in self.stored_traits if name in TEXT_TRAITS)

    def known_traits(self) -> frozenset[str]:
        """Traits a weighting may read from this cache.

        Class logits are whole: all. Which of the k columns is the most probable is exact; its probability and the
        margin are known (to the codec's rounding) if they were stored at temperature 1, where traits are defined. Cross
        entropy and entropy need columns that are not kept, so only their stored values serve.
        """
        known = set(self.stored_traits)
        if self.targets == "classes":
            known |= {"ce", *SCALARS}
        if self.targets == "top":
            known.add("choice")
            known |= {"confidence"} if self.temperature == 1 else set()
            known |= {"margin"} if self.temperature == 1 and self.k > 1 else set()
        return frozenset(known)

    def knows_with_two(self, traits: Collection[str]) -> bool:
        """Whether these traits would be known if a second column were kept."""
        two = replace(self, k=max(self.k, 2))
        return not self.known_traits().issuperset(traits) and two.known_traits().issuperset(traits)

    def check(self, where: str = "") -> None:
        """Refuse what cannot be stored.

        Raises:
            UserError: naming the field.
        """
        rules: list[tuple[str, bool, object]] = [
            ("targets", self.targets in TARGETS, TARGETS),
            ("k", self.k >= 1 if self.per_token else self.k == 0, "1 or more for top and sampled, else 0"),
            ("k", self.targets != "top" or self.k <= self.columns, f"at most the {self.columns} columns"),
            ("k", self.targets != "sampled" or self.k < 2**16, "at most 65,535 draws"),
            ("columns", 0 < self.columns < 2**24, "1 to 2^24 - 1"),
            ("temperature", self.temperature > 0, "a positive number"),
            ("proposal", self.proposal > 0, "a positive number"),
            ("dtype", self.dtype in DTYPES, DTYPES),
            ("bits", 4 <= self.bits <= 12, "4 to 12"),
            ("scalars", set(self.scalars) <= {*SCALARS, *TEXT_TRAITS}, (*SCALARS, *TEXT_TRAITS)),
            ("others", self.others >= 0 and not (self.per_token and self.others), "0 or more of targets: classes"),
            ("hidden", all(_storable(key) for key in self.hidden), "hidden.K, embedding, cls.K"),
        ]
        for name, fine, allowed in rules:
            if not fine:
                place = f"{where}.{name}" if where else name
                raise UserError("a cache cannot hold this", where=place, found=getattr(self, name), allowed=allowed)

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in _LATER or value}

    @classmethod
    def from_json(cls, value: Any, where: str) -> CacheContent:
        """Raises DataError for anything but what `as_json` gives."""
        return _from_json(cls, value, where)


@dataclass(frozen=True)
class CacheOrigin:
    """What a cache was made from; a run that reads it must have the same.

    Attributes:
        teacher: digest of the teacher's weights and configuration, and of what was cut from it.
        tokenizer: fingerprint of the tokenizer.
        data: fingerprint of the prepared split.
        split: its name.
        num_examples: examples in it; they are numbered from 0.
        model: the teacher's config.json, so that its shapes are known without its weights.
        precision: that the teacher ran in, fp32 or bf16.
    """

    teacher: str
    tokenizer: str
    data: str
    split: str
    num_examples: int
    model: dict[str, Any]
    precision: str

    def check(self, wanted: CacheOrigin, where: str) -> None:
        """Refuse a cache of another teacher, tokenizer, data set or precision.

        Raises:
            DataError: naming the first field that differs, with both values.
        """
        for name in ("teacher", "tokenizer", "data", "split", "num_examples", "precision"):
            own, asked = getattr(self, name), getattr(wanted, name)
            if own != asked:
                raise DataError(
                    f"the cache was made with another {_WORDS[name]}",
                    where=where,
                    found=f"{own} in the cache",
                    allowed=f"{asked} in this run",
                    todo=f"write engine.precision: {own} for this run, or make the cache again in {asked}"
                    if name == "precision"
                    else "make the cache again, or name the one that belongs to this run",
                )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> CacheOrigin:
        """Raises DataError for anything but what `as_json` gives."""
        return _from_json(cls, value, where)


_WORDS = {
    "teacher": "teacher (digest)",
    "tokenizer": "tokenizer (digest)",
    "data": "data set or chat template (fingerprint)",
    "split": "split",
    "num_examples": "number of examples",
    "precision": "precision",
}

Plain = TypeVar("Plain", CacheContent, CacheOrigin)


def _from_json(cls: type[Plain], value: Any, where: str) -> Plain:
    kinds = {f.name: f.type for f in fields(cls)}
    if not isinstance(value, Mapping) or value.keys() - _LATER != kinds.keys() - _LATER:
        raise DataError("the description of the cache is malformed", where=where, allowed=sorted(kinds))
    for name, item in value.items():
        known = name in kinds and isinstance(item, _JSON_TYPES[str(kinds[name])])
        if not known or (kinds[name] != "bool" and isinstance(item, bool)):
            raise DataError("the description of the cache is malformed", where=where, found=f"{name}: {item!r}")
    return cls(**value)


_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "tuple[str, ...]": (list, tuple),
    "dict[str, Any]": (dict,),
}


def _storable(key: str) -> bool:
    try:
        name, _ = split_key(key)
    except ValueError:
        return False
    return name in ("hidden", "embedding", *PER_EXAMPLE)
