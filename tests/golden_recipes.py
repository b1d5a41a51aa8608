"""Nine recipes as golden files see them: a corpus that no Python version changes, few steps, float32, one thread.

The recipes themselves are read from ``configs/``. What is exchanged is said here: the text of the Python installation
(another one with every Python release) by made-up documents, and published models by tiny fresh ones.
"""

from __future__ import annotations

import io
import json
import random
import re
import string
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

import mtkd
from mtkd.config import RunConfig
from mtkd.data.docstrings import Docstring
from mtkd.data.stdlib import Document
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES
from mtkd.methods.spec import METHODS
from mtkd.registry import BUILT_IN, SOURCES, TASKS
from mtkd.weightings.spec import WEIGHTINGS

CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = 4
"""Optimizer steps whose losses are kept, of every stage that trains."""
WIDTH = 160
"""Columns of the plan's tables."""
SST2 = Path("data", "SST-2")
"""Where methods/mtbert.yaml looks for its data, below the working directory."""
_DOCUMENTS = {"train": 60, "validation": 8, "test": 8}
_SHORT = ("limit.validation=8", "limit.test=8")


@dataclass(frozen=True)
class Recipe:
    """A file below ``configs/`` and how it is made small.

    Attributes:
        file: below ``configs/``.
        here: overrides of plan, mistakes and run: in place of models that are not on this machine.
        stages: those that train, whose steps are cut; a chain's own are cut through `run`.
        data: entries whose validation and test splits are cut.
        run: further overrides of the run; the plan is that of the recipe as it stands.
        mistakes: overrides, each wrong in one place, whose messages are kept.
    """

    file: str
    stages: tuple[str, ...]
    data: tuple[str, ...] = ()
    here: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    mistakes: tuple[str, ...] = ()

    @property
    def overrides(self) -> list[str]:
        """Of the run whose losses are kept."""
        cut = [f"data.{name}.{short}" for name in self.data for short in _SHORT]
        steps = [f"stages.{name}.steps={STEPS}" for name in self.stages]
        return ["log_every=1", "engine.threads=1", *cut, *steps, *self.run]


_TINY_BERT = "path: minilm-tiny, dropout: 0.0"

