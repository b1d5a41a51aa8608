"""The task registry: what is asked of the examples, which model class answers, and how rows become examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mtkd.config import DataConfig
from mtkd.data.blanks import prepare_cloze, prepare_infill
from mtkd.data.examples import prepare_causal, prepare_classify, prepare_masked
from mtkd.data.labels import find_labels
from mtkd.data.raw import Raw
from mtkd.data.split import PrepareRequest, Split
from mtkd.errors import DataError, UserError
from mtkd.registry import TASKS

if TYPE_CHECKING:
    from mtkd.data.raw import Raw
    from mtkd.data.split import Split


Prepare = Callable[[PrepareRequest], Split]
Labels = Callable[[DataConfig, Raw], tuple[tuple[str, ...], int]]


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
        architectures: the only ones that can do it; () for all that have the head.
        varies: inputs change with the epoch, unless `redraw` is false.
        laid: examples have two parts and positions of their own.
        cloze: a class is scored by its words (`verbalizers`) in place of a blank; it adds no
            weights to the language model's.
    """

    name: str
    auto_class: str
    token_level: bool
    metrics: tuple[str, ...]
    prepare: Prepare
    labels: Labels
    regression_metrics: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    varies: bool = False
    laid: bool = False
    cloze: bool = False

    @property
    def masked(self) -> bool:
        """Whether models are asked about the tokenizer's mask."""
        return self.auto_class == "AutoModelForMaskedLM" or self.laid or self.cloze

    @property
    def left_to_right(self) -> bool:
        """Whether the logits of a position predict the token after it, given the text up to it."""
        return self.auto_class == "AutoModelForCausalLM" and not self.laid

    def class_for(self, config: DataConfig) -> str:
        """The auto class of a `data` block's models: with next-sentence labels the one that has both heads."""
        return "AutoModelForPreTraining" if config.next_sentence else self.auto_class

    def metrics_for(self, num_labels: int) -> tuple[str, ...]:
        """The metrics of this task: a single output is a regression."""
        return self.regression_metrics if self.regression_metrics and num_labels == 1 else self.metrics


def check_task(config: DataConfig, where: str = "@data") -> None:
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
    if "mask_share" in task.fields and config.mask_share == 0:
        raise UserError("no token would be a target", where=f"{where}.mask_share", found=0, allowed="above 0, up to 1")
    if task.cloze:
        _check_cloze(config, where)


def varies(config: DataConfig) -> bool:
    """Whether the inputs of a `data` block change with the epoch."""
    return bool(TASKS.find(config.task).varies) and config.redraw


def check_model(config: DataConfig, architecture: str, where: str, *, cloze: bool, compressed: bool) -> None:
    """Refuse a model that cannot do the task of a `data` block.

    Args:
        architecture: transformers' model_type. cloze: whether its configuration scores classes by their words.
        compressed: whether it has a part of the ids.

    Raises:
        UserError: naming both.
    """
    task: TaskSpec = TASKS.find(config.task)
    if task.architectures and architecture not in task.architectures:
        raise UserError(
            f"task '{task.name}' is for {' and '.join(task.architectures)}",
            where=where,
            found=f"architecture '{architecture}'",
            allowed=task.architectures,
            todo="choose such a model, or another task for these data",
        )
    if task.cloze and compressed:
        raise UserError(
            "a cloze scores words of the whole vocabulary, and this model has a part of it",
            where=f"{where}.vocabulary",
            found=f"task {task.name}",
            todo="drop vocabulary here and in the stages before",
        )
    if cloze and not task.cloze and not task.token_level:
        raise UserError(
            f"the model is a cloze, and task '{task.name}' does not see to it that every text keeps its blank",
            where=where,
            found="verbalizers in its configuration",
            todo="set data.NAME.task: glm-cloze with cloze and verbalizers",
        )


def _check_cloze(config: DataConfig, where: str) -> None:
    if config.cloze is None or len(config.verbalizers) < 2:
        first = config.cloze is None
        raise UserError(
            f"task '{config.task}' needs cloze and verbalizers",
            where=f"{where}.{'cloze' if first else 'verbalizers'}",
            found="nothing" if first else config.verbalizers,
            allowed="a template with [MASK]" if first else "the words of two classes or more",
        )
    if config.labels and set(config.labels) != set(config.verbalizers):
        raise UserError(
            "labels and verbalizers name different classes",
            where=f"{where}.labels",
            found=config.labels,
            allowed=list(config.verbalizers),
        )
    if "text" in config.model_fields_set:
        raise UserError("the columns of a cloze are those of its template", where=f"{where}.text", found=config.text)
    words = [text.strip() for text in config.verbalizers.values()]
    if not all(words) or len(set(config.verbalizers.values())) < len(words):
        raise UserError(
            "every class needs words of its own", where=f"{where}.verbalizers", found=list(config.verbalizers.values())
        )


def _no_labels(config: DataConfig, raw: Raw) -> tuple[tuple[str, ...], int]:
    return (), 0


def _class_labels(config: DataConfig, raw: Raw) -> tuple[tuple[str, ...], int]:
    labels = raw.labels or find_labels(config, raw)
    if not labels.kind:
        raise DataError(
            f"nothing names the classes: {labels.why}",
            where="@data.labels",
            found="no labels",
            todo="set `labels` to the class names in order",
        )
    return labels.names, labels.num_outputs


def _cloze_labels(config: DataConfig, raw: Raw) -> tuple[tuple[str, ...], int]:
    return config.classes, len(config.classes)


_GLM = ("glm_blocklm",)

TASKS.add(
    "causal-lm",
    TaskSpec(
        "causal-lm",
        "AutoModelForCausalLM",
        True,
        ("bits_per_byte", "perplexity"),
        prepare_causal,
        _no_labels,
        fields=("prompt", "chat", "messages", "mask_history", "prompts_only"),
    ),
)
TASKS.add(
    "masked-lm",
    TaskSpec(
        "masked-lm",
        "AutoModelForMaskedLM",
        True,
        ("perplexity", "accuracy"),
        prepare_masked,
        _no_labels,
        fields=("mask_share", "next_sentence", "redraw"),
        varies=True,
    ),
)
TASKS.add(
    "glm-infill",
    TaskSpec(
        "glm-infill",
        "AutoModelForCausalLM",
        True,
        ("perplexity", "accuracy"),
        prepare_infill,
        _no_labels,
        fields=("infill", "mask_share", "redraw"),
        architectures=_GLM,
        varies=True,
        laid=True,
    ),
)
TASKS.add(
    "glm-cloze",
    TaskSpec(
        "glm-cloze",
        "AutoModelForSequenceClassification",
        False,
        ("accuracy", "f1", "matthews"),
        prepare_cloze,
        _cloze_labels,
        fields=("cloze", "verbalizers", "label", "labels"),
        architectures=_GLM,
        cloze=True,
    ),
)
TASKS.add(
    "classify",
    TaskSpec(
        "classify",
        "AutoModelForSequenceClassification",
        False,
        ("accuracy", "f1", "matthews"),
        prepare_classify,
        _class_labels,
        regression_metrics=("pearson", "spearman"),
        fields=("label", "labels", "label_kind", "specialist", "text_pair"),
    ),
)
