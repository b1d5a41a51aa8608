"""What a teacher is to the rest of mtkd, wherever its weights live."""

from __future__ import annotations

from typing import Protocol

from mtkd.data.batch import Batch
from mtkd.features import Features


class Teacher(Protocol):
    """A frozen model: always in eval mode, always without gradients."""

    name: str

    def provides(self) -> frozenset[str]:
        """Feature names it can give ("logits", "hidden", ...), see `mtkd.features`."""
        ...

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of a batch, detached."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...
