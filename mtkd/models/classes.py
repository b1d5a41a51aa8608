"""Which output of a classifier stands for which class of the data: by name, by position, or as the user says."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mtkd.config import TeacherConfig
from mtkd.data.device import moved
from mtkd.errors import DataError, UserError, nearest
from mtkd.models.features import DenseLogits

Given = Sequence[str | None] | Mapping[str, str | None]
"""A class of the data per output, None for an output without one; or output -> class, the others have none."""

_SHOWN = 12
"""Classes that a message lists; banking77 has 77."""

_MEANINGLESS = re.compile(r"\s*((label|class)[\s_-]*)?[+-]?\d*\s*", re.IGNORECASE)


NO_OUTPUT = -1
"""Stands for the output of a class that a specialist does not know."""

LOW = 1e4
"""Distance of such a class's logit below the smallest of the teacher's own.

Its probability must be 0 in float32 at any temperature that is used: exp(-LOW / T) is 0 up to T = 96, below 1e-10 up to
T = 400. The logit must be finite: 0 * -inf is NaN in every divergence. bfloat16 and float16 hold it too.
"""


@dataclass(frozen=True)
class Meaning:
    """What the user says of a teacher's outputs.

    Attributes:
        classes: of the data, per output; None for nothing.
        other: names or numbers of outputs that mean "none of my classes".
    """

    classes: Given | None = None
    other: tuple[str, ...] = ()

    @classmethod
    def of(cls, teacher: TeacherConfig) -> Meaning:
        return cls(teacher.classes, teacher.others)

    @property
    def key(self) -> str:
        """The field of the teacher that says it; "" for none."""
        return "classes" if self.classes is not None else "other" if self.other else ""


UNSAID = Meaning()
"""The user says nothing: names and positions decide."""


@dataclass(frozen=True)
class ClassMap:
    """The outputs of a classifier, and the classes of the data.

    Attributes:
        outputs: names of the outputs, in order.
        classes: names of the data's classes, in order.
        columns: per class the output that stands for it; NO_OUTPUT for a class that a specialist does not know.
        how: "name": the names say so; "position": they mean nothing; "given": the user says so.
        other: numbers of the outputs that mean "none of my classes".
    """

    outputs: tuple[str, ...]
    classes: tuple[str, ...]
    columns: tuple[int, ...]
    how: Literal["name", "position", "given"]
    other: tuple[int, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """Classes of the data without an output."""
        return tuple(name for name, column in zip(self.classes, self.columns, strict=True) if column == NO_OUTPUT)

    def logits(self, outputs: Tensor) -> DenseLogits:
        """The logits of the data's classes [...,C] among all outputs; a class without one is `LOW` below the others."""
        # Moved, not made there or as masks and lists: a GPU would be waited for.
        columns, own, other = (
            moved(torch.tensor(numbers, dtype=torch.int64), outputs.device)
            for numbers in (self.columns, [c for c in self.columns if c != NO_OUTPUT], self.other)
        )
        values = outputs.index_select(-1, columns.clamp_min(0))
        if self.missing:
            least = outputs.index_select(-1, own).amin(-1, keepdim=True)
            values = torch.where(columns == NO_OUTPUT, least - LOW, values)
        return DenseLogits(values, outputs.index_select(-1, other) if self.other else None)

    @property
    def in_order(self) -> bool:
        """Nothing is dropped, and nothing changes places."""
        return self.columns == tuple(range(len(self.outputs)))

    @property
    def note(self) -> str:
        """What the plan shows: "0: LABEL_0 = negative, by position; ..."; "" where the names are equal, in order."""
        if self.in_order and self.outputs == self.classes:
            return ""
        how = {"name": "by name", "position": "by position", "given": "as `classes` says"}[self.how]
        named = dict(zip(self.columns, self.classes, strict=True))
        lines = [
            f"{i}: {output} = {named[i]}, {how}" if i in named else f"{i}: {output} is dropped before the softmax"
            for i, output in enumerate(self.outputs)
            if i not in self.other
            # a specialist of many classes: those of equal names say nothing
            and not (self.other and named.get(i) == output)
        ]
        shown = [*lines[:_SHOWN], *([f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else [])]
        shown += [f"{i}: {self.outputs[i]} = none of its classes" for i in self.other]
        if self.missing:
            shown.append(f"{len(self.missing)} of {len(self.classes)} classes have no output: their probability is 0")
        return "; ".join(shown)


def output_names(config: PretrainedConfig) -> tuple[str, ...]:
    """Names of a classifier's outputs in order, as its configuration has them; LABEL_n where it names none."""
    named = {int(number): str(name) for number, name in (config.id2label or {}).items()}
    return tuple(named.get(i, f"LABEL_{i}") for i in range(max(len(named), config.num_labels or 0)))


def check_softmax(config: PretrainedConfig, num_labels: int, where: str) -> None:
    """Refuse outputs that are not the logits of one distribution over classes.

    Args:
        num_labels: of the data; 1 where labels are numbers.
    Raises:
        DataError: a sigmoid per class, or numbers where the data has classes.
    """
    names = output_names(config)
    if config.problem_type == "multi_label_classification":
        raise DataError(
            "the model was trained with a sigmoid per class: its outputs are not a distribution over the classes",
            where=where,
            found="problem_type: multi_label_classification in its config.json",
            allowed="problem_type: single_label_classification, or none",
            todo="use a teacher of one class per text, or fine-tune this one first: a `kind: finetune` stage",
        )
    numbers = config.problem_type == "regression" or len(names) == 1
    if num_labels > 1 and numbers:
        raise DataError(
            "the model predicts a number, and the data has classes",
            where=where,
            found=f"{len(names)} output, problem_type: {config.problem_type}",
            allowed=f"a classifier of {num_labels} classes",
            todo="use a teacher that was trained on classes, or fine-tune this one first: a `kind: finetune` stage",
        )


def teacher_classes(
    config: PretrainedConfig, classes: Sequence[str], num_labels: int, where: str, meaning: Meaning
) -> ClassMap:
    """Which outputs of a teacher's classifier are the data's classes.

    Args:
        classes: of the data, in order; () where it does not name them.
        meaning: what the user says of the teacher's outputs.
    """
    check_softmax(config, num_labels, where)
    names = tuple(classes) or tuple(f"LABEL_{i}" for i in range(num_labels))
    return match_classes(output_names(config), names, where, meaning.classes, other=meaning.other)


def match_classes(
    outputs: Sequence[str],
    classes: Sequence[str],
    where: str,
    given: Given | None = None,
    *,
    key: str = "classes",
    other: Sequence[str] = (),
) -> ClassMap:
    """Which output stands for which class.

    Names are equal that differ in case, spaces, `_` and `-` only. Where all names of one side mean nothing (LABEL_n,
    numbers, none), outputs and classes are matched by position.

    Args:
        given: a teacher's `classes`.
        where: place of the model in the configuration.
        key: what the user can write to say it; "" for a model that has no such key.
        other: a teacher's `other`: these outputs stand for no class, and the others need not stand for all.
    Raises:
        DataError: other names, or another number of them; with both lists and what to write.
        UserError: `given` or `other` does not fit.
    """
    outputs, classes = tuple(outputs), tuple(classes)
    if other:
        return _with_other(outputs, classes, given, other, where)
    if given is not None:
        return ClassMap(outputs, classes, _given(outputs, classes, given, f"{where}.{key}"), "given")
    columns = _by_name(outputs, classes)
    if columns is not None:
        return ClassMap(outputs, classes, columns, "name")
    if len(outputs) != len(classes):
        raise _refused("the model's classifier has another number of classes than the data", outputs, classes, where,
                       key)  # fmt: skip
    if any(all(map(_MEANINGLESS.fullmatch, names)) for names in (outputs, classes)):
        return ClassMap(outputs, classes, tuple(range(len(classes))), "position")
    raise _refused("the model's classes are not those of the data", outputs, classes, where, key)


def _with_other(
    outputs: tuple[str, ...], classes: tuple[str, ...], given: Given | None, other: Sequence[str], where: str
) -> ClassMap:
    """The map of a specialist: its outputs but for those of `other` are some of the classes, or all."""
    numbers = tuple(_output(name, outputs, f"{where}.other") for name in other)
    if len(set(numbers)) < len(numbers):
        raise UserError("this output of the model is named twice", where=f"{where}.other", found=list(other))
    if given is not None:
        columns = _given(outputs, classes, given, f"{where}.classes", partly=True)
        if both := set(numbers).intersection(columns):
            raise UserError("`classes` says that this output is a class of the data", where=f"{where}.other",
                            found=outputs[min(both)], todo="take it out of one of the two")  # fmt: skip
        return ClassMap(outputs, classes, columns, "given", numbers)
    for number in numbers:
        if outputs[number] in classes:
            raise UserError("this output has the name of a class of the data", where=f"{where}.other",
                            found=outputs[number], allowed="an output that means none of the classes",
                            todo="drop it, or say with `classes` which output is which class")  # fmt: skip
    own = [number for number in range(len(outputs)) if number not in numbers]
    if not own:
        raise UserError("no output of the model is left for a class", where=f"{where}.other", found=list(other))
    found = {number: _find(outputs[number], classes) for number in own}
    if None not in found.values() and len(set(found.values())) == len(own):
        column_of = {position: number for number, position in found.items()}
        columns = tuple(column_of.get(position, NO_OUTPUT) for position in range(len(classes)))
        return ClassMap(outputs, classes, columns, "name", numbers)
    names = tuple(outputs[number] for number in own)
    if len(own) == len(classes) and any(all(map(_MEANINGLESS.fullmatch, side)) for side in (names, classes)):
        return ClassMap(outputs, classes, tuple(own), "position", numbers)
    unlike = [outputs[number] for number, position in found.items() if position is None]
    raise DataError(
        "outputs of the model that are no classes of the data",
        where=where,
        found=_listed(unlike or names),
        allowed=f"{len(classes)}: {_listed(classes)}",
        todo="say which output is which class: `classes: {OUTPUT: class}`; the others are then dropped",
    )


def _by_name(outputs: tuple[str, ...], classes: tuple[str, ...]) -> tuple[int, ...] | None:
    """The output of every class, where each side has the other's names; equal ones before like ones."""
    for form in (str, _normal):
        class_forms, output_forms = [form(name) for name in classes], [form(name) for name in outputs]
        if len(set(output_forms)) == len(output_forms) and sorted(class_forms) == sorted(output_forms):
            return tuple(output_forms.index(name) for name in class_forms)
    return None


def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _given(
    outputs: tuple[str, ...], classes: tuple[str, ...], given: Given, where: str, *, partly: bool = False
) -> tuple[int, ...]:
    """The output of every class; NO_OUTPUT for classes without one, where the outputs may be `partly` classes."""
    named: dict[str, int] = {}
    for output, name in _numbered(outputs, given, where).items():
        if name is None:
            continue
        position = _find(name, classes)
        if position is None:
            raise UserError("the data has no such class", where=where, found=name, allowed=classes,
                            todo=nearest(name, classes))  # fmt: skip
        if classes[position] in named:
            raise UserError("two outputs of the model stand for one class", where=where, found=classes[position])
        named[classes[position]] = output
    if partly:
        return tuple(named.get(name, NO_OUTPUT) for name in classes)
    if missing := [name for name in classes if name not in named]:
        raise UserError(
            "no output of the model stands for this class of the data",
            where=where,
            found=_listed(missing),
            allowed="an output for every class: " + _listed(classes),
            todo="name its output, or use data without this class; of a specialist say which output is `other`",
        )
    return tuple(named[name] for name in classes)


def _numbered(outputs: tuple[str, ...], given: Given, where: str) -> dict[int, str | None]:
    """Number of an output -> its class."""
    if not isinstance(given, Mapping):
        if len(given) != len(outputs):
            raise UserError(
                "needs an entry per output of the model, null for one without a class of the data",
                where=where,
                found=f"{len(given)} entries",
                allowed=f"{len(outputs)}, in the order of {_listed(outputs)}",
            )
        return dict(enumerate(given))
    class_of: dict[int, str | None] = {}
    for name, class_name in given.items():
        number = _output(name, outputs, where)
        if number in class_of:
            raise UserError("this output of the model is named twice", where=where, found=outputs[number])
        class_of[number] = class_name
    return class_of


def _output(name: str, outputs: tuple[str, ...], where: str) -> int:
    """The number of an output that the user names, or numbers."""
    number = _find(name, outputs)
    if number is None and name.isdecimal() and int(name) < len(outputs):
        number = int(name)
    if number is None:
        raise UserError("the model has no such output", where=where, found=name, allowed=outputs,
                        todo=nearest(name, outputs))  # fmt: skip
    return number


def _find(name: str, names: tuple[str, ...]) -> int | None:
    """Position of a name, else of the only one that is like it."""
    if name in names:
        return names.index(name)
    like = [i for i, other in enumerate(names) if _normal(other) == _normal(name)]
    return like[0] if len(like) == 1 else None


def _refused(message: str, outputs: tuple[str, ...], classes: tuple[str, ...], where: str, key: str) -> DataError:
    like = [_find(output, classes) for output in outputs]
    if len(outputs) == len(classes) and not any(i is not None for i in like):
        like = list(range(len(classes)))
    line = ", ".join("null" if i is None else classes[i] for i in like[:_SHOWN])
    start = "use a model of these classes, or one without a classification head"
    todo = f"say which output is which class, null for none: `{key}: [{line}]` with your own entries" if key else start
    return DataError(
        message,
        where=where,
        found=f"{len(outputs)}: {_listed(outputs)}",
        allowed=f"{len(classes)}: {_listed(classes)}",
        todo=todo,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def named_after(config: Any, classes: Sequence[str], num_labels: int) -> None:
    """Give a configuration the data's classes, in their order."""
    names = tuple(classes) or tuple(f"LABEL_{i}" for i in range(num_labels))
    config.num_labels = num_labels
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
