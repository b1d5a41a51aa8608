"""Which weights of a model's head its folder holds. What is missing is drawn at random when the model is loaded.

Whether a folder is a classifier or a language model is read off the names in its files. `architectures` in its
config.json is only a claim.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.errors import DataError, UserError
from mtkd.models.create import meta_model
from mtkd.models.folder import INDEX, WEIGHTS
from mtkd.models.formats import lay_out
from mtkd.models.info import PRE_TRAINING
from mtkd.models.stored import read_index, read_weights, some

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEXT_SENTENCE = "seq_relationship"
"""Part of the names of a next-sentence head, in every architecture that has one."""


# First part of the names of heads that another task had; their weights in a checkpoint are not needed.
_OTHER_HEADS = (
    *("cls", "lm_head", "vocab_transform", "vocab_layer_norm", "vocab_projector", "predictions"),
    *("classifier", "pre_classifier", "score", "qa_outputs", "pooler"),
    *("generator_predictions", "generator_lm_head", "discriminator_predictions"),
)


@dataclass(frozen=True)
class Head:
    """The weights behind one feature, encoder or decoder aside; of tied weights one name stands for all.

    Attributes:
        names: all of them; () where the head is the table of the tokens, or has no weights of its own.
        missing: those that the folder lacks.
        own: of `names`, those that are not the encoder's pooler, which a plain encoder may have as well.
    """

    names: tuple[str, ...]
    missing: tuple[str, ...]
    own: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Nothing is missing: it is trained."""
        return not self.missing

    @property
    def absent(self) -> bool:
        """The folder is of a model without this head: all is missing but, perhaps, the pooler."""
        return bool(self.own) and set(self.own) <= set(self.missing)


def find_heads(config: PretrainedConfig, auto_class: str, folder: Path) -> dict[str, Head] | None:
    """The heads of a model of this configuration: "logits", and "nsp_logits" where it has a next-sentence head.

    Args:
        folder: checked. None of its values is read.
    Returns:
        None where no weights lie in the folder: of a hub model they are fetched when the run begins.
    Raises:
        DataError: the files are damaged.
    """
    stored = stored_names(folder)
    if stored is None:
        return None
    model = meta_model(config, auto_class)
    with torch.device("meta"):  # a format may make its numbers with `torch.zeros`
        lay_out(model)
    return heads_of(model, auto_class, stored)


def heads_of(model: PreTrainedModel, auto_class: str, stored: Collection[str]) -> dict[str, Head]:
    """As `find_heads`, for a model whose weights may be on the meta device.

    Args:
        stored: names in the files, with or without the prefix of the bare encoder or decoder.
    """
    prefix, ignored = model.base_model_prefix, model._keys_to_ignore_on_load_missing or ()
    there = {new for name in stored for new in _current(name, prefix)}
    optional = re.compile("|".join(f"({pattern})" for pattern in ignored) or r"(?!)")
    names: dict[str, list[str]] = {"logits": []}
    missing: dict[str, list[str]] = {"logits": []}
    for group in _tied(model):
        pooler = group[0].startswith(f"{prefix}.pooler.")
        if any(name.startswith(f"{prefix}.") for name in group) and not pooler:
            continue  # of the encoder or decoder, or tied to it
        feature = "nsp_logits" if auto_class == PRE_TRAINING and (pooler or _NEXT_SENTENCE in group[0]) else "logits"
        names.setdefault(feature, []).append(group[0])
        if not there.intersection(group) and not any(optional.search(name) for name in group):
            missing.setdefault(feature, []).append(group[0])
    own = {f: tuple(n for n in parts if not n.startswith(f"{prefix}.pooler.")) for f, parts in names.items()}
    return {f: Head(tuple(parts), tuple(missing.get(f, ())), own[f]) for f, parts in names.items()}


def stored_names(folder: Path) -> set[str] | None:
    """Names of the weights in a folder's files, or in its index where the shards are not here; None without both."""
    if (folder / WEIGHTS).is_file():
        return set(read_weights(folder))
    return set(read_index(folder / INDEX)) if (folder / INDEX).is_file() else None


