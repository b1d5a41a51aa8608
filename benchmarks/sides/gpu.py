"""The parts of `gpu_check.py` that measure: the machine's own rates, tiles, whole steps, and GLM-10B teaching GLM-2B.

Each part yields its figures as they grow, so that what is known stays known when time runs out. Bytes are those of
torch's allocator on a GPU; on a CPU, which has none, the growth of the process.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mtkd
from mtkd.config import DataConfig, ModelConfig, OptimizerConfig, StageConfig, teacher_config
from mtkd.data.batch import Batch, position_counts
from mtkd.engine.torch_engine import TorchEngine
from mtkd.losses.spec import LOSSES
from mtkd.models.attention import TAP
from mtkd.models.cards import load_cards
from mtkd.models.features import HeadLogits
from mtkd.models.glm import GLMConfig
from mtkd.models.info import CAUSAL_LM
from mtkd.models.numbers import count_parameters
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import compile_rows
from mtkd.objective.tiles import tiled
from mtkd.planning.data import unread
from mtkd.planning.footprint import Step, measure
from mtkd.planning.spec import DataSpec, ModelSpec, StageSpec, TeacherSpec
from mtkd.pool import LiveTeacher, TeacherPool
from mtkd.registry import TASKS
from sides import ours
from sides.setting import BATCH, LENGTH, forget_peak, peak_mb, resident_mb

Figures = dict[str, Any]
KL = LOSSES["kl"]
WARM, TIMED = 2, 5  # steps


@dataclass(frozen=True)
class Target:
    """Shapes of the project's target. Attributes: sequences, length: of a step, in tokens; tile: positions."""

    teacher: GLMConfig
    student: GLMConfig
    sequences: int
    length: int
    tile: int


def target_shapes(toy: bool) -> Target:
    """GLM-10B and GLM-2B by their cards; or something of the same make that a CPU runs in a second."""
    if toy:
        return Target(_glm(500, 2, 64, 4), _glm(500, 2, 32, 4), 2, 32, 16)
    cards = load_cards()
    big, small = (_glm(c.vocabulary, c.layers, c.width, c.heads) for c in (cards["glm-10b"], cards["glm-2b"]))
    return Target(big, small, 4, 512, 1024)


def machine(device: str, toy: bool) -> Iterator[Figures]:
    """What there is, and the two rates that all others are measured by: bf16 products and copies of memory."""
    found: Figures = {
        "name": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if device == "cuda" else None,
        "torch": torch.__version__,
        "transformers": __import__("transformers").__version__,
        "python": platform.python_version(),
    }
    yield found
    yield {**found, "product_flops": product_rate(device, toy), "copy_bytes_per_second": _copy_rate(device, toy)}


def product_rate(device: str, toy: bool) -> float:
    """Floating-point operations per second of a square bf16 product of random numbers."""
    size = 256 if toy else 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: left @ right, device, 10)


def _copy_rate(device: str, toy: bool) -> float:
    """Bytes read and written per second."""
    source = torch.randn(2**16 if toy else 2**30, device=device)
    goal = torch.empty_like(source)
    return 2 * source.numel() * 4 / _seconds(lambda: goal.copy_(source), device, 10)


