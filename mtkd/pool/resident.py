"""The resident backend: the teacher's weights stay in memory beside the student's."""

from __future__ import annotations

import torch

from mtkd.data.batch import Batch
from mtkd.features import Features
from mtkd.models.taps import TappedModel


class ResidentTeacher:
    """A `TappedModel` frozen for good.

    Args:
        name: in metrics and options.
        model: its parameters lose `requires_grad` here.
        device: where it runs.
        dtype: bfloat16 runs it under autocast.
    """

    def __init__(self, name: str, model: TappedModel, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.info = name, model.info
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._dtype = dtype
        self._model: TappedModel | None = model.to(device).eval().requires_grad_(False)

    def provides(self) -> frozenset[str]:
        return self.info.taps

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        assert self._model is not None
        # Set again at every call: a `train()` on anything that holds the teacher would turn dropout on.
        self._model.eval()
        device = batch.input_ids.device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            return self._model(batch, wants)

    def close(self) -> None:
        self._model = None
