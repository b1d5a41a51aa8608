"""The memory planner against what steps really take: bytes that torch's allocator gave out, and what processes hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CPU
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from mtkd.config import BatchConfig, DataConfig, EngineConfig, ModelConfig, Named, StageConfig, teacher_config
from mtkd.config.match import Match
from mtkd.data.batch import Batch
from mtkd.engine.dist import Dist
from mtkd.engine.tile import tile_for
from mtkd.engine.torch_engine import TorchEngine
from mtkd.models.info import model_info
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import compile_rows
from mtkd.objective.objective import Objective
from mtkd.objective.wire import Wiring, wire
from mtkd.planning.budget import Limits, StageMemory, stage_memory
from mtkd.planning.data import unread
from mtkd.planning.spec import DataSpec, ModelSpec, StageSpec, TeacherSpec
from mtkd.pool import LiveTeacher, Teacher, TeacherPool, offload
from mtkd.registry import TASKS
from mtkd.weightings.make import make_weighting, stage_facts

IDS, SEQUENCES, LENGTH = 8_000, 4, 128
HEAD = "AutoModelForCausalLM"
NO_LIMITS = Limits(None, None, None)
GB = 1e9


def llama(width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=IDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
        attn_implementation="mtkd_tap",
    )


STUDENT, TEACHER = llama(128, 4), llama(256, 2)


def tapped(config: LlamaConfig, seed: int) -> TappedModel:
    torch.manual_seed(seed)
    return TappedModel(LlamaForCausalLM(config), HEAD, IDS)


class Case:
    """A stage that can be planned and made: the same models, rows and batch on both sides."""

    def __init__(
        self,
        matches: Sequence[Match],
        backends: Sequence[str] = ("resident",),
        weighting: str = "uniform",
        accumulate: int = 1,
        teacher: LlamaConfig | None = None,
        **engine: Any,
    ) -> None:
        self.names = [f"t{k}" for k in range(len(backends))]
        self.backends, self.matches, self.engine = (
            backends,
            matches,
            EngineConfig(**{"device": "cpu", "precision": "fp32", **engine}),
        )
        self.teacher = teacher or TEACHER
        teachers = [teacher_config({"name": n, "model": ModelConfig(path="x")}) for n in self.names]
        self.stage = StageConfig(
            kind="distill",
            student=ModelConfig(path="x"),
            teachers=tuple(teachers),
            match=tuple(matches),
            weighting=Named(name=weighting),
            steps=2,
            batch=BatchConfig(sequences=SEQUENCES * accumulate * self.engine.processes, accumulate=accumulate),
        )

    def spec(self) -> StageSpec:
        """What the plan would make of it."""
        data = DataConfig(task="causal-lm", source="random-tokens", documents=8, max_length=LENGTH)
        shape = ModelSpec(self.teacher, HEAD, IDS)
        teachers = [
            TeacherSpec(config, f"stages.s.teachers[{k}]", shape, backend)
            for k, (config, backend) in enumerate(zip(self.stage.teachers, self.backends, strict=True))
        ]
        return StageSpec(
            name="s",
            stage=self.stage,
            data=DataSpec("text", data, TASKS.find("causal-lm"), unread(data)),
            trained={"student": ModelSpec(STUDENT, HEAD, IDS)},
            teachers=tuple(teachers),
            seed=0,
            rows=tuple(self._rows()),
        )

    def planned(self) -> StageMemory:
        return stage_memory(self.spec(), self.engine, NO_LIMITS, on_gpu=False)

    def _rows(self) -> Any:
        student, teacher = (model_info(config, HEAD) for config in (STUDENT, self.teacher))
        infos = dict.fromkeys(self.names, teacher)
        return compile_rows(self.matches, student, infos, token_level=True, regression=False, where="match")

    def make(self, folder: Path) -> tuple[Objective, TeacherPool]:
        dtype = torch.bfloat16 if self.engine.precision == "bf16" else torch.float32
        student, teachers = tapped(STUDENT, 0), [tapped(self.teacher, k + 1) for k in range(len(self.names))]
        if self.engine.activation_checkpointing:
            student.enable_activation_checkpointing()
        infos = {name: teacher.info for name, teacher in zip(self.names, teachers, strict=True)}
        facts = stage_facts(tuple(self.names), [1] * len(teachers), student, 0)
        made = make_weighting(self.stage.weighting, facts, "w")
        how = Wiring("example", True, tile_for(self.engine, IDS, "cpu"), dtype)
        objective = wire(student, infos, self._rows(), made, how)
        objective.train()
        held: list[Teacher] = []
        for name, model, backend in zip(self.names, teachers, self.backends, strict=True):
            if backend == "offload":
                held.append(LiveTeacher(name, offload(model, CPU, folder / name, Dist()), CPU, dtype))
            else:
                held.append(LiveTeacher(name, model, CPU, dtype))
        return objective, TeacherPool(held, [objective.teacher_wants(k) for k in range(len(held))])

    def run(self, folder: Path) -> None:
        """Two optimizer steps of the torch engine."""
        objective, pool = self.make(folder)
        engine = TorchEngine(objective, self.stage.optimizer, 2, CPU)
        for step in range(2):
            objective.begin_step(step, torch.eye(len(self.names), dtype=torch.float64))
            for _ in range(self.stage.batch.accumulate):
                loss, _ = engine.forward(batch(), pool.forward(batch()), counts())
                engine.backward(loss)
                del loss
            engine.step(step)
        pool.close()


def batch() -> Batch:
    ids = torch.randint(1, IDS, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(SEQUENCES), ids, torch.ones_like(ids, dtype=torch.bool), ids)


def counts() -> dict[str, int]:
    return {
        "tokens": SEQUENCES * LENGTH,
        "targets": SEQUENCES * LENGTH,
        "labels": SEQUENCES * LENGTH,
        "sequences": SEQUENCES,
    }


def allocated_peak(function: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given out at one time, by its own records."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


CASES = {
    "kl": Case([Match(loss="kl")]),
    "jsd, labels": Case([Match(loss="jsd"), Match(loss="ce", target="labels")]),
    "bf16": Case([Match(loss="kl")], precision="bf16"),
    "checkpointing": Case([Match(loss="kl")], activation_checkpointing=True),
    "bf16, checkpointing": Case([Match(loss="kl")], precision="bf16", activation_checkpointing=True),
    "2 teachers": Case([Match(loss="kl")], ("resident",) * 2),
    "3 teachers, jsd": Case([Match(loss="jsd")], ("resident",) * 3),
    "accumulate": Case([Match(loss="kl")], accumulate=2),
    "hidden states": Case([Match(feature="hidden", loss="mse", student_layer=(2, 4), teacher_layer=(1, 2))]),
    "attention": Case(
        [Match(feature="scores", loss="attention_mse", teacher_layer="last", student_layer="last"), Match(loss="kl")]
    ),
    "weighting": Case([Match(loss="kl")], ("resident",) * 2, weighting="entropy"),
    "gram": Case([Match(loss="kl")], ("resident",) * 2, weighting="mgda"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_measured_peak(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found, planned = allocated_peak(lambda: case.run(tmp_path)), case.planned()
    assert planned.rank_gb * GB == pytest.approx(found, rel=0.15)
