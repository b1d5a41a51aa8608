"""A compressed vocabulary: the most frequent ids are kept, and each removed one is read as the kept one most like it.

A removed id is mapped to the kept id whose teacher embedding has the largest inner product with its own. The student's
embedding and output head have rows for kept ids only, and a loss on logits compares these columns, before the softmax.

The student then predicts classes of ids. To be scored on text as every other model is, it is completed by a unigram
model within the classes: ``p(id) = p(class) * (count(id) + 1) / sum over the class of (count + 1)``, with the counts
that chose the ids. That is a distribution over the whole vocabulary, so bits per byte compare with any other model's.

Source: Tan et al. 2023, Are Intermediate Layers and Labels Really Necessary? A General Language Model Distillation
Method (GLMD), arXiv 2306.06625, vocabulary compression. Classes: Brown et al. 1992, Class-based n-gram models of
natural language.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mtkd.data.batch import NO_LABEL
from mtkd.data.conversations import chat_texts
from mtkd.data.prompts import written_texts
from mtkd.data.split import PrepareRequest
from mtkd.data.tokenizers import num_real_ids, tokenizer_fingerprint
from mtkd.data.vocabulary import count_ids, shareable_ids
from mtkd.errors import DataError, UserError
from mtkd.models.folder import MAP_FILE, check_folder
from mtkd.models.info import OFFSET_POSITIONS
from mtkd.registry import TASKS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from mtkd.config import DataConfig, VocabularyConfig
    from mtkd.data.raw import Raw

_ROWS = 1024  # embeddings of removed ids that are compared with all kept ones at a time


class VocabularyMap(nn.Module):
    """Which of V ids are kept, and what stands for the others; K = `num_kept`.

    A module, so that it moves with the student and is in its checkpoint.

    Args:
        kept: run ids of the student's rows, rising, [K].
        to_kept: per run id the student's row, [V].
        counts: per run id its occurrences, [V].
        tokenizer: fingerprint of the tokenizer that the run ids belong to.
    """

    kept: Tensor
    to_kept: Tensor
    counts: Tensor

    def __init__(self, kept: Tensor, to_kept: Tensor, counts: Tensor, tokenizer: str) -> None:
        super().__init__()
        self.register_buffer("kept", kept.long())
        self.register_buffer("to_kept", to_kept.long())
        self.register_buffer("counts", counts.long())
        self.tokenizer = tokenizer

    @property
    def num_kept(self) -> int:
        """K."""
        return len(self.kept)

    def inputs(self, ids: Tensor) -> Tensor:
        """Run ids -> rows of the student's embedding, any shape."""
        return self.to_kept[ids]

    def targets(self, targets: Tensor) -> Tensor:
        """Run ids -> the student's columns; `NO_LABEL` stays."""
        return torch.where(targets == NO_LABEL, targets, self.to_kept[targets.clamp_min(0)])

    def is_removed(self, ids: Tensor) -> Tensor:
        """Whether a run id has no column of its own, bool."""
        return self.kept[self.to_kept[ids]] != ids

    def log_share(self, ids: Tensor) -> Tensor:
        """Log of a run id's share of its class, nats, <= 0; float32."""
        weights = self.counts.double() + 1
        sums = torch.zeros(self.num_kept, dtype=torch.float64, device=weights.device)
        sums.index_add_(0, self.to_kept, weights)
        return (weights[ids] / sums[self.to_kept[ids]]).log().float()

    def save(self, folder: Path) -> None:
        """Write it next to an exported model."""
        values = {name: getattr(self, name).tolist() for name in ("kept", "to_kept", "counts")}
        (folder / MAP_FILE).write_text(json.dumps({"tokenizer": self.tokenizer, **values}))


