"""What the types of the configuration make of what stands in a YAML file.

YAML 1.1 takes ``no``, ``on``, ``1.0``, ``007`` and ``null`` for booleans, numbers and nothing. A key that holds text
gets the text as it is written; one that holds a number or a switch gets the value.
"""

from __future__ import annotations

import math
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, Tag

from mtkd.config.base import Named
from mtkd.config.model import ModelConfig
from mtkd.config.teacher import TeacherConfig
from mtkd.config.yamlfile import Value
from mtkd.errors import UserError

# The key that a plain string stands for in a block that may be written as one.
SHORT_FORMS: dict[type[BaseModel], str] = {Named: "name", ModelConfig: "path"}

# 010 is 8 in YAML 1.1 and 10 in YAML 1.2; 1:30 is 90 in the first and text in the second.
_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-9.]+)+")

# A value of the first type may stand where one of the second is asked for.
_FITS = {bool: (bool,), int: (int, float), float: (int, float), NoneType: (NoneType, None)}


def as_meant(value: Value, annotation: Any) -> Any:
    """A tree without its places, every scalar as the annotation of its key wants it.

    Args:
        annotation: of the whole tree, such as `RunConfig`; None where the types know no such key.

    Raises:
        UserError: a number that versions of YAML read differently, or that is not finite.
    """
    if isinstance(value.value, dict):
        return {key: as_meant(child, step_into(annotation, key)) for key, child in value.value.items()}
    if isinstance(value.value, list):
        return [as_meant(child, step_into(annotation, i)) for i, child in enumerate(value.value)]
    return _scalar(value, annotation)


def _scalar(value: Value, annotation: Any) -> Any:
    kinds = alternatives(annotation)
    if value.text and not any(_fits(value.value, kind) for kind in kinds) and any(map(_is_text, kinds)):
        return value.text
    number = isinstance(value.value, int | float) and not isinstance(value.value, bool)
    if number and not abs(value.value) < math.inf:
        raise UserError("a number must be finite", where=value.place, found=value.text)
    if number and _AMBIGUOUS.fullmatch(value.text):
        raise UserError(
            "a number that versions of YAML read differently",
            where=value.place,
            found=value.text,
            allowed="digits without a zero before them, or text in quotes",
        )
    return value.value


def _fits(value: object, kind: Any) -> bool:
    return (
        kind is Any or kind in _FITS.get(type(value), ()) or (get_origin(kind) is Literal and value in get_args(kind))
    )


def _is_text(kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(isinstance(choice, str) for choice in get_args(kind))
    return kind is str or kind in SHORT_FORMS


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without `Annotated`."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [one for member in get_args(annotation) for one in alternatives(member)]
    return [annotation]


def blocks_of(annotation: Any) -> list[type[BaseModel]]:
    """The blocks among the alternatives: several where a key tells them apart (`backend` of a teacher)."""
    return [one for one in alternatives(annotation) if isinstance(one, type) and issubclass(one, BaseModel)]


def model_of(annotation: Any) -> type[BaseModel] | None:
    """The first block among the alternatives; None for none."""
    return next(iter(blocks_of(annotation)), None)


def keys_of(annotation: Any) -> list[str]:
    """The keys that a block has; [] for what is none."""
    return list(dict.fromkeys(key for block in blocks_of(annotation) for key in block.model_fields))


def tagged(annotation: Any) -> dict[str, type[BaseModel]]:
    """The blocks of a union that a key tells apart, by the tag that pydantic puts into places; {} for another type."""
    if not any(isinstance(mark, Discriminator) for mark in get_args(annotation)[1:]):
        return {}
    members = get_args(get_args(annotation)[0])
    return {mark.tag: get_args(one)[0] for one in members for mark in get_args(one)[1:] if isinstance(mark, Tag)}


def is_block(annotation: Any) -> bool:
    """Whether keys may stand below: a block, or a mapping of the user's names."""
    return model_of(annotation) is not None or any(get_origin(one) is dict for one in alternatives(annotation))


def step_into(annotation: Any, key: str | int) -> Any:
    """The annotation of an entry of a block, mapping or list; None when the types know no such entry."""
    for one in alternatives(annotation):
        if one in blocks_of(annotation):
            if key in one.model_fields:
                return one.model_fields[str(key)].annotation
            continue
        if get_origin(one) is dict and not isinstance(key, int):
            return get_args(one)[1]
        if get_origin(one) is tuple and isinstance(key, int):
            return get_args(one)[0]
    return None


SHORT_FORMS |= dict.fromkeys(blocks_of(TeacherConfig), "model")
