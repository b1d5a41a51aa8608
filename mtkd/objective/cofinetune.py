"""Co-finetuning: several encoders learn one task together, through one pooling and one prediction layer.

Their own layers differ, the last layers are the same parameters, so what the encoders hand to them comes to lie in one
space: MT-BERT's teachers, whose hidden states one student can then match (Wu et al. 2021, arXiv 2106.01023, section
"Multi-Teacher Co-Finetuning"). Every model is exported whole, with its own copy of the shared layers.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.engine.base import Trainable
from mtkd.engine.jsonlines import ROW
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES
from mtkd.models.features import Features
from mtkd.models.forward import logits_of
from mtkd.models.info import GLM, ModelInfo
from mtkd.models.taps import TappedModel

# The linear layers after the encoder, in order: pooling (where the architecture has one), then prediction.
_HEADS: dict[str, tuple[str, ...]] = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
    "electra": ("classifier.dense", "classifier.out_proj"),
    "gpt2": ("score",),
    "llama": ("score",),
    "qwen2": ("score",),
    GLM: ("pooler", "classifier"),
}


def check_members(infos: Mapping[str, ModelInfo], where: str) -> None:
    """Refuse models that cannot share their pooling and prediction layers.

    Args:
        infos: by member, in order.
        where: the stage's `members` in the configuration.

    Raises:
        UserError: not classifiers, an architecture whose head is not known, other layers or widths.
    """
    first = next(iter(infos))
    for name, info in infos.items():
        place = f"{where}.{name}"
        if not info.num_labels:
            raise UserError(
                "co-finetuning shares a pooling and a prediction layer, which classifiers have",
                where=place,
                found=f"a token-level model '{info.architecture}'",
                todo="use a `classify` task, or a finetune stage per model",
            )
        if info.cloze:
            raise UserError(
                "a cloze has no pooling and prediction layer to share",
                where=place,
                todo="drop verbalizers from its config.json, or finetune it in a stage of its own",
            )
        if info.architecture not in _HEADS:
            raise UserError("the head of this architecture is not known", where=place, found=info.architecture,
                            allowed=sorted(_HEADS))  # fmt: skip
        shape = (len(_HEADS[info.architecture]), info.width)
        wanted = (len(_HEADS[infos[first].architecture]), infos[first].width)
        if shape != wanted:
            raise UserError(
                f"its pooling and prediction layers cannot be those of '{first}'",
                where=place,
                found=f"{shape[0]} layers of width {shape[1]}",
                allowed=f"{wanted[0]} layers of width {wanted[1]}",
            )


def share_heads(models: Mapping[str, TappedModel]) -> None:
    """Make the pooling and prediction parameters of every model those of the first one; checked before."""
    first, *others = models.values()
    for other in others:
        pairs = zip(_HEADS[first.info.architecture], _HEADS[other.info.architecture], strict=True)
        for source, target in pairs:
            layer, shared = other.model.get_submodule(target), first.model.get_submodule(source)
            assert {n for n, _ in layer.named_parameters()} >= {n for n, _ in shared.named_parameters()}
            for name, parameter in layer.named_parameters():
                # A bias that only one side has (decoders' heads have none) stays the model's own.
                layer.register_parameter(name, dict(shared.named_parameters()).get(name, parameter))


class CoFinetuning(Trainable):
    """T models whose losses on the labels are added: ``sum_k CE(y, t_k)``.

    Args:
        members: by name; their heads are shared here.
        regression: squared error instead of cross entropy.
        tile: positions per tile of a validation.
        dtype: bfloat16 runs the models under autocast.

    Source: Wu et al. 2021, One Teacher is Enough? / MT-BERT, arXiv 2106.01023, section on co-finetuning.
    """

    def __init__(
        self, members: Mapping[str, TappedModel], *, regression: bool, tile: int, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        share_heads(members)
        # A member's name may have a dot, which the name of a module may not.
        self.members, self._names = nn.ModuleList(members.values()), tuple(members)
        self.tile, self.dtype = tile, dtype
        self._loss = LOSSES["label_mse" if regression else "ce"]

    @property
    def models(self) -> dict[str, TappedModel]:
        models = {}
        for name, member in zip(self._names, self.members, strict=True):
            assert isinstance(member, TappedModel)
            models[name] = member
        return models

    def forward(
        self, batch: Batch, teachers: list[Features], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch: the sum over the members of their mean loss over the step's labels.

        Args:
            teachers: none.
        Returns:
            (loss [], metrics): as `Objective.forward`; a metric ``row/MEMBER`` each.
        """
        total = torch.zeros((), device=batch.input_ids.device)
        metrics: dict[str, Tensor] = {}
        labels, mask = batch.targets, batch.target_mask
        for name, model in self.models.items():
            logits = logits_of(model, batch, self.dtype)
            scores = logits.rows(torch.arange(len(labels), device=labels.device))  # [B,C]
            value = self._loss(scores, labels, mask).sum() / max(counts["targets"], 1)
            total = total + value
            metrics[ROW + name] = value.detach()
        metrics["loss"] = total.detach()
        return total, metrics
