"""Which stored weight each parameter of a model is, for teachers that are read from their files as they are.

Nothing of the values is read here but where two copies of a weight must be equal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.errors import DataError
from mtkd.models.load import empty_model, of_another_head
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
    ours = _by_our_name(stored, values, model.base_model_prefix, folder)
    found: dict[str, StoredWeight] = {}
    missing, misshapen = [], []
    for names in _tied(values):
        there = [ours[name] for name in names if name in ours]
        if not there:
            missing.append(names[0])
            continue
        misshapen += [
            f"{w.name} {list(w.shape)} instead of {list(values[names[0]].shape)}"
            for w in there
            if w.shape != tuple(values[names[0]].shape)
        ]
        found |= dict.fromkeys(names, there[0])
        for other in there[1:]:
            if not misshapen and not _same_values(there[0], other):
                raise DataError(
                    "two weights are one in the configuration and differ in the checkpoint",
                    where=str(folder),
                    found=f"{there[0].name}, {other.name}",
                    todo="set tie_word_embeddings in its config.json to what it is",
                )
    strange = [
        f"{w.name} {w.dtype}"
        for name, w in found.items()
        if values[name].is_floating_point() != w.dtype.is_floating_point
    ]
    used, ignored = {weight.name for weight in ours.values()}, _ignored(model)
    unexpected = [name for name in stored if name not in used and not ignored(name)]
    _refuse(
        folder,
        {
            "missing": missing,
            "of another shape": misshapen,
            "not part of the architecture": unexpected,
            "of another type": strange,
        },
    )
    return found


def check_weights(config: PretrainedConfig, auto_class: str, folder: Path) -> None:
    """Refuse, before anything is read of them, weights that are not those of a configuration; see `find_weights`.

    Raises:
        DataError: as `find_weights`.
    """
    find_weights(empty_model(config, auto_class), folder)


def _by_our_name(
    stored: Mapping[str, StoredWeight], ours: Mapping[str, Tensor], prefix: str, folder: Path
) -> dict[str, StoredWeight]:
    found: dict[str, StoredWeight] = {}
    for name, weight in stored.items():
        new = next((n for n in (name, f"{prefix}.{name}") if n in ours), None)
        if new in found:
            raise DataError("a weight is there twice", where=str(folder), found=f"{found[new].name}, {name}")
        if new is not None:
            found[new] = weight
    return found


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


def _refuse(folder: Path, wrong: Mapping[str, list[str]]) -> None:
    told = [f"{len(names)} {what}: {some(sorted(names))}" for what, names in wrong.items() if names]
    if told:
        raise DataError(
            "the checkpoint does not fit its configuration",
            where=str(folder),
            found="; ".join(told),
            todo="use the complete checkpoint of a model made for this task, saved by a current transformers "
            "(from_pretrained, then save_pretrained, renames the weights of older ones)",
        )
