"""What a stage asks of a model: facts of the task, the data and the tokenizer, and what is read of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtkd.config import DataConfig
from mtkd.data.blanks import answer_ids
from mtkd.models.classes import UNSAID, Meaning
from mtkd.registry import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Resolve = Callable[[str], Path | str]
"""Maps ``stage:NAME`` and relative folders to folders; returns anything else as it is."""


@dataclass(frozen=True)
class Taught:
    """What a stage does with a frozen teacher.

    Attributes:
        reads: which of its predictions are read, "logits" and "nsp_logits"; their heads must be in its files.
        meaning: what the user says of its outputs.
    """

    reads: frozenset[str]
    meaning: Meaning = UNSAID


@dataclass(frozen=True)
class ModelRequest:
    """What is asked of a model in addition to its own description.

    Attributes:
        auto_class: "AutoModelForCausalLM", "AutoModelForMaskedLM" or "AutoModelForSequenceClassification".
        num_ids: real token ids of the tokenizer, or of the kept part of a compressed vocabulary.
        max_positions: tokens of the longest example.
        tokenizer: gives the special ids of a fresh model.
        resolve: where a path leads.
        num_labels: outputs of a classification model (1 = regression); 0 for token-level models, and at plan time
            while the classes are still in the data.
        label_names: class names in order, may be empty.
        answers: token ids of every class's words: makes a GLM classifier a cloze, even if its configuration is another.
        taught: of a frozen teacher, which keeps its own outputs (`mtkd.models.classes` maps them to the data's
            classes). None: a model that is trained. It gets the data's classes in their order, and a new
            classification head if it comes without one.
        seed: of everything that is newly initialised; the global random state is neither read nor changed.
        where: place in the configuration, for messages; default: the folder.
    """

    auto_class: str
    num_ids: int
    max_positions: int
    tokenizer: PreTrainedTokenizerBase
    resolve: Resolve = Path
    num_labels: int = 0
    label_names: tuple[str, ...] = ()
    answers: list[list[int]] | None = None
    taught: Taught | None = None
    seed: int = 0
    where: str = ""

    @classmethod
    def of_data(
        cls,
        name: str,
        data: DataConfig,
        labels: tuple[int, tuple[str, ...]],
        tokenizer: PreTrainedTokenizerBase,
        num_ids: int,
        resolve: Resolve,
    ) -> ModelRequest:
        """A model for the task of a `data` entry: trained, seed 0.

        Args:
            name: of the entry.
            labels: (number of outputs, class names), as far as they are known.
        """
        task = TASKS.find(data.task)
        return cls(
            auto_class=task.class_for(data),
            num_ids=num_ids,
            max_positions=data.max_length,
            tokenizer=tokenizer,
            resolve=resolve,
            num_labels=labels[0],
            label_names=labels[1],
            answers=answer_ids(data, tokenizer, f"data.{name}") if task.cloze else None,
        )
