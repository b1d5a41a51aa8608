"""The tokenizer of a run: loaded, or trained on the run's own texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

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

    chat_template: str | None = Field(
        None,
        description="how turns of a chat are written: chatml, llama3, alpaca, or a file of jinja; a trained tokenizer "
        "gets its special tokens and ends texts as it ends an answer; default: that of a loaded tokenizer",
    )
    special_tokens: tuple[str, ...] = Field(
        (), description="further special tokens of a trained tokenizer, such as those of a template from a file"
    )

    @field_validator("special_tokens")
    @classmethod
    def _tokens_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for token in value:
            if not token.strip() or token != token.strip() or value.count(token) > 1:
                raise ValueError(f"each special token is a text of its own without space around it, not {token!r}")
        return value

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if (self.path is None) == (self.train_on is None):
            raise ValueError("give either `path` or `train_on`")
        if self.path is not None and self.commands != "plain":
            raise ValueError("commands: of a trained tokenizer; a loaded one has its own")
        if self.path is not None and self.special_tokens:
            raise ValueError(
                "special_tokens: of a trained tokenizer; models have no row for more tokens of a loaded one"
            )
        if self.commands == "glm" and (self.chat_template or self.special_tokens):
            raise ValueError("commands: glm has the special tokens of GLM; drop chat_template and special_tokens")
        return self