def read_vocabulary(folder: Path | str, tokenizer: PreTrainedTokenizerBase, where: str) -> VocabularyMap | None:
    """The map in the folder of an exported model; None for a model with a whole vocabulary.

    Raises:
        DataError: a file that is no map, or one for another tokenizer than the run's.
    """
    file = Path(folder) / MAP_FILE
    if not isinstance(folder, Path) or not file.is_file():
        return None
    check_folder(folder, weights=False)  # a link could lead to a file outside
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kept, to_kept, counts = (torch.tensor(values[n], dtype=torch.int64) for n in ("kept", "to_kept", "counts"))
        vocabulary = VocabularyMap(kept, to_kept, counts, str(values["tokenizer"]))
        ids, rows = torch.arange(len(vocabulary.to_kept)), torch.arange(vocabulary.num_kept)
        whole = len(vocabulary.counts) == len(ids) and bool((vocabulary.to_kept[vocabulary.kept] == rows).all())
        whole = whole and bool(((vocabulary.to_kept >= 0) & (vocabulary.to_kept < len(rows))).all())
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"is not a vocabulary map: {error}", where=str(file)) from error
    if not whole:
        raise DataError("is not a vocabulary map: its tables do not fit each other", where=str(file))
    if vocabulary.tokenizer != tokenizer_fingerprint(tokenizer):
        raise DataError(
            "the model's vocabulary was compressed from another tokenizer than the run's",
            where=where,
            found=str(folder),
            todo="set tokenizer.path to the tokenizer that this model was trained with",
        )
    return vocabulary


def compressed_twice(where: str) -> UserError:
    """The error for `vocabulary` on a model that brings a map."""
    return UserError(
        "the model's vocabulary is compressed already; it goes on with it as it is",
        where=where,
        todo="drop `vocabulary`",
    )


def compressed_teacher(path: str, where: str) -> UserError:
    """The error for a teacher of a token task whose vocabulary is compressed."""
    return UserError(
        "a teacher of a token task needs its whole vocabulary, and this model's is compressed",
        where=where,
        found=path,
        allowed="a whole vocabulary; for classification any, and as a student to go on with",
        todo="teach from the model it was distilled from, or leave out `vocabulary` in that stage",
    )


def num_kept(setting: VocabularyConfig, num_ids: int) -> int:
    """K of V = `num_ids` ids."""
    return max(1, round(setting.keep * num_ids))


def choose_kept(
    setting: VocabularyConfig,
    counts: np.ndarray,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    labels: Sequence[str],
    where: str,
) -> np.ndarray:
    """The kept ids, rising, [K]: special ones, those of `always` and of the labels, and the most frequent others.

    Ids that the tokenizer needs apart (see `shareable_ids`) are kept too. Equal counts: the smaller id first.

    Args:
        counts: occurrences, [V].
        config: of the model that is compressed.
        labels: class names.

    Raises:
        UserError: more ids must be kept than `keep` allows, or a tokenizer that cannot be compressed.
    """
    num_ids = len(counts)
    number = num_kept(setting, num_ids)
    words = [*setting.always, *labels]
    # both as a text of its own and inside one, where byte-level tokenizers mark the space
    texts = [text for word in words for text in (word, f" {word}")]
    spoken = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    forced = set(range(num_ids)) - set(shareable_ids(tokenizer, where).tolist())
    forced |= {part for ids in spoken for part in ids} | set(_special_fields(config).values())
    if config.model_type in OFFSET_POSITIONS and config.pad_token_id is not None:
        forced |= set(range(config.pad_token_id))  # positions are counted from the id of the pad token
    must = np.array(sorted(i for i in forced if 0 <= i < num_ids), np.int64)
    if len(must) > number or (len(must) == number < num_ids):  # at least one id that others may be mapped to
        raise UserError(
            "more ids must be kept than `keep` allows: special tokens, label words, and what the tokenizer's merges "
            "are built from",
            where=f"{where}.keep",
            found=f"{setting.keep:g} of {num_ids} ids = {number}",
            allowed=f"more than {len(must) / num_ids:.3f}",
        )
    order = np.lexsort((np.arange(num_ids), -counts))
    others = order[~np.isin(order, must)]
    return np.sort(np.concatenate([must, others[: number - len(must)]]))


def make_vocabulary(
    setting: VocabularyConfig,
    data: DataConfig,
    raw: Raw,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    table: Tensor,
) -> VocabularyMap:
    """Count the ids of a train split, choose those that stay, and map the others.

    Args:
        data: the entry that `setting.counts` names.
        raw: its rows.
        config: of the student.
        table: the input embedding that tells which ids are alike, [>= V,H].

    Raises:
        UserError: as `choose_kept`.
    """
    where = "@model.vocabulary"
    counts = np.zeros(num_real_ids(tokenizer), np.int64)
    for texts in _counted(data, raw, tokenizer):
        counts += count_ids(tokenizer, texts, len(counts))
    labels, _ = TASKS.find(data.task).labels(data, raw)
    kept = choose_kept(setting, counts, tokenizer, config, labels, where)
    return make_map(kept, counts, table, shareable_ids(tokenizer, where), tokenizer_fingerprint(tokenizer))


