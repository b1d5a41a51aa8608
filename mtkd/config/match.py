"""The Match row: one line of the method table, and its YAML form.

A row compares one feature of the student with the same feature of each teacher (or with labels) under one loss.
A method is a few rows; a mix is list concatenation.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtkd.errors import UserError

_Number = Annotated[int, Field(ge=0, le=1000)]
Layer = _Number | Literal["last", "uniform", "skip", "each"] | tuple[_Number, ...]
FeatureName = Literal["logits", "nsp_logits", "embedding", "hidden", "cls", "query", "key", "value", "scores", "probs"]
UNLAYERED_FEATURES = ("logits", "nsp_logits", "embedding")
ATTENTION_FEATURES = ("query", "key", "value", "scores", "probs")


class Candidates(BaseModel):
    """What a student holds possible at a position, and how much of the teachers' mass must lie there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    top: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        16, description="number of the student's most probable tokens"
    )
    mass: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="least probability of the weighted teachers on these tokens together"
    )


class Match(BaseModel):
    """One row: ``weight * mean over valid positions of sum_k w_k loss(student feature, teacher k's feature)``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    feature: FeatureName = Field("logits", description="which feature is compared")
    loss: str = Field("kl", description="registered loss; see `mtkd ls losses`")
    weight: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = Field(
        1.0, description="factor of the row in the sum (no unit)"
    )
    target: Literal["teacher", "labels"] = Field("teacher", description="compared with the teachers or with labels")
    student_layer: Layer = Field("last", description="layer number(s), 0 = embedding output; 'last'; 'each'")
    teacher_layer: Layer = Field(
        "last",
        description="layer number(s); 'last'; with student 'each': 'uniform' (k*L_T/L_S for k=1..L_S), 'skip' (the "
        "same for k=1..L_S-1, PKD-skip), 'last' (L_T-L_S+k for k=1..L_S-1, PKD-last), 'each' (equal depth)",
    )
    layer_reduction: Literal["sum", "mean"] = Field(
        "sum", description="several layer pairs: sum or mean of their losses"
    )
    weighted: bool = Field(True, description="false: every teacher counts 1 (a sum over teachers) in this row")
    ensemble: Literal["losses", "probabilities", "logits"] = Field(
        "losses",
        description="how teachers meet in a logits row: weighted sum of losses, arithmetic mixture of probabilities, "
        "or weighted mean of logits (geometric)",
    )
    positions: Literal["targets", "all", "teachable"] | None = Field(
        None,
        description="token positions that count: with a target, or all unpadded; default: targets for logits, else "
        "all. teachable: of the targets, those where the teachers' mass lies on the student's candidates; the others "
        "have the loss 0 and count",
    )
    candidates: Candidates = Field(Candidates(), description="with positions: teachable")
    projection: Literal["shared", "per_layer"] = Field(
        "shared", description="width adapters where widths differ: one per (row, teacher), or one more per layer pair"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword parameters of the loss")
    replace: str | None = Field(
        None,
        description="label of a row of the stage's method (`mtkd ls methods`) that this row takes the place of, whole; "
        "with weight 0 the method's row is dropped",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Match:
        layers = {"student_layer", "teacher_layer"} & self.model_fields_set
        if self.feature in UNLAYERED_FEATURES and layers:
            raise ValueError(f"feature '{self.feature}' has no layers; drop {' and '.join(sorted(layers))}")
        if self.target == "labels" and self.feature not in ("logits", "nsp_logits"):
            raise ValueError(f"labels can be compared with logits, not with '{self.feature}'")
        if self.ensemble != "losses" and self.feature != "logits":
            raise ValueError(f"ensemble '{self.ensemble}' is for logits rows, not '{self.feature}'")
        if self.positions in ("targets", "teachable") and self.feature != "logits":
            raise ValueError(f"positions: {self.positions} is for logits rows")
        if self.student_layer in ("uniform", "skip"):
            raise ValueError("student_layer is a number, a list of numbers, 'last' or 'each'")
        self._every_knob_is_read()
        return self

    def _every_knob_is_read(self) -> None:
        if self.target == "labels" and not self.weighted:
            raise ValueError("a row with target: labels has no teachers to weight; drop weighted: false")
        if self.target == "labels" and self.ensemble != "losses":
            raise ValueError(f"a row with target: labels has no teachers; drop ensemble: {self.ensemble}")
        if self.target == "labels" and self.positions in ("all", "teachable"):
            raise ValueError(
                f"a row with target: labels counts positions with a label; drop positions: {self.positions}"
            )
        if "candidates" in self.model_fields_set and self.positions != "teachable":
            raise ValueError("candidates are read with positions: teachable")
        if self.projection == "per_layer" and self.feature not in ("hidden", "cls"):
            raise ValueError(f"projection: per_layer is for hidden and cls rows, not for '{self.feature}'")
        if self.layer_reduction == "mean" and self.feature in UNLAYERED_FEATURES:
            raise ValueError(f"feature '{self.feature}' has no layers; drop layer_reduction: mean")

    def layer_pairs(self, num_student_layers: int, num_teacher_layers: int, where: str = "") -> list[tuple[int, int]]:
        """Pairs (student layer, teacher layer) this row compares.

        Raises:
            UserError: for a layer outside the model, or depths that do not divide while the row states no layers.
        """
        students, teachers = num_student_layers, num_teacher_layers
        if isinstance(self.student_layer, tuple) or isinstance(self.teacher_layer, tuple):
            pairs = self._listed_pairs(students, teachers, where)
        elif self.student_layer == "each":
            pairs = self._depth_pairs(students, teachers, where)
        elif self.teacher_layer in ("uniform", "skip", "each"):
            raise UserError(
                f"teacher_layer '{self.teacher_layer}' needs student_layer: each", where=where, found=self.student_layer
            )
        else:
            pairs = [(_single(self.student_layer, students), _single(self.teacher_layer, teachers))]
        if not pairs:
            # PKD's maps leave the last layer out: nothing is left of a one-layer student, and the row would do nothing.
            raise UserError("no layers are compared", where=where, todo="give the student more layers, or list them")
        lowest = 1 if self.feature in ATTENTION_FEATURES else 0
        for student, teacher in pairs:
            _check_layer(student, lowest, students, f"{where}.student_layer")
            _check_layer(teacher, lowest, teachers, f"{where}.teacher_layer")
        return pairs

    def _listed_pairs(self, students: int, teachers: int, where: str) -> list[tuple[int, int]]:
        left = _as_list(self.student_layer, students)
        right = _as_list(self.teacher_layer, teachers)
        if len(left) != len(right):
            raise UserError(
                "student_layer and teacher_layer list different numbers of layers",
                where=where,
                found=f"{len(left)} and {len(right)}",
                allowed="equally many on both sides",
            )
        return list(zip(left, right, strict=True))

    def _depth_pairs(self, students: int, teachers: int, where: str) -> list[tuple[int, int]]:
        if self.teacher_layer == "last":
            return [(k, teachers - students + k) for k in range(1, students)]
        if self.teacher_layer == "each":
            if students != teachers:
                raise UserError(
                    "teacher_layer 'each' needs equal depth", where=where, found=f"{students} and {teachers} layers"
                )
            return [(k, k) for k in range(1, students + 1)]
        if self.teacher_layer not in ("uniform", "skip"):
            raise UserError(
                "student_layer 'each' needs a rule for the teacher's layers",
                where=f"{where}.teacher_layer",
                found=self.teacher_layer,
                allowed="uniform, skip, last, each, or a list",
            )
        if teachers % students:
            # Floor division would silently drop the teacher's top layers (10 -> 4 maps to 2,4,6,8).
            raise UserError(
                f"{teachers} teacher layers do not divide evenly over {students} student layers",
                where=where,
                todo="state the layers: student_layer: [1, 2], teacher_layer: [3, 6]",
            )
        end = students + 1 if self.teacher_layer == "uniform" else students
        return [(k, k * teachers // students) for k in range(1, end)]


def _single(layer: Layer, num_layers: int) -> int:
    assert isinstance(layer, (int, str))
    return num_layers if layer == "last" else int(layer)


def _as_list(layer: Layer, num_layers: int) -> list[int]:
    if isinstance(layer, tuple):
        return list(layer)
    if layer == "each":
        return list(range(1, num_layers + 1))
    return [_single(layer, num_layers)]


def _check_layer(layer: int, lowest: int, highest: int, where: str) -> None:
    if not lowest <= layer <= highest:
        raise UserError("no such layer", where=where, found=layer, allowed=f"{lowest} to {highest}")
