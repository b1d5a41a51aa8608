"""The default engine: plain torch, one process, CPU or one GPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from mtkd.config import OptimizerConfig
from mtkd.data.batch import Batch
from mtkd.engine.base import (
    Trainable,
    gradient_of,
    learning_rate,
    load_plain,
    make_adamw,
    random_state,
    set_learning_rate,
    set_random_state,
)
from mtkd.engine.dist import Dist
from mtkd.models.features import Features
from mtkd.models.linear import speed_up_linears

_STATE = "state-rank-0.pt"


class TorchEngine:
    """AdamW on the objective.

    Args:
        objective: its forward returns (loss, metrics); its `models` are what is exported.
        config: optimizer and schedule.
        steps: of the whole stage, for the schedule.
        device: where it runs.
    """

    def __init__(self, objective: Trainable, config: OptimizerConfig, steps: int, device: torch.device) -> None:
        self.dist, self.device = Dist(), device
        self.objective = objective.to(device)
        for model in objective.models.values():
            speed_up_linears(model)
        self._config, self._steps = config, steps
        self.optimizer = make_adamw(objective, config, fused=True)
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]

    def forward(
        self, batch: Batch, teachers: list[Features], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(batch, teachers, counts)

    def backward(self, loss: Tensor) -> None:
        loss.backward(gradient_of(loss))

    def step(self, step: int) -> float:
        set_learning_rate(self.optimizer.param_groups, learning_rate(self._config, step, self._steps))
        largest = self._config.clip or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self._trainable, largest))
        if norm < float("inf"):  # false for NaN too: a poisoned gradient never reaches the parameters
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path) -> None:
        state = {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(),
        }
        torch.save(state, folder / _STATE)

    def load(self, folder: Path) -> None:
        state = load_plain(folder / _STATE)
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        set_random_state(state["random"])

    def model_state(self, name: str) -> dict[str, Tensor]:
        state = self.objective.models[name].model.state_dict()
        return {name: value.detach().cpu() for name, value in state.items()}

    def whole_head(self) -> AbstractContextManager[None]:
        return nullcontext()

    def whole_student(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
