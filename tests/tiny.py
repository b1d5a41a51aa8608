"""Tiny models, data and runs that several tests build on: made in code, no downloads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from mtkd.config import Named
from mtkd.config.match import Match
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import compile_rows
from mtkd.objective.objective import Objective
from mtkd.objective.wire import Wiring, wire
from mtkd.pool import LiveTeacher, TeacherPool
from mtkd.weightings.make import make_weighting, stage_facts

NUM_IDS = 61
CPU = torch.device("cpu")


def causal_model(width: int, layers: int, seed: int, *, tied: bool = False, padded: int = 0) -> TappedModel:
    """A seeded Llama of 4 heads over NUM_IDS ids, with `padded` more columns than ids."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_IDS + padded,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # far from uniform predictions, so that losses differ visibly
        pad_token_id=0,
        attn_implementation="mtkd_tap",
    )
    return TappedModel(LlamaForCausalLM(config), "AutoModelForCausalLM", NUM_IDS)


def classifier(width: int, layers: int, seed: int, num_labels: int = 3, dropout: float = 0.0) -> TappedModel:
    """A seeded BERT classifier of 4 heads."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=NUM_IDS,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        attn_implementation="mtkd_tap",
    )
    return TappedModel(BertForSequenceClassification(config), "AutoModelForSequenceClassification", NUM_IDS)


def causal_batch(lengths: Sequence[int], seed: int = 0, *, prompt: int = 0, padding: int = 0) -> Batch:
    """Random sequences of the given lengths; the first `prompt` positions ask for nothing; `padding` columns more."""
    size = max(lengths) + padding
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), size, dtype=torch.int64)
    mask = torch.zeros(len(lengths), size, dtype=torch.bool)
    targets = torch.full((len(lengths), size), NO_LABEL)
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, NUM_IDS, (length + 1,), generator=generator)
        ids[row, :length], mask[row, :length] = tokens[:-1], True
        targets[row, prompt:length] = tokens[1 + prompt :]
    return Batch(torch.arange(len(lengths)), ids, mask, targets)


def class_batch(lengths: Sequence[int], seed: int = 0, num_labels: int = 3) -> Batch:
    """Random sequences with a class each."""
    batch = causal_batch(lengths, seed)
    batch.targets = torch.randint(0, num_labels, (len(lengths),), generator=torch.Generator().manual_seed(seed + 1))
    return batch


def rows_of(batch: Batch, rows: Sequence[int], *, trim: bool = True) -> Batch:
    """Some rows of a batch, trimmed to their longest sequence; no rows make one filler row."""
    if not rows:
        filler = rows_of(batch, [0], trim=False)
        filler.keys = torch.tensor([-1])
        filler.routes = None if batch.routes is None else torch.tensor([-1])
        return filler
    index = torch.tensor(rows)
    length = int(batch.attention_mask[index].sum(1).max()) if trim else batch.input_ids.shape[1]
    targets = batch.targets[index]
    return Batch(
        batch.keys[index],
        batch.input_ids[index, :length],
        batch.attention_mask[index, :length],
        targets[:, :length] if targets.dim() == 2 else targets,
        routes=None if batch.routes is None else batch.routes[index],
    )


def make_objective(
    student: TappedModel,
    teachers: Sequence[TappedModel],
    matches: Sequence[Match],
    weighting: str | Named = "uniform",
    per: str = "example",
    tile: int = 5,
    names: Sequence[str] = (),
    teach: tuple[tuple[bool, ...], ...] = (),
) -> tuple[Objective, TeacherPool]:
    """An objective and its pool."""
    names = names or [f"t{k}" for k in range(len(teachers))]
    named = Named(name=weighting) if isinstance(weighting, str) else weighting
    token_level = student.info.num_labels == 0
    infos = {n: t.info for n, t in zip(names, teachers, strict=True)}
    rows = compile_rows(matches, student.info, infos, token_level=token_level, regression=False, where="match")
    sizes = [sum(p.numel() for p in t.parameters()) for t in teachers]
    made = make_weighting(named, stage_facts(tuple(names), sizes, student, seed=0), "weighting")
    objective = wire(student, infos, rows, made, Wiring(per, token_level, tile, teach=teach))
    held = [LiveTeacher(n, t, CPU, torch.float32) for n, t in zip(names, teachers, strict=True)]
    return objective, TeacherPool(held, [objective.teacher_wants(k) for k in range(len(held))])
