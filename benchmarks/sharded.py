"""Three sharded teachers of 300 MB and a student on two processes: what each process holds, and what a step takes.

    python benchmarks/sharded.py                  # everything, about ten minutes; --rounds 1 for a look

Setting: CPU, gloo, 2 processes of one thread; student Llama 4x256 under ZeRO 2, teachers Llama 8x768 (float32, untied,
random weights in safetensors shards), V = 8,000, 4 x 64 tokens per process; forward KL to the uniform mixture. Every
measurement is a fresh pair of processes; the figure is the larger one of the two. glibc gives freed blocks of 1 MiB and
more back at once in all of them (MALLOC_MMAP_THRESHOLD_), as it does wherever a teacher is sharded on a CPU.

Memory is the resident set (VmHWM of /proc/self/status: anonymous, file and shared pages), from the start of the process
to the end of the third step: loading and Adam's moments are in it. The law:

    peak  <  (student + sum of the teachers / 2 + largest layer) x 1.2

"student" is the peak of the same process with the same student and no teachers (K = 0: labels alone). Because that has
the libraries in it, the same is printed for what the teachers add:  peak - student  <  (sum / 2 + largest layer) x 1.2.

Loading is measured by itself: one teacher, the largest resident set while it is loaded less what was there before (a
tiny one was loaded first, which imports everything), for mtkd and for the way of DeepSpeed's documentation: first
`zero.Init`, then `GatheredParameters` for each weight, read on rank 0 and broadcast. (transformers' own way,
`from_pretrained` under `HfDeepSpeedConfig`, needs accelerate, which mtkd does not.)
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

VOCABULARY, LENGTH, SEQUENCES, STEPS, TEACHERS = 8_000, 64, 4, 3, 3
STUDENT = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512}
TEACHER = {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 2_304}
MB = 1e6


def status_mb(*names: str) -> float:
    """Fields of /proc/self/status added up, MB of 1e6 bytes."""
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file)
    return sum(int(found[name].split()[0]) for name in names) * 1024 / MB


def llama(shape: dict, seed: int):
    """A fresh model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    more = {"num_attention_heads": 8, "max_position_embeddings": LENGTH, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=False, **shape, **more))


def write_teachers(folder: str) -> tuple[float, float]:
    """Their folders; MB of one of them, and of its largest layer (a decoder layer, the embedding or the head)."""
    for k in range(TEACHERS):
        model = llama(TEACHER, k + 1)
        model.save_pretrained(Path(folder) / str(k), max_shard_size="100MB")
    llama({**TEACHER, "hidden_size": 16, "num_hidden_layers": 1}, 0).save_pretrained(Path(folder) / "tiny")
    layers = [*model.model.layers, model.lm_head, model.model.embed_tokens]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return sum(p.numel() for p in model.parameters()) * 4 / MB, max(sizes) * 4 / MB


def empty_teacher(folder: Path):
    """The model of a folder in our taps, its parameters on the meta device."""
    from mtkd.config import ModelConfig
    from mtkd.models.load import build_model
    from mtkd.models.request import ModelRequest
    from mtkd.models.taps import TappedModel

    auto_class = "AutoModelForCausalLM"
    request = ModelRequest(auto_class, VOCABULARY, max_positions=LENGTH, tokenizer=None)
    model = build_model(ModelConfig(path=str(folder)), request, empty=True)
    return TappedModel(model, auto_class, VOCABULARY)


def sharded_teacher(folder: Path, dist):
    """As the backend loads it."""
    import torch

    from mtkd.config import teacher_config
    from mtkd.pool import shard

    config = teacher_config({"name": folder.name, "model": str(folder), "backend": "sharded"})
    return shard(empty_teacher(folder), folder, config, torch.device("cpu"), torch.float32, dist, "benchmark")


def gathered(folder: Path, dist):
    """The way of DeepSpeed's documentation: parameters partitioned as they are made, filled one by one by rank 0."""
    import deepspeed
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from mtkd.config import ShardedConfig
    from mtkd.models.weights import find_weights
    from mtkd.pool.partition import engine_settings

    settings = engine_settings(ShardedConfig(), folder.name, 0)
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    stored = find_weights(empty_teacher(folder).model, folder)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.is_main:
                with safe_open(stored[name].file, "pt") as file:
                    parameter.data.copy_(file.get_tensor(stored[name].name))
    return model


def parts_alone(folder: Path, dist):
    """As the backend loads it, without its engine and the pass that verifies it."""
    import torch

    from mtkd.config import ShardedConfig
    from mtkd.models.weights import find_weights
    from mtkd.pool.partition import engine_settings, partition

    model = empty_teacher(folder).model
    settings, how = engine_settings(ShardedConfig(), folder.name, 0), {"half": False, "where": "benchmark"}
    partition(model, find_weights(model, folder), settings, device=torch.device("cpu"), dist=dist, **how)
    return model


WAYS = {"mtkd, parts": parts_alone, "GatheredParameters": gathered, "mtkd, with engine and check": sharded_teacher}


