"""Show a data entry in the plan: classes, rows, and the first examples as a model sees them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mtkd.config import DataConfig
from mtkd.data.batch import NO_LABEL
from mtkd.data.everyrow import look_at_rows
from mtkd.data.raw import Raw
from mtkd.data.split import Split
from mtkd.planning.data import DataFacts

_SHOWN = 2  # examples
_WIDEST, _CLASSES = 160, 12  # characters of a text, names of classes


@dataclass(frozen=True)
class PlannedExample:
    """An example: its decoded ids with special tokens, the answer, its number of tokens."""

    text: str
    asked: str
    tokens: int


@dataclass(frozen=True)
class PlannedData:
    """A data entry as the stages will see it.

    Attributes:
        labels: "2 classes", "numbers", or "" for token tasks.
        classes: names in order.
        why: how the classes were found.
        rows: split -> rows after hold-out and limit.
        labelled: split -> rows with a label.
        pad_token: of the tokenizer; "" for none.
        examples: the first ones of the train split.
        note: why there are no examples yet, or what cannot be read now.
        unread: shares of a mix; parts of the files that are ignored or cut, such as an index column, blank rows,
            prompts without room.
    """

    name: str
    task: str
    labels: str
    classes: tuple[str, ...]
    why: str
    rows: dict[str, int]
    labelled: dict[str, int]
    pad_token: str
    examples: tuple[PlannedExample, ...] = ()
    note: str = ""
    unread: tuple[str, ...] = ()


def view(
    name: str, config: DataConfig, facts: DataFacts, raw: Raw | None, tokenizer: PreTrainedTokenizerBase | None
) -> PlannedData:
    """Describe an entry for the plan.

    Args:
        raw: its rows; None where they cannot be read now.
        tokenizer: None while it does not exist.
    Raises:
        UserError, DataError: a row cannot be read, or tokenised for the task; naming the file and row.
    """
    labels = {"class": f"{len(facts.classes)} classes", "number": "numbers (a regression)"}.get(facts.kind, "")
    entry = PlannedData(
        name, config.task, labels, facts.classes, facts.why, dict(facts.rows), dict(facts.labelled),
        str(tokenizer.pad_token or "") if tokenizer is not None else "",
    )  # fmt: skip
    if raw is None:
        return replace(entry, note=facts.not_here)
    rows = look_at_rows(name, config, raw, tokenizer)
    entry = replace(entry, unread=(*_shares(config), *raw.notes, *rows.notes))
    if tokenizer is None:
        return replace(entry, note="examples are shown once the run's tokenizer is there")
    split = _split(raw)
    if split in rows.unmade:
        return replace(entry, note=rows.unmade[split])
    data = rows.splits[split]
    examples = (_example(data, index, config, tokenizer, facts) for index in range(min(_SHOWN, len(data))))
    return replace(entry, examples=tuple(examples))


def _example(
    split: Split, index: int, config: DataConfig, tokenizer: PreTrainedTokenizerBase, facts: DataFacts
) -> PlannedExample:
    batch = split.collate([index])
    ids, target = batch.input_ids[0][batch.attention_mask[0]], batch.targets[0]
    if target.dim() == 0:
        value = target.item()
        missing = value != value or value == NO_LABEL
        answer = "no label" if missing else facts.classes[int(value)] if facts.classes else f"{value:g}"
    else:
        labels = target[target != NO_LABEL]
        every = len(labels) == len(ids) and config.task == "causal-lm"
        answer = "every next token" if every else _short(str(tokenizer.decode(labels)))
        answer = "a prompt alone" if config.prompts_only else answer
    return PlannedExample(_short(str(tokenizer.decode(ids))), answer, len(ids))


def _shares(config: DataConfig) -> list[str]:
    """What an epoch of a mix is made of, in words; the numbers of examples are known with the tokenizer alone."""
    total = sum(config.mix.values())
    return [f"an epoch: {', '.join(f'{name} {config.mix[name] / total:.1%}' for name in config.parts)}"] * bool(total)


def _split(raw: Raw) -> str:
    return "train" if "train" in raw.splits else next(iter(raw.splits))


def _short(text: str) -> str:
    """The beginning of a text, with characters that do not print escaped."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: _WIDEST + 1])
    return text if len(text) <= _WIDEST else f"{text[:_WIDEST]}..."


def data_tables(data: list[PlannedData]) -> list[Table]:
    """The tables for the terminal."""
    table = Table("data", "task", "rows", "labels", "why", "pad token", title="data")
    examples = Table("data", "tokens", "example, as the model sees it", "asked", title="first examples")
    for each in data:
        rows = ", ".join(f"{split} {count:,}{_unlabelled(each, split)}" for split, count in each.rows.items())
        names = ", ".join(f"{i}: {name}" for i, name in enumerate(each.classes[:_CLASSES]))
        names += ", ..." if len(each.classes) > _CLASSES else ""
        labels = f"{each.labels}: {names}" if names else each.labels
        table.add_row(each.name, each.task, rows or "?", *map(escape, (labels, each.why, each.pad_token or "none")))
        for i, example in enumerate(each.examples):
            examples.add_row(
                each.name if i == 0 else "", str(example.tokens), escape(example.text), escape(example.asked)
            )
        for note in filter(None, (each.note, *each.unread)):
            examples.add_row(each.name, "", escape(note), "")
    return [table, examples]


def _unlabelled(data: PlannedData, split: str) -> str:
    count = data.rows[split] - data.labelled.get(split, data.rows[split])
    return f" ({count:,} without a label)" if count else ""
