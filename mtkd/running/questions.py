"""The held-out prompts that models answer, with the data's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.config import AnswersConfig
from mtkd.data.batch import NO_LABEL
from mtkd.data.split import Split
from mtkd.errors import DataError
from mtkd.evaluate.answers import make_extractor
from mtkd.models.sampling import Sampling
from mtkd.planning.answers import WHERE, answers_data
from mtkd.running.context import RunContext
from mtkd.running.sample import spread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Texts = list[dict[str, Any]]
"""A record per prompt, see `mtkd.evaluate.answers`."""


@dataclass(frozen=True)
class Prompts:
    """The prompts that are answered.

    Attributes:
        ids: run ids of each. records: document, domain, reference (the data's answer) and expected of each.
        left_out: documents whose reference is cut at `max_length`.
    """

    ids: list[list[int]]
    records: Texts
    left_out: int


def read_prompts(context: RunContext, asked: AnswersConfig, sampling: Sampling) -> Prompts:
    """The prompts, tokenised, evenly spread over the split.

    A prompt whose answer in the data was cut at `max_length` is left out: its end is not there to compare with.

    Raises:
        DataError: there is no such split, no prompt is left, or the extractor finds nothing in the data's answer.
        UserError: the function that extracts is not there.
    """
    name, wanted = answers_data(context.config)
    split = context.data(name).splits.get(wanted)
    if split is None:
        raise DataError("there is no such split to answer", where=f"data.{name}", found=wanted)
    examples, tokenizer = split.prompted, context.tokenizer
    assert examples is not None, "the data have prompts"
    extract = None
    if "exact_match" in asked.metrics:
        extract = make_extractor(asked.extract, context.config.base, f"{WHERE}.extract")
    most, ends = context.config.data[name].max_length, set(sampling.ends)
    ids, records, left_out = [], [], 0
    for index in spread(np.arange(len(split)), asked.examples).tolist():
        answer, reference = reference_of(split, index, tokenizer)
        if answer and split.lengths[index] >= most and answer[-1] not in ends:
            left_out += 1
            continue
        document = int(split.documents[index])
        expected = None if extract is None else extract(reference)
        if extract is not None and expected is None:
            raise DataError(
                "nothing is found in the data's answer to compare with",
                where=f"data.{name}, {wanted} split, row {split.document_names[document]!r}",
                found=repr(reference[:160]),
                todo=f"correct the row, or choose another {WHERE}.extract",
            )
        ids.append(examples.prompt(index).tolist())
        shown = {"document": split.document_names[document], "domain": split.document_domains[document]}
        records.append({**shown, "reference": reference, "expected": expected})
    if not ids:
        raise DataError(
            "no prompt is left: the end of every answer is cut",
            where=f"data.{name}, {wanted} split",
            todo="set a larger data.NAME.max_length",
        )
    return Prompts(ids, records, left_out)


def reference_of(split: Split, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """The data's (last) answer to the prompt of an example: its tokens, and its text without special ones."""
    examples = split.prompted
    assert examples is not None, "the data have prompts"
    _, targets, _ = examples.read(index, 0)
    assert isinstance(targets, np.ndarray)
    answer = [token for token in targets[len(examples.prompt(index)) - 1 :].tolist() if token != NO_LABEL]
    return answer, str(tokenizer.decode(answer, skip_special_tokens=True))
