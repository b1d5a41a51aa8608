"""A model: loaded, cut from a loaded one, or fresh."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, model_validator

from mtkd.config.base import Config, Layers, Length, Share, Width
from mtkd.config.refs import StageRef


class VocabularyConfig(Config):
    """A student with a part of the ids: the most frequent are kept, the others are read as the kept one most alike."""

    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        description="share of the tokenizer's ids that stay, special ones included"
    )
    counts: str = Field(
        "",
        description="name of the `data` entry whose train split the ids are counted in; may be left out when only one",
    )
    always: tuple[str, ...] = Field(
        (), description="words whose ids stay however rare they are; those of class names of `counts` always do"
    )


class SliceConfig(Config):
    """The shape of a narrower model cut from a loaded one; see mtkd/models/cut.py for what is kept."""

    width: Width | None = Field(None, description="hidden width, the first columns; default: the loaded model's")
    heads: Width | None = Field(
        None,
        description="attention heads, evenly spaced; must divide the width; default: as many as keep the head width",
    )
    kv_heads: Width | None = Field(
        None, description="llama, qwen2: key/value heads; default: groups as large as the loaded model's"
    )
    intermediate: Width | None = Field(
        None, description="feed-forward units, the first ones; default: in proportion to the width"
    )

    @model_validator(mode="after")
    def _something(self) -> SliceConfig:
        if not self.model_fields_set:
            raise ValueError("a slice needs width, heads or intermediate")
        return self


class ModelConfig(Config):
    """A model: loaded from `path`, cut from a loaded model, or fresh from a short description."""

    path: str | None = Field(
        None,
        description="folder, hub id, card name in teachers/, stage:NAME or stage:NAME/MEMBER, or a folder of an "
        "installed Python package: package:NAME/FOLDER",
    )
    revision: str | None = Field(None, description="hub: branch, tag or commit")
    keep_layers: tuple[Layers, ...] | None = Field(
        None, description="with path: copy only these layers (counted from 1) of the loaded model"
    )
    slice: SliceConfig | None = Field(
        None, description="with path: cut the loaded model (after keep_layers) to a smaller width, fewer heads"
    )
    vocabulary: VocabularyConfig | None = Field(
        None,
        description="keep a part of the ids; alike are ids in the input embedding of the loaded model, for a fresh one "
        "in that of its stage's first teacher",
    )
    architecture: str | None = Field(
        None, description="fresh: bert, roberta, distilbert, gpt2, llama, qwen2, glm_blocklm"
    )
    layers: Layers | None = Field(None, description="fresh: number of layers")
    width: Width | None = Field(None, description="fresh: hidden width")
    heads: Width | None = Field(None, description="fresh: attention heads; must divide the width")
    kv_heads: Width | None = Field(None, description="fresh llama, qwen2: key/value heads; default: heads")
    intermediate: Width | None = Field(
        None, description="fresh: feed-forward width; default 4 x width (llama, qwen2: 8/3 x width)"
    )
    max_positions: Length | None = Field(
        None, description="fresh: longest sequence in tokens; default: the data's max_length"
    )
    tie_embeddings: bool = Field(True, description="fresh: output head shares the embedding matrix")
    dropout: Share | None = Field(
        None, description="dropout share while training; default: the model's own (fresh: 0.0)"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        shape = [
            n for n in ("layers", "width", "heads", "kv_heads", "intermediate", "max_positions") if getattr(self, n)
        ]
        if self.path is not None and "tie_embeddings" in self.model_fields_set:
            raise ValueError("a loaded model ties its embeddings or not; drop tie_embeddings")
        if self.path is None and self.revision is not None:
            raise ValueError("revision goes with path")
        if (self.path is None) == (self.architecture is None):
            raise ValueError("give either `path` (loaded) or `architecture` (fresh)")
        if self.path is not None and shape:
            raise ValueError(
                f"a loaded model has its own {', '.join(shape)}; cut it with keep_layers and slice: "
                "{width, heads, kv_heads, intermediate}"
            )
        if self.architecture is not None:
            missing = [n for n in ("layers", "width", "heads") if getattr(self, n) is None]
            if missing:
                raise ValueError(f"a fresh model needs {', '.join(missing)}")
            if self.is_cut:
                raise ValueError("keep_layers and slice go with path")
            if self.width % self.heads:  # type: ignore[operator]
                raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")
            if self.kv_heads and self.heads % self.kv_heads:  # type: ignore[operator]
                raise ValueError(f"{self.kv_heads} key/value heads do not divide {self.heads} heads")
        return self

    @cached_property
    def stage(self) -> StageRef | None:
        """The earlier stage that makes the model, or the cache; None for a model from elsewhere, and a fresh one."""
        return StageRef.parse(self.path)

    @property
    def is_cut(self) -> bool:
        """Whether some of a loaded model's layers or width are left out."""
        return self.keep_layers is not None or self.slice is not None