def tiles(device: str, toy: bool) -> Iterator[Figures]:
    """KL of a step's positions over the target's vocabulary, forward and backward: in tiles, and whole.

    `error`: of loss and gradients against float32 products, whole; norm of the difference over the norm.
    """
    shapes = target_shapes(toy)
    positions = shapes.sequences * shapes.length
    columns, torch_dtype = shapes.student.vocab_size, torch.bfloat16
    torch.manual_seed(0)
    sizes = (positions, shapes.student.hidden_size), (positions, shapes.teacher.hidden_size)
    hidden, theirs = (torch.randn(size, device=device) for size in sizes)
    heads = [torch.randn(columns, size[1], device=device) / size[1] ** 0.5 for size in sizes]
    teacher = HeadLogits(theirs, heads[1], None, columns).in_dtype(torch_dtype)
    index, weights = torch.arange(positions, device=device), torch.ones(1, positions, device=device)

    def in_tiles(dtype: torch.dtype = torch_dtype) -> list[Tensor]:
        mine = [x.detach().clone().requires_grad_() for x in (hidden, heads[0])]

        def tile_loss(logits: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
            return KL(logits, teacher.rows(index[at]), None, {}).sum() / positions, logits.new_zeros(1)

        head = HeadLogits(mine[0], mine[1], None, columns)
        loss, _ = tiled(head, index, weights, tile_loss, tile=shapes.tile, dtype=dtype)
        return _gradients(loss, mine)

    def whole(dtype: torch.dtype = torch_dtype) -> list[Tensor]:
        mine = [x.detach().clone().requires_grad_() for x in (hidden, heads[0])]
        logits = (mine[0].to(dtype) @ mine[1].to(dtype).t()).float()
        return _gradients(KL(logits, teacher.rows(index), None, {}).sum() / positions, mine)

    reference, found = whole(torch.float32), {"positions": positions, "columns": columns, "tile": shapes.tile}
    for name, function in (("tiles", in_tiles), ("whole", whole)):
        made, peak = _peak(function, device)
        errors = [float((x - y).norm() / y.norm()) for x, y in zip(made, reference, strict=True)]
        del made
        seconds = _seconds(function, device, TIMED)
        found[name] = {
            "seconds": seconds,
            "bytes": peak,
            "error": dict(zip(("loss", "hidden", "head"), errors, strict=True)),
        }
        yield found


def steps(device: str, toy: bool) -> Iterator[Figures]:
    """Whole optimizer steps at the setting of `peers.py`, by teachers and precision."""
    # a processor that only emulates bf16 takes a minute for a step of the setting's size
    sequences, length = (1, 16) if toy else (BATCH, LENGTH)
    batch = ours.text_batch(sequences, length)
    found: Figures = {"tokens": sequences * length}
    for dtype in (torch.float32, torch.bfloat16):
        for teachers in (1,) if toy else (1, 2, 4):
            student, pool = ours.student_and_teachers(teachers)
            step = ours.distil(student, pool, [ours.KL], batch, device=torch.device(device), dtype=dtype)
            loss, peak = _peak(step, device)
            seconds = _seconds(step, device, 1 if toy else 20, warm=not toy)
            name = f"kl, {teachers} teacher(s), {str(dtype).removeprefix('torch.')}"
            found[name] = {
                "seconds": seconds,
                "tokens_per_second": sequences * length / seconds,
                "bytes": peak,
                "loss": loss,
            }
            yield found


def target(device: str, toy: bool) -> Iterator[Figures]:
    """GLM-10B in bf16 teaches GLM-2B (float32 weights under autocast): random weights, whole steps.

    `utilisation`: of the rate of bf16 products measured here; model operations are 6 per student weight and token, 2
    per teacher weight and token, and those of attention over all positions; recomputed layers do not count.
    """
    shapes = target_shapes(toy)
    batch = _batch(shapes).to(torch.device(device))
    tokens = shapes.sequences * shapes.length
    rate = product_rate(device, toy)
    found: Figures = {
        "tokens": tokens,
        "length": shapes.length,
        "product_flops": rate,
        "planned_bytes": _planned(shapes, device),
    }
    yield found
    forget_peak()
    before = resident_mb()
    engine, pool, sizes = _build(shapes, device)
    found |= {"student_parameters": sizes[0], "teacher_parameters": sizes[1]}
    yield found
    losses = []

    def step() -> None:
        loss, metrics = engine.forward(batch, pool.forward(batch), position_counts([batch]))
        engine.backward(loss)
        engine.step(len(losses))
        losses.append(float(metrics["loss"]))

    for _ in range(WARM):
        step()
    seconds = _seconds(step, device, 1 if toy else TIMED, warm=False)
    operations = 3 * _operations(shapes.student, sizes[0], tokens, shapes.length)
    operations += _operations(shapes.teacher, sizes[1], tokens, shapes.length)
    on_gpu = device == "cuda"
    found |= {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "operations": operations,
        "utilisation": operations / seconds / rate,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else (peak_mb() - before) * 1e6,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "losses": losses,
    }
    yield found


def _glm(vocabulary: int, layers: int, width: int, heads: int) -> GLMConfig:
    return GLMConfig(
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        max_position_embeddings=1024,
        pad_token_id=0,
    )


def _model(config: GLMConfig, device: str, dtype: torch.dtype) -> TappedModel:
    """Random weights, made where they are needed: on their way from the host 20 GB would take longer than a step."""
    import transformers

    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=TAP, dtype=dtype)
    return TappedModel(model, CAUSAL_LM, config.vocab_size)