RECIPES = {
    "quickstart": Recipe(
        "quickstart.yaml",
        ("first-teacher", "second-teacher", "third-teacher", "student", "labels-only", "labels-equal-time"),
        ("mine", "second", "third", "unlabelled"),
        tuple(
            f"stages.{name}.student={{{_TINY_BERT}}}" for name in ("first-teacher", "second-teacher", "third-teacher")
        )
        + tuple(
            f"stages.{name}.student={{{_TINY_BERT}, keep_layers: [3, 6]}}"
            for name in ("student", "labels-only", "labels-equal-time")
        ),
        # Untrained models agree: their divergence alone is rounding
        ("stages.labels-equal-time.equal_time=null", "stages.student.method.options.hard=1.0"),
        (
            "stages.student.student.path=package:not_a_package_of_anyone/model",
            "data.second.domains=[number]",
            "data.third.skip.train=5000",
            "stages.student.teachers.1.model=stage:cache/secnd-teacher",
        ),
    ),
    "assistant": Recipe(
        "generative/assistant.yaml",
        ("prose-teacher", "code-teacher", "assistant", "student", "labels-only", "labels-equal-time"),
        ("mixed", "prose", "code"),
        (),
        ("stages.labels-equal-time.equal_time=null",),
        (
            "stages.student.weigthing=ca_mkd",
            "stages.student.weighting=ca_mdk",
            "stages.student.teachers.0=stage:asistant",
            "stages.student.method.options.temprature=2.0",
            "stages.assistant.student.heads=5",
        ),
    ),
    "takd": Recipe(
        "chains/takd.yaml",
        ("teacher",),
        ("text",),
        (),
        (f"chain.steps={STEPS}", f"chain.overrides.student.steps={STEPS}", f"chain.evaluate_every={STEPS}"),
        ("chain.mode=tadk", "chain.num_rungs=0", "chain.overrides.studnet.steps=3", "chain.teachers.0=stage:student"),
    ),
    "mtbert": Recipe(
        "methods/mtbert.yaml",
        ("teachers", "student", "labels-only"),
        (),
        (
            "tokenizer={path: minilm-tiny}",
            "stages.teachers.members.deep={" + _TINY_BERT + "}",
            "stages.teachers.members.shallow={" + _TINY_BERT + ", keep_layers: [1, 2, 3, 4, 5]}",
            "stages.student.student={" + _TINY_BERT + ", keep_layers: [2, 4, 6]}",
            "stages.labels-only.student={" + _TINY_BERT + ", keep_layers: [2, 4, 6]}",
        ),
        ("data.sst2.validation_share=0.1", "engine.device=cpu"),
        (
            "stages.teachers.members.shallow.keep_layers=[1, 2, 9]",
            "stages.student.teachers.0=stage:teachers/depp",
            "stages.student.match.0.projection=per_layers",
        ),
    ),
    "tinybert": Recipe(
        "methods/tinybert.yaml",
        ("general-teacher", "general", "task-teacher", "task", "prediction", "labels-only"),
        ("text", "task"),
        (),
        ("engine.device=cpu",),
        (
            "stages.prediction.method.options.step=predicion",
            "data.task.labels=[code]",
            "stages.task.student=stage:prediction",
        ),
    ),
    "glm-toy": Recipe(
        "glm/toy.yaml",
        ("published", "pretrain", "teacher", "fine-tune", "prediction", "labels-only"),
        ("text", "task-text", "task"),
        (),
        # At temperature 15 untrained models are equal to 1e-5: their divergence is rounding, which Adam would enlarge.
        # At the rates of the recipe the losses of classes jump, and two processors part by a relative 1e-4 and more.
        (
            "engine.device=cpu",
            "stages.pretrain.method.options.temperature=1.0",
            "stages.fine-tune.method.options.temperature=1.0",
            "stages.pretrain.optimizer.eps=1.0e-4",
            "stages.fine-tune.optimizer.eps=1.0e-4",
            "stages.teacher.optimizer.lr=5.0e-4",
            "stages.fine-tune.optimizer.lr=1.0e-3",
            "stages.prediction.optimizer.lr=1.0e-3",
            "stages.labels-only.optimizer.lr=1.0e-3",
        ),
        (
            "tokenizer.commands=plain",
            'data.task.cloze="{text} This is."',
            "stages.pretrain.student.architecture=llama",
        ),
    ),
    "cached": Recipe(
        "generative/cached.yaml",
        ("wide", "deep", "student", "live"),
        ("text",),
        (),
        (),
        (
            "stages.cache.cache.traits=[]",
            "stages.student.teachers.0.model=stage:cache/wid",
            "stages.cache.cache.k=100000",
        ),
    ),
    "instruct": Recipe(
        "generative/instruct.yaml",
        ("first-teacher", "second-teacher", "student", "labels-only"),
        (),
        (),
        ("data.instructions.limit={train: 64, validation: 8}",),
        (
            'data.instructions.prompt="{instruction}{inputs}"',
            "data.instructions.files.train=instruction.json",
            "stages.student.batch={tokens: 512, sequences: 16}",
        ),
    ),
    "custom-weighting": Recipe(
        "custom_weighting.yaml",
        ("prose-teacher", "code-teacher", "student"),
        ("mixed", "prose", "code"),
        (),
        (),
        (
            "stages.student.weighting.options.tau=-1.0",
            "stages.student.weighting.options.tua=1.0",
            "plugins=[custom_weightings.py]",
        ),
    ),
}


@dataclass
class Workplace:
    """A folder in which the recipes can be planned and run: made-up corpus, a tiny BERT, GLUE-like files."""

    folder: Path

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Exchange the corpus, and work in the folder."""
        monkeypatch.chdir(self.folder)
        _write_sst2(self.folder / SST2)
        _write_bert(self.folder / "minilm-tiny", self.folder / SST2 / "train.tsv")
        monkeypatch.setattr("mtkd.data.sources.stdlib_documents", made_up_documents)
        monkeypatch.setattr("mtkd.data.sources.docstring_rows", made_up_docstrings)
        _forget_plugins(monkeypatch)

    def config(self, recipe: Recipe, *overrides: str) -> RunConfig:
        """The recipe in float32: what `auto` chooses depends on the processor."""
        return mtkd.load_config(CONFIGS / recipe.file, ["engine.precision=fp32", *recipe.here, *overrides])


def _forget_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages list registered names: those of plug-ins that other tests loaded do not count."""
    monkeypatch.setattr("mtkd.registry._loaded_plugins", {})
    for registry in (LOSSES, WEIGHTINGS, METHODS, SOURCES, TASKS):
        built_in = {name: value for name, value in registry.items() if registry.origin(name) == BUILT_IN}
        monkeypatch.setattr(registry, "_values", built_in)
        monkeypatch.setattr(registry, "_origins", dict.fromkeys(built_in, BUILT_IN))


