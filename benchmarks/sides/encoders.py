"""Two teachers of a classifier: mtkd with and without hidden-state matching, TextBrewer's MultiTeacherDistiller.

TextBrewer's multi-teacher distiller knows logits alone: cross entropy against the softmax of the teachers' mean logits.
Its step is its own training loop; a step's time is that between two batches it asks for.
"""

from __future__ import annotations

import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from types import ModuleType

import torch

from sides.setting import LEARNING_RATE, Result, bert, measured_steps, peak_mb, resident_mb

STUDENT = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
TEACHER = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
SEQUENCES, LONGEST = 32, 64


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, [32,64]: lengths from 8 to 64, the same on all sides."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 8_000, (SEQUENCES, LONGEST), generator=draw)
    lengths = torch.randint(8, LONGEST + 1, (SEQUENCES,), generator=draw)
    lengths[0] = LONGEST
    mask = torch.arange(LONGEST) < lengths[:, None]
    return ids.masked_fill(~mask, 0), mask


def mtkd(hidden: bool, repeats: int) -> Result:
    """Steps on the teachers' mean logits; with `hidden` also a projected MSE on both student layers per teacher."""
    import mtkd as library
    from mtkd.data.batch import Batch
    from sides import ours

    rows = [library.Match(loss="soft_ce", ensemble="logits")]
    if hidden:
        options = {"student_layer": "each", "teacher_layer": "uniform"}
        rows.append(library.Match(feature="hidden", loss="mse", **options))
    ids, mask = _batch()
    batch = Batch(torch.arange(SEQUENCES), ids, mask, torch.zeros(SEQUENCES, dtype=torch.long))
    student, teachers = ours.encoder(STUDENT, 0), [ours.encoder(TEACHER, 1 + k) for k in range(2)]
    loaded = resident_mb()
    step = ours.distil(student, teachers, rows, batch, watched="row/0:logits:soft_ce")
    return measured_steps(step, repeats, loaded)


def textbrewer(repeats: int) -> Result:
    """Steps of its own loop."""
    library = _import_textbrewer()
    ids, mask = _batch()
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    student, teachers = bert(STUDENT, 0), [bert(TEACHER, 1 + k) for k in range(2)]
    loaded = resident_mb()

    def adaptor(batch, outputs):
        return {"logits": outputs.logits}

    # a checkpoint is written after the last step only
    training = library.TrainingConfig(device="cpu", output_dir=tempfile.mkdtemp(), ckpt_steps=10**9)
    distilling = library.DistillationConfig(temperature=1, kd_loss_type="ce")
    distiller = library.MultiTeacherDistiller(training, distilling, teachers, student, adaptor, adaptor)
    distiller.tb_writer = _Losses()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True)
    times: list[float] = []

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(repeats + 2):  # the last step's end is not seen: the loop ends without asking again
            times.append(time.perf_counter())
            yield batch

    class Loader:
        def __iter__(self):
            return batches()

    with distiller:
        distiller.train(optimizer, Loader(), num_steps=repeats + 2, max_grad_norm=1.0)
    seconds = [b - a for a, b in pairwise(times[1:])]  # the first step warms up
    peak = peak_mb()
    return {
        "first_loss": distiller.tb_writer.losses[0],
        "seconds": statistics.median(seconds),
        "best": min(seconds),
        "peak_mb": peak,
        "step_mb": peak - loaded,
    }


class _Losses:
    """Takes the losses that the distiller would write to TensorBoard."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if name == "scalar/total_loss":
            self.losses.append(value)


def _import_textbrewer() -> ModuleType:
    """TextBrewer imports a TensorBoard writer at once and uses it only with a log_dir, which is not given here.

    An empty module stands for it during the import, the only shim that this version needs.
    """
    stand_in = ModuleType("tensorboardX")
    stand_in.SummaryWriter = None  # type: ignore[attr-defined]
    sys.modules["tensorboardX"] = stand_in
    try:
        return importlib.import_module("textbrewer")
    finally:
        del sys.modules["tensorboardX"]  # transformers looks for it, and would not understand what it finds
