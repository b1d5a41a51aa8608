"""Offloaded teachers give bit-equal values, hold one teacher's memory, and leave nothing behind."""

from __future__ import annotations

import copy
import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import CPU, causal_batch, causal_model, class_batch, classifier, make_objective
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mtkd.config import Named, OptimizerConfig
from mtkd.config.match import Match
from mtkd.data.batch import Batch, position_counts
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import DataError
from mtkd.models.features import Features
from mtkd.models.taps import TappedModel
from mtkd.pool import LiveTeacher, OffloadedModel, TeacherPool, offload
from mtkd.pool.waiting import MappedParameters, PinnedParameters

ALL = frozenset({"logits", "hidden.0", "hidden.2", "query.1", "probs.2"})


def mapped(model: TappedModel, folder: Path, name: str = "t") -> OffloadedModel:
    return offload(copy.deepcopy(model), CPU, folder / f".offload-{name}", Dist())


def pinned(model: TappedModel, folder: Path, name: str = "t") -> OffloadedModel:
    """What a GPU gets, with a CPU as the device: the copies are made, without pinning and streams."""
    model = copy.deepcopy(model)
    head = [p for p in model.output_head or () if p is not None]
    return OffloadedModel(model, PinnedParameters(list(model.parameters()), head, CPU))


Make = Callable[..., OffloadedModel]


def values(features: Features, dtype: torch.dtype, columns: Tensor | None) -> dict[str, Tensor]:
    """Everything as tensors; logits as the objective reads them: selected, cast, in two tiles."""
    found = {}
    for key, value in features.items():
        if not isinstance(value, Tensor):
            value = value if columns is None else value.select(columns)
            tiles = [value.in_dtype(dtype).rows(index) for index in (torch.arange(3), torch.arange(3, 8))]
            assert value.num_columns == tiles[0].shape[1]
            value = torch.cat(tiles)
        found[key] = value
    return found


