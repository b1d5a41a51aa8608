"""Whole runs with two teachers of one tokenizer whose embeddings are padded to different sizes, or permuted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_run import NAME, tiny_config, write_data

import mtkd.running.run
from mtkd.data.tokenizers import num_real_ids, train_tokenizer
from mtkd.errors import DataError


def write_teacher(folder: Path, seed: int, padding: int, *, permuted: bool = False) -> None:
    """A GPT-2 of one layer with `padding` columns that no id names, each the most probable one if it were read."""
    texts = [json.loads(line)["text"] for line in (folder.parents[1] / "data/train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 300)
    ids = num_real_ids(tokenizer)
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=ids,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.resize_token_embeddings(ids + padding, mean_resizing=False)
        model.lm_head.weight[ids:] = 50 * model.lm_head.weight[5]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if permuted:
        file = folder / "tokenizer.json"
        spec = json.loads(file.read_text())
        vocabulary = spec["model"]["vocab"]
        last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
        vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
        file.write_text(json.dumps(spec))


def losses(folder: Path, paddings: tuple[int, int], *, permuted: bool = False) -> list[float]:
    """The student's losses in a run with two teachers."""
    write_data(folder / "data")
    for seed, padding in enumerate(paddings):
        write_teacher(folder / f"model/t{seed}", seed, padding, permuted=permuted and seed == 1)
    student = {"teachers": ["model/t0", "model/t1"], "steps": 2, "batch": {"sequences": 8}, "save_every": None}
    config = tiny_config(
        folder,
        tokenizer=None,
        log_every=1,
        stages={"teacher": None, "student": student},
        evaluate={"comparisons": [], "ensembles": []},
    )
    mtkd.running.run.run(config)
    lines = [json.loads(x) for x in (folder / "runs" / NAME / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_teachers_padded_to_different_sizes_teach_what_unpadded_ones_do(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "padded").mkdir()
    plain, padded = losses(tmp_path / "plain", (0, 0)), losses(tmp_path / "padded", (5, 21))
    assert len(plain) >= 2
    assert padded == pytest.approx(plain, rel=1e-5)


def test_a_permuted_vocabulary_of_equal_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 tokens differ") as caught:
        losses(tmp_path, (0, 0), permuted=True)
    assert "teachers[1]" in str(caught.value)
