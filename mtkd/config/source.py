"""Where the rows of a `data` block come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mtkd.config.base import Config, Length, Name, Natural, Positive, Weight

MIX = "mix"
"""The data source whose rows are those of other `data` entries."""

STAGE = "stage"
"""The data source whose train split a `kind: generate` stage writes."""

RANDOM_TOKENS = "random-tokens"
"""The data source that reads nothing: every token of its texts is sampled."""


class SourceConfig(Config):
    """Where rows come from."""

    source: str = Field(description="registered source, of `mtkd ls sources`: files, hub, python-docstrings and others")
    path: str | None = Field(
        None,
        description="hub: dataset id; files: folder that the file names are relative to, or a saved data set",
    )
    subset: str | None = Field(None, description="hub: configuration name, e.g. sst2")
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    files: dict[Literal["train", "validation", "test"], str | tuple[str, ...]] = Field(
        default_factory=dict,
        description="files: per split a path, a pattern such as part-*.jsonl, or a list of them; .jsonl .json .csv "
        ".tsv .txt, also with .gz .bz2 .xz .zst behind it, .parquet, or a folder of save_to_disk",
    )
    separator: str | None = Field(
        None,
        description='files: what separates the values of .csv and .tsv files, such as ";" or "\t"; values are quoted',
    )
    columns: tuple[str, ...] = Field(
        (), description="files: the columns' names in order, for .csv and .tsv files without a header line"
    )
    splits: dict[Literal["train", "validation", "test"], str] = Field(
        default_factory=dict, description="hub: the source's name of each split (train, validation, test)"
    )
    stream: dict[Literal["train", "validation", "test"], Positive] = Field(
        default_factory=dict,
        description="hub: read so many rows of each split as a stream (`streaming=True` of `datasets`), such as "
        "{train: 100000}, without downloading the others, and keep them; only these splits are read",
    )
    stream_buffer: Natural = Field(
        1_000, description="rows of the buffer that shuffles a stream by `seed`; 0: rows come in their order"
    )
    domains: tuple[str, ...] = Field(
        (), description="python-stdlib: prose, code; python-docstrings: numbers, learning, tools; default: all"
    )
    documents: Length | None = Field(None, description="random-tokens: number of texts of about max_length tokens")
    stage: Name | None = Field(None, description="stage: the `kind: generate` stage that writes the train split")
    mix: dict[Name, Weight] = Field(
        default_factory=dict,
        description="mix: weight of each `data` entry that is mixed, such as {math: 2, chat: 1}: its share of the "
        "examples of an epoch; a domain per entry, unless its rows name theirs",
    )

    @field_validator("separator")
    @classmethod
    def _one_character(cls, value: str | None) -> str | None:
        value = {"\\t": "\t", "tab": "\t"}.get(value or "", value)
        if value is not None and (len(value) != 1 or value in '"\r\n' or value.isalnum()):
            raise ValueError(
                'a separator is one character that is no letter, digit or quote: ";", "|", "\\t" for a tab'
            )
        return value

    @field_validator("columns")
    @classmethod
    def _named_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not name.strip() or value.count(name) > 1:
                raise ValueError(
                    f"every column has a name of its own, and {name!r} is "
                    + ("there twice" if name.strip() else "none")
                )
        return value
