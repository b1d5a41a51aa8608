"""What a teacher is to the rest of mtkd, wherever its weights live."""

from __future__ import annotations

from typing import Protocol

from mtkd.data.batch import Batch
from mtkd.models.features import Features
from mtkd.models.info import ModelInfo


class Teacher(Protocol):
    """A frozen model: always in eval mode, always without gradients.

    Attributes:
        name: in metrics and options.
        info: shape and capabilities of the model, wherever it runs; rows and width adapters are made from it.
        num_parameters: of the model.
    """

    name: str
    info: ModelInfo
    num_parameters: int

    def provides(self) -> frozenset[str]:
        """Feature names it can give ("logits", "hidden", ...), see `mtkd.models.features`."""
        ...

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of a batch, detached."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...
