"""A teacher reads the batch in the tokenizer that it names; the others read the student's."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_batch

from mtkd.data.batch import NO_LABEL, STUDENT, Batch, View
from mtkd.errors import UserError
from mtkd.models.features import Features
from mtkd.models.info import ModelInfo
from mtkd.pool import TeacherPool

INFO = ModelInfo("stand-in", 1, 8, 1, 1, 8, 100, 0, 64, True, frozenset({"hidden"}))
OTHER = "bytes"


class Reader:
    """A teacher that keeps the batches it was given."""

    num_parameters = 0

    def __init__(self, name: str, view: str) -> None:
        self.name, self.info, self.view = name, INFO, view
        self.announced: list[Batch] = []
        self.read: list[Batch] = []

    def provides(self) -> frozenset[str]:
        return self.info.taps

    def ahead(self, batch: Batch) -> None:
        self.announced.append(batch)

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        self.read.append(batch)
        return {key: torch.zeros(*batch.input_ids.shape, 8) for key in wants}

    def close(self) -> None:
        pass


def two_views() -> Batch:
    batch = causal_batch([5, 3])
    ids = torch.arange(22).view(2, 11)
    batch.views = {OTHER: View(ids, ids < 18)}
    return batch


def pool_of(*views: str) -> TeacherPool:
    teachers = [Reader(f"t{i}", view) for i, view in enumerate(views)]
    return TeacherPool(teachers, [frozenset({"hidden.1"})] * len(views))


def test_each_teacher_reads_its_own_view() -> None:
    """The second one gets the other view and nothing else of the text, announced and asked; rows and keys stay."""
    batch, pool = two_views(), pool_of(STUDENT, OTHER)
    pool.forward(batch)
    first, second = pool.teachers
    assert isinstance(first, Reader)
    assert isinstance(second, Reader)
    assert first.read == [batch]
    for seen in (*second.announced, *second.read):
        assert seen.input_ids is batch.views[OTHER].input_ids
        assert seen.attention_mask is batch.views[OTHER].attention_mask
        assert seen.view().input_ids is batch.input_ids  # where its features must stand
        assert torch.equal(seen.keys, batch.keys)
    assert len(second.announced) == len(second.read) == 1


def test_targets_are_asked_of_the_students_text_alone() -> None:
    """Targets of tokens are places and ids of the student's text; a class is that of the row, whoever reads it."""
    batch = two_views()
    seen = batch.read_by(OTHER)
    assert seen.targets.shape == (2, 11)
    assert (seen.targets == NO_LABEL).all()
    batch.targets = torch.tensor([1, 0])
    assert batch.read_by(OTHER).targets is batch.targets


def test_the_students_view_is_the_batch() -> None:
    """Nothing is copied where a teacher reads what the student reads."""
    batch = two_views()
    assert batch.read_by(STUDENT) is batch
    assert batch.view().input_ids is batch.input_ids
    assert batch.to(torch.device("cpu")).views[OTHER].input_ids.tolist() == batch.views[OTHER].input_ids.tolist()


def test_a_view_that_is_not_there_is_named() -> None:
    """The message says which views there are, and who adds one."""
    with pytest.raises(UserError, match="transform") as caught:
        pool_of("words").forward(two_views())
    assert (caught.value.found, caught.value.allowed) == ("words", [OTHER])
