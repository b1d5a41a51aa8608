"""Specialist language models of two corpora, their data and tokenizers: the teachers of language.py.

    python benchmarks/language_teachers.py math --output FOLDER     # four specialists of questions with exact answers
    python benchmarks/language_teachers.py stdlib --output FOLDER   # two of the Python library: prose, code

Each domain has a specialist; a generalist of the same shape has as many steps on all domains as they have together. A
model is a run of its own. Finished ones are not made again, so the script can be stopped and called again.

stdlib: the documents of the source `python-stdlib`, written into files with the domain as the name of the teacher.
math: `math/` of the data sets (see tasks.py), of which `MODULES` are kept. Specialists learn from `GENERATED` further
questions per module, which math_questions.py draws in a Python environment of its own, made below the output folder:
with the 4,000 questions per module of the data none learned more than to remember them. A token is a digit with its
place (ones, tens, tenths), so that digits of the same place find each other (index hints: Zhou et al. 2023, What
Algorithms can Transformers Learn?, 2310.16028), or a run of words. Arithmetic's answers are written from the last digit
to the first, as they are computed (Lee et al. 2023, Teaching Arithmetic to Small Transformers, 2307.03381). Answers
alone are predicted, but specialists also read `READ` of their questions as text: what a teacher says about a question
(the weighting `posterior` reads it) means nothing where no question was ever predicted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sides.jobs import Job, done, set_environment, stage_folder, work
from tasks import data_folder

SPLITS = ("train", "validation", "test")
PLACES = "abcdefghijklmnopqrst"  # ones, tens and so on; in capitals tenths, hundredths and so on
MODULES = {
    "arithmetic": ("arithmetic__add_or_sub",),
    "comparison": ("comparison__kth_biggest", "comparison__pair", "comparison__sort"),
    "numbers": ("numbers__place_value", "numbers__round_number"),
    "measurement": ("measurement__conversion", "measurement__time"),
}
MATH_STEPS = {"arithmetic": 3_000, "comparison": 1_500, "numbers": 1_500, "measurement": 1_500}
GENERATED = 80_000  # questions per module that specialists learn from
FEWER = {"measurement__conversion": 35_000}  # slow to draw
READ = 0.1  # share of the questions that specialists read as text
ASKED = 500  # test questions per domain
LONGEST_ANSWER = 32  # tokens

ENGINE = {"kind": "torch", "device": "cpu", "precision": "bf16", "threads": 1}

Row = dict[str, str]


@dataclass(frozen=True)
class Corpus:
    """What the runs on a corpus share.

    Attributes:
        data: fields of every `data` entry but its files.
        shapes: domain -> its specialist. The generalist has the shape of the first.
        steps: domain -> steps of its specialist.
        teacher: further fields of the stage of a specialist.
    """

    name: str
    folder: Path
    data: dict[str, Any]
    shapes: dict[str, dict[str, Any]]
    steps: dict[str, int]
    tokens: int  # per step
    lr: float
    attention: str = "auto"
    teacher: dict[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def entry(self, domains: Sequence[str], train: str = "train") -> dict[str, Any]:
        """The `data` entry of some domains; `train`: which file is the train split."""
        files = {s: [str(self.folder / f"{d}.{train if s == 'train' else s}.jsonl") for d in domains] for s in SPLITS}
        return {"source": "files", "files": files, **self.data}

    def run(self, name: str, seed: int, stages: dict[str, Any], data: dict[str, Any], needs: Sequence[str] = ()) -> Job:
        """A run whose models are scored on the first of its `data`."""
        scored = next(iter(data))
        config = {
            "name": name,
            "seed": seed,
            "output": str(self.runs),
            "tokenizer": {"path": str((self.folder / "tokenizer").resolve())},
            "data": data,
            "engine": {**ENGINE, "attention": self.attention},
            "stages": {key: {"batch": {"tokens": self.tokens}, **stage} for key, stage in stages.items()},
            "evaluate": {"data": scored, "resamples": 10, "batch": {"tokens": 4_096}, "agreement": False},
            "log_every": 50,
        }
        return Job(config, tuple(self.runs / need for need in needs), used_again=True)

    def labels(self, steps: int, student: dict[str, Any]) -> dict[str, Any]:
        optimizer = {"lr": self.lr, "betas": [0.9, 0.98], "weight_decay": 0.1 if self.name == "math" else 0.01}
        return {"kind": "finetune", "student": student, "steps": steps, "optimizer": optimizer}

    @property
    def runs(self) -> Path:
        return (self.folder.parent / "runs").resolve()

    def export(self, run: str, stage: str = "01-teacher") -> str:
        return str(self.runs / run / "stages" / stage / "export")


def corpus(name: str, output: Path) -> Corpus:
    """A corpus below `output`; files and tokenizer are written at the first call."""
    folder = output.resolve() / name / "data"
    return {"stdlib": _stdlib, "math": _math}[name](folder)


def teachers(corpus: Corpus, seed: int) -> list[Job]:
    """The runs of the specialists and of the generalist."""
    train = "read" if corpus.name == "math" else "train"
    jobs = []
    for domain, shape in corpus.shapes.items():
        stages = {"teacher": {**corpus.labels(corpus.steps[domain], shape), **corpus.teacher}}
        jobs.append(corpus.run(f"teacher-{domain}-{seed}", seed, stages, {domain: corpus.entry([domain], train)}))
    whole = corpus.labels(sum(corpus.steps.values()), next(iter(corpus.shapes.values())))
    stages = {"teacher": {**whole, **corpus.teacher}}
    mixed = {"mixed": corpus.entry(corpus.domains, train)}
    return [*jobs, corpus.run(f"teacher-generalist-{seed}", seed, stages, mixed)]


def ask(job: Job, keep: bool = False) -> None:
    """Ask the models of a finished run the test questions, once; `exact.jsonl` of a stage has domain, module, hit.

    Args:
        keep: the models, which are large, for later runs.
    """
    entry = next(iter(job.config["data"].values()))
    models = sorted((job.folder / "stages").glob("*/export/model.safetensors")) if done(job.folder) else []
    for model in models:
        stage = model.parents[1]
        if "prompt" in entry and not (stage / "exact.jsonl").exists():
            lines = [line for file in entry["files"]["test"] for line in Path(file).read_text().splitlines()]
            rows = [json.loads(line) for line in lines]
            answers = answer(model.parent, [row["prompt"] for row in rows])
            found = [
                json.dumps({"domain": row["domain"], "module": row["module"], "hit": int(given == row["answer"])})
                for row, given in zip(rows, answers, strict=True)
            ]
            part = stage / "exact.part"
            part.write_text("\n".join(found) + "\n")
            part.replace(stage / "exact.jsonl")
        if not keep:
            model.unlink()


def answer(folder: Path, prompts: Sequence[str], at_once: int = 250) -> list[str]:
    """The greedy continuations of prompts by an exported model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    for start in range(0, len(order), at_once):
        chosen = order[start : start + at_once]
        longest = max(len(ids[i]) for i in chosen)
        rows = torch.tensor([[tokenizer.pad_token_id] * (longest - len(ids[i])) + ids[i] for i in chosen])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            out = model.generate(
                input_ids=rows,
                attention_mask=(rows != tokenizer.pad_token_id).long(),
                do_sample=False,
                max_new_tokens=LONGEST_ANSWER,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        for i, row in zip(chosen, out[:, longest:], strict=True):
            answers[i] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def _stdlib(folder: Path) -> Corpus:
    domains = ("prose", "code")
    if not (folder / "tokenizer").exists():
        from mtkd.data.stdlib import stdlib_documents
        from mtkd.data.tokenizers import train_tokenizer

        documents = stdlib_documents()
        for domain in domains:
            for split in SPLITS:
                chosen = [d for d in documents if (d.domain, d.split) == (domain, split)]
                rows = [{"text": d.text, "domain": domain, "teacher": domain, "name": d.name} for d in chosen]
                _write(folder / f"{domain}.{split}.jsonl", rows)
        train_tokenizer((d.text for d in documents if d.split == "train"), 4_096).save_pretrained(folder / "tokenizer")
    data = {"domain": "domain", "name": "name", "max_length": 128, "limit": {"validation": 80, "test": 300}}
    # Those of configs/quickstart.yaml.
    shapes = {domain: llama(layers, 256) for domain, layers in zip(domains, (3, 2), strict=True)}
    return Corpus("stdlib", folder, data, shapes, {"prose": 240, "code": 300}, 512, 3e-3)


def _math(folder: Path) -> Corpus:
    if not (folder / "tokenizer").exists():
        source = data_folder() / "math"
        texts: list[str] = []
        for domain, modules in MODULES.items():
            kept: set[str] = set()  # questions that are asked or validated with
            for split in SPLITS:
                rows = [row for row in _rows(source / f"{domain}.{split}.jsonl") if row["module"] in modules]
                rows = rows[:ASKED] if split == "test" else rows
                _write(folder / f"{domain}.{split}.jsonl", [_prompted(row, domain, n) for n, row in enumerate(rows)])
                kept |= set() if split == "train" else {row["question"] for row in rows}
            further = [row for row in _generated(folder, domain) if row["question"] not in kept and _has_places(row)]
            rows = [_prompted(row, domain, n) for n, row in enumerate(further)]
            whole = [{**row, "prompt": "", "answer": row["prompt"] + row["answer"]} for row in rows[:: round(1 / READ)]]
            _write(folder / f"{domain}.read.jsonl", [*rows, *whole])
            texts += [row["answer"] for row in whole]
        digits(texts).save_pretrained(folder / "tokenizer")
    data = {"prompt": "prompt", "text": "answer", "domain": "domain", "max_length": 64, "limit": {"validation": 500}}
    shapes = {domain: llama(3, 192) for domain in MODULES}
    teacher = {"batch": {"tokens": 4_096}}
    # Rows are short: the flash kernel of the CPU takes four times as long for the backward pass of 25 tokens.
    return Corpus("math", folder, data, shapes, MATH_STEPS, 1_024, 3e-3, "math", teacher)


def _has_places(row: Row) -> bool:
    """Whether no number is longer than there are names of places."""
    return not re.search(rf"\d{{{len(PLACES) + 1}}}", row["question"] + " " + row["answer"])


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _generated(folder: Path, domain: str) -> list[Row]:
    """Further questions of a domain; drawn at the first call, by a Python of its own that pip makes."""
    file, python, here = folder / f"{domain}.generated.jsonl", folder / "generator" / "bin" / "python", Path(__file__)
    if not python.exists():
        fresh = folder / "generator"
        subprocess.run([sys.executable, "-m", "venv", str(fresh)], check=True)
        wanted = str(here.with_name("math_questions.txt"))
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
    if not file.exists():
        counts = [f"{module}={FEWER.get(module, GENERATED)}" for module in MODULES[domain]]
        script = [str(python), str(here.with_name("math_questions.py")), *counts]
        subprocess.run([*script, "--output", str(file)], check=True)
    return _rows(file)


def _prompted(row: Row, domain: str, number: int) -> Row:
    answer = placed(row["answer"], backwards=domain == "arithmetic")
    where = {"domain": domain, "module": row["module"], "teacher": domain, "name": f"{domain} {number}"}
    return {"prompt": placed(row["question"]) + "\n", "answer": answer, **where}


def placed(text: str, backwards: bool = False) -> str:
    """Numbers with the place before each digit: 120.45 becomes c1b2a0.A4B5, from the last digit on 5B4A.0a2b1c."""

    def write(number: re.Match[str]) -> str:
        whole, part = number[1], number[3] or ""
        before = "".join(PLACES[len(whole) - i - 1] + digit for i, digit in enumerate(whole))
        after = "".join(place.upper() + digit for place, digit in zip(PLACES, part, strict=False))
        return before + ("." if part else "") + after

    written = re.sub(r"(\d+)(\.(\d+))?", write, text)
    return "".join(reversed(re.findall(r"[A-Za-z]\d|.", written))) if backwards else written


def llama(layers: int, width: int) -> dict[str, Any]:
    return {"architecture": "llama", "layers": layers, "width": width, "heads": 4}


def digits(texts: Sequence[str], size: int = 1_500, often: int = 60) -> Any:
    """A byte-level BPE whose merges stay within runs of frequent words and within signs: a digit is a token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    counts = Counter(word for text in texts for word in set(re.findall(r"[A-Za-z]{2,}", text)))
    words = "|".join(sorted(word for word, count in counts.items() if count >= often))
    pattern = rf"[A-Za-z]\d| ?\b(?:{words})\b(?: \b(?:{words})\b)* ?|\?\n|\.\n| ?[^\w\s]+ ?|[\s\S]"
    core = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=often,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _write(file: Path, rows: Sequence[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(run: Path, stage: str) -> list[tuple[str, str, int]]:
    """Domain, module and hit of every test question of a finished run's model; [] of texts."""
    file = stage_folder(run, stage) / "exact.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [(row["domain"], row["module"], row["hit"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=("stdlib", "math"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=85, help="start nothing after this many minutes")
    parser.add_argument("--output", type=Path, default=Path("runs/language"))
    parser.add_argument("--only", nargs="+", default=[""], help="words; only models with one of them in their names")
    arguments = parser.parse_args()
    set_environment()
    made = corpus(arguments.corpus, arguments.output)
    every = [job for seed in range(arguments.seeds) for job in teachers(made, seed)]
    jobs = [job for job in every if any(word in job.folder.name for word in arguments.only)]
    work(jobs, arguments.workers, time.monotonic() + 60 * arguments.minutes)
    for job in jobs:
        ask(job, keep=True)
        print(described(job.folder))


def described(run: Path) -> str:
    """What a teacher reaches on its own test questions or documents, by module or domain."""
    if not done(run):
        return f"{run.name}: not finished"
    scores = next(iter(json.loads((run / "results.json").read_text())["models"].values()))
    text = f"{run.name}: {scores['seconds']:.0f} s, {scores['overall']['bits_per_byte']:.3f} bits per byte"
    for domain, values in scores["domains"].items():
        text += f", {domain} {values['bits_per_byte']:.3f}"
    by_module: dict[str, list[int]] = {}
    for _, module, hit in asked(run, "teacher"):
        for name in ("exact", module):
            by_module.setdefault(name, []).append(hit)
    return text + "".join(f"; {name} {100 * sum(found) / len(found):.1f}%" for name, found in by_module.items())


if __name__ == "__main__":
    main()