def load(way: str, folder: str) -> dict[str, float]:
    """MB that loading one teacher takes at most, MB that stay, and seconds; on this rank."""
    warnings.filterwarnings("ignore")
    from mtkd.engine.deepspeed_engine import init_distributed

    dist = init_distributed("cpu")
    tiny = WAYS[way](Path(folder) / "tiny", dist)
    before = status_mb("RssAnon", "RssFile", "RssShmem")
    Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts at 0
    begun = time.perf_counter()
    model = WAYS[way](Path(folder) / "0", dist)
    dist.barrier()
    seconds = time.perf_counter() - begun
    held = status_mb("RssAnon", "RssFile", "RssShmem") - before
    assert all(p.ds_numel for p in (*model.parameters(), *tiny.parameters()))
    return {"peak": status_mb("VmHWM") - before, "held": held, "seconds": seconds}


def train(backend: str, count: int, folder: str) -> dict[str, float]:
    """Three steps of the student on this rank: its peak in MB, seconds per step, the first loss."""
    warnings.filterwarnings("ignore")
    import torch

    import mtkd
    from mtkd.config import OptimizerConfig
    from mtkd.data.batch import NO_LABEL, Batch
    from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
    from mtkd.models.taps import TappedModel
    from mtkd.objective.compile import compile_rows
    from mtkd.objective.objective import Objective
    from mtkd.objective.settings import Wiring
    from mtkd.pool import LiveTeacher, TeacherPool
    from mtkd.running.train import global_counts
    from mtkd.weightings.constant import Uniform

    dist, device = init_distributed("cpu"), torch.device("cpu")
    tapped = partial(TappedModel, auto_class="AutoModelForCausalLM", num_ids=VOCABULARY)
    models = []
    for k in range(count):
        place = Path(folder) / str(k)
        if backend == "sharded":
            models.append(sharded_teacher(place, dist))
        else:
            from transformers import LlamaForCausalLM

            models.append(tapped(LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)))
    student = tapped(llama(STUDENT, 0))
    names = [str(k) for k in range(count)]
    match = mtkd.Match(loss="kl") if count else mtkd.Match(loss="ce", target="labels")
    infos = {name: model.info for name, model in zip(names, models, strict=True)}
    rows = compile_rows([match], student.info, infos, token_level=True, regression=False, where="benchmark")
    objective = Objective(student, rows, Uniform(), torch.nn.ModuleDict(), names, Wiring("example", True))
    teachers = [LiveTeacher(name, model, device, torch.float32) for name, model in zip(names, models, strict=True)]
    pool = TeacherPool(teachers, [objective.teacher_wants(k) for k in range(count)])
    config = OptimizerConfig(lr=1e-4, warmup=0, schedule="constant", weight_decay=0)
    engine = DeepSpeedEngine(objective.train(), config, 1_000, device, zero_stage=2, accumulate=1, dist=dist)
    ids = torch.randint(1, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(dist.rank))
    targets = torch.full_like(ids, NO_LABEL)
    targets[:, :-1] = ids[:, 1:]
    batch = Batch(torch.arange(SEQUENCES), ids, torch.ones_like(ids, dtype=torch.bool), targets)
    losses, seconds = [], []
    for step in range(STEPS):
        begun = time.perf_counter()
        counts, _ = global_counts([batch], dist)
        loss, _ = engine.forward(batch, pool.forward(batch), counts)
        engine.backward(loss)
        engine.step(step)
        losses += dist.sum([float(loss.detach())])
        del loss
        seconds.append(time.perf_counter() - begun)
    return {"peak": status_mb("VmHWM"), "seconds": statistics.median(seconds[1:]), "first_loss": losses[0]}


def measured(function, *arguments: object, rounds: int) -> dict[str, float]:
    """The larger one of the ranks' figures; of the rounds the least."""
    from mtkd.engine.testing import run_distributed

    found = []
    for _ in range(rounds):
        ranks = run_distributed(function, 2, *arguments, timeout=600)
        found.append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    return {key: min(one[key] for one in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # What a process with sharded teachers does by itself; here for all, so that they compare.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        one, layer = write_teachers(folder)
        print(f"one teacher {one:.0f} MB, largest layer {layer:.0f} MB")
        print("\n| loading one teacher | peak, MB | held, MB | s |\n| --- | --- | --- | --- |")
        for way in WAYS:
            found = measured(load, way, folder, rounds=rounds)
            print(f"| {way} | {found['peak']:.0f} | {found['held']:.0f} | {found['seconds']:.2f} |", flush=True)
        print("\n| teachers | peak, MB | s per step | first loss |\n| --- | --- | --- | --- |")
        arms = {"none": ("sharded", 0), "3 sharded": ("sharded", TEACHERS), "3 resident": ("resident", TEACHERS)}
        results = {}
        for name, (backend, count) in arms.items():
            found = results[name] = measured(train, backend, count, folder, rounds=rounds)
            cells = f"{found['peak']:.0f} | {found['seconds']:.2f} | {found['first_loss']:.6f}"
            print(f"| {name} | {cells} |", flush=True)
    student, peak = results["none"]["peak"], results["3 sharded"]["peak"]
    share = TEACHERS * one / 2 + layer
    for what, value, bound in (
        ("peak", peak, 1.2 * (student + share)),
        ("peak less the student's", peak - student, 1.2 * share),
    ):
        print(f"{what}: {value:.0f} MB, bound {bound:.0f} MB: {'met' if value < bound else 'MISSED'}")


if __name__ == "__main__":
    main()
