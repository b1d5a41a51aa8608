"""Which stored weight each parameter of a model is, for models that are read from their files as they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.errors import DataError
from mtkd.models.create import empty_model
from mtkd.models.heads import of_another_head
from mtkd.models.stored import StoredWeight, read_weights, some

_COMPARED_BYTES = 1 << 24  # of two copies of a weight at a time

# What older checkpoints hold besides weights: tables that the modules compute themselves.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def find_weights(model: PreTrainedModel, folder: Path) -> dict[str, StoredWeight]:
    """Which stored weight each parameter and persistent buffer of a model is; the model may be on the meta device.

    Names may lack the prefix of the bare encoder or decoder. Of tied parameters one is enough; where there are more,
    they must hold the same values.

    Returns:
        Name in `model.state_dict()` -> weight; of tied parameters every name.

    Raises:
        DataError: naming the weights that are missing, of another shape, not part of the architecture, or not floats.
    """
    stored = read_weights(folder)
    values = dict(model.state_dict(keep_vars=True))
    by_name = _by_model_name(stored, values, model.base_model_prefix, folder)
    weights: dict[str, StoredWeight] = {}
    missing, misshapen, strange = list[str](), list[str](), list[str]()
    for names in _tied(values):
        copies, value = [by_name[name] for name in names if name in by_name], values[names[0]]
        if not copies:
            missing.append(names[0])
            continue
        shape = tuple(value.shape)
        misshapen += [f"{w.name} {list(w.shape)} instead of {list(shape)}" for w in copies if w.shape != shape]
        if value.is_floating_point() != copies[0].dtype.is_floating_point:
            strange += [f"{copies[0].name} {copies[0].dtype}"] * len(names)
        if not misshapen:
            _check_copies(copies, folder)
        weights |= dict.fromkeys(names, copies[0])
    used, ignored = {weight.name for weight in by_name.values()}, _ignored(model)
    faults = {
        "missing": missing,
        "of another shape": misshapen,
        "not part of the architecture": [name for name in stored if name not in used and not ignored(name)],
        "of another type": strange,
    }
    _refuse(folder, faults)
    return weights


def _check_copies(copies: Sequence[StoredWeight], folder: Path) -> None:
    """Refuse copies of one tied weight that hold other values than the first."""
    for other in copies[1:]:
        if not _same_values(copies[0], other):
            raise DataError(
                "two weights are one in the configuration and differ in the checkpoint",
                where=str(folder),
                found=f"{copies[0].name}, {other.name}",
                todo="set tie_word_embeddings in its config.json to what it is",
            )


def fill_model(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model without values with those of its folder: floats in float32, whole numbers as they are stored.

    Raises:
        DataError: as `find_weights`.
    """
    values = {}
    with ExitStack() as files:
        opened = dict[Path, Any]()
        for name, weight in find_weights(model, folder).items():
            if weight.file not in opened:
                opened[weight.file] = files.enter_context(safe_open(weight.file, framework="pt"))
            value = opened[weight.file].get_tensor(weight.name)
            values[name] = value.float() if value.is_floating_point() else value
    model.load_state_dict(values, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def check_weights(config: PretrainedConfig, auto_class: str, folder: Path) -> None:
    """Refuse, before anything is read of them, weights that are not those of a configuration; see `find_weights`.

    Raises:
        DataError: as `find_weights`.
    """
    find_weights(empty_model(config, auto_class), folder)


def _by_model_name(
    stored: Mapping[str, StoredWeight], values: Mapping[str, Tensor], prefix: str, folder: Path
) -> dict[str, StoredWeight]:
    by_name: dict[str, StoredWeight] = {}
    for stored_name, weight in stored.items():
        name = next((n for n in (stored_name, f"{prefix}.{stored_name}") if n in values), None)
        if name in by_name:
            raise DataError("a weight is there twice", where=str(folder), found=f"{by_name[name].name}, {stored_name}")
        if name is not None:
            by_name[name] = weight
    return by_name


def _tied(values: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that belong to one parameter or buffer, together."""
    groups: dict[int, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def _ignored(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a stored weight need not be in the model: another task's head, or a table that modules compute."""
    patterns = [*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    computed = re.compile("|".join(f"({pattern})" for pattern in patterns))
    prefix = model.base_model_prefix
    return lambda name: computed.search(name) is not None or of_another_head(name, prefix)


def _same_values(one: StoredWeight, other: StoredWeight) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        for start in range(0, one.num_bytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, one.num_bytes - start)
            if left.read(size) != right.read(size):
                return False
    return True


def _refuse(folder: Path, faults: Mapping[str, list[str]]) -> None:
    texts = [f"{len(names)} {what}: {some(sorted(names))}" for what, names in faults.items() if names]
    if texts:
        raise DataError(
            "the checkpoint does not fit its configuration",
            where=str(folder),
            found="; ".join(texts),
            todo="use the complete checkpoint of a model made for this task, saved by a current transformers "
            "(from_pretrained, then save_pretrained, renames the weights of older ones)",
        )
