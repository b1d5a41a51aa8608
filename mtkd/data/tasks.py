"""The task registry: what is asked of the examples, which model class answers, and how rows become examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtkd.config import DataConfig
from mtkd.errors import UserError
from mtkd.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.collate import Split
    from mtkd.data.files import Origin
    from mtkd.data.sources import Raw


@dataclass(frozen=True)
class PrepareRequest:
    """All that a task needs to make a split: rows, where they come from, how, and the classes."""

    split: str
    rows: Dataset
    origin: Origin
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...] = ()
    num_labels: int = 0


Prepare = Callable[[PrepareRequest], "Split"]
Labels = Callable[[DataConfig, "Raw"], tuple[tuple[str, ...], int]]


@dataclass(frozen=True)
class TaskSpec:
    """A row of the task table.

    Attributes:
        auto_class: the class of transformers that has the right head.
        token_level: targets are per token [B,L], else per example [B].
        metrics: names of the metrics of `mtkd.evaluate`, the first one leading.
        prepare: rows -> Split.
        labels: (config, raw) -> class names and number of outputs; () and 0 for token tasks.
        regression_metrics: instead of `metrics` when the labels are numbers.
        fields: of the `data` block that only this kind of task reads.
    """

    name: str
    auto_class: str
    token_level: bool
    metrics: tuple[str, ...]
    prepare: Prepare
    labels: Labels
    regression_metrics: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()

    def class_for(self, config: DataConfig) -> str:
        """The auto class of a `data` block's models: with next-sentence labels the one that has both heads."""
        return "AutoModelForPreTraining" if config.next_sentence else self.auto_class

    def metrics_for(self, num_labels: int) -> tuple[str, ...]:
        """The metrics of this task: a single output is a regression."""
        return self.regression_metrics if self.regression_metrics and num_labels == 1 else self.metrics


def check_task(config: DataConfig, where: str = "data") -> None:
    """Refuse an unknown task and fields that another task reads.

    Raises:
        UserError: naming the field.
    """
    task: TaskSpec = TASKS.find(config.task, f"{where}.task")
    special = {name for spec in TASKS.values() for name in spec.fields}
    for name in sorted((special - set(task.fields)) & config.model_fields_set):
        readers = [spec.name for spec in TASKS.values() if name in spec.fields]
        raise UserError(
            f"task '{config.task}' does not read this",
            where=f"{where}.{name}",
            found=getattr(config, name),
            todo=f"drop it, or set task: {' or '.join(readers)}",
        )
    if config.task == "masked-lm" and config.mask_share == 0:
        raise UserError("no token would be a target", where=f"{where}.mask_share", found=0, allowed="above 0, up to 1")


def _no_labels(config: DataConfig, raw: Raw) -> tuple[tuple[str, ...], int]:
    return (), 0


# The makers of splits need torch; the table of tasks is read without it.


def _class_labels(config: DataConfig, raw: Raw) -> tuple[tuple[str, ...], int]:
    from mtkd.data.labels import find_labels

    return find_labels(config, raw)


def _causal(request: PrepareRequest) -> Split:
    from mtkd.data.prepare import prepare_causal

    return prepare_causal(request)


def _masked(request: PrepareRequest) -> Split:
    from mtkd.data.prepare import prepare_masked

    return prepare_masked(request)


def _classify(request: PrepareRequest) -> Split:
    from mtkd.data.prepare import prepare_classify

    return prepare_classify(request)


TASKS.add(
    "causal-lm",
    TaskSpec(
        "causal-lm",
        "AutoModelForCausalLM",
        True,
        ("bits_per_byte", "perplexity"),
        _causal,
        _no_labels,
        fields=("prompt", "chat"),
    ),
)
TASKS.add(
    "masked-lm",
    TaskSpec(
        "masked-lm",
        "AutoModelForMaskedLM",
        True,
        ("perplexity", "accuracy"),
        _masked,
        _no_labels,
        fields=("mask_share", "next_sentence"),
    ),
)
TASKS.add(
    "classify",
    TaskSpec(
        "classify",
        "AutoModelForSequenceClassification",
        False,
        ("accuracy", "f1", "matthews"),
        _classify,
        _class_labels,
        regression_metrics=("pearson", "spearman"),
        fields=("label", "labels", "text_pair"),
    ),
)
