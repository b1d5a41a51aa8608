"""From a published GLM checkpoint to a folder that `from_pretrained` and mtkd read: renamed, merged, streamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mtkd.data.glm_tokens import END, START, tokenizer_beside
from mtkd.errors import DataError, UserError
from mtkd.models.cards import load_cards
from mtkd.models.glm.checkpoint import Checkpoint, open_checkpoint
from mtkd.models.glm.configuration import HUB_ACTIVATION, ORIGINAL_ACTIVATION, GLMConfig
from mtkd.models.glm.names import Stored, merge, rename, shapes_wanted
from mtkd.models.glm.published import IDS
from mtkd.models.glm.shards import SHARD_BYTES, num_bytes, write_shards
from mtkd.models.info import GLM


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, the model's configuration, its parameters, and files of weights."""

    folder: Path
    config: GLMConfig
    parameters: int
    num_files: int


def convert_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a published checkpoint under mtkd's names, as `GLMForConditionalGeneration` saves them.

    Values are handed on, not copied. The output head is the table of the tokens and has no entry; load with
    ``model.load_state_dict(weights, strict=False)``, or tie the weights afterwards.

    Args:
        state_dict: of any of the four forms, whole (not one of several model-parallel parts).

    Raises:
        DataError: weights that are missing or unexpected, with their names, or of shapes that do not fit each other.
    """
    names = rename(state_dict.keys(), "state_dict")
    weights = {ours: state_dict[published] for ours, published in names.items()}
    _check_shapes({name: tuple(value.shape) for name, value in weights.items()}, "state_dict")
    return weights


def convert_checkpoint(
    source: Path,
    out: Path,
    *,
    heads: int | None = None,
    hidden_act: str | None = None,
    vocabulary: Path | None = None,
    with_tokenizer: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Write a published checkpoint as a model folder: config.json, safetensors and their index.

    The folder appears when it is whole, and not before. The weights keep their type. Memory: the largest weight and
    what it is merged from; pages of the mapped source come on top, which the system takes back when it needs them.

    Args:
        source: a file or folder of one of the four forms.
        out: a folder that does not exist.
        heads: attention heads; default: of config.json next to the weights, else of the card of that shape.
        hidden_act: default: the tanh form for the original's checkpoints, the erf form for the hub port's.
        vocabulary: a folder with vocab.json and merges.txt (GPT-2) or vocab.txt (BERT), whose tokenizer, with GLM's
            commands, goes along; default: those files next to the weights, if they are there.
        with_tokenizer: false: no tokenizer goes along, even if one is next to the weights.

    Raises:
        UserError: `out` exists, or a number of heads that is unknown or does not fit.
        DataError: a source that is not a GLM: names, shapes, parts, or a pickle with more than weights.
    """
    if vocabulary is not None and not with_tokenizer:
        raise UserError("a vocabulary, and none", where="--no-tokenizer", found=f"--vocabulary {vocabulary}")
    _check_options(out, hidden_act)
    opened = open_checkpoint(source)
    weights = _merged(opened.parts, str(source))
    config = _config(opened, weights, heads, hidden_act)
    tokenizer = _tokenizer(source, vocabulary, config) if with_tokenizer else None
    num_files = _write(out, weights, config, tokenizer, shard_bytes)
    return Converted(out, config, sum(torch.Size(w.shape).numel() for w in weights.values()), num_files)


def _check_options(out: Path, hidden_act: str | None) -> None:
    if hidden_act not in (None, HUB_ACTIVATION, ORIGINAL_ACTIVATION):
        raise UserError(
            "not an activation of a published GLM",
            where="--hidden-act",
            found=hidden_act,
            allowed=[ORIGINAL_ACTIVATION, HUB_ACTIVATION],
        )
    if os.path.lexists(out):
        raise UserError("the folder exists already", where="OUT", found=str(out), todo="name another one")


def _write(
    out: Path,
    weights: Mapping[str, Stored],
    config: GLMConfig,
    tokenizer: PreTrainedTokenizerFast | None,
    shard_bytes: int,
) -> int:
    """Write the folder next to its place and rename it; the number of files of weights."""
    out.parent.mkdir(parents=True, exist_ok=True)
    need = sum(num_bytes(weight) for weight in weights.values())
    if (free := shutil.disk_usage(out.parent).free) < need:
        raise UserError(
            "the disk is too small for the converted weights",
            where=str(out.parent),
            found=f"{free / 1e9:.1f} GB free",
            allowed=f"at least {need / 1e9:.1f} GB",
        )
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        num_files = write_shards(aside, weights, shard_bytes)
        config.save_pretrained(aside)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        aside.chmod(0o777 & ~_umask())  # mkdtemp's are the owner's alone
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return num_files


