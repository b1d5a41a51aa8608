"""A teacher of the pool: one block per backend, chosen by the key `backend`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, TypeAdapter, field_validator, model_validator

from mtkd.config.base import Config, Name, Temperature
from mtkd.config.calibrate import CalibrateConfig, calibrate_block
from mtkd.config.model import ModelConfig
from mtkd.config.refs import STAGE_PREFIX
from mtkd.errors import nearest

DEFAULT_DOMAIN = "default"
"""As a teacher's domain: the texts whose domain no teacher names."""

Classes = tuple[str | None, ...] | dict[str, str | None]
"""What a classifier's outputs stand for: the data's class per output, or {OUTPUT: class}."""


_Calibrate = bool | Temperature | CalibrateConfig | None


class ShardedConfig(Config):
    """The ZeRO-3 engine of a sharded teacher; each teacher has its own, at any ZeRO stage of the student."""

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


class Teacher(Config):
    """What every teacher of the pool has.

    Attributes:
        no_cache: why a cache stage cannot run a teacher of this backend, behind its name; "" where it can.
    """

    no_cache: ClassVar[str] = ""

    name: Name = Field(
        "",
        description="name in metrics and options; default: the last part of the model's path",
        validate_default=False,
    )
    domain: str | tuple[str, ...] = Field(
        (),
        description="teaches texts of this domain alone, or of several: those that have it in the column "
        f"`data.NAME.domain`; {DEFAULT_DOMAIN}: those whose domain no teacher names. Default: every text",
    )
    calibrate: Annotated[
        CalibrateConfig | None, BeforeValidator(calibrate_block, json_schema_input_type=_Calibrate)
    ] = Field(
        None,
        description="divide its logits by a temperature before weights, rows, caches and ensembles read them: true "
        "(fitted on the validation labels), a number, or a block",
    )

    @field_validator("domain")
    @classmethod
    def _some_domains(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        named = (value,) if isinstance(value, str) else value
        if len(set(named)) < len(named) or not all(name.strip() for name in named):
            raise ValueError("domain names each domain that the teacher teaches once; leave it out for all texts")
        return value

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that it names; () for every text."""
        return (self.domain,) if isinstance(self.domain, str) else self.domain

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """A string is a model's path; a key of another backend is refused by the backend that it belongs to."""
        if isinstance(value, str):
            value = {"model": value}
        if not isinstance(value, dict):
            return value
        backend = value.get("backend", RESIDENT)
        others = {key for key in _ONLY if key in value and key not in cls.model_fields}
        if given := [key for key in _ONLY if key in others and value[key] is not None]:
            own = cls is OwnTeacher
            raise ValueError(_perhaps(backend) + _UNREAD[given[0]] if own else _ONLY[given[0]].format(backend=backend))
        value = {key: item for key, item in value.items() if key not in others}
        if not value.get("name"):
            model = value.get("model")
            path = model.get("path") if isinstance(model, dict) else model
            if isinstance(path, str):
                value["name"] = path.removeprefix(STAGE_PREFIX).rstrip("/").split("/")[-1]
            elif model is None and cls is OwnTeacher:
                value["name"] = backend
        return value


class ModelTeacher(Teacher):
    """A model that runs.

    Attributes:
        whole: its weights are read from its files as they are.
    """

    whole: ClassVar[bool] = False

    model: ModelConfig = Field(description="a folder, hub id, card or stage:NAME")
    backend: str
    classes: Classes | None = Field(
        None,
        description="classify: what its outputs stand for: the data's class per output in its order, null for one "
        "without ([negative, null, positive]); or {OUTPUT: class}, the others have none; outputs without a class are "
        "dropped before the softmax. Default: by name, else by position",
    )
    other: str | tuple[str, ...] = Field(
        (),
        description="classify: a specialist's output that means `none of my classes`, by name or number; it is dropped "
        "before the softmax too, weighting: abstain reads its probability, and classes of the data without an output "
        "have probability 0",
    )

    @field_validator("other", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """One output may stand without a list."""
        values = value if isinstance(value, list | tuple) else () if value is None else (value,)
        return tuple(map(_class_text, values))

    @field_validator("other")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or not all(name.strip() for name in value):
            raise ValueError("other names each output that means `none of my classes` once")
        return value

    @property
    def others(self) -> tuple[str, ...]:
        """The outputs that `other` names."""
        return (self.other,) if isinstance(self.other, str) else self.other

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

    @model_validator(mode="after")
    def _model_fits(self) -> ModelTeacher:
        _check_vocabulary(self.model)
        if self.whole and self.model.is_cut:
            raise ValueError(f"a {self.backend} teacher is read from its files as it is; drop keep_layers and slice")
        return self


class ResidentTeacher(ModelTeacher):
    """A teacher whose weights are next to the student's."""

    backend: Literal["resident"] = Field("resident", description="its weights are in memory with the student's")


class OffloadTeacher(ModelTeacher):
    """A teacher whose weights wait outside the device's memory."""

    no_cache = ": a cache stage has one teacher in memory at a time; drop backend, or set it to streamed"

    backend: Literal["offload"] = Field(
        description="its weights are in host memory (GPU) or a mapped file in the run folder (CPU), on the device only "
        "while it runs"
    )


class StreamedTeacher(ModelTeacher):
    """A teacher whose weights stay in the files of its folder."""

    whole = True

    backend: Literal["streamed"] = Field(
        description="its weights stay in its own safetensors files, one layer at a time in memory: a batch reads all "
        "of them once"
    )


class ShardedTeacher(ModelTeacher):
    """A teacher that has a part of its weights on every process."""

    no_cache = (
        ": the processes of a cache stage take unequal numbers of batches, and a sharded teacher needs all of them for "
        "each; drop backend, or set it to streamed"
    )
    whole = True

    backend: Literal["sharded"] = Field(
        description="a part of its weights is on every process, gathered layer by layer (engine.kind: deepspeed)"
    )
    sharded: ShardedConfig | None = Field(None, description="its ZeRO-3 engine")


class CacheTeacher(Teacher):
    """A teacher that is not run: a cache has its outputs."""

    no_cache = " is a cache already; name it in the stage that reads it"

    model: ModelConfig = Field(description="stage:CACHESTAGE/TEACHER, or the folder of a cache")
    backend: Literal["cached"] = Field(description="its outputs are read from a cache (kind: cache), and it is not run")

    @property
    def classes(self) -> None:
        """A cache has the classes of the data."""
        return None

    @property
    def others(self) -> tuple[str, ...]:
        """A cache knows by itself which logits mean none of them."""
        return ()

    @model_validator(mode="after")
    def _plain(self) -> CacheTeacher:
        _check_vocabulary(self.model)
        if more := sorted(self.model.model_fields_set - {"path"}):
            raise ValueError(f"a cached teacher is read as it was written; drop model.{more[0]}")
        return self


class OwnTeacher(Teacher):
    """A teacher of the user's own, registered by `@mtkd.teacher`."""

    model: ModelConfig = Field(
        default_factory=ModelConfig.model_construct,
        description="folder, hub id or stage:NAME that it reads, where it reads one",
    )
    backend: Name = Field(
        description="registered by a plug-in: @mtkd.teacher(NAME)", json_schema_extra=lambda schema: _not_ours(schema)
    )
    options: dict[str, Any] = Field(default_factory=dict, description="checked against its constructor's parameters")

    @property
    def classes(self) -> None:
        """It answers in the order of the data's classes."""
        return None

    @property
    def others(self) -> tuple[str, ...]:
        """It has an output per class of the data, and no others."""
        return ()

    @model_validator(mode="after")
    def _reads_itself(self) -> OwnTeacher:
        if more := sorted(self.model.model_fields_set - {"path", "revision"}):
            raise ValueError(
                f"{_perhaps(self.backend)}a teacher of your own reads its model itself; drop model.{more[0]}"
            )
        return self


RESIDENT = "resident"
OWN = "own"
"""Tag of the block of a teacher whose backend is no built-in one."""

_BLOCKS: dict[str, type[Teacher]] = {
    RESIDENT: ResidentTeacher,
    "offload": OffloadTeacher,
    "streamed": StreamedTeacher,
    "sharded": ShardedTeacher,
    "cached": CacheTeacher,
}
BUILT_IN = tuple(_BLOCKS)
"""The backends that a configuration can name without a plug-in."""

# Keys that some backends have and others do not, and the message where one is set that its backend does not read.
_ONLY = {
    "sharded": "sharded is for backend: sharded, not for {backend}; drop it",
    "classes": "a cache holds the logits of the data's classes; give classes where the cache is made",
    "other": "a cache keeps the output that means none of the classes; give other where the cache is made",
    "options": "options is for a teacher of your own, not for backend: {backend}; drop it",
}

_UNREAD = {
    "sharded": "sharded is for backend: sharded, not for a teacher of your own; drop it",
    "classes": "classes is for models: a teacher of your own answers in the order of the data's classes; drop it",
    "other": "other is for models: a teacher of your own answers for the data's classes alone; drop it",
}


def _perhaps(backend: Any) -> str:
    """The first part of a message where the name of a built-in backend may be misspelled; "" for any other name."""
    guess = nearest(backend, BUILT_IN) if isinstance(backend, str) else ""
    return f"unknown backend '{backend}'; {guess} Or, if a plug-in has it: " if guess else ""


def _not_ours(schema: dict[str, Any]) -> None:
    """The name of a built-in backend is none of a plug-in's: editors then know which block they are in."""
    schema["not"] = {"enum": list(BUILT_IN)}


def _tag(value: Any) -> str:
    backend = value.get("backend", RESIDENT) if isinstance(value, dict) else getattr(value, "backend", RESIDENT)
    return backend if backend in BUILT_IN else OWN


TeacherConfig = Annotated[
    Annotated[ResidentTeacher, Tag(RESIDENT)]
    | Annotated[OffloadTeacher, Tag("offload")]
    | Annotated[StreamedTeacher, Tag("streamed")]
    | Annotated[ShardedTeacher, Tag("sharded")]
    | Annotated[CacheTeacher, Tag("cached")]
    | Annotated[OwnTeacher, Tag(OWN)],
    Discriminator(_tag),
]
"""One teacher of the pool."""


def teacher_config(values: Any) -> TeacherConfig:
    """A teacher from plain values; a string is its model's path.

    Raises:
        ValidationError: as any block of the configuration.
    """
    return _ADAPTER.validate_python(values)


_ADAPTER: TypeAdapter[TeacherConfig] = TypeAdapter(TeacherConfig)


def _check_vocabulary(model: ModelConfig) -> None:
    if model.vocabulary is not None:
        raise ValueError("vocabulary is for students: a teacher predicts the whole vocabulary")


def _class_text(value: Any) -> Any:
    """A class as text, as labels are read from files: true is "true", 1.0 is "1"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, int | float) else value
