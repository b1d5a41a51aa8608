"""Options of the engine that choose kernels and compilation: each is read, and what it cannot do is refused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cache_runs
import pytest
import torch
from pydantic import ValidationError
from tiny import CPU, causal_batch, causal_model, make_objective
from tiny_run import tiny_config

from mtkd.config import EngineConfig, OptimizerConfig
from mtkd.config.match import Match
from mtkd.config.read import load_config
from mtkd.data.batch import position_counts
from mtkd.engine.dist import Dist
from mtkd.engine.make import start_processes
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import UserError
from mtkd.models.attention import use_attention
from mtkd.models.taps import TappedModel
from mtkd.pool import LiveTeacher, offload
from mtkd.running.identity import identity


@pytest.fixture
def switches() -> Iterator[None]:
    """Kernels are switched for the whole process: put back afterwards."""
    yield
    use_attention("auto", "cpu")


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(("kernel", "used"), [("auto", "flash"), ("flash", "flash"), ("math", "math")])
def test_attention_runs_on_the_chosen_kernel(kernel: str, used: str) -> None:
    """As torch's profiler names the kernel that ran."""
    use_attention(kernel, "cpu")
    query = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    names = " ".join(event.key for event in profile.key_averages())
    assert f"scaled_dot_product_{'flash_attention_for_cpu' if used == 'flash' else 'attention_math'}" in names


@pytest.mark.usefixtures("switches")
def test_a_run_switches_the_kernel() -> None:
    start_processes(EngineConfig(attention="math", device="cpu", threads=torch.get_num_threads()))
    assert not torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ({"attention": "efficient", "device": "cpu"}, "GPUs only"),
        ({"compile": True, "kind": "deepspeed"}, "kind: torch"),
        ({"compile": True, "activation_checkpointing": True}, "exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused(engine: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        EngineConfig(**engine)


def test_a_kernel_that_the_found_device_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="GPUs only"):
        use_attention("efficient", "cpu")
    assert torch.backends.cuda.flash_sdp_enabled()  # nothing was switched


@pytest.mark.parametrize(
    ("engine", "changes"),
    [
        ({"compile": True}, True),
        ({"attention": "math"}, True),
        ({"precision": "bf16"}, True),
        ({"prefetch": False}, False),
    ],
)
def test_what_changes_numbers_identifies_a_stage(tmp_path: Path, engine: dict[str, Any], changes: bool) -> None:
    """A setting is part of a stage's identity exactly when it changes numbers."""

    def of(**engine: Any) -> dict[str, Any]:
        config = tiny_config(tmp_path, engine=engine)
        return identity(config, "student", data="d", tokenizer="t", segmentation="s", models={}, steps=1)

    assert (of() != of(**engine)) == changes


@pytest.mark.slow
def test_a_compiled_student_gives_the_same_losses_with_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced with rows on logits, hidden states and attention, lengths that change: as plain,
    and saved under the same names.

    The graphs are run by torch instead of being translated to C++, which takes minutes here.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    rows = [
        Match(),
        Match(feature="hidden", loss="mse", student_layer="last", teacher_layer="last"),
        Match(feature="probs", loss="attention_kl", student_layer="last", teacher_layer="last"),
    ]
    found = []
    for compiled in (False, True):
        objective, pool = make_objective(causal_model(8, 1, 0), [causal_model(16, 1, 1)], rows)
        if compiled:
            objective.student.compile_model()
        engine = TorchEngine(objective, OptimizerConfig(lr=1e-2), 2, CPU)
        losses = []
        for step, lengths in enumerate(([5, 4], [7, 3])):
            batch = causal_batch(lengths, seed=step)
            loss, _ = engine.forward(batch, pool.forward(batch), position_counts([batch]))
            engine.backward(loss)
            engine.step(step)
            losses.append(float(loss.detach()))
        found.append((losses, list(engine.model_state("student"))))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs > 0
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == found[1][1]


def test_a_resident_teacher_is_compiled_where_the_run_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An offloaded one is not: it changes its parameters' place at every turn."""
    seen: list[int] = []
    monkeypatch.setattr(TappedModel, "compile_model", lambda self: seen.append(self.info.width))
    models = [causal_model(16, 1, 1), offload(causal_model(24, 1, 1), CPU, tmp_path / "x", Dist())]
    teachers = [LiveTeacher("t", model, CPU, torch.float32, compiled=True) for model in models]
    assert seen == [16]
    teachers[1].close()


def test_flash_needs_bf16_on_a_gpu() -> None:
    with pytest.raises(ValidationError, match="no kernel for fp32"):
        EngineConfig(attention="flash", device="cuda", precision="fp32")
    EngineConfig(attention="flash", device="cuda", precision="bf16")
    with pytest.raises(UserError, match="no kernel for fp32"):  # device: auto, found later
        use_attention("flash", "cuda", "fp32")


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["engine.compile=true"], False),  # a cache stage compiles nothing
        (["seed=5"], False),
        (["stages.cache.cache={targets: sampled, k: 30}", "seed=5"], True),
    ],
)
def test_what_changes_a_cache_identifies_it(tmp_path: Path, overrides: list[str], changes: bool) -> None:
    """A seed counts for drawn targets only; nothing that a cache stage does not read counts."""
    file = cache_runs.write(tmp_path, cache_runs.values(tmp_path, cache={}, student={}))

    def of(overrides: list[str]) -> dict[str, Any]:
        return identity(
            load_config(file, overrides), "cache", data="d", tokenizer="t", segmentation="s", models={}, steps=0
        )

    assert (of(overrides[:-1]) != of(overrides)) == changes
