"""The resident backend: the teacher's weights stay in memory beside the student's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mtkd.data.batch import Batch
from mtkd.models.broken import broken_weights
from mtkd.models.features import Features
from mtkd.models.linear import speed_up_linears
from mtkd.models.taps import TappedModel

if TYPE_CHECKING:
    from mtkd.pool.offload import OffloadedModel
    from mtkd.pool.sharded import ShardedModel


def check_finite(model: TappedModel, where: str) -> None:
    """Refuse weights with NaN or infinity in them.

    Raises:
        DataError: naming the first ones.
    """
    broken = [name for name, weight in model.model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise broken_weights(where, ", ".join(broken[:5]))


class ResidentTeacher:
    """A model frozen for good.

    Args:
        name: in metrics and options.
        model: its parameters lose `requires_grad` here.
        device: where it runs.
        dtype: bfloat16 runs it under autocast.
    """

    def __init__(
        self,
        name: str,
        model: TappedModel | OffloadedModel | ShardedModel,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.name, self.info = name, model.info
        # of a sharded one there is a part here; `ds_numel` is the whole
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        self._dtype = dtype
        self._model: TappedModel | OffloadedModel | ShardedModel | None = model.to(device).eval().requires_grad_(False)
        speed_up_linears(self._model)

    def provides(self) -> frozenset[str]:
        return self.info.taps

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        assert self._model is not None
        # Set again at every call: a `train()` on anything that holds the teacher would turn dropout on.
        self._model.eval()
        device = batch.input_ids.device.type
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            features: Features = self._model(batch, wants)
        return features

    def close(self) -> None:
        self._model = None