def check_heads(
    heads: Mapping[str, Head], folder: Path, where: str, *, reads: Collection[str] | None, new: bool
) -> None:
    """Refuse a head that would be drawn at random, wholly or in part, where it may not be.

    Args:
        reads: features that are read of a frozen teacher; None for a model that is trained.
        new: a model that is trained may begin with a new head, where nothing of it is in the folder.
    Raises:
        DataError: naming the weights that are missing.
    """
    for feature, head in heads.items():
        if reads is None:
            if not head.whole and not (new and head.absent):
                raise unfitting("missing", list(head.missing), folder)
        elif feature in reads and not head.whole:
            raise DataError(
                "the teacher has no trained head for this task: its predictions would be noise",
                where=where,
                found=f"{folder} lacks {some(list(head.missing))}",
                allowed="a model whose files hold every weight of its head; or rows on hidden states and attention "
                "alone, with a weighting that reads no predictions",
                todo="fine-tune it first: a `kind: finetune` stage, and stage:NAME as the teacher",
            )


def unfitting(what: str, names: list[str], folder: Path) -> DataError:
    """Weights that are not those of the configuration.

    Args:
        what: is wrong with them.
    """
    return DataError(
        f"the checkpoint does not fit its configuration: {len(names)} weights are {what}",
        where=str(folder),
        found=some(names),
        todo="use the complete checkpoint of a model made for this task",
    )


def of_another_head(name: str, prefix: str) -> bool:
    """A weight of another task's head, or of the pooler that this task does not use."""
    return name.removeprefix(f"{prefix}.").split(".")[0] in _OTHER_HEADS


def output_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer of a classifier whose outputs are its logits: the last linear one outside the encoder or decoder.

    Raises:
        UserError: there is none.
    """
    prefix = f"{model.base_model_prefix}."
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith(prefix)]
    if not layers:
        raise UserError(f"architecture '{model.config.model_type}' has no linear classification layer", where="@model")
    return layers[-1]


@torch.no_grad()
def reorder_outputs(model: PreTrainedModel, columns: Sequence[int]) -> None:
    """Put the outputs of a classifier into another order: output i is then the one that was `columns[i]`.

    Raises:
        UserError: an architecture whose last layer does not make its logits.
    """
    layer, order = output_layer(model), torch.tensor(columns)
    ids = torch.tensor([[0, 1]])
    before = model(input_ids=ids).logits
    layer.weight.data = layer.weight.data[order].contiguous()
    if layer.bias is not None:
        layer.bias.data = layer.bias.data[order].contiguous()
    after = model(input_ids=ids).logits
    if not torch.allclose(before[:, order], after, rtol=1e-3, atol=1e-5):
        raise UserError(
            f"the classes of architecture '{model.config.model_type}' cannot be put into another order",
            where="@model",
            todo="set data.NAME.labels to the order of the model",
        )


def stand_in_pad(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Give a classifier's configuration an id for padding, where it has none: decoders ask for one in a batch.

    Plain transformers takes a row's last token that is not this one. Where the tokenizer has no padding token it is a
    special token that stands in no text, so that both find the same one.

    Args:
        tokenizer: None for a model that is not exported: then -1, which no text has.
    """
    if config.pad_token_id is None:
        config.pad_token_id = -1 if tokenizer is None else padding_id(tokenizer)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's padding token, else a special one that it does not put around texts (the end before others)."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    around = set(tokenizer("a")["input_ids"])
    special = [tokenizer.eos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids]
    known = [int(number) for number in special if number is not None]
    return next((number for number in known if number not in around), known[0] if known else 0)


def _current(name: str, prefix: str) -> tuple[str, str]:
    """Names that a stored weight may have in the model: older files call the parts of a norm gamma and beta."""
    name = re.sub(r"\.gamma$", ".weight", name)
    name = re.sub(r"\.beta$", ".bias", name)
    return name, f"{prefix}.{name}"


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """Names that belong to one parameter, together."""
    groups: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())
