"""Match rows checked against the models they compare: everything a row can get wrong is found here, at plan time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtkd.errors import UserError
from mtkd.features import ATTENTION
from mtkd.match import UNLAYERED_FEATURES, Match
from mtkd.models.info import ModelInfo
from mtkd.registry import LOSSES, LossSpec, check_options

PROJECTED = ("hidden", "cls", "embedding")


@dataclass(frozen=True)
class Row:
    """A Match row resolved for one student and T teachers.

    Attributes:
        key: its name in the metrics, "position:feature:loss".
        pairs: per teacher the layer pairs (student, teacher) it compares; one (0, 0) for features without layers.
    """

    match: Match
    spec: LossSpec
    key: str
    pairs: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def is_logits(self) -> bool:
        return self.match.feature == "logits"

    @property
    def from_labels(self) -> bool:
        return self.match.target == "labels"

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
        """Which positions the row counts: `tokens`, `targets` or `sequences`."""
        feature = self.match.feature
        if feature in ("cls", "nsp_logits"):
            return "sequences"
        if feature != "logits":
            return "tokens"
        if not token_level:
            return "targets" if self.from_labels else "sequences"
        return "tokens" if self.match.positions == "all" and not self.from_labels else "targets"


def compile_rows(
    matches: Sequence[Match],
    student: ModelInfo,
    teachers: dict[str, ModelInfo],
    *,
    token_level: bool,
    regression: bool | None,
    where: str,
) -> list[Row]:
    """Resolve and check every row.

    Args:
        regression: labels are numbers; None while only the data can tell.

    Raises:
        UserError: unknown loss or option, a feature the loss cannot read or a model cannot give, layers outside a
            model or depths that do not divide, unequal heads, unequal class counts, losses that do not fit the task.
    """
    rows = []
    for position, match in enumerate(matches):
        place = f"{where}[{position}]"
        spec = LOSSES.find(match.loss, f"{place}.loss")
        check_options(match.options, spec.options(), place)
        _check_loss(match, spec, token_level, regression, place)
        _check_values(match, spec, place)
        _check_taps(match, "student", student, place)
        pairs: list[tuple[tuple[int, int], ...]] = []
        for name, teacher in teachers.items() if match.target == "teacher" else ():
            _check_taps(match, f"teacher '{name}'", teacher, place)
            _check_heads(match, student, name, teacher, place)
            if match.feature == "logits" and not token_level and student.num_labels != teacher.num_labels:
                raise UserError(
                    f"teacher '{name}' has another number of classes",
                    where=place,
                    found=f"{teacher.num_labels} against the student's {student.num_labels}",
                )
            if match.feature in UNLAYERED_FEATURES:
                pairs.append(((0, 0),))
            else:
                pairs.append(tuple(match.layer_pairs(student.num_layers, teacher.num_layers, place)))
        key = f"{position}:{match.feature}:{match.loss}"
        rows.append(Row(match, spec, key, tuple(pairs)))
    return rows


def _check_loss(match: Match, spec: LossSpec, token_level: bool, regression: bool | None, where: str) -> None:
    if match.feature not in spec.inputs:
        raise UserError(f"loss '{match.loss}' cannot read feature '{match.feature}'", where=where, allowed=spec.inputs)
    if spec.labels != (match.target == "labels"):
        wanted = "labels" if spec.labels else "teacher"
        raise UserError(f"loss '{match.loss}' compares with {wanted}", where=f"{where}.target", found=match.target)
    if not spec.labels and regression and match.feature == "logits" and "hidden" not in spec.inputs:
        raise UserError(
            f"loss '{match.loss}' needs at least two classes, but the task has one number per example",
            where=where,
            todo="use loss: mse for a regression task",
        )
    if spec.name == "ce" and regression:
        raise UserError("cross entropy needs class labels", where=where, todo="use loss: label_mse")
    if spec.name == "label_mse" and regression is False:
        raise UserError("label_mse needs numeric labels (a regression task)", where=where, todo="use loss: ce")
    if match.ensemble == "probabilities" and "hidden" in spec.inputs:
        raise UserError(
            f"loss '{match.loss}' compares logits as vectors; a mixture of probabilities has none",
            where=f"{where}.ensemble",
            found=match.ensemble,
            allowed="losses, logits",
        )
    if match.positions is not None and not token_level:
        raise UserError("positions is for token tasks", where=f"{where}.positions", found=match.positions)


def _check_values(match: Match, spec: LossSpec, where: str) -> None:
    """Try the options on a tiny input, so that a value the loss refuses (temperature 0) is found before training."""
    if not match.options:
        return
    heads = match.options.get("heads", 0)
    if heads < 0:
        raise UserError("the number of relation heads is not negative", where=f"{where}.options.heads", found=heads)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(ATTENTION, (1, heads or 1, 2, 2))
    shapes |= {"hidden": (1, 2, 4), "embedding": (1, 2, 4)}
    student = torch.ones(shapes.get(match.feature, (2, 4)))
    mask = torch.ones((2,) if student.dim() == 2 else (1, 2), dtype=torch.bool)
    teacher = torch.zeros(mask.shape, dtype=torch.int64) if spec.labels else student
    try:
        spec(student, teacher, mask, match.options)
    except ValueError as error:
        raise UserError(str(error), where=f"{where}.options") from error


def _check_taps(match: Match, who: str, info: ModelInfo, where: str) -> None:
    if match.feature not in info.taps:
        raise UserError(
            f"feature '{match.feature}' cannot come from the {who} (architecture '{info.architecture}')",
            where=where,
            allowed=sorted(info.taps),
        )


def _check_heads(match: Match, student: ModelInfo, name: str, teacher: ModelInfo, where: str) -> None:
    feature = match.feature
    if feature in ("scores", "probs") and student.causal != teacher.causal:
        raise UserError(f"teacher '{name}' and the student attend differently (causal and not)", where=where)
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
                    where=f"{where}.options.heads",
                    found=relation_heads,
                )
    elif feature in ("query", "key", "value", "scores", "probs") and heads[0] != heads[1]:
        raise UserError(
            f"feature '{feature}' needs equal head counts, and they cannot be projected",
            where=where,
            found=f"student {heads[0]}, teacher '{name}' {heads[1]}",
            todo="use query/key/value rows with loss relation_kl and options: {heads: R}, or drop the row",
        )
