"""Match the outputs of a classifier with the classes of the data, before weights are read."""

from __future__ import annotations

from mtkd.config import DataConfig
from mtkd.errors import DataError, UserError
from mtkd.models.classes import ClassMap, Meaning, match_classes
from mtkd.planning.data import DataFacts
from mtkd.registry import TASKS


def check_given(name: str, data: DataConfig, facts: DataFacts, where: str, key: str) -> None:
    """Refuse `classes` and `other` of a teacher whose outputs are not classes of their own.

    Args:
        name: of the `data` entry.
        where: place of the teacher.
        key: the field that the user has set.
    Raises:
        UserError: naming the task.
    """
    task, numbers = TASKS.find(data.task), facts.kind == "number"
    if task.token_level or task.cloze or numbers:
        why = "its labels are numbers" if numbers else f"task {data.task}"
        raise UserError(
            f"{key} is for classifiers: here the teacher's outputs are not classes of its own",
            where=f"{where}.{key}",
            found=f"data '{name}': {why}",
            todo="drop it",
        )


def earlier_classes(
    stage: str, source: DataFacts, target: DataFacts, where: str, meaning: Meaning, key: str
) -> ClassMap:
    """Match the outputs of an earlier stage's classifier with the classes of the data.

    Args:
        stage: name of the stage that makes the classifier.
        source: facts of the data that it learns from.
        target: facts of the data that it teaches, or goes on with.
        meaning: what the user says of its outputs.
        key: the user's field for it; see `match_classes`.
    Raises:
        DataError: the classes differ.
    """
    try:
        if source.kind != target.kind:
            raise DataError(
                "",
                where=where,
                found=", ".join(source.classes) or "numbers (a regression)",
                allowed=", ".join(target.classes) or "numbers (a regression)",
            )
        return match_classes(source.classes, target.classes, where, meaning.classes, key=key, other=meaning.other)
    except DataError as error:
        message = f"stage '{stage}' makes a classifier of other classes"
        todo = error.todo or "use data of the same classes, or go on from a model that is no classifier"
        raise DataError(message, where=where, found=error.found, allowed=error.allowed, todo=todo) from None
