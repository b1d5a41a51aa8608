"""K teachers in one distillation step: resident against offloaded, bf16 and the kernels of attention.

    python benchmarks/teachers.py                           # K = 1..4, both backends, alternating
    python benchmarks/teachers.py --arms resident,resident-bf16,resident-math --teachers 1
    python benchmarks/teachers.py --one offload --teachers 4        # one arm in this process, for profiling

The setting is that of step.py: student Llama 2x256, teachers Llama 4x512, V = 32,000, 4 x 256 tokens; forward KL to the
uniform mixture. Each measurement is a process of its own and loads its teachers from files; arms alternate; time is
the least of the medians. An arm is BACKEND[-bf16][-compile][-math|-flash].

Memory is the resident set (anonymous and file pages). "held" is what holding the teachers between steps takes, "peak"
the largest resident set of the steps after the first one (Adam's moments exist by then), both less those of a process
without teachers (K = 0: labels alone; libraries, student and optimizer), in units of one teacher: 198 MB, of which
output head and input embedding are 66 MB each. The peak has activations and tiles in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from sides.setting import BATCH, STUDENT, TEACHER, VOCABULARY, llama, token_ids


def resident_mb(*names: str) -> float:
    """Fields of /proc/self/status added up, MB of 1e6 bytes."""
    with open("/proc/self/status") as file:
        found = dict(line.split(":", 1) for line in file)
    return sum(int(found[name].split()[0]) for name in names) * 1024 / 1e6


def make_teachers(count: int, backend: str, folder: Path, dtype):
    """The pool's teachers, loaded one after the other."""
    import torch
    from transformers import LlamaForCausalLM

    from mtkd.engine.dist import Dist
    from mtkd.models import attention  # noqa: F401  registers the tap
    from mtkd.models.taps import TappedModel
    from mtkd.pool import LiveTeacher, offload

    device, teachers = torch.device("cpu"), []
    for k in range(count):
        loaded = LlamaForCausalLM.from_pretrained(folder / str(k), attn_implementation="mtkd_tap", dtype=torch.float32)
        model = TappedModel(loaded, "AutoModelForCausalLM", VOCABULARY)
        if backend == "offload":
            held = offload(model, device, folder / f"offload-{os.getpid()}", Dist())
            teachers.append(LiveTeacher(str(k), held, device, dtype))
        else:
            teachers.append(LiveTeacher(str(k), model, device, dtype))
    return teachers


def measure(arm: str, count: int, steps: int, folder: Path) -> dict[str, float]:
    """First loss, seconds per step (median), its CPU seconds (least), MB held between steps, peak MB."""
    warnings.filterwarnings("ignore")
    import torch

    import mtkd
    from mtkd.config import OptimizerConfig
    from mtkd.data.batch import NO_LABEL, Batch, position_counts
    from mtkd.engine.torch_engine import TorchEngine
    from mtkd.models.attention import use_attention
    from mtkd.models.taps import TappedModel
    from mtkd.objective.compile import compile_rows
    from mtkd.objective.objective import Objective
    from mtkd.objective.settings import Wiring
    from mtkd.pool import TeacherPool
    from mtkd.weightings.constant import Uniform

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    backend, *options = arm.split("-")
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    use_attention(next((o for o in options if o in ("math", "flash")), "auto"), "cpu")
    student = llama(STUDENT, 0)
    student.config._attn_implementation = "mtkd_tap"
    student = TappedModel(student, "AutoModelForCausalLM", VOCABULARY)
    teachers = make_teachers(count, backend, folder, dtype)
    if "compile" in options:
        for model in (student, *(t._model for t in teachers)):
            model.compile_model()
    names = [t.name for t in teachers]
    match = mtkd.Match(loss="kl") if count else mtkd.Match(loss="ce", target="labels")
    infos = {t.name: t._model.info for t in teachers}
    rows = compile_rows([match], student.info, infos, token_level=True, regression=False, where="benchmark")
    objective = Objective(student, rows, Uniform(), torch.nn.ModuleDict(), names, Wiring("example", True, dtype=dtype))
    pool = TeacherPool(teachers, [objective.teacher_wants(k) for k in range(count)])
    config = OptimizerConfig(lr=1e-4, warmup=0, schedule="constant", weight_decay=0)
    engine = TorchEngine(objective.train(), config, 1_000, torch.device("cpu"))
    ids = token_ids()
    targets = torch.full_like(ids, NO_LABEL)
    targets[:, :-1] = ids[:, 1:]
    batch = Batch(torch.arange(BATCH), ids, torch.ones_like(ids, dtype=torch.bool), targets)
    losses, seconds, work = [], [], []
    for step in range(steps + 1):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the largest resident set starts at 0
        begun, busy = time.perf_counter(), time.process_time()
        loss, _ = engine.forward(batch, pool.forward(batch), position_counts([batch]))
        engine.backward(loss)
        engine.step(step)
        losses.append(float(loss.detach()))
        del loss
        seconds.append(time.perf_counter() - begun)
        work.append(time.process_time() - busy)
    return {
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "seconds": statistics.median(seconds[1:]),
        "cpu_seconds": min(work[1:]),
        "held_mb": resident_mb("RssAnon", "RssFile"),
        "peak_mb": resident_mb("VmHWM"),
    }


