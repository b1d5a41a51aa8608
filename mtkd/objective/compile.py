"""Compile Match rows: check each against the models that it compares, and resolve its loss and layers.

Everything that a row can get wrong is refused here, at plan time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mtkd.config.match import UNLAYERED_FEATURES, Match
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES, LossSpec
from mtkd.models.features import ATTENTION
from mtkd.models.info import ModelInfo
from mtkd.registry import check_options

PROJECTED = ("hidden", "cls", "embedding")


@dataclass(frozen=True)
class Row:
    """A Match row resolved for one student and T teachers.

    Attributes:
        key: its name in the metrics, "position:feature:loss".
        pairs: per teacher the layer pairs (student, teacher) it compares; one (0, 0) for features without layers.
        place: in the configuration, of its own or of the method that it belongs to; "" where there is none.
    """

    match: Match
    spec: LossSpec
    key: str
    pairs: tuple[tuple[tuple[int, int], ...], ...]
    place: str = ""

    @property
    def is_logits(self) -> bool:
        return self.match.feature == "logits"

    @property
    def from_labels(self) -> bool:
        return self.match.target == "labels"

    @property
    def selects(self) -> bool:
        """Whether the student and its teachers decide which positions have a loss."""
        return self.match.positions == "teachable"

    def feature_key(self, layer: int) -> str:
        """ "hidden.4", or "logits" for a feature without layers."""
        feature = self.match.feature
        return feature if feature in UNLAYERED_FEATURES else f"{feature}.{layer}"

    def student_wants(self) -> set[str]:
        """Feature keys the student must give."""
        return {self.feature_key(s) for pairs in self.pairs for s, _ in pairs} or {self.match.feature}

    def teacher_wants(self, k: int) -> set[str]:
        """Feature keys teacher k must give."""
        return set() if self.from_labels else {self.feature_key(t) for _, t in self.pairs[k]}

    def counted(self, token_level: bool) -> str:
        """Which positions the row counts: `tokens`, `targets`, `labels`, `written` or `sequences`."""
        feature = self.match.feature
        if feature in ("cls", "nsp_logits"):
            return "sequences"
        if feature != "logits":
            return "tokens"
        if not token_level:
            return "targets" if self.from_labels else "sequences"
        if self.from_labels:
            return "labels"
        if "behaviour" in self.spec.needs:
            return "written"
        return "tokens" if self.match.positions == "all" else "targets"


@contextmanager
def at_row(place: str) -> Iterator[None]:
    """Move an error at ``@row...`` to the row's own place, or to that of the method whose row it is.

    Args:
        place: a key of `mtkd.methods.rows.placed_rows`: ``stages.s.match[0]``, or ``stages.s.method: LABEL``.
    """
    block, of_method, label = place.partition(": ")
    try:
        yield
    except UserError as error:
        if error.where.startswith("@row"):
            error.where = block if of_method else block + error.where.removeprefix("@row")
            error.message = f"row '{label}': {error.message}" if of_method else error.message
        raise


def compile_rows(
    matches: Sequence[Match] | Mapping[str, Match],
    student: ModelInfo,
    teachers: dict[str, ModelInfo],
    *,
    token_level: bool,
    regression: bool | None,
    where: str = "match",
) -> list[Row]:
    """Resolve and check every row.

    Args:
        matches: in order; under their places, or without (the rows of `where`).
        regression: labels are numbers; None while only the data can tell.

    Raises:
        UserError: unknown loss or option, a feature the loss cannot read or a model cannot give, layers outside a
            model or depths that do not divide, unequal heads, unequal class counts, losses that do not fit the task.
    """
    placed = matches if isinstance(matches, Mapping) else {f"{where}[{i}]": match for i, match in enumerate(matches)}
    rows = []
    for position, (place, match) in enumerate(placed.items()):
        with at_row(place):
            spec = LOSSES.find(match.loss, "@row.loss")
            check_options(match.options, spec.options(), "@row")
            _check_loss(match, spec, token_level, regression)
            _check_values(match, spec)
            _check_taps(match, "student", student)
            _check_standardised(match, student, token_level)
            pairs = _pairs(match, student, teachers, token_level)
        rows.append(Row(match, spec, f"{position}:{match.feature}:{match.loss}", pairs, place.partition(": ")[0]))
    return rows


def _pairs(
    match: Match, student: ModelInfo, teachers: Mapping[str, ModelInfo], token_level: bool
) -> tuple[tuple[tuple[int, int], ...], ...]:
    """The layer pairs of a row per teacher, each of which can give the row's feature."""
    pairs: list[tuple[tuple[int, int], ...]] = []
    for name, teacher in teachers.items() if match.target == "teacher" else ():
        _check_taps(match, f"teacher '{name}'", teacher)
        _check_heads(match, student, name, teacher)
        if match.feature == "logits" and not token_level and student.num_labels != teacher.num_labels:
            raise UserError(
                f"teacher '{name}' has another number of classes",
                where="@row",
                found=f"{teacher.num_labels} against the student's {student.num_labels}",
            )
        if match.feature in UNLAYERED_FEATURES:
            pairs.append(((0, 0),))
        else:
            pairs.append(tuple(match.layer_pairs(student.num_layers, teacher.num_layers, "@row")))
    return tuple(pairs)


