"""Further questions of the kinds in `math/`, from the generator that made those: run by a Python of its own.

    python -m venv FOLDER && FOLDER/bin/pip install -r benchmarks/math_questions.txt
    FOLDER/bin/python benchmarks/math_questions.py arithmetic__add_or_sub=80000 --output FILE

`mathematics_dataset` (Saxton et al. 2019, Analysing Mathematical Reasoning Abilities of Neural Models, 1904.01557)
needs an old sympy, which torch refuses. Difficulty is the easiest quarter, as in `math/`; no question comes twice.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def easiest(entropies: tuple[float, float]) -> tuple[float, float]:
    """The first quarter of a range of entropies."""
    low, high = entropies
    return low, low + (high - low) / 4


def questions(make: Callable[[], Any], count: int) -> Iterator[tuple[str, str]]:
    """Different questions with answers, `count` of them, or those that four times as many draws give."""
    asked: set[str] = set()
    for _ in range(4 * count):
        problem = make()
        question = str(problem.question)
        if question not in asked:
            asked.add(question)
            yield question, str(problem.answer)
        if len(asked) == count:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="+", help="MODULE=QUESTIONS, the module as in the data")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    np.random.seed(arguments.seed)
    part = arguments.output.with_suffix(".part")
    with part.open("w") as file:
        for module, count in (each.split("=") for each in arguments.counts):
            domain, _, kind = module.partition("__")
            made = importlib.import_module(f"mathematics_dataset.modules.{domain}").train(easiest)
            for question, answer in questions(made[kind], int(count)):
                file.write(json.dumps({"module": module, "question": question, "answer": answer}) + "\n")
    part.replace(arguments.output)


if __name__ == "__main__":
    main()
