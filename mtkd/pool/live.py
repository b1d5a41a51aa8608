"""A teacher that runs: resident, offloaded, streamed or sharded, as its model is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtkd.config import TeacherConfig
from mtkd.data.batch import STUDENT, Batch
from mtkd.models.broken import broken_weights
from mtkd.models.features import Features
from mtkd.models.forward import features_of
from mtkd.models.linear import speed_up_linears
from mtkd.models.taps import TappedModel
from mtkd.pool.backend import Backend, Gives, Outlook, Stock
from mtkd.pool.base import ElsewhereModel, LiveModel
from mtkd.pool.cache.made_of import model_values
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
        self.num_columns = model.num_columns
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

    @property
    def embedding_table(self) -> Tensor:
        assert self._model is not None
        # Which ids are alike is decided on the CPU, as for a student's own table.
        return self._model.embedding_table.cpu()

    def record(self) -> dict[str, Any]:
        assert self._model is not None
        model = self._model if isinstance(self._model, TappedModel) else self._model.model
        return model_values(model.model.config)

    def close(self) -> None:
        if isinstance(self._model, ElsewhereModel):
            self._model.close()
        self._model = None


class ModelBackend(Backend):
    """A backend that runs a model of transformers."""

    runs = True

    def describe(self, teacher: TeacherConfig, outlook: Outlook) -> Gives:
        return outlook.model()

    def place(self, model: TappedModel, teacher: TeacherConfig, stock: Stock) -> LiveModel:
        """The model with its weights where this backend keeps them, checked; a collective.

        Args: model: on the CPU; without weights where they are `in_files`.
        """
        raise NotImplementedError

    def open(self, teacher: TeacherConfig, stock: Stock) -> LiveTeacher:
        site = stock.site
        model = self.place(stock.model(empty=self.in_files), teacher, stock)
        if site.packing:
            model.enable_packing(site.packing)
        return LiveTeacher(teacher.name, model, site.device, site.dtype, site.compiled)


class Resident(ModelBackend):
    """The weights stay in memory with the student's."""

    lighter = ("offload", "sharded")

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        whole = sum(t.weights for t in teachers)
        return Share(whole, whole, built=whole)

    def place(self, model: TappedModel, teacher: TeacherConfig, stock: Stock) -> LiveModel:
        check_finite(model, stock.site.where)
        model.verify()
        return model
