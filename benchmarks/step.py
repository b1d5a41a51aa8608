"""One language-model distillation step: mtkd against trl's GKDTrainer(lmbda=0), on the same ids and models.

    python benchmarks/step.py                 # both sides alternating, with and without THP_MEM_ALLOC_ENABLE=1
    python benchmarks/step.py --side mtkd     # one side in this process, for profiling

A step is forward of teacher and student, JSD (beta 0.5), backward, gradient clipping and AdamW. Student Llama 2x256,
teacher Llama 4x512, V = 32,000, 4 x 256 tokens, float32. Each measurement is a process of its own; sides alternate;
peak memory is the process's largest resident set, "step memory" what it grew by after both models were loaded.
Needs `pip install trl` (or the extra `benchmark`).

Floor of the loss: 1,020 positions x 32,000 columns. Operations: student head 3 products x 2 x 1,020 x 32,000 x 256
= 50 GFLOP, teacher head 2 x 1,020 x 32,000 x 512 = 33 GFLOP. Bytes: student and teacher head are read once per tile of
128 positions, 8 x (3 x 33 + 66) MB = 1.3 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

VOCABULARY, BATCH, LENGTH = 32_000, 4, 256
STUDENT = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
TEACHER = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
LEARNING_RATE = 1e-4


def llama(shape: dict[str, int], seed: int):
    """A seeded Llama with untied head, the same on both sides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    return LlamaForCausalLM(config)


def token_ids():
    """The batch, [BATCH, LENGTH]; no padding."""
    import torch

    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def mtkd_step() -> Callable[[], float]:
    """A function that makes one step and returns its loss."""
    import torch

    import mtkd
    from mtkd.config import OptimizerConfig
    from mtkd.data.batch import Batch, position_counts
    from mtkd.engine.torch_engine import TorchEngine
    from mtkd.features import NO_LABEL
    from mtkd.models.taps import TappedModel
    from mtkd.objective import Objective
    from mtkd.pool import ResidentTeacher, TeacherPool
    from mtkd.rows import compile_rows
    from mtkd.weightings.simple import Uniform

    student = TappedModel(llama(STUDENT, 0), "AutoModelForCausalLM", VOCABULARY)
    teacher = TappedModel(llama(TEACHER, 1), "AutoModelForCausalLM", VOCABULARY)
    rows = compile_rows(
        [mtkd.Match(loss="jsd", options={"beta": 0.5})],
        student.info,
        {"teacher": teacher.info},
        token_level=True,
        regression=False,
        where="benchmark",
    )
    objective = Objective(student, rows, Uniform(), torch.nn.ModuleDict(), ["teacher"], token_level=True)
    pool = TeacherPool(
        [ResidentTeacher("teacher", teacher, torch.device("cpu"), torch.float32)], [objective.teacher_wants(0)]
    )
    config = OptimizerConfig(lr=LEARNING_RATE, warmup=0, schedule="constant", weight_decay=0)
    engine = TorchEngine(objective.train(), config, 1_000, torch.device("cpu"))
    ids = token_ids()
    targets = torch.full_like(ids, NO_LABEL)
    targets[:, :-1] = ids[:, 1:]
    batch = Batch(torch.arange(BATCH), ids, torch.ones_like(ids, dtype=torch.bool), targets)
    made = 0

    def step() -> float:
        nonlocal made
        loss, _ = engine.forward(batch, pool.forward(batch), position_counts([batch]))
        engine.backward(loss)
        engine.step(made)
        made += 1
        return float(loss.detach())

    return step


def trl_step() -> Callable[[], float]:
    """The same step by trl's trainer: its own `training_step`, clipping and AdamW."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    vocabulary = {f"t{i}": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    dialogue = [{"role": "user", "content": "t5"}, {"role": "assistant", "content": "t6"}]
    arguments = GKDConfig(
        output_dir=tempfile.mkdtemp(),
        lmbda=0.0,
        beta=0.5,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=BATCH,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        max_length=LENGTH,
    )
    trainer = GKDTrainer(
        model=llama(STUDENT, 0),
        teacher_model=llama(TEACHER, 1),
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": dialogue}] * BATCH),
        processing_class=tokenizer,
    )
    model = trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train()`, which is not called here
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=0, fused=True
    )  # the trainer's default
    ids = token_ids()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "prompts": ids[:, :1]}
    inputs["prompt_attention_mask"] = torch.ones_like(inputs["prompts"])

    def step() -> float:
        loss = trainer.training_step(model, dict(inputs))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


SIDES = {"mtkd": mtkd_step, "trl": trl_step}


def measure(side: str, steps: int) -> dict[str, float]:
    """First loss, median and best seconds per step, peak memory and its growth over the steps (MB of 1e6 bytes)."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    step = SIDES[side]()
    loaded = resident_mb()
    first, seconds = step(), []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {
        "first_loss": first,
        "seconds": statistics.median(seconds),
        "best": min(seconds),
        "peak_mb": peak,
        "step_mb": peak - loaded,
    }


def resident_mb() -> float:
    """Resident set of this process now, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def compare(rounds: int, steps: int) -> None:
    """Alternate the sides, print every measurement and the ratios of the best ones."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for round_ in range(rounds):
        for pages in ("0", "1"):
            for side in SIDES:
                environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": pages}
                command = [sys.executable, __file__, "--side", side, "--steps", str(steps)]
                output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                if output.returncode:
                    sys.exit(output.stderr)
                result = json.loads(output.stdout.splitlines()[-1])
                found.setdefault((side, pages), []).append(result)
                print(f"round {round_} THP={pages} {side:5s}", {k: round(v, 6) for k, v in result.items()}, flush=True)
    print(
        f"\n{'':12s}{'s/step (median, min..max over rounds)':>44s}{'peak MB':>10s}{'step MB':>10s}{'first loss':>12s}"
    )
    for (side, pages), results in found.items():
        times = sorted(r["seconds"] for r in results)
        spread = f"{statistics.median(times):.3f} ({times[0]:.3f}..{times[-1]:.3f})"
        peak, grown = min(r["peak_mb"] for r in results), min(r["step_mb"] for r in results)
        print(f"{side:5s} THP={pages} {spread:>44s}{peak:10.0f}{grown:10.0f}{results[0]['first_loss']:12.6f}")
    best = {
        side: {
            key: min(r[key] for (s, _), results in found.items() if s == side for r in results)
            for key in ("seconds", "peak_mb", "step_mb")
        }
        for side in SIDES
    }
    ratios = {key: best["mtkd"][key] / best["trl"][key] for key in best["mtkd"]}
    losses = [found[side, "0"][0]["first_loss"] for side in SIDES]
    print(f"\nbest against best, mtkd / trl: {', '.join(f'{k} {v:.2f}' for k, v in ratios.items())}")
    print(f"first loss differs by {abs(losses[0] - losses[1]) / losses[1]:.1e} relative")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.steps)))
    else:
        compare(arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
