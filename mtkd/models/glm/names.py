"""The names and parts of a GLM's weights: as published, and as mtkd keeps them.

A published checkpoint is one of four (see `mtkd.models.glm.checkpoint`); their names differ in prefixes alone. Over
model-parallel ranks some weights are split: each rank has whole heads and some feed-forward units.

Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053, section 3 (which weights are split, and how).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtkd.errors import DataError

_PREFIX = "glm."
_TABLES = ("word_embeddings.weight", "position_embeddings.weight", "block_position_embeddings.weight")
_LAYER = tuple(
    f"{module}.{kind}"
    for module in (
        *("input_layernorm", "attention.query_key_value", "attention.dense"),
        *("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    for kind in ("weight", "bias")
)
_LAST = ("final_layernorm.weight", "final_layernorm.bias")
_SHOWN = 8  # names in a message

# Largest relative difference between the copies of a weight that every rank has: they are trained apart.
_COPIES_DIFFER = 1e-3


@dataclass(frozen=True)
class Stored:
    """A weight in a file: its shape and type are known, its values are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def stored(value: Tensor) -> Stored:
    """A weight that is in memory (or mapped into it) already."""
    return Stored(tuple(value.shape), value.dtype, lambda: value)


def our_name(published: str) -> str:
    """``transformer.layers.0.attention.dense.weight -> glm.layers.0.attention.dense.weight``; any of the four forms."""
    name = published.removeprefix("glm.").removeprefix("transformer.")
    return _PREFIX + name.removeprefix("mixins.block_position_embedding.")


def our_names(num_layers: int) -> list[str]:
    """Every weight of a GLM of N layers; the output head is the table of the tokens and is not kept twice."""
    layers = [f"layers.{i}.{name}" for i in range(num_layers) for name in _LAYER]
    return [_PREFIX + name for name in (*_TABLES, *layers, *_LAST)]


def rename(published: Collection[str], where: str) -> dict[str, str]:
    """Our name -> the published one, in the model's order.

    Raises:
        DataError: weights that are missing, unexpected, or there twice under two prefixes.
    """
    by_name: dict[str, str] = {}
    unexpected = []
    for name in published:
        new = our_name(name)
        if new in by_name:
            unexpected.append(f"{name} (in addition to {by_name[new]})")
        else:
            by_name[new] = name
    # Counted, not read off the largest number, which comes from an untrusted file.
    numbers = {layer[1] for name in by_name if (layer := re.match(r"glm\.layers\.(\d+)\.", name))}
    names = our_names(len(numbers) or 1)
    expected = set(names)
    unexpected += sorted(published_name for name, published_name in by_name.items() if name not in expected)
    missing = [name.removeprefix(_PREFIX) for name in names if name not in by_name]
    if missing or unexpected:
        raise DataError(
            "the weights are not those of a GLM",
            where=where,
            found=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
            allowed="word_embeddings, transformer.position_embeddings, transformer.layers.N and the like, with or "
            "without the prefix 'glm.' (see mtkd/models/glm/names.py)",
            todo="give a checkpoint of the language model; heads of fine-tuned tasks cannot be converted",
        )
    return {name: by_name[name] for name in names}


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def merge(name: str, parts: Sequence[Stored], where: str) -> Stored:
    """One weight of ours out of the model-parallel ranks' parts of it, in the order of the ranks.

    Query, key and value are thirds of one matrix in every part: each third is put together for itself.

    Raises:
        DataError: parts of different shapes, or copies (when they are read) that differ.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        raise DataError(
            f"the parts of '{name}' do not fit each other",
            where=where,
            found=", ".join(f"{list(part.shape)} {part.dtype}" for part in parts),
            todo="give all parts of one checkpoint, and no others",
        )
    axis = _split_axis(name)
    if axis is None:
        return Stored(first.shape, first.dtype, lambda: _same(name, [part.read() for part in parts], where))
    shape = tuple(size * len(parts) if i == axis else size for i, size in enumerate(first.shape))
    if "query_key_value" in name:
        return Stored(shape, first.dtype, lambda: _thirds([part.read() for part in parts]))
    return Stored(shape, first.dtype, lambda: torch.cat([part.read() for part in parts], axis))


def _split_axis(name: str) -> int | None:
    """The axis along which a weight is split over ranks; None for one that every rank has whole."""
    module, _, kind = name.rpartition(".")
    if module.endswith(("query_key_value", "dense_h_to_4h")) or module == f"{_PREFIX}word_embeddings":
        return 0
    return 1 if kind == "weight" and module.endswith(("attention.dense", "dense_4h_to_h")) else None


def _thirds(parts: Sequence[Tensor]) -> Tensor:
    cut = [part.chunk(3) for part in parts]
    return torch.cat([third for thirds in zip(*cut, strict=True) for third in thirds])


def _same(name: str, copies: Sequence[Tensor], where: str) -> Tensor:
    first = copies[0]
    bound = _COPIES_DIFFER * float(first.float().abs().max())
    for rank, copy in enumerate(copies):
        difference = float((copy.float() - first.float()).abs().max())
        if not difference <= bound:
            raise DataError(
                f"'{name}' is not the same in every part",
                where=where,
                found=f"a difference of {difference:.3g} between parts 0 and {rank}",
                allowed=f"at most {bound:.3g}",
                todo="give the parts of one checkpoint (the same training step)",
            )
    return first


def shapes_wanted(sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of ours; `sizes` has `layers`, `width`, `intermediate`, `vocabulary`, `positions`."""
    width, wide, rows = sizes["width"], sizes["intermediate"], sizes["positions"] + 1
    by_module: dict[str, tuple[int, ...]] = {
        "word_embeddings": (sizes["vocabulary"], width),
        "position_embeddings": (rows, width),
        "block_position_embeddings": (rows, width),
        "query_key_value": (3 * width, width),
        "dense": (width, width),
        "dense_h_to_4h": (wide, width),
        "dense_4h_to_h": (width, wide),
    }
    shapes = {}
    for name in our_names(sizes["layers"]):
        *_, module, kind = name.split(".")
        shape = by_module.get(module, (width,))
        shapes[name] = shape if kind == "weight" else shape[:1]
    return shapes