def _build(shapes: Target, device: str) -> tuple[TorchEngine, TeacherPool, tuple[int, int]]:
    torch.manual_seed(0)
    teacher = _model(shapes.teacher, device, torch.bfloat16)
    student = _model(shapes.student, device, torch.float32)
    objective = ours.objective(student, {"glm-10b": teacher}, [mtkd.Match(loss="kl")])
    objective.tile, objective.dtype = shapes.tile, torch.bfloat16
    held = LiveTeacher("glm-10b", teacher, torch.device(device), torch.bfloat16)
    engine = TorchEngine(objective.train(), OptimizerConfig(), 100, torch.device(device))
    sizes = sum(p.numel() for p in student.parameters()), held.num_parameters
    return engine, TeacherPool([held], [objective.teacher_wants(0)]), sizes


def _planned(shapes: Target, device: str) -> int:
    """What `mtkd plan` says of this step: weights, moments, the teacher's bf16, and the footprint."""
    student = ModelSpec(shapes.student, CAUSAL_LM, shapes.student.vocab_size)
    teacher = ModelSpec(shapes.teacher, CAUSAL_LM, shapes.teacher.vocab_size, dtype=torch.bfloat16)
    match = mtkd.Match(loss="kl")
    rows = compile_rows(
        [match], student.info, {"glm-10b": teacher.info}, token_level=True, regression=False, where="target"
    )
    data = DataConfig(task="causal-lm", source="random-tokens", documents=8, max_length=shapes.length)
    instructor = teacher_config({"name": "glm-10b", "model": ModelConfig(path="glm-10b")})
    spec = StageSpec(
        name="target",
        stage=StageConfig(
            kind="distill", student=ModelConfig(path="glm-2b"), teachers=(instructor,), match=(match,), steps=1
        ),
        data=DataSpec("text", data, TASKS.find("causal-lm"), unread(data)),
        trained={"student": student},
        teachers=(TeacherSpec(instructor, "stages.target.teachers[0]", teacher, "resident"),),
        seed=0,
        rows=tuple(rows),
    )
    step = Step(
        spec,
        sequences=shapes.sequences,
        length=shapes.length,
        micro_batches=1,
        tile=shapes.tile,
        on_gpu=device == "cuda",
        dtype=torch.bfloat16,
        checkpointing=False,
    )
    held = 12 * count_parameters(shapes.student, CAUSAL_LM) + 2 * count_parameters(shapes.teacher, CAUSAL_LM)
    return measure(step, device).total + held


def _operations(config: GLMConfig, parameters: int, tokens: int, length: int) -> float:
    """Of a forward pass: two per weight that multiplies (positions are looked up), and attention's two products."""
    looked_up = 2 * (config.max_position_embeddings + 1) * config.hidden_size
    attention = 4 * config.num_hidden_layers * config.hidden_size * length
    return float(tokens * (2 * (parameters - looked_up) + attention))


def _batch(shapes: Target) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, shapes.student.vocab_size, (shapes.sequences, shapes.length + 1), generator=generator)
    mask = torch.ones(shapes.sequences, shapes.length, dtype=torch.bool)
    return Batch(torch.arange(shapes.sequences), ids[:, :-1].contiguous(), mask, ids[:, 1:].contiguous())


def _gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    loss.backward()
    return [loss.detach(), *(x.grad for x in inputs if x.grad is not None)]


def _peak(function: Callable[[], Any], device: str) -> tuple[Any, float]:
    """(what it returns, bytes in use at its largest moment beyond those before it)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: float = torch.cuda.memory_allocated()
        made = function()
        torch.cuda.synchronize()
        return made, torch.cuda.max_memory_allocated() - before
    forget_peak()
    before = resident_mb()
    made = function()
    return made, (peak_mb() - before) * 1e6


def _seconds(function: Callable[[], Any], device: str, repeats: int, *, warm: bool = True) -> float:
    """Median of some calls, each waited for."""
    if warm:
        function()
    taken = []
    for _ in range(repeats):
        _wait(device)
        begun = time.perf_counter()
        function()
        _wait(device)
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[len(taken) // 2]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
