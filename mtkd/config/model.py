"""Models: loaded, cut from a loaded one, or fresh; and the teachers of a pool."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mtkd.config.base import Config, Layers, Length, Name, Share, Width
from mtkd.config.refs import STAGE_PREFIX, StageRef


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
        None, description="folder, hub id, card name in teachers/, stage:NAME or stage:NAME/MEMBER"
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


class ShardedConfig(Config):
    """The ZeRO-3 engine of a sharded teacher; each teacher has its own, whatever the student's is."""

    prefetch_parameters: Annotated[int, Field(ge=0, le=1_000_000_000_000)] = Field(
        10_000_000,
        description="numbers (not bytes) that may be gathered at a time so that the next layers are there early; "
        "memory for twice as many on every rank; what a layer needs is gathered in any case; 0: nothing early",
    )
    whole_parameters: Annotated[int, Field(ge=0, le=1_000_000_000_000)] = Field(
        10_000,
        description="a parameter of at most so many numbers (norms, biases) is gathered once and stays whole on every "
        "rank; 0: none",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where a rank's part waits: none = on its device; cpu = in pinned host memory; nvme = in files, in "
        "float32",
    )
    nvme_path: str | None = Field(
        None,
        description="offload: nvme: folder on a local disk, as every node has it; relative to the working directory",
    )

    @model_validator(mode="after")
    def _path_of_nvme(self) -> ShardedConfig:
        if (self.offload == "nvme") != (self.nvme_path is not None):
            raise ValueError("offload: nvme and nvme_path go together")
        return self


class TeacherConfig(Config):
    """One teacher of the pool."""

    name: Name = Field(
        "",
        description="name in metrics and options; default: the last part of the model's path",
        validate_default=False,
    )
    model: ModelConfig = Field(
        description="a folder, hub id, card or stage:NAME; backend cached: stage:CACHESTAGE/TEACHER or a cache's folder"
    )
    backend: Literal["resident", "offload", "streamed", "sharded", "cached"] = Field(
        "resident",
        description="where its weights live: resident = with the student; offload = in host memory (GPU) or a mapped "
        "file in the run folder (CPU), on the device only while it runs; streamed = in its own safetensors files, one "
        "layer at a time in memory: a batch reads all of them once; sharded = a part on every process, gathered layer "
        "by layer (engine.kind: deepspeed); cached = nowhere: its outputs are read from a cache (kind: cache), and it "
        "is not run",
    )
    sharded: ShardedConfig | None = Field(None, description="backend sharded: its ZeRO-3 engine")
    classes: tuple[str | None, ...] | dict[str, str | None] | None = Field(
        None,
        description="classify: what its outputs stand for: the data's class per output in its order, null for one "
        "without ([negative, null, positive]); or {OUTPUT: class}, the others have none; outputs without a class are "
        "dropped before the softmax. Default: by name, else by position",
    )

    @field_validator("classes", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        """From Python a class may be a number or a boolean; of a YAML file the text as written arrives."""
        if isinstance(value, dict):
            return {_class_text(output): _class_text(name) for output, name in value.items()}
        return tuple(map(_class_text, value)) if isinstance(value, list | tuple) else value

    @field_validator("classes")
    @classmethod
    def _some_class(cls, value: Any) -> Any:
        named = list(value.values() if isinstance(value, dict) else value or ())
        if value is not None and not any(name is not None for name in named):
            raise ValueError("classes names no class of the data")
        return value

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"model": value}
        if isinstance(value, dict) and not value.get("name"):
            model = value.get("model")
            path = model.get("path") if isinstance(model, dict) else model
            if isinstance(path, str):
                value = {**value, "name": path.removeprefix(STAGE_PREFIX).rstrip("/").split("/")[-1]}
        return value

    @model_validator(mode="after")
    def _whole_vocabulary(self) -> TeacherConfig:
        if self.model.vocabulary is not None:
            raise ValueError("vocabulary is for students: a teacher predicts the whole vocabulary")
        return self

    @model_validator(mode="after")
    def _whole_files(self) -> TeacherConfig:
        if self.backend in ("streamed", "sharded") and self.model.is_cut:
            raise ValueError(f"a {self.backend} teacher is read from its files as it is; drop keep_layers and slice")
        if self.sharded is not None and self.backend != "sharded":
            raise ValueError(f"sharded is for backend: sharded, not for {self.backend}; drop it")
        return self

    @model_validator(mode="after")
    def _plain_cache(self) -> TeacherConfig:
        if self.backend == "cached" and self.classes is not None:
            raise ValueError("a cache holds the logits of the data's classes; give classes where the cache is made")
        if self.backend == "cached" and (more := sorted(self.model.model_fields_set - {"path"})):
            raise ValueError(f"a cached teacher is read as it was written; drop model.{more[0]}")
        return self


def _class_text(value: Any) -> Any:
    """A class as text, as labels are read from files: true is "true", 1.0 is "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) else value
