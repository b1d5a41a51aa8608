"""What a backend says of itself. No code outside `pool/` and `config/` compares its name.

The plan asks `check`, `describe`, `check_room` and `memory`, without weights. The run calls `open`, and has a `Teacher`
whose weights are where the backend keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch

from mtkd.config import TeacherConfig
from mtkd.config.read import fingerprint
from mtkd.data.batch import STUDENT
from mtkd.engine.dist import Dist
from mtkd.models.info import ModelInfo
from mtkd.models.numbers import Numbers
from mtkd.models.taps import TappedModel
from mtkd.pool.base import Teacher
from mtkd.pool.cache import CacheOrigin
from mtkd.pool.cache.folder import CacheFacts
from mtkd.pool.sizes import Place, Share, TeacherSize
from mtkd.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Site:
    """Where teachers are opened.

    Attributes:
        where: place of the teacher in the configuration.
        device, dtype: where it runs, and in what.
        file: what a backend may write for the length of the opening.
        packing: place of the setting that has batches run on packed rows; "" where they are not.
        compiled: run a resident model through torch.compile.
    """

    where: str
    device: torch.device
    dtype: torch.dtype
    dist: Dist
    file: Path
    packing: str = ""
    compiled: bool = False


@dataclass(frozen=True)
class Asked:
    """What a stage asks of any teacher.

    Attributes:
        auto_class: of the stage's task. token_level: logits are [B,L,V] instead of [B,C].
        columns: real ids, or classes; in a plan 2 while the classes are not read.
        classes: names in order, as far as they are known.
        max_positions: tokens of the longest example.
        tokenizer: the run's; None while it does not exist.
    """

    auto_class: str
    token_level: bool
    columns: int
    classes: tuple[str, ...]
    max_positions: int
    tokenizer: PreTrainedTokenizerBase | None = None


class Gives(Protocol):
    """What the plan knows of a teacher: of a model that runs, of a cache, or of a plug-in's teacher."""

    @property
    def info(self) -> ModelInfo:
        """Shape of what it gives."""
        ...

    @property
    def numbers(self) -> Numbers:
        """Its size; of what does not run without memory for weights."""
        ...


class Outlook(Protocol):
    """What a plan can find out for a teacher; a backend asks for what it needs."""

    @property
    def asked(self) -> Asked: ...

    def model(self) -> Gives:
        """The model that the configuration names, checked against task, tokenizer and backend."""
        ...

    def find_model(self) -> None:
        """Look for the folder of that model, without its weights."""
        ...

    def cache(self) -> CacheFacts:
        """What is known of the cache that the configuration names, checked against data, tokenizer and precision."""
        ...


class Stock(Protocol):
    """What a run has for a teacher that is opened; a backend asks for what it needs."""

    @property
    def site(self) -> Site: ...

    @property
    def asked(self) -> Asked: ...

    def model(self, *, empty: bool) -> TappedModel:
        """The model that the configuration names, on the CPU; without its weights if `empty`. A collective."""
        ...

    def folder(self) -> Path:
        """The folder of that model, with its weights."""
        ...

    def cache(self) -> Path:
        """The folder of the cache that the configuration names."""
        ...

    def cache_origin(self, recorded: CacheOrigin) -> CacheOrigin:
        """What a cache must be made of here, given what it says."""
        ...

    def confirm(self) -> None:
        """Compare what an earlier stage made with what it sealed."""
        ...


class Backend:
    """Where a teacher's weights are between its turns.

    Attributes:
        runs: a model of transformers runs, whose weights and tokenizer lie in its folder.
        stored: its answers were given once, for the text of the data alone.
        in_files: its weights are read from the model's folder as they are: the model is opened without them.
        shown: the plan names it next to the model.
        several: it needs more than one process.
        formats: it keeps weights of other number formats than float32 as they are (`mtkd.models.formats`).
        lighter: backends that take less memory for the same teacher, for advice.
    """

    runs: ClassVar[bool] = False
    stored: ClassVar[bool] = False
    in_files: ClassVar[bool] = False
    shown: ClassVar[bool] = False
    several: ClassVar[bool] = False
    formats: ClassVar[bool] = True
    lighter: ClassVar[tuple[str, ...]] = ()

    def check(self, teacher: TeacherConfig, where: str) -> None:
        """Refuse a teacher that cannot be had here, before anything of it is read.

        Raises:
            UserError: naming what is missing.
        """

    def describe(self, teacher: TeacherConfig, outlook: Outlook) -> Gives:
        """What the teacher can give, for the plan.

        Raises:
            UserError: a model or cache that does not fit the stage.
        """
        raise NotImplementedError

    def check_room(self, teachers: Sequence[TeacherSize], place: Place, folder: Path, where: str) -> None:
        """Refuse a stage's teachers of this backend where there is no room for them; there is at least one.

        Args:
            folder: of the run, which may not exist yet.
            where: of the stage's teachers.
        Raises:
            UserError: naming the stage.
        """

    def size(self, teacher: TeacherConfig, weights: int, head: int, layers: int) -> TeacherSize:
        """What is known of a teacher's size.

        Args:
            weights: bytes in the number format of its model.
            head: those of the output head, which are part of `weights`.
        """
        return TeacherSize(weights, head, teacher.backend, layers)

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        """What the weights of a stage's teachers of this backend take; there is at least one."""
        return Share()

    def view_of(self, teacher: TeacherConfig) -> str:
        """The key of `Batch.views` that it reads; `STUDENT` for the run's text."""
        return STUDENT

    def origin(self, teacher: TeacherConfig) -> str:
        """Where its answers come from, as the plan shows it; "" for its model."""
        return ""

    def remark(self, tokens: int) -> str:
        """What the plan says of a cache stage with batches of so many tokens; "" for nothing."""
        return ""

    def source(self, teacher: TeacherConfig, model: Callable[[], str], cache: Callable[[], str], base: Path) -> str:
        """Digest of what the configuration names: under `model` weights or the folder of a cache, in options files.

        Args: base: that relative paths of the configuration start from.
        """
        return model()

    def digest(
        self, teacher: TeacherConfig, model: str, code: Callable[[Collection[str]], Mapping[str, str]], base: Path
    ) -> str:
        """What identifies the teacher's predictions: its weights, and what its outputs stand for if the user says it.

        Args: model: digest of its model. code: origins of plug-ins -> digests of their code. base: as for `source`.
        """
        digest = model if teacher.classes is None else fingerprint([model, teacher.classes])
        return fingerprint([digest, "other", teacher.others]) if teacher.others else digest

    def open(self, teacher: TeacherConfig, stock: Stock) -> Teacher:
        """The teacher with its weights where this backend keeps them, checked; a collective.

        Raises:
            DataError: weights or a cache that are not what they should be, cannot be read, or are not finite.
            UserError: an architecture that this backend cannot run.
        """
        raise NotImplementedError


BACKENDS: Registry[Backend] = Registry("teacher backend", "mtkd.pool.backends")
"""The backends by the name that a configuration gives them."""
