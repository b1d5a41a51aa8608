"""What a backend says of itself. No code outside `pool/` and `config/` compares its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from mtkd.config import TeacherConfig
from mtkd.engine.dist import Dist
from mtkd.models.taps import TappedModel
from mtkd.pool.base import LiveModel
from mtkd.pool.sizes import Place, Share, TeacherSize
from mtkd.registry import Registry


@dataclass(frozen=True)
class Site:
    """Where teachers are opened.

    Attributes:
        device, dtype: where they run, and in what.
        folder: of the teacher's weights, found when a backend asks for it.
        file: what a backend may write for the length of the opening.
    """

    device: torch.device
    dtype: torch.dtype
    dist: Dist
    folder: Callable[[], Path]
    file: Path


class Backend:
    """Where a teacher's weights are between its turns.

    Attributes:
        runs: a model runs; else its answers are read from somewhere.
        in_files: its weights are read from the model's folder as they are: the model is opened without them.
        shown: the plan names it next to the model.
        several: it needs more than one process.
        formats: it keeps weights of other number formats than float32 as they are (`mtkd.models.formats`).
        lighter: backends that take less memory for the same teacher, for advice.
    """

    runs: ClassVar[bool] = True
    in_files: ClassVar[bool] = False
    shown: ClassVar[bool] = False
    several: ClassVar[bool] = False
    formats: ClassVar[bool] = True
    lighter: ClassVar[tuple[str, ...]] = ()

    def check(self, teacher: TeacherConfig, where: str) -> None:
        """Refuse a teacher that this machine cannot run, before anything of it is read.

        Raises:
            UserError: naming what is missing.
        """

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

    def remark(self, tokens: int) -> str:
        """What the plan says of a cache stage with batches of so many tokens; "" for nothing."""
        return ""

    def open(self, teacher: TeacherConfig, model: TappedModel, site: Site, where: str) -> LiveModel:
        """The model with its weights where this backend keeps them, checked; a collective.

        Args:
            model: on the CPU; without weights where they are `in_files`.
            where: place of the teacher in the configuration.
        Raises:
            DataError: weights that are not the model's, cannot be read, or are not finite.
            UserError: an architecture that this backend cannot run.
        """
        raise NotImplementedError


BACKENDS: Registry[Backend] = Registry("teacher backend", "mtkd.pool.backends")
"""The backends by the name that a configuration gives them."""
