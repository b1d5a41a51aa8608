"""Batches with written answers: positions, targets, padding, and which rows are whose."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import causal_batch

from mtkd.data.batch import NO_LABEL, position_counts
from mtkd.data.completions import Completion, completed, prompts_of

BATCH = replace(causal_batch((7, 4, 5), prompt=3), origin=torch.tensor([4, 5, 6]), routes=torch.tensor([0, 1, 0]))


def written(row: int, ids: list[int]) -> Completion:
    return Completion(row, prompts_of(BATCH)[row], ids, -torch.arange(1.0, len(ids) + 1))


def test_a_prompt_ends_where_its_answer_is_predicted() -> None:
    """Law: four tokens are read before the first target; the token after them is that target."""
    for row, prompt in enumerate(prompts_of(BATCH)):
        assert prompt == BATCH.input_ids[row, :4].tolist()
        assert BATCH.targets[row, 2] == NO_LABEL != BATCH.targets[row, 3]


def test_the_last_of_several_answers_is_the_one_that_is_written() -> None:
    """Law: of a chat with two answers the prompt has the first answer and the second question."""
    targets = torch.full((1, 8), NO_LABEL)
    targets[0, [1, 2, 5, 6]] = 9
    batch = replace(causal_batch((8,)), targets=targets)
    assert prompts_of(batch) == [batch.input_ids[0, :6].tolist()]


def test_every_token_is_asked_for_without_a_prompt() -> None:
    batch = causal_batch((4,))
    assert prompts_of(batch) == [batch.input_ids[0, :1].tolist()]


def test_a_row_without_an_answer_is_a_prompt_alone_and_a_filler_row_is_none() -> None:
    silent = replace(BATCH, targets=torch.full_like(BATCH.targets, NO_LABEL))
    rows = zip(BATCH.input_ids, BATCH.attention_mask, strict=True)
    assert prompts_of(silent) == [ids[mask].tolist() for ids, mask in rows]
    assert prompts_of(replace(silent, keys=torch.full((3,), -1))) == [[], [], []]


def test_written_tokens_are_predicted_from_the_prompt_on() -> None:
    """Law: the prompt's last position predicts the first token; the last token is a target and no input."""
    made = completed(BATCH, [], [written(1, [21, 22, 23]), written(1, [24])], pad_id=60)
    assert made.input_ids.tolist() == [[*prompts_of(BATCH)[1], 21, 22], [*prompts_of(BATCH)[1], 60, 60]]
    assert made.attention_mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    none = [NO_LABEL] * 3
    assert made.targets.tolist() == [[*none, 21, 22, 23], [*none, 24, NO_LABEL, NO_LABEL]]
    assert made.behaviour is not None
    assert made.behaviour.tolist() == [[0, 0, 0, -1, -2, -3], [0, 0, 0, -1, 0, 0]]
    assert made.written is not None
    assert made.written.tolist() == [True, True]
    assert (made.keys.tolist(), made.origin.tolist(), made.routes.tolist()) == ([1, 1], [5, 5], [1, 1])  # type: ignore[union-attr]


def test_rows_of_the_data_stay_as_they_are() -> None:
    """Law: with a shorter completion nothing of them changes but the padding; labels are theirs alone."""
    made = completed(BATCH, [1, 2], [written(0, [21])], pad_id=0)
    assert made.input_ids.shape == (3, 5)
    for row, old in enumerate((1, 2)):
        for name in ("input_ids", "attention_mask", "targets"):
            assert torch.equal(getattr(made, name)[row], getattr(BATCH, name)[old, :5])
    assert made.written is not None
    assert made.written.tolist() == [False, False, True]
    assert position_counts([made]) == {
        "tokens": 4 + 5 + 4,
        "targets": 1 + 2 + 1,
        "labels": 1 + 2,
        "written": 1,
        "sequences": 3,
    }
    assert made.labelled().targets.eq(NO_LABEL)[2].all()
    assert torch.equal(made.labelled().target_mask, made.label_mask)


def test_a_filler_row_stays_one() -> None:
    filler = replace(BATCH, keys=torch.tensor([-1, -1, -1]))
    assert position_counts([completed(filler, [0, 1, 2], [], pad_id=0)]) == dict.fromkeys(
        ("tokens", "targets", "labels", "written", "sequences"), 0
    )
