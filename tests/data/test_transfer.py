"""Transfer sets: what is replaced, what stays, and that labels of made-up texts are never read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_examples import load_raw, sentences
from tiny_run import write_yaml
from transformers import PreTrainedTokenizerFast

import mtkd
from mtkd.config import DataConfig, RunConfig
from mtkd.data.batch import NO_LABEL
from mtkd.data.load import LoadedData, load_data
from mtkd.data.tokenizers import num_real_ids
from mtkd.data.transfer import transfer_tokens
from mtkd.errors import UserError

Load = Callable[..., LoadedData]
TEXTS = sentences(60)


def ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def made(
    tokenizer: PreTrainedTokenizerFast, split: str = "train", seed: int = 0, **transfer: object
) -> list[np.ndarray]:
    config = DataConfig(source="files", transfer=transfer, seed=seed)
    return transfer_tokens(ids(tokenizer), config, tokenizer, split)


@pytest.mark.parametrize("tokens", ["uniform", "frequency", "shuffled"])
def test_lengths_and_special_tokens_stay_and_the_seed_decides(tokenizer: PreTrainedTokenizerFast, tokens: str) -> None:
    found = made(tokenizer, tokens=tokens)
    special = tokenizer.all_special_ids
    for before, after in zip(ids(tokenizer), found, strict=True):
        assert len(before) == len(after)
        places = [i for i, token in enumerate(before) if token in special]
        assert places == [i for i, token in enumerate(after) if token in special]
        assert all(before[i] == after[i] for i in places)
    assert all(map(np.array_equal, found, made(tokenizer, tokens=tokens)))
    assert not all(map(np.array_equal, found, made(tokenizer, tokens=tokens, seed=1)))
    assert all(map(np.array_equal, ids(tokenizer), made(tokenizer, "validation", tokens=tokens)))


def test_shuffled_texts_keep_their_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    moved = 0
    for before, after in zip(ids(tokenizer), made(tokenizer, tokens="shuffled"), strict=True):
        assert Counter(before) == Counter(after.tolist())
        moved += sum(a != b for a, b in zip(before, after, strict=True))
    assert moved > 300


def test_sampled_tokens_follow_their_distribution(tokenizer: PreTrainedTokenizerFast) -> None:
    special = set(tokenizer.all_special_ids)
    real = Counter(t for text in ids(tokenizer) for t in text if t not in special)
    total = sum(real.values())
    drawn = Counter(
        t for seed in range(20) for text in made(tokenizer, seed=seed, tokens="frequency") for t in text.tolist()
    )
    for token, count in real.items():
        expected = 20 * count  # of a binomial: 6 standard deviations
        assert abs(drawn[token] - expected) < 6 * (20 * count * (1 - count / total)) ** 0.5 + 1
    assert set(drawn) <= set(real) | special
    even = Counter(
        t for seed in range(5) for text in made(tokenizer, seed=seed, tokens="uniform") for t in text.tolist()
    )
    ordinary = [t for t in range(num_real_ids(tokenizer)) if t not in special]
    mean = 5 * total / len(ordinary)
    assert all(abs(even[t] - mean) < 6 * mean**0.5 for t in ordinary)


def test_a_share_is_replaced(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = zip(ids(tokenizer), made(tokenizer, tokens="uniform", share=0.3), strict=True)
    changed = [a != b for before, after in pairs for a, b in zip(before, after, strict=True)]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.06)
    assert all(map(np.array_equal, ids(tokenizer), made(tokenizer, tokens="uniform", share=0.0)))


def test_every_task_reads_the_made_tokens(load: Load) -> None:
    label = {"text": TEXTS, "label": ["yes", "no"] * 30}
    for task, columns in (("causal-lm", {"text": TEXTS}), ("masked-lm", {"text": TEXTS}), ("classify", label)):
        real = load(columns, task=task).splits["train"].collate([0, 1, 2])
        other = load(columns, task=task, transfer={"tokens": "uniform"}).splits["train"].collate([0, 1, 2])
        assert real.input_ids.shape == other.input_ids.shape
        assert (real.attention_mask == other.attention_mask).all()
        assert (real.input_ids != other.input_ids).float().mean() > 0.3
        if task == "causal-lm":  # a token's successor is the next made-up one
            assert (
                other.targets[0, :-1][other.attention_mask[0, 1:]]
                == other.input_ids[0, 1:][other.attention_mask[0, 1:]]
            ).all()
        if task == "classify":
            assert (real.targets == other.targets).all()


def test_random_tokens_need_no_data(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = DataConfig(source="random-tokens", documents=200, max_length=20, task="classify", labels=("no", "yes"))
    loaded = load_data("noise", config, load_raw(config, tmp_path), tokenizer)
    assert list(loaded.splits) == ["train"]
    assert loaded.num_labels == 2
    batch = loaded.splits["train"].collate(range(200))
    assert (batch.targets == NO_LABEL).all()
    assert batch.attention_mask.sum(1).max() <= 20
    assert len(batch.input_ids.unique()) > 0.9 * num_real_ids(tokenizer)
    other = config.model_copy(update={"seed": 1})
    assert load_raw(other, tmp_path).fingerprint != load_raw(config, tmp_path).fingerprint


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"documents": None}, "needs `documents`"),
        ({"transfer": {"tokens": "shuffled"}}, "sampled already"),
        ({"validation_share": 0.1}, "nothing to validate on"),
        ({"task": "classify"}, "name them in order"),
        ({"path": "x"}, "does not read this"),
    ],
)
def test_random_tokens_are_checked(fields: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        load_raw(DataConfig(**{"source": "random-tokens", "documents": 5, **fields}), tmp_path)


def noisy_run(folder: Path, **changes: object) -> RunConfig:
    """A teacher on real text and a student on random tokens."""
    student = {"data": "noise", "method": {"name": "kd", "options": {"hard": 0.0}}, **changes}
    noise = {"source": "random-tokens", "documents": 40, "max_length": 64}
    stages = {"teacher": {"data": "text"}, "student": student}
    file = write_yaml(folder, data={"noise": noise}, stages=stages, evaluate={"data": "text"})
    return mtkd.load_config(file)


def test_a_student_learns_from_random_tokens(tmp_path: Path) -> None:
    result = mtkd.run(noisy_run(tmp_path, steps=4))
    assert result.results["models"]["student"]["overall"]["tokens"] > 0  # judged on real text


@pytest.mark.parametrize("change", [{"method": "kd"}, {"weighting": "mt_bert"}])
def test_labels_of_made_up_texts_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(UserError, match="made up"):
        mtkd.plan(noisy_run(tmp_path, **change))


def test_a_vocabulary_cannot_be_learnt_from_random_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to learn a vocabulary from"):
        mtkd.load_config(write_yaml(tmp_path), ["data.text={source: random-tokens, documents: 3}"])
