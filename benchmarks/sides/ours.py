"""mtkd's side: the modules that a stage of a run is built of, without the files around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

import mtkd
from mtkd.config import OptimizerConfig
from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.engine.torch_engine import TorchEngine
from mtkd.models.attention import TAP
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import compile_rows
from mtkd.objective.objective import Objective
from mtkd.objective.projection import make_projections
from mtkd.objective.settings import Wiring
from mtkd.pool import LiveTeacher, TeacherPool
from mtkd.weightings.constant import Uniform
from sides.setting import BATCH, BETA, LEARNING_RATE, LENGTH, STUDENT, TEACHER, VOCABULARY, bert, llama, token_ids

JSD = mtkd.Match(loss="jsd", options={"beta": BETA})
KL = mtkd.Match(loss="kl")
LABELS = mtkd.Match(loss="ce", target="labels")
CPU = torch.device("cpu")


def decoder(shape: dict[str, int], seed: int) -> TappedModel:
    return TappedModel(llama(shape, seed, TAP), "AutoModelForCausalLM", VOCABULARY)


def encoder(shape: dict[str, int], seed: int) -> TappedModel:
    return TappedModel(bert(shape, seed, TAP), "AutoModelForSequenceClassification", 8_000)


def student_and_teachers(num_teachers: int) -> tuple[TappedModel, list[TappedModel]]:
    """The setting's decoders; the same seeds as the peers' sides."""
    return decoder(STUDENT, 0), [decoder(TEACHER, 1 + k) for k in range(num_teachers)]


def text_batch(sequences: int = BATCH, length: int = LENGTH) -> Batch:
    """The setting's ids, or their first ones; every token but the first is a target."""
    ids = token_ids()[:sequences, :length]
    targets = torch.full_like(ids, NO_LABEL)
    targets[:, :-1] = ids[:, 1:]
    return Batch(torch.arange(sequences), ids, torch.ones_like(ids, dtype=torch.bool), targets)


def objective(
    student: nn.Module, teachers: dict[str, TappedModel], matches: Sequence[mtkd.Match], *, token_level: bool = True
) -> Objective:
    """Rows of equal teacher weights; `student` is a TappedModel or something that looks like one."""
    infos = {name: teacher.info for name, teacher in teachers.items()}
    where = "benchmark"
    rows = compile_rows(list(matches), student.info, infos, token_level=token_level, regression=False, where=where)
    projections = make_projections(rows, student.info, list(infos.values()), 0)
    return Objective(student, rows, Uniform(), projections, list(infos), Wiring("example", token_level))


def distil(
    student: TappedModel,
    teachers: Sequence[TappedModel],
    matches: Sequence[mtkd.Match],
    batch: Batch,
    *,
    watched: str = "loss",
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], float]:
    """A function that makes one optimizer step and returns the metric `watched`.

    Args: dtype: bfloat16 runs models under autocast.
    """
    named = {f"t{k}": teacher for k, teacher in enumerate(teachers)}
    whole = objective(student, named, matches, token_level=student.token_level)
    whole.dtype, batch = dtype, batch.to(device)
    residents = [LiveTeacher(name, model, device, dtype) for name, model in named.items()]
    pool = TeacherPool(residents, [whole.teacher_wants(k) for k in range(len(named))])
    config = OptimizerConfig(lr=LEARNING_RATE, warmup=0, schedule="constant", weight_decay=0)
    engine = TorchEngine(whole.train(), config, 1_000, device)
    made = 0

    def step() -> float:
        nonlocal made
        loss, metrics = engine.forward(batch, pool.forward(batch), position_counts([batch]))
        engine.backward(loss)
        engine.step(made)
        made += 1
        return float(metrics[watched])

    return step
