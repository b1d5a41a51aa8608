"""Which output of a classifier is which class of the data, as far as the plan can tell."""

from __future__ import annotations

from mtkd.config import DataConfig
from mtkd.errors import DataError, UserError
from mtkd.models.classes import ClassMap, Given, match_classes
from mtkd.planning.data import DataFacts
from mtkd.registry import TASKS


def check_given(name: str, data: DataConfig, facts: DataFacts, where: str) -> None:
    """Refuse `classes` of a teacher whose outputs are not classes of their own.

    Args:
        name: of the `data` entry.
    Raises:
        UserError: naming the task.
    """
    task, numbers = TASKS.find(data.task), facts.kind == "number"
    if task.token_level or task.cloze or numbers:
        why = "its labels are numbers" if numbers else f"task {data.task}"
        raise UserError(
            "classes is for classifiers: here the teacher's outputs are not classes of its own",
            where=where,
            found=f"data '{name}': {why}",
            todo="drop it",
        )


def earlier_classes(
    stage: str, theirs: DataFacts, ours: DataFacts, where: str, given: Given | None, key: str
) -> ClassMap:
    """Which output of an earlier stage's classifier is which class of the data.

    Args:
        stage: that makes the classifier.
        theirs: of the data that it learns from. ours: of the data that it teaches, or goes on with.
        given: what the user says its outputs stand for.
        key: what the user can write to say it; see `match_classes`.
    Raises:
        DataError: the classes differ.
    """
    try:
        if theirs.kind != ours.kind:
            raise DataError(
                "",
                where=where,
                found=", ".join(theirs.classes) or "numbers (a regression)",
                allowed=", ".join(ours.classes) or "numbers (a regression)",
            )
        return match_classes(theirs.classes, ours.classes, where, given, key=key)
    except DataError as error:
        message = f"stage '{stage}' makes a classifier of other classes"
        todo = error.todo or "use data of the same classes, or go on from a model that is no classifier"
        raise DataError(message, where=where, found=error.found, allowed=error.allowed, todo=todo) from None