def _check_loss(match: Match, spec: LossSpec, token_level: bool, regression: bool | None) -> None:
    if match.feature not in spec.inputs:
        raise UserError(f"loss '{match.loss}' cannot read feature '{match.feature}'", where="@row", allowed=spec.inputs)
    if spec.labels != (match.target == "labels"):
        wanted = "labels" if spec.labels else "teacher"
        raise UserError(f"loss '{match.loss}' compares with {wanted}", where="@row.target", found=match.target)
    if not spec.labels and regression and match.feature == "logits" and "hidden" not in spec.inputs:
        raise UserError(
            f"loss '{match.loss}' needs at least two classes, but the task has one number per example",
            where="@row",
            todo="use loss: mse for a regression task",
        )
    if spec.name == "ce" and regression:
        raise UserError("cross entropy needs class labels", where="@row", todo="use loss: label_mse")
    if spec.name == "label_mse" and regression is False:
        raise UserError("label_mse needs numeric labels (a regression task)", where="@row", todo="use loss: ce")
    if match.ensemble == "probabilities" and "hidden" in spec.inputs:
        raise UserError(
            f"loss '{match.loss}' compares logits as vectors; a mixture of probabilities has none",
            where="@row.ensemble",
            found=match.ensemble,
            allowed="losses, logits",
        )
    if "batch" in spec.needs and token_level:
        raise UserError(
            f"loss '{match.loss}' compares the examples of a batch; the targets of this task are tokens, which come in "
            "tiles",
            where="@row.loss",
            todo="use it on a task with classes, or drop the row (method dist: intra: 0)",
        )
    if "behaviour" in spec.needs and not token_level:
        raise UserError(
            f"loss '{match.loss}' learns from words that the student writes, and this task has classes",
            where="@row.loss",
            todo="use a divergence, such as reverse_kl",
        )
    if "behaviour" in spec.needs and match.positions in ("targets", "all"):
        raise UserError(
            f"loss '{match.loss}' counts the words that the student wrote, and nothing else",
            where="@row.positions",
            found=match.positions,
            todo="drop positions",
        )
    if match.positions is not None and not token_level:
        raise UserError("positions is for token tasks", where="@row.positions", found=match.positions)


def _check_values(match: Match, spec: LossSpec) -> None:
    """Try the options on a tiny input: a value that the loss refuses (temperature 0) is refused before training."""
    if not match.options:
        return
    heads = match.options.get("heads", 0)
    if heads < 0:
        raise UserError("the number of relation heads is not negative", where="@row.options.heads", found=heads)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ATTENTION, (1, heads or 1, 2, 2))
    shapes |= {"hidden": (1, 2, 4), "embedding": (1, 2, 4)}
    student = torch.ones(shapes.get(match.feature, (2, 4)))
    mask = torch.ones((2,) if student.dim() == 2 else (1, 2), dtype=torch.bool)
    teacher = torch.zeros(mask.shape, dtype=torch.int64) if spec.labels else student
    try:
        spec(student, teacher, mask, match.options)
    except ValueError as error:
        raise UserError(str(error), where="@row.options") from error


def _check_standardised(match: Match, student: ModelInfo, token_level: bool) -> None:
    two = match.feature == "nsp_logits" or (not token_level and student.num_labels == 2)
    if match.options.get("standardise") and two:
        raise UserError(
            "the standardised logits of two classes are 1 and -1: they say which class, and not how sure",
            where="@row.options.standardise",
            todo="drop standardise",
        )


def _check_taps(match: Match, who: str, info: ModelInfo) -> None:
    if match.feature not in info.taps:
        raise UserError(
            f"feature '{match.feature}' cannot come from the {who} (architecture '{info.architecture}')",
            where="@row",
            allowed=sorted(info.taps),
        )


def _check_heads(match: Match, student: ModelInfo, name: str, teacher: ModelInfo) -> None:
    feature = match.feature
    if feature in ("scores", "probs") and student.causal != teacher.causal:
        raise UserError(f"teacher '{name}' and the student attend differently (causal and not)", where="@row")
    if feature in ("key", "value"):
        heads = student.num_kv_heads, teacher.num_kv_heads
    else:
        heads = student.num_heads, teacher.num_heads
    relation_heads = match.options.get("heads", 0)
    if feature in ("query", "key", "value") and relation_heads:
        for who, info, count in (("student", student, heads[0]), (f"teacher '{name}'", teacher, heads[1])):
            width = count * info.head_width
            if width % relation_heads:
                raise UserError(
                    f"relation heads do not divide the {who}'s {feature} width {width}",
                    where="@row.options.heads",
                    found=relation_heads,
                )
    elif feature in ("query", "key", "value", "scores", "probs") and heads[0] != heads[1]:
        raise UserError(
            f"feature '{feature}' needs equal head counts, and they cannot be projected",
            where="@row",
            found=f"student {heads[0]}, teacher '{name}' {heads[1]}",
            todo="use query/key/value rows with loss relation_kl and options: {heads: R}, or drop the row",
        )
