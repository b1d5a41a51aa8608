"""A teacher of the user's own: a class that a plug-in registers by `@mtkd.teacher`.

    @mtkd.teacher("dictionary")
    class Dictionary:
        def __init__(self, facts: mtkd.TeacherFacts, file: str = "answers.json") -> None: ...
        def forward(self, batch, wants): return {"logits": ...}  # [B,L,V], or [B,C] in the order of the classes

The constructor's parameters are the options of the YAML; one called `facts` receives the `TeacherFacts`. `ahead(batch)`
and `close()` are called where the class has them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtkd.config import OwnTeacher, TeacherConfig
from mtkd.config.read import fingerprint
from mtkd.data.batch import STUDENT, Batch, View
from mtkd.errors import UserError
from mtkd.models.features import Features, split_key
from mtkd.models.info import ModelInfo
from mtkd.models.numbers import FLOAT, Numbers
from mtkd.pool.backend import BACKENDS, Backend, Gives, Outlook, Stock
from mtkd.pool.base import Teacher
from mtkd.pool.cache.made_of import plugged_values
from mtkd.pool.named import named_files
from mtkd.pool.sizes import Place, Share, TeacherSize
from mtkd.registry import Decorated, check_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

GIVES = ("logits", "nsp_logits", "hidden", "cls", "embedding")
"""Features that a teacher of the user's own may give."""

_FACTS = "facts"


@dataclass(frozen=True)
class TeacherFacts:
    """What a teacher may know of the run.

    Attributes:
        name: of the teacher.
        tokenizer: the run's.
        columns: of its logits: V, the real ids of the tokenizer; or C, the classes; 1 for a regression.
        classes: their names in order; () for token tasks and regressions.
        token_level: logits are [B,L,V] instead of [B,C].
        device: of the batches.
        folder: of the model that the configuration names; None where it names none.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase | None
    columns: int
    classes: tuple[str, ...]
    token_level: bool
    device: torch.device
    folder: Path | None = None


@dataclass(frozen=True)
class PluggedFacts:
    """What the plan knows of a plug-in's teacher: what its decorator says."""

    info: ModelInfo
    numbers: Numbers

    def stand_in(self, wants: frozenset[str], batch: Batch) -> Features:
        """Features of the shapes that it gives, without values, for a count of memory."""
        return {key: torch.zeros(_shape(key, batch, self.info)) for key in wants}


class BatchChanged(UserError):
    """A teacher wrote into the batch."""