def compare(arms: list[str], counts: list[int], rounds: int, steps: int) -> None:
    """Alternate the arms for every K, print a table."""
    import torch

    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        for k in range(max(counts)):
            llama(TEACHER, k + 1).save_pretrained(folder / str(k))
        torch.manual_seed(0)
        found: dict[tuple[str, int], list[dict[str, float]]] = {}
        plain = [(arm, 0) for arm in dict.fromkeys(arm.replace("offload", "resident") for arm in arms)]
        for _ in range(rounds):
            for arm, count in [*plain, *((arm, k) for k in counts for arm in arms)]:
                command = [sys.executable, __file__, "--one", arm, "--teachers", str(count), "--folder", name]
                done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(done.stderr)
                result = json.loads(done.stdout.splitlines()[-1])
                found.setdefault((arm, count), []).append(result)
                print(f"{arm:24s}{count:3d}", {k: round(v, 6) for k, v in result.items()}, flush=True)
        one = sum(p.numel() for p in llama(TEACHER, 1).parameters()) * 4 / 1e6
    print(f"one teacher: {one:.0f} MB")
    print(f"{'arm':24s}{'K':>3s}{'s/step (min..max)':>24s}{'CPU s':>8s}{'held':>8s}{'peak':>8s}  first loss")
    for (arm, count), results in sorted(found.items(), key=lambda item: (item[0][1], item[0][0])):
        times = [r["seconds"] for r in results]
        bare = found[arm.replace("offload", "resident"), 0]
        held, peak = (
            (min(r[key] for r in results) - min(r[key] for r in bare)) / one for key in ("held_mb", "peak_mb")
        )
        spread = f"{min(times):.3f} ({min(times):.3f}..{max(times):.3f})"
        cpu, loss = min(r["cpu_seconds"] for r in results), results[0]["first_loss"]
        print(f"{arm:24s}{count:3d}{spread:>24s}{cpu:8.3f}{held:8.2f}{peak:8.2f}  {loss:.7f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="resident,offload")
    parser.add_argument("--teachers", default="1,2,3,4", help="numbers of teachers")
    parser.add_argument("--one", help="measure one arm in this process")
    parser.add_argument("--folder", help="with --one: where the teachers' folders 0, 1, ... are")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    counts = [int(k) for k in arguments.teachers.split(",")]
    if not arguments.one:
        compare(arguments.arms.split(","), counts, arguments.rounds, arguments.steps)
        return
    with tempfile.TemporaryDirectory(dir=".") as name:
        if not arguments.folder:
            for k in range(counts[0]):
                llama(TEACHER, k + 1).save_pretrained(Path(name) / str(k))
        print(json.dumps(measure(arguments.one, counts[0], arguments.steps, Path(arguments.folder or name))))


if __name__ == "__main__":
    main()
