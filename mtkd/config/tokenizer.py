"""The tokenizer of a run: loaded, or trained on the run's own texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mtkd.config.base import Config, Width


class TokenizerConfig(Config):
    """The one tokenizer of the run: loaded, or trained on the train split of a data entry."""

    path: str | None = Field(None, description="folder, hub id or package:NAME/FOLDER")
    train_on: str | None = Field(
        None, description="name of a `data` entry; a byte-level BPE is trained on its train split"
    )
    vocab_size: Width = Field(4096, description="ids of a trained tokenizer, special tokens included")
    commands: Literal["plain", "glm"] = Field(
        "plain", description="special tokens of a trained tokenizer: plain (<s>, <mask> and so on), or GLM's commands"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if (self.path is None) == (self.train_on is None):
            raise ValueError("give either `path` or `train_on`")
        if self.path is not None and self.commands != "plain":
            raise ValueError("commands: of a trained tokenizer; a loaded one has its own")
        return self
