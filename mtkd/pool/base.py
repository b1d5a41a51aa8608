"""What a teacher is to the rest of mtkd, wherever its weights live."""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.models.features import Features
from mtkd.models.info import ModelInfo
from mtkd.models.taps import TappedModel


class Teacher(Protocol):
    """A frozen model: always in eval mode, always without gradients.

    Attributes:
        name: in metrics and options.
        info: shape and capabilities of the model, wherever it runs; rows and width adapters are made from it.
        num_parameters: of the model.
        num_columns: of its logits.
        embedding_table: a copy of its token embeddings, [V,H]; None for a teacher that has none. A collective.
        view: whose tokenizer's text it reads, a key of `Batch.views`; `STUDENT` for that of the run. Its features
            stand at the student's positions either way.
    """

    name: str
    info: ModelInfo
    num_parameters: int
    num_columns: int
    view: str

    @property
    def embedding_table(self) -> Tensor | None: ...

    def provides(self) -> frozenset[str]:
        """Feature names it can give ("logits", "hidden", ...), see `mtkd.models.features`."""
        ...

    def ahead(self, batch: Batch) -> None:
        """Start what can be started: the teacher before this one in the pool runs on the batch now."""
        ...

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of a batch, detached."""
        ...

    def record(self) -> dict[str, Any]:
        """What a cache keeps of its shape; see `mtkd.pool.cache.made_of`."""
        ...

    def close(self) -> None:
        """Free its memory."""
        ...


class ElsewhereModel(nn.Module):
    """A frozen `TappedModel` whose weights are on the device only while it runs.

    Args:
        model: its parameters lose `requires_grad`.
    """

    def __init__(self, model: TappedModel) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.info, self.vocabulary = model.info, model.vocabulary

    @property
    def num_columns(self) -> int:
        """Columns of its logits."""
        return self.model.num_columns

    @property
    def embedding_table(self) -> Tensor:
        """A copy of its token embeddings, [V,H]."""
        raise NotImplementedError

    def enable_packing(self, where: str) -> None:
        """Let it take packed rows; see `TappedModel.enable_packing`."""
        raise NotImplementedError

    def ahead(self) -> None:
        """Start to bring the weights; nothing where that is not possible."""

    def close(self) -> None:
        """Free everything; the model must not run any more."""
        raise NotImplementedError

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        """`to`, `cuda`, `float` do nothing: the backend decides where the parameters are."""
        return self


LiveModel = TappedModel | ElsewhereModel
"""A model that can be run, wherever its weights are."""


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers (position tables) are small: they stay on the device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