class PluggedTeacher:
    """An object of a plug-in's class in the place of a model.

    Args:
        own: has `forward`, and may have `ahead` and `close`.
        facts: that its constructor had.
        info: shape of what it gives.
        num_parameters: that it says to have.
        view: the one of `Batch.views` that it reads.
        where: its place in the configuration.
    """

    def __init__(
        self, own: Any, facts: TeacherFacts, info: ModelInfo, num_parameters: int, *, view: str, where: str
    ) -> None:
        self.name, self.info, self.num_parameters = facts.name, info, num_parameters
        self.num_columns, self.embedding_table = facts.columns, None
        self.own, self.view, self._where = own, view, where

    def provides(self) -> frozenset[str]:
        return self.info.taps

    def ahead(self, batch: Batch) -> None:
        if hasattr(self.own, "ahead"):
            with self._unchanged(batch):
                self.own.ahead(batch)

    def answers(self, batch: Batch, wants: frozenset[str]) -> dict[str, Tensor]:
        """The wanted features, detached, in float32.

        Raises:
            UserError: a feature that is missing or has another shape.
            BatchChanged: it wrote into the batch.
        """
        with torch.no_grad(), self._unchanged(batch):
            try:
                answer = self.own.forward(batch, wants)
            except (TypeError, AttributeError) as error:
                if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                    raise  # from inside of it, where a traceback has its line
                raise UserError(
                    f"forward of the plug-in's teacher '{self.name}' cannot be called: {error}",
                    where=self._where,
                    todo="give the class forward(self, batch, wants)",
                ) from error
        return {key: self._checked(key, answer, batch) for key in sorted(wants)}

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        return dict(self.answers(batch, wants))

    def record(self) -> dict[str, Any]:
        """What a cache keeps of the teacher's shape."""
        return plugged_values(self.info, self.num_parameters)

    def close(self) -> None:
        if hasattr(self.own, "close"):
            self.own.close()

    @contextmanager
    def _unchanged(self, batch: Batch) -> Iterator[None]:
        """Refuse a call that writes into the batch: other teachers and the student read it too."""
        before = _tensors(batch)
        versions = {name: tensor._version for name, tensor in before.items()}
        yield
        after = _tensors(batch)
        for name, tensor in before.items():
            if after.get(name) is not tensor or tensor._version != versions[name]:
                raise BatchChanged(
                    f"teacher '{self.name}' changes the batch, which other teachers and the student read",
                    where=self._where,
                    found=name,
                    todo="write into a copy: batch.input_ids.clone()",
                )

    def _checked(self, key: str, answer: Any, batch: Batch) -> Tensor:
        values = answer.get(key) if isinstance(answer, Mapping) else None
        shape = _shape(key, batch, self.info)
        if not isinstance(values, Tensor) or list(values.shape) != shape:
            actual = "nothing" if values is None else list(values.shape) if isinstance(values, Tensor) else type(values)
            raise UserError(
                f"teacher '{self.name}' gives '{key}' in another shape than the batch asks for",
                where=self._where,
                found=actual,
                allowed=shape,
                todo=f"forward returns {{'{key}': a tensor of this shape}}",
            )
        return values.detach().to(batch.input_ids.device, torch.float32)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """Every tensor of a batch and its views, by name."""
    parts: dict[str, Batch | View] = {"": batch, **{f"views[{name!r}].": view for name, view in batch.views.items()}}
    found = {f"{part}{f.name}": getattr(each, f.name) for part, each in parts.items() for f in fields(each)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _shape(key: str, batch: Batch, info: ModelInfo) -> list[int]:
    """Shape of a feature of a batch: at the student's positions, also for a teacher that reads another view."""
    rows, length = batch.view().input_ids.shape
    name = split_key(key)[0]
    if name == "logits":
        return [rows, info.num_labels] if info.num_labels else [rows, length, info.vocabulary]
    if name == "nsp_logits":
        return [rows, 2]
    return [rows, info.width] if name == "cls" else [rows, length, info.width]


@dataclass(frozen=True)
class Own(Backend):
    """A backend that a plug-in registered.

    Attributes:
        name, cls: the registered class and its name.
        gives: features that it can give.
        layers, width: of its hidden states, where it gives any.
        parameters: float32 numbers that it keeps in memory, for the plan.
        needs_model: the configuration must name a model.
        view: the one of `Batch.views` that it reads; `STUDENT` for the run's text.
    """

    name: str
    cls: type
    gives: frozenset[str]
    layers: int = 0
    width: int = 0
    parameters: int = 0
    needs_model: bool = False
    view: str = STUDENT

    def __post_init__(self) -> None:
        where, unknown = f"decorator of '{self.name}'", sorted(self.gives - set(GIVES))
        if unknown or not self.gives:
            raise UserError("a teacher gives features", where=where, found=unknown, allowed=GIVES)
        if self.gives & {"hidden", "cls", "embedding"} and not self.width:
            raise UserError("hidden states have a width", where=where, found="width=0")
        self._check_forward(where)

    def _check_forward(self, where: str) -> None:
        """Refuse a class whose objects cannot be asked `forward(batch, wants)`."""
        forward = getattr(self.cls, "forward", None)
        bound = isinstance(inspect.getattr_static(self.cls, "forward", None), staticmethod | classmethod)
        try:
            if not callable(forward):
                raise TypeError("it has none")
            inspect.signature(forward).bind(*([None] * (2 if bound else 3)))
        except TypeError as error:
            raise UserError(
                "a teacher is a class with forward(self, batch, wants)",
                where=where,
                found=f"{self.cls.__name__}: {error}",
            ) from error
        except ValueError:
            pass  # compiled code that does not tell its parameters

    def options(self) -> dict[str, inspect.Parameter]:
        """The parameters of its constructor that a stage may set."""
        given = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        parameters = inspect.signature(self.cls).parameters
        return {n: p for n, p in parameters.items() if n != _FACTS and p.kind in given}

    def info(self, columns: int, max_positions: int, *, token_level: bool) -> ModelInfo:
        """Its shape, for a number of ids or classes."""
        return ModelInfo(
            architecture=self.name,
            num_layers=self.layers,
            width=self.width,
            num_heads=0,
            num_kv_heads=0,
            head_width=0,
            vocabulary=columns if token_level else 0,
            num_labels=0 if token_level else columns,
            max_positions=max_positions,
            causal=False,
            taps=self.gives,
        )

    def make(self, options: Mapping[str, Any], facts: TeacherFacts, max_positions: int, where: str) -> PluggedTeacher:
        """The teacher with its options.

        Raises:
            UserError: what its constructor refuses by a ValueError.
        """
        more = {_FACTS: facts} if _FACTS in inspect.signature(self.cls).parameters else {}
        try:
            own = self.cls(**options, **more)
        except UserError as error:
            error.where = error.where or where
            raise
        except ValueError as error:
            raise UserError(str(error), where=f"{where}.options") from error
        if (view := getattr(own, "view", self.view)) != self.view:
            raise UserError(
                f"teacher '{self.name}' says in its class which view it reads",
                where=where,
                found=view,
                todo=f"say it in the decorator: @mtkd.teacher('{self.name}', view='{view}')",
            )
        info = self.info(facts.columns, max_positions, token_level=facts.token_level)
        return PluggedTeacher(own, facts, info, self.parameters, view=self.view, where=where)

    def view_of(self, teacher: TeacherConfig) -> str:
        return self.view

    def check(self, teacher: TeacherConfig, where: str) -> None:
        assert isinstance(teacher, OwnTeacher)
        check_options(teacher.options, self.options(), where)
        if self.needs_model and teacher.model.path is None:
            raise UserError(f"a '{self.name}' teacher reads a model", where=f"{where}.model", found="nothing")

    def describe(self, teacher: TeacherConfig, outlook: Outlook) -> Gives:
        outlook.find_model()
        asked = outlook.asked
        info = self.info(asked.columns, asked.max_positions, token_level=asked.token_level)
        return PluggedFacts(info, Numbers(self.parameters, FLOAT * self.parameters))

    def origin(self, teacher: TeacherConfig) -> str:
        return f"plug-in {BACKENDS.origin(self.name)}"

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        whole = sum(t.weights for t in teachers)
        return Share(whole, whole, built=whole)

    def source(self, teacher: TeacherConfig, model: Callable[[], str], cache: Callable[[], str], base: Path) -> str:
        source = "plug-in" if teacher.model.path is None else model()
        return "; ".join([source, *(f"{name} {digest}" for name, digest in self._files(teacher, base).items())])

    def digest(
        self, teacher: TeacherConfig, model: str, code: Callable[[Collection[str]], Mapping[str, str]], base: Path
    ) -> str:
        assert isinstance(teacher, OwnTeacher)
        parts = [model, self.name, teacher.options, dict(code([BACKENDS.origin(self.name)]))]
        files = self._files(teacher, base)
        return fingerprint([*parts, files] if files else parts)

    def _files(self, teacher: TeacherConfig, base: Path) -> dict[str, str]:
        """Digests of the files that the options name, from the configuration's folder or the plug-in's."""
        assert isinstance(teacher, OwnTeacher)
        return named_files(teacher.options, [base, Path(inspect.getfile(self.cls)).parent])

    def open(self, teacher: TeacherConfig, stock: Stock) -> Teacher:
        assert isinstance(teacher, OwnTeacher)
        site, asked = stock.site, stock.asked
        folder = None if teacher.model.path is None else stock.folder()
        facts = TeacherFacts(
            teacher.name,
            asked.tokenizer,
            asked.columns,
            asked.classes,
            asked.token_level,
            site.device,
            folder,
        )
        return self.make(teacher.options, facts, asked.max_positions, site.where)


def teacher(
    name: str,
    *,
    gives: Collection[str] = ("logits",),
    layers: int = 0,
    width: int = 0,
    parameters: int = 0,
    needs_model: bool = False,
    view: str = STUDENT,
) -> Callable[[Decorated], Decorated]:
    """Register a class as a teacher backend under `name`; see `Own` for the rest."""

    def decorate(cls: Decorated) -> Decorated:
        own = Own(name, cls, frozenset(gives), layers, width, parameters, needs_model, view)  # type: ignore[arg-type]
        BACKENDS.add(name, own)
        return cls

    return decorate