def plan_text(place: Workplace, recipe: Recipe) -> str:
    """The tables of `mtkd plan` without memory, which depends on the machine."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=False, color_system=None)
    for table in mtkd.plan(place.config(recipe)).tables():
        console.print(table)
    return _portable("\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n", place)


def error_texts(place: Workplace, recipe: Recipe) -> str:
    """What `mtkd plan` says about each mistake."""
    return _portable(
        "\n".join(f"-o {mistake}\n{_message(place, recipe, mistake)}\n" for mistake in recipe.mistakes), place
    )


def _message(place: Workplace, recipe: Recipe, mistake: str) -> str:
    try:
        mtkd.plan(place.config(recipe, mistake))
    except UserError as error:
        return f"exit {error.exit_code}: {error}"
    raise AssertionError(f"{recipe.file} with {mistake} is planned without a word")


def losses(place: Workplace, recipe: Recipe) -> dict[str, list[float]]:
    """Loss of the first steps of every stage that trains, by its name."""
    config = place.config(recipe, *recipe.overrides, f"output={place.folder / 'runs'}")
    folder = mtkd.run(config).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list[float]] = {}
    for line in lines:
        if "loss" in line and "step" in line:
            found.setdefault(line["stage"], []).append(line["loss"])
    return found


def made_up_documents(domains: tuple[str, ...], folder: Path | None = None) -> list[Document]:
    """In place of `mtkd.data.stdlib.stdlib_documents`: the same for every Python, domains with words of their own."""
    return [
        Document(text, domain, f"{domain}-{split}#{number}", split)
        for domain in ("prose", "code")
        if domain in domains
        for split, count in _DOCUMENTS.items()
        for number, text in enumerate(_texts(f"{domain} {split}", domain, count))
    ]


def made_up_docstrings() -> list[Docstring]:
    """In place of `mtkd.data.docstrings.docstring_rows`: four classes, enough rows for the recipe's slices."""
    return [
        Docstring(text[:120], f"{domain}{part}", subject, f"{domain}{part}.{split}#{number}", split)
        for domain, subject in (("prose", "numbers"), ("code", "tools"))
        for part in range(2)
        for split, count in {"train": 250, "validation": 8, "test": 8}.items()
        for number, text in enumerate(_texts(f"docstrings {domain} {part} {split}", domain, count))
    ]


def _texts(seed: str, domain: str, count: int) -> list[str]:
    chance = random.Random(seed)
    words = _words(domain)
    joint = {"prose": " ", "code": "_"}[domain]
    return [
        ". ".join(joint.join(_pick(chance, words) for _ in range(4 + number % 7)) for number in range(10)) + "."
        for _ in range(count)
    ]


def _words(domain: str) -> list[str]:
    """600 words of two to four syllables; the two domains share none of the rarer ones."""
    chance = random.Random(f"words of {domain}")
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(_pick(chance, syllables) for _ in range(2 + number % 3)) for number in range(600)]


def _pick(chance: random.Random, items: list[str]) -> str:
    """The lower a number the likelier, as words are; by `random` alone, whose numbers Python keeps for a seed."""
    return items[int(chance.random() ** 2 * len(items))]


def _write_sst2(folder: Path) -> None:
    folder.mkdir(parents=True)
    for split, count in (("train", 120), ("dev", 12)):
        rows = zip(
            _texts(f"sst2 {split} 0", "prose", count // 2), _texts(f"sst2 {split} 1", "code", count // 2), strict=True
        )
        lines = [f"{text[:120]}\t{label}" for pair in rows for label, text in enumerate(pair)]
        (folder / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def _write_bert(folder: Path, texts: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = Tokenizer(models.WordPiece(_vocabulary(texts, 300, special), unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _vocabulary(texts: Path, size: int, special: list[str]) -> dict[str, int]:
    """Word pieces by number: letters, then the most frequent words. (A WordPieceTrainer breaks ties by chance.)"""
    text = texts.read_text().lower()
    letters = sorted(set(text) - set(string.whitespace))
    counted = Counter(re.findall("[a-z]{2,}", text))
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters)]
    pieces += sorted(counted, key=lambda word: (-counted[word], word))[: size - len(pieces)]
    return {piece: number for number, piece in enumerate(pieces)}


def _portable(text: str, place: Workplace) -> str:
    """Without the folders of this machine."""
    return text.replace(str(CONFIGS), "configs").replace(str(place.folder), "FOLDER")