@pytest.mark.parametrize("make", [mapped, pinned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["untied", "tied", "padded", "classes"])
def test_values_are_bit_equal(make: Make, dtype: torch.dtype, shape: str, tmp_path: Path) -> None:
    model = classifier(16, 2, 3, num_labels=3)
    batch: Batch = class_batch([5, 4, 6, 3, 2, 7, 3, 1])
    if shape != "classes":
        model = causal_model(16, 2, 3, tied=shape == "tied", padded=7 if shape == "padded" else 0)
        batch = causal_batch([5, 4, 6])
    resident = LiveTeacher("t", copy.deepcopy(model), CPU, dtype)
    offloaded = LiveTeacher("t", make(model, tmp_path), CPU, dtype)
    chosen = None if shape == "classes" else torch.tensor([3, 9, 12])
    for columns in (None, chosen):
        wanted = values(resident.forward(batch, ALL), dtype, columns)
        for _ in range(2):  # a second turn reads everything again
            found = values(offloaded.forward(batch, ALL), dtype, columns)
            assert wanted.keys() == found.keys()
            for key, value in wanted.items():
                assert torch.equal(value, found[key]), key
    offloaded.close()


def test_features_outlive_the_turns_of_others(tmp_path: Path) -> None:
    """Logits are read after every teacher has had its turn, and after the next micro-batch's."""
    batch, model = causal_batch([5, 4, 6]), causal_model(16, 2, 3).eval().requires_grad_(False)
    for make in (mapped, pinned):
        offloaded = make(model, tmp_path)
        features = offloaded(batch, ALL)
        later = offloaded(causal_batch([3], seed=5), ALL)
        wanted, found = (values(f, torch.float32, None) for f in (model(batch, ALL), features))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
        if make is pinned:  # one head on the device, however many micro-batches are held
            assert later["logits"].weight is features["logits"].weight  # type: ignore[union-attr]


@pytest.mark.parametrize("weighting", ["uniform", "mt_bert", "entropy"])
def test_training_is_bit_equal(weighting: str, tmp_path: Path) -> None:
    """A mixed pool, dense and logits rows, weightings that read the teachers' logits: the same student to the bit."""
    rows = [Match(), Match(feature="hidden", loss="mse", student_layer="last", teacher_layer="last")]
    ends = []
    for make in (None, mapped, pinned):
        teachers = [causal_model(16, 2, seed) for seed in (1, 2, 3)]
        objective, pool = make_objective(causal_model(8, 1, 0), teachers, rows, Named(name=weighting))
        if make is not None:
            first = pool.teachers[0]
            others = [LiveTeacher(f"t{k}", make(teachers[k], tmp_path, f"t{k}"), CPU, torch.float32) for k in (1, 2)]
            pool = TeacherPool([first, *others], pool.wants)
        engine = TorchEngine(objective, OptimizerConfig(lr=1e-2), 3, CPU)
        for step in range(3):
            parts = [causal_batch([5, 4, 6], seed=step), causal_batch([2], seed=9 + step)]
            counts = position_counts(parts)
            held = [pool.forward(part) for part in parts]
            for part, features in zip(parts, held, strict=True):
                loss, _ = engine.forward(part, features, counts)
                engine.backward(loss)
            engine.step(step)
        pool.close()
        ends.append([p.detach().clone() for p in objective.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No file while it runs, so that nobody can change it; no thread and no descriptor after close."""
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    batch = causal_batch([5])
    teachers = [LiveTeacher(n, mapped(causal_model(16, 2, 3), tmp_path, n), CPU, torch.float32) for n in ("a", "b")]
    assert list(tmp_path.iterdir()) == []
    pool = TeacherPool(teachers, [ALL, ALL])
    pool.forward(batch)
    assert threading.active_count() == threads + 1  # the second one was prefetched
    pool.close()
    pool.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == before


def test_prefetch_is_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next offloaded teacher is announced before the one ahead of it runs, unless that is switched off."""
    order: list[str] = []
    monkeypatch.setattr(LiveTeacher, "ahead", lambda self, batch: order.append(f"prefetch {self.name}"))
    forward = LiveTeacher.forward

    def noted(self: LiveTeacher, batch: Batch, wants: frozenset[str]) -> Features:
        order.append(self.name)
        return forward(self, batch, wants)

    monkeypatch.setattr(LiveTeacher, "forward", noted)
    teachers = [LiveTeacher(n, pinned(causal_model(16, 2, 3), tmp_path), CPU, torch.float32) for n in "ab"]
    TeacherPool(teachers, [ALL, ALL]).forward(causal_batch([5]))
    TeacherPool(teachers, [ALL, ALL], prefetch=False).forward(causal_batch([5]))
    assert order == ["prefetch b", "a", "b", "a", "b"]


def test_errors_of_the_reading_thread_reach_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offloaded = mapped(causal_model(16, 2, 3), tmp_path)

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "posix_fadvise", broken)
    offloaded.waiting.prefetch()
    with pytest.raises(OSError, match="the disk is gone"):
        offloaded(causal_batch([5]), ALL)
    offloaded.close()


def test_a_full_disk_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match="bytes free"):
        mapped(causal_model(16, 2, 3), tmp_path)
    assert list(tmp_path.iterdir()) == []


def _rank(folder: str) -> list[Tensor]:
    model = offload(causal_model(16, 2, 3), CPU, Path(folder) / "weights", Dist.current())
    found = values(model(causal_batch([5, 4, 6]), ALL), torch.float32, None)
    return [found[key] for key in sorted(found)]


def _failing_rank(folder: str) -> str:
    # only the main rank writes; the other one must hear of it
    try:
        offload(causal_model(16, 2, 3), CPU, Path(folder) / "file" / "weights", Dist.current())
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_share_one_file(tmp_path: Path) -> None:
    model = causal_model(16, 2, 3).eval().requires_grad_(False)
    wanted = values(model(causal_batch([5, 4, 6]), ALL), torch.float32, None)
    for found in run_distributed(_rank, 2, str(tmp_path)):
        assert all(torch.equal(wanted[key], value) for key, value in zip(sorted(wanted), found, strict=True))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    assert all("cannot be put on disk" in text for text in run_distributed(_failing_rank, 2, str(tmp_path)))


class _TwoRanks:
    """A rank of two threads: what the main one broadcasts reaches the other."""

    barrier, box = threading.Barrier(2), [None]

    def __init__(self, rank: int) -> None:
        self.is_main = rank == 0

    def broadcast_object(self, value: Any) -> Any:
        if self.is_main:
            self.box[0] = value
        self.barrier.wait(600)
        found = self.box[0]
        self.barrier.wait(600)
        return found

    def all_ok(self, ok: bool) -> bool:
        self.barrier.wait(600)
        return ok


def test_the_file_is_laid_out_by_the_rank_that_writes_it(tmp_path: Path) -> None:
    """The same weights may be aligned otherwise in another process."""
    wanted = [torch.arange(20.0) + 100 * i for i in range(2)]
    found: dict[int, list[torch.nn.Parameter]] = {}

    def go(rank: int) -> None:
        room = [torch.zeros(64)[4 * rank : 4 * rank + 20].copy_(values) for values in wanted]
        found[rank] = [torch.nn.Parameter(values, requires_grad=False) for values in room]
        MappedParameters(found[rank], tmp_path / "file", cast(Dist, _TwoRanks(rank)))

    threads = [threading.Thread(target=go, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in (0, 1):
        for values, parameter in zip(wanted, found[rank], strict=True):
            assert torch.equal(parameter.data, values), rank


@pytest.mark.parametrize("make", [mapped, pinned])
def test_whatever_reads_the_weights_at_build_takes_a_turn(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first packed rows and the embedding table would leave every teacher's pages in memory otherwise."""
    model = causal_model(16, 2, 3)
    offloaded = make(model, tmp_path)
    turns: list[str] = []
    for name in ("arrive", "leave"):
        was = getattr(offloaded.waiting, name)

        def noted(name: str = name, was: Callable[[], None] = was) -> None:
            turns.append(name)
            was()

        monkeypatch.setattr(offloaded.waiting, name, noted)
    offloaded.enable_packing("stages.s.batch.packing")
    table = offloaded.embedding_table
    assert turns == ["arrive", "leave"] * 2
    assert offloaded.model.packing
    offloaded.close()
    assert torch.equal(table, model.embedding_table)  # a copy: it outlives the file


_M_ARENA_MAX, _M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -8, -1, -3  # of mallopt


def resident_set(*names: str) -> int:
    """Lines of the kernel's about this process, bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in names) * 1024


def measured(backend: str, folder: str) -> dict[str, int]:
    """Bytes of one teacher's weights, and what four teachers add to this process."""
    # glibc keeps freed blocks for itself, how many and how large depends on what came before; musl has no mallopt.
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, 65_536), (_M_TRIM_THRESHOLD, 131_072)):
            allocator.mallopt(option, value)
    ids = 8_000
    config = LlamaConfig(
        vocab_size=ids,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        pad_token_id=0,
        attn_implementation="mtkd_tap",
    )

    def teacher(k: int) -> LiveTeacher:
        torch.manual_seed(k)
        model = TappedModel(LlamaForCausalLM(config), "AutoModelForCausalLM", ids)
        held = offload(model, CPU, Path(folder) / str(k), Dist()) if backend == "offload" else model
        return LiveTeacher(str(k), held, CPU, torch.float32)

    tokens = torch.randint(1, ids, (1, 16), generator=torch.Generator().manual_seed(0))
    batch = Batch(torch.arange(1), tokens, torch.ones_like(tokens).bool(), torch.full_like(tokens, -100))
    logits = frozenset({"logits"})
    one = teacher(9)  # what the libraries load at the first pass is not the teachers'
    one.forward(batch, logits)["logits"].rows(torch.arange(16))  # type: ignore[union-attr]
    size = one.num_parameters * 4
    one.close()
    del one
    before = resident_set("RssAnon", "RssFile")
    pool = TeacherPool([teacher(k) for k in range(4)], [logits] * 4)
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts again: loading does not count
    for _ in range(3):
        for features in pool.forward(batch):
            features["logits"].rows(torch.arange(16))  # type: ignore[union-attr]
    growth = resident_set("RssAnon", "RssFile") - before
    return {"size": size, "growth": growth, "peak": resident_set("VmHWM") - before}


@pytest.mark.slow
def test_memory_is_one_teachers_not_four(tmp_path: Path) -> None:
    """The resident set (anonymous and file pages) that four teachers add: after their turns, and at its largest."""
    ((offloaded,), (resident,)) = (run_distributed(measured, 1, b, str(tmp_path)) for b in ("offload", "resident"))
    size = offloaded["size"]
    assert size > 50e6
    assert resident["growth"] > 2.5 * size  # the measure sees what offloading saves
    assert offloaded["growth"] < 0.5 * size
    assert 0.5 * size < offloaded["peak"] < 1.5 * size
