"""Numbers on the device of `--device` (a CPU by default) against float64, dense products and a CPU's own steps.

`launch/gpu-check` runs this file on a GPU. What is compared takes another way on either side, so it can differ on a CPU
too.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from models.model_bank import ARCHITECTURES, LM_OF, batch, tapped
from tiny import CPU, causal_batch, causal_model, make_objective
from torch import Tensor

from mtkd.config import OptimizerConfig
from mtkd.config.match import Match
from mtkd.data.batch import Batch, position_counts
from mtkd.engine.dist import Dist
from mtkd.engine.torch_engine import TorchEngine
from mtkd.losses.spec import LOSSES
from mtkd.models.attention import use_attention
from mtkd.models.features import HeadLogits
from mtkd.objective.tiles import tiled
from mtkd.pool import LiveTeacher, Teacher, TeacherPool, offload

POSITIONS, COLUMNS, WIDTH, TILE = 70, 1_000, 64, 16
# A loss over the examples of a batch has another value in every tile: tests/losses/test_relations.py has those.
ON_LOGITS = sorted(
    name for name, spec in LOSSES.items() if "logits" in spec.inputs and not spec.labels and "batch" not in spec.needs
)
EXACT = {"float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 2e-2)}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    chosen = torch.device(request.config.getoption("--device"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    use_attention("auto", chosen.type)
    return chosen


def far(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found.double().cpu() - wanted.cpu()).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("precision", EXACT)
@pytest.mark.parametrize("name", ON_LOGITS)
def test_tiles_are_dense_float64(name: str, precision: str, device: torch.device) -> None:
    """A loss over tiles, its gradients included, against the same formula over whole logits in float64 on a CPU."""
    dtype, tolerance = EXACT[precision]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator) for n in (POSITIONS, COLUMNS))
    theirs = torch.randn(POSITIONS, COLUMNS, generator=generator) * 3
    weight = weight / WIDTH**0.5
    spec = LOSSES[name]
    # rounded to the products' type on both sides: what is left is the arithmetic
    inputs = [x.to(dtype).double().requires_grad_() for x in (hidden, weight)]
    wanted = spec(inputs[0] @ inputs[1].t(), theirs.double(), None, {}).sum()
    wanted.backward()
    ours = [x.detach().float().to(device).requires_grad_() for x in inputs]
    teacher = theirs.to(device)

    def tile_loss(logits: Tensor, weights: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        return spec(logits, teacher[positions], None, {}).sum(), logits.new_zeros(1)

    head = HeadLogits(ours[0], ours[1], None, COLUMNS)
    index, weights = torch.arange(POSITIONS, device=device), torch.ones(1, POSITIONS, device=device)
    found, _ = tiled(head, index, weights, tile_loss, tile=TILE, dtype=dtype)
    found.backward()
    assert far(found.detach(), wanted.detach()) < tolerance
    for mine, reference in zip(ours, inputs, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        assert far(mine.grad, reference.grad) < tolerance


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_taps_are_float64(architecture: str, device: torch.device) -> None:
    """Features of the model on the device against those of the same weights in float64 on a CPU."""
    model = tapped(architecture, LM_OF[architecture])
    wants, rows = frozenset({"logits", "hidden.2", "query.1", "probs.3"}), batch()
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(rows, wants)
        found = model.to(device)(rows.to(device), wants)
    model.verify()
    index = rows.token_mask.reshape(-1).nonzero().squeeze(-1)
    for key in wants:
        mine, theirs = found[key], wanted[key]
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
            keep = rows.token_mask if mine.dim() == 3 else rows.token_mask[:, None, :].expand(mine.shape[:3])
            assert far(mine.cpu()[keep], theirs[keep]) < 1e-4, key
        else:
            assert not isinstance(mine, Tensor)
            assert not isinstance(theirs, Tensor)
            # HeadLogits hands out float32
            assert far(mine.rows(index.to(device)), theirs.rows(index).double()) < 1e-4, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_teacher_is_the_resident_one(dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """Two of them, each brought while the other runs; bit-equal, whatever stream copied the weights."""
    rows, wants = causal_batch([5, 4, 6]).to(device), frozenset({"logits", "hidden.1"})
    models = [causal_model(32, 2, seed) for seed in (1, 2)]
    resident: list[Teacher] = [LiveTeacher("r", copy.deepcopy(m), device, dtype) for m in models]
    waiting: list[Teacher] = [
        LiveTeacher("w", offload(m, device, tmp_path / f"{k}", Dist()), device, dtype) for k, m in enumerate(models)
    ]
    pools = [TeacherPool(teachers, [wants] * 2) for teachers in (resident, waiting)]
    index = torch.arange(9, device=device)
    for _ in range(3):
        for one, other in zip(*(pool.forward(rows) for pool in pools), strict=True):
            logits = [x["logits"].in_dtype(dtype).rows(index) for x in (one, other)]  # type: ignore[union-attr]
            assert torch.equal(*logits)
            assert torch.equal(one["hidden.1"], other["hidden.1"])  # type: ignore[arg-type]
    for pool in pools:
        pool.close()


@pytest.mark.parametrize("precision", EXACT)
@pytest.mark.parametrize("weighting", ["uniform", "entropy", "learned"])
def test_steps_are_those_of_a_cpu(weighting: str, precision: str, device: torch.device) -> None:
    """Three optimizer steps, recomputing layers, in tiles of 5, against plain float32 ones in one tile on a CPU."""
    dtype, _ = EXACT[precision]
    rows = [Match(), Match(feature="hidden", loss="mse", student_layer="last", teacher_layer="last")]

    def losses(where: torch.device, tile: int, checkpointing: bool, dtype: torch.dtype) -> Tensor:
        student, teachers = causal_model(16, 2, 0), [causal_model(16, 2, seed) for seed in (1, 2)]
        if checkpointing:
            student.enable_activation_checkpointing()
        objective, _ = make_objective(student, teachers, rows, weighting, tile=tile)
        objective.dtype = dtype
        held: list[Teacher] = [LiveTeacher(f"t{k}", t, where, dtype) for k, t in enumerate(teachers)]
        pool = TeacherPool(held, [objective.teacher_wants(k) for k in range(2)])
        engine = TorchEngine(objective.train(), OptimizerConfig(lr=1e-2, warmup=0), 3, where)
        found = []
        for step in range(3):
            part: Batch = causal_batch([5, 9, 6], seed=step).to(where)
            counts = {**position_counts([part]), **objective.step_counts(part)}
            loss, _ = engine.forward(part, pool.forward(part), counts)
            engine.backward(loss)
            engine.step(step)
            found.append(float(loss.detach()))
        return torch.tensor(found, dtype=torch.float64)

    found = losses(device, 5, True, dtype)
    assert far(found, losses(CPU, 64, False, torch.float32)) < (1e-4 if dtype == torch.float32 else 5e-2)