def _counted(data: DataConfig, raw: Raw, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """The texts of the train split as the task tokenises them: prompts with what their template writes around them."""
    if not data.prompted:
        for column in filter(None, (*data.text_columns, data.text_pair)):
            yield raw.texts("train", column)
    elif "train" in raw.splits:
        request = PrepareRequest("train", raw.splits["train"], raw.origin("train"), data, tokenizer)
        yield written_texts(request) if data.messages is None else chat_texts(request)
    else:
        raise DataError("there is no train split to count", where="@data", allowed=list(raw.splits))


def make_map(
    kept: np.ndarray, counts: np.ndarray, embedding: Tensor, targets: np.ndarray, tokenizer: str
) -> VocabularyMap:
    """Map every id that is not kept to the kept one with the largest inner product of embeddings; ties: the smaller id.

    Args:
        embedding: of the teacher, [>= V, H_T].
        targets: ids that another one may be mapped to (no special ones).
    """
    num_ids = len(counts)
    table = embedding.detach()[:num_ids].float().cpu()
    rows = torch.from_numpy(kept)
    to_kept = torch.full((num_ids,), -1, dtype=torch.int64)
    to_kept[rows] = torch.arange(len(kept))
    open_rows = torch.from_numpy(np.isin(kept, targets)).nonzero().squeeze(-1)
    removed = (to_kept < 0).nonzero().squeeze(-1)
    candidates = table[rows[open_rows]].t()
    for part in removed.split(_ROWS):
        to_kept[part] = open_rows[(table[part] @ candidates).argmax(1)]
    return VocabularyMap(rows, to_kept, torch.from_numpy(counts), tokenizer)


def compressed_config(config: PretrainedConfig, kept: Sequence[int]) -> PretrainedConfig:
    """A copy with K ids; the special ids have their new numbers.

    Raises:
        UserError: a cloze classifier, whose words are ids too.
    """
    if getattr(config, "verbalizers", None):
        raise UserError(
            "the vocabulary of a cloze classifier cannot be compressed: its verbalizers are ids of the whole one",
            where="@model.vocabulary",
            todo="drop `vocabulary`, or distil a model with a pooled head (no verbalizers in its config.json)",
        )
    rows = {number: row for row, number in enumerate(kept)}
    small = type(config).from_dict(config.to_dict())
    small.vocab_size = len(rows)
    values: dict[str, Any] = config.to_dict()
    for name in values:
        if name.endswith("_token_id") and values[name] is not None:
            many = isinstance(values[name], list)
            # an id that the run's tokenizer does not know (default of an architecture) is dropped
            ids = [rows[number] for number in (values[name] if many else [values[name]]) if number in rows]
            setattr(small, name, ids if many else next(iter(ids), None))
    return small


def compressed_weights(weights: dict[str, Tensor], shapes: dict[str, torch.Size], kept: Tensor) -> dict[str, Tensor]:
    """The kept rows of the embedding, the output head and its bias; everything else as it is.

    Args:
        weights: state dict of the whole model.
        shapes: of the compressed one.
    """
    return {
        name: value if value.shape == shapes[name] else value.index_select(0, kept) for name, value in weights.items()
    }


def planned_config(
    config: PretrainedConfig, setting: VocabularyConfig, tokenizer: PreTrainedTokenizerBase, num_ids: int, where: str
) -> PretrainedConfig:
    """The compressed configuration before anything is counted: of the right size, with some ids for the others.

    Args:
        num_ids: of the run's tokenizer; more than `tokenizer` has while that is a stand-in for one to be trained.

    Raises:
        UserError: as `choose_kept`.
    """
    known = num_real_ids(tokenizer)
    if known < num_ids:
        shareable_ids(tokenizer, where)
        return compressed_config(config, range(num_kept(setting, num_ids)))
    return compressed_config(
        config, choose_kept(setting, np.zeros(num_ids, np.int64), tokenizer, config, (), where).tolist()
    )


def _special_fields(config: PretrainedConfig) -> dict[str, int]:
    values: dict[str, Any] = config.to_dict()
    return {name: value for name, value in values.items() if name.endswith("_token_id") and isinstance(value, int)}
