"""A teacher that runs: resident, offloaded, streamed or sharded, as its model is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtkd.config import TeacherConfig
from mtkd.data.batch import STUDENT, Batch
from mtkd.models.broken import broken_weights
from mtkd.models.features import Features
from mtkd.models.forward import features_of
from mtkd.models.linear import speed_up_linears
from mtkd.models.taps import TappedModel
from mtkd.pool.backend import Backend, Site
from mtkd.pool.base import ElsewhereModel, LiveModel
from mtkd.pool.sizes import Place, Share, TeacherSize


def check_finite(model: TappedModel, where: str) -> None:
    """Refuse weights with NaN or infinity in them.

    Raises:
        DataError: naming the first ones.
    """
    broken = [name for name, weight in model.model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise broken_weights(where, ", ".join(broken[:5]))


class LiveTeacher:
    """A model frozen for good.

    Args:
        name: in metrics and options.
        model: its parameters lose `requires_grad` here.
        device: where it runs.
        dtype: bfloat16 runs it under autocast.
        compiled: run a resident model through torch.compile; the others' parameters change their place at every turn.
    """

    def __init__(
        self, name: str, model: LiveModel, device: torch.device, dtype: torch.dtype, compiled: bool = False
    ) -> None:
        if compiled and isinstance(model, TappedModel):
            model.compile_model()
        self.name, self.info, self.view = name, model.info, STUDENT
        # A rank has a part of a sharded one; `ds_numel` is the whole.
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        self._dtype = dtype
        self._model: LiveModel | None = model.to(device).eval().requires_grad_(False)
        speed_up_linears(self._model)

    def provides(self) -> frozenset[str]:
        return self.info.taps

    def ahead(self, batch: Batch) -> None:
        if isinstance(self._model, ElsewhereModel):
            self._model.ahead()

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        assert self._model is not None
        # Set again at every call: a `train()` on anything that holds the teacher would turn dropout on.
        self._model.eval()
        with torch.no_grad():
            return features_of(self._model, batch, wants, self._dtype)

    def close(self) -> None:
        if isinstance(self._model, ElsewhereModel):
            self._model.close()
        self._model = None


class Resident(Backend):
    """The weights stay in memory with the student's."""

    lighter = ("offload", "sharded")

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        whole = sum(t.weights for t in teachers)
        return Share(whole, whole, built=whole)

    def open(self, teacher: TeacherConfig, model: TappedModel, site: Site, where: str) -> LiveModel:
        check_finite(model, where)
        model.verify()
        return model