def _tokenizer(source: Path, vocabulary: Path | None, config: GLMConfig) -> PreTrainedTokenizerFast | None:
    """The tokenizer that goes along; None without a vocabulary next to the weights."""
    folder = vocabulary or (source if source.is_dir() else source.parent)
    tokenizer = tokenizer_beside(folder)
    if tokenizer is None and vocabulary is not None:
        raise UserError(
            "no vocabulary in the folder",
            where="--vocabulary",
            found=str(vocabulary),
            allowed="vocab.json and merges.txt (GPT-2), or vocab.txt (BERT)",
        )
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise UserError(
            "the vocabulary is not that of the weights",
            where="--vocabulary",
            found=f"{len(tokenizer)} tokens with GLM's commands",
            allowed=f"at most {config.vocab_size}",
        )
    if tokenizer is not None:
        ids = tokenizer.get_vocab()
        own = {
            "pad_token_id": tokenizer.pad_token_id,
            "sop_token_id": ids[START],
            "eos_token_id": ids[END],
            "mask_token_id": tokenizer.mask_token_id,
        }
        published = IDS.get(config.vocab_size, own)
        if own != published:
            raise UserError(
                f"the vocabulary is not that of weights with {config.vocab_size} ids",
                where="--vocabulary",
                found=own,
                allowed=published,
            )
        for name, number in own.items():
            setattr(config, name, number)
    return tokenizer


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _merged(parts: Sequence[Mapping[str, Stored]], where: str) -> dict[str, Stored]:
    """Our name -> the whole weight."""
    renamed = [rename(part.keys(), f"{where}, part {number}") for number, part in enumerate(parts)]
    if any(names.keys() != renamed[0].keys() for names in renamed):
        raise DataError("the parts have different numbers of layers", where=where)
    weights = {
        name: merge(name, [part[names[name]] for part, names in zip(parts, renamed, strict=True)], where)
        for name in renamed[0]
    }
    _check_shapes({name: weight.shape for name, weight in weights.items()}, where)
    return weights


def _sizes(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, int]:
    """What the shapes say of the model."""
    names = ("word_embeddings", "position_embeddings", "layers.0.mlp.dense_h_to_4h")
    tables = [shapes[f"glm.{name}.weight"] for name in names]
    if any(len(shape) != 2 for shape in tables):
        raise DataError("tables and matrices have two axes", where=where, found=dict(zip(names, tables, strict=True)))
    (vocabulary, width), (rows, _), (wide, _) = tables
    layers = sum(name.endswith(".mlp.dense_h_to_4h.weight") for name in shapes)
    return {
        "vocabulary": vocabulary,
        "width": width,
        "positions": rows - 1,
        "intermediate": wide,
        "layers": layers,
    }


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    expected = shapes_wanted(_sizes(shapes, where))
    wrong = [f"{n} {list(shapes[n])} instead of {list(expected[n])}" for n in expected if shapes[n] != expected[n]]
    if wrong:
        raise DataError(
            f"the shapes of {len(wrong)} weights do not fit the others",
            where=where,
            found="; ".join(wrong[:5]),
            todo="give all model-parallel parts (the folder), not one of them",
        )


def _config(opened: Checkpoint, weights: Mapping[str, Stored], heads: int | None, act: str | None) -> GLMConfig:
    sizes = _sizes({name: weight.shape for name, weight in weights.items()}, str(opened.source))
    num_heads = _heads(opened, sizes, heads)
    ids: dict[str, Any] = {**IDS.get(sizes["vocabulary"], {})}
    return GLMConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=num_heads,
        intermediate_size=sizes["intermediate"],
        max_position_embeddings=sizes["positions"],
        hidden_act=act or _activation(opened),
        architectures=["GLMForConditionalGeneration"],
        dtype=str(weights["glm.word_embeddings.weight"].dtype).removeprefix("torch."),
        **ids,
    )


def _activation(opened: Checkpoint) -> str:
    """What the configuration next to the weights says, else what the form was published with."""
    stated = opened.settings.get("hidden_act")
    if stated is None:
        return HUB_ACTIVATION if opened.hub else ORIGINAL_ACTIVATION
    if stated not in (HUB_ACTIVATION, ORIGINAL_ACTIVATION):
        raise DataError(
            "the configuration next to the weights has an activation that no published GLM has",
            where=str(opened.source),
            found=stated,
            allowed=[ORIGINAL_ACTIVATION, HUB_ACTIVATION],
            todo="give it with --hidden-act",
        )
    return str(stated)


def _heads(opened: Checkpoint, sizes: Mapping[str, int], given: int | None) -> int:
    """The number of heads, which no shape tells."""
    stated = opened.settings.get("num_attention_heads")
    if given is not None and isinstance(stated, int) and stated != given:
        raise UserError(
            "the configuration next to the weights has another number of heads",
            where="--heads",
            found=given,
            allowed=stated,
        )
    shape = (sizes["layers"], sizes["width"])
    cards = {
        card.heads for card in load_cards().values() if card.architecture == GLM and (card.layers, card.width) == shape
    }
    number = given or stated or (cards.pop() if len(cards) == 1 else None)
    if not isinstance(number, int) or number < 1 or sizes["width"] % number:
        raise UserError(
            "the number of attention heads cannot be read from the weights",
            where="--heads",
            found=number or "no configuration next to the weights, and no card of this shape",
            allowed=f"a divisor of the width {sizes['width']}",
            todo="give it with --heads; the published models have heads of 64",
        )
    return number
