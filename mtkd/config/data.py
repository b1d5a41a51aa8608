"""Where examples come from and how they become ids: the `data` blocks."""

from __future__ import annotations

from collections.abc import Collection
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtkd.config.base import Config, Length, Positive, Seed, Share
from mtkd.config.composed import ComposedConfig
from mtkd.config.infill import InfillConfig
from mtkd.config.source import MIX, RANDOM_TOKENS, STAGE


class TransferConfig(Config):
    """Training tokens that are made up: a transfer set for teachers, with less or no real data."""

    tokens: Literal["uniform", "frequency", "shuffled"] = Field(
        description="uniform: any id equally likely; frequency: ids as often as in the train split; shuffled: each "
        "text's own tokens in another order"
    )
    share: Share = Field(1.0, description="share of the ordinary tokens that is replaced, or takes part in the shuffle")


class SpecialistConfig(Config):
    """Data of a teacher that knows some classes, and all others as one."""

    classes: tuple[str, ...] = Field(description="its own classes, in order; every other label becomes `other`")
    other: str = Field("other", description="the class of all other labels; a teacher names it in `other`")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="share of the train split's rows of other classes that is kept, chosen by the seed"
    )

    @model_validator(mode="after")
    def _names_once(self) -> SpecialistConfig:
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes names each class of the specialist once, and at least one")
        if self.other in self.classes:
            raise ValueError(f"{self.other!r} is both a class of the specialist and `other`: give `other` another name")
        return self


_LAW = 2
"""Version of the law of glm-infill's blanks: what was made with another one is made again."""

BLANK = "[MASK]"
"""The place of the answer in a cloze."""

_SAID_WHEN_SET = (
    "cloze",
    "verbalizers",
    "infill",
    "redraw",
    "label_kind",
    "name",
    "domain",
    "separator",
    "columns",
    "specialist",
    "skip",
    "messages",
    "mask_history",
    "prompts_only",
    "mix",
    "stream",
    "stream_buffer",
    "stage",
)
"""Fields that tell data from others only where they are set; the fields before them always do."""


class DataConfig(ComposedConfig):
    """Where examples come from, what is asked of them, and how they become batches of ids."""

    transfer: TransferConfig | None = Field(
        None, description="replace or shuffle the tokens of the train split (validation and test stay real)"
    )
    task: str = Field(
        "causal-lm",
        description="registered task (`mtkd ls tasks`): causal-lm, masked-lm, classify, glm-infill, glm-cloze",
    )
    text: str = Field("text", description="column of the (first) text")
    prompt: str | tuple[str, ...] | None = Field(
        None,
        description="causal-lm: column of the prompt, or a template of columns such as "
        '"{instruction}\\n{input}\\n" (double quotes: within single ones YAML keeps a backslash and an n); it is read '
        "but never predicted, `text` is the response, and a row is one example; of a list ([instruction, input]) "
        "each stands on lines of its own, and one whose columns are empty is left out",
    )
    chat: bool = Field(
        False,
        description="with prompt: prompt and response are the turns of the tokenizer's chat template",
    )
    messages: str | None = Field(
        None,
        description="causal-lm: column of the turns of a chat, a list of {role, content} or ShareGPT's {from, value}; "
        "the tokenizer's chat template writes them, every assistant turn is predicted, all others are read",
    )
    mask_history: bool = Field(
        False, description="with messages: predict the last assistant turn alone; earlier ones are read"
    )
    prompts_only: bool = Field(
        False,
        description="with prompt or messages: prompts without answers, for texts that models write; `text` is not "
        "read, and a chat ends with a turn to answer",
    )
    text_pair: str | None = Field(None, description="column of the second text, classify only")
    label: str = Field("label", description="column of the label, classify and glm-cloze")
    labels: tuple[str, ...] = Field(
        (),
        description="class names in order; default: sorted values of the whole train split, or the classes of the "
        "teachers where it has no labels (glm-cloze: names of verbalizers)",
    )
    specialist: SpecialistConfig | None = Field(
        None,
        description="classify: of a file with all labels make the data of a specialist: {classes: [a, b]} makes every "
        "other label the class `other`",
    )
    label_kind: Literal["auto", "class", "number"] = Field(
        "auto",
        description="classify: what labels are: names of classes, numbers of a regression, or as their values tell; "
        "`mtkd plan` says what was found and why",
    )
    name: str | None = Field(
        None, description="column that names each row in the scores, each name once; default: the row's number"
    )
    domain: str | None = Field(
        None, description="column of each row's domain: scores are reported for each, too; default: none"
    )
    cloze: str | None = Field(
        None,
        description='glm-cloze: template of columns with one blank, such as "{premise}? [MASK], {hypothesis}"; of a '
        "text that is too long the longest column is cut, never the blank",
    )
    verbalizers: dict[str, str] = Field(
        default_factory=dict,
        description="glm-cloze: what each class puts into the blank, one or more words; with the space before them "
        'where the tokenizer keeps spaces: {yes: " Yes", no: " No"}',
    )
    infill: InfillConfig = Field(InfillConfig(), description="glm-infill: the mixture of objectives")
    redraw: bool = Field(
        True,
        description="masked-lm, glm-infill: draw again in every epoch what is asked for; false: once for all epochs, "
        "so that teachers can be cached",
    )
    teacher: str = Field("teacher", description="column that names each row's teacher; read by weighting: route")
    max_length: Length = Field(
        128,
        description="tokens per example, special ones included; language-model tasks cut longer documents into blocks",
    )
    mask_share: Share = Field(
        0.15,
        description="masked-lm: share of tokens selected as targets; glm-infill: least share in spans or sentences",
    )
    next_sentence: bool = Field(
        False,
        description="masked-lm: pairs of segments, half of them from another document, with the label which; the model "
        "gets a next-sentence head (bert) and rows may read nsp_logits",
    )
    validation_share: Share = Field(
        0.0, description="share of the train split held out as validation when the source has none"
    )
    limit: dict[Literal["train", "validation", "test"], Positive] = Field(
        default_factory=dict, description="at most this many documents or rows per split, chosen by the seed"
    )
    skip: dict[Literal["train", "validation", "test"], Positive] = Field(
        default_factory=dict, description="first leave out the rows that a `limit` of this number would take"
    )
    seed: Seed = Field(0, description="of stream, hold-out, limit, masking, sentence pairs and made-up tokens")

    # What `mix` names; `mtkd.config.mix` sets it when the whole run is known.

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        _check_mix(self)
        _check_stream(self)
        _check_labels(self)
        _check_messages(self)
        _check_prompt(self)
        _check_cloze(self)
        return self

    def values(self, without: Collection[str] = ()) -> dict[str, Any]:
        """The fields as plain values, by which stages, caches and scores differ from others.

        A field of `_SAID_WHEN_SET` stands there only where it is not its default.
        """
        defaults = {n: type(self).model_fields[n].get_default(call_default_factory=True) for n in _SAID_WHEN_SET}
        unsaid = [name for name, default in defaults.items() if getattr(self, name) == default]
        said = self.model_dump(mode="json", exclude={*without, *unsaid})
        if self.task == "glm-infill":
            said["infill"] = {**self.infill.model_dump(mode="json"), "law": _LAW}
        if self._parts:
            said["parts"] = {name: part.values(without) for name, part in self._parts.items()}
        return said

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in order, as far as the configuration names them."""
        if self.specialist is not None:
            return (*self.specialist.classes, self.specialist.other)
        return self.labels or tuple(sorted(self.verbalizers))

    @property
    def text_columns(self) -> tuple[str, ...]:
        """The columns that are read as text, a second text aside; each once."""
        if self.cloze is not None:
            return tuple(dict.fromkeys(name for _, name in prompt_parts(self.cloze, "cloze") if name is not None))
        if self.messages is not None:
            return (self.messages,)
        return self.prompt_columns if self.prompts_only else (self.text, *self.prompt_columns)

    @property
    def filled_columns(self) -> tuple[str, ...]:
        """The columns of a language model's texts of which at least one is not blank, or the row is left out."""
        return self.text_columns if self.messages is not None or self.prompts_only else (self.text,)

    @property
    def templated(self) -> bool:
        """Whether the tokenizer's chat template writes the texts."""
        return self.chat or self.messages is not None

    @property
    def prompted(self) -> bool:
        """Whether examples are a prompt that is read and an answer."""
        return self.prompt is not None or self.messages is not None

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that the prompt is made of."""
        parts = (part for line in self.prompt_lines for part in prompt_parts(line))
        return tuple(name for _, name in parts if name is not None)

    @property
    def prompt_lines(self) -> tuple[str, ...]:
        """The templates that the prompt is made of."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt or ()

    @property
    def noise(self) -> TransferConfig | None:
        """How the train split's tokens are replaced; None where they are read."""
        return TransferConfig(tokens="uniform") if self.source == RANDOM_TOKENS else self.transfer

    @property
    def labelled(self) -> bool:
        """Whether the train split's labels mean anything: not where every token was sampled."""
        noise = self.noise
        return noise is None or noise.share < 1 or (noise.tokens == "shuffled" and self.task == "classify")


def _check_mix(config: DataConfig) -> None:
    if (config.source == MIX) != bool(config.mix):
        raise ValueError("source: mix and mix: {NAME: weight, ...}, the data that are mixed, go together")
    if (config.source == STAGE) != bool(config.stage):
        raise ValueError("source: stage and stage: NAME, which writes them, go together")
    if config.source in (MIX, STAGE) and config.transfer is not None:
        raise ValueError("transfer: of each data that are mixed, not of the mix")
    if config.source == MIX and config.mask_history:
        raise ValueError("mask_history: of each data that are mixed, not of the mix")


def _check_stream(config: DataConfig) -> None:
    if not config.stream:
        if "stream_buffer" in config.model_fields_set and config.stream_buffer != 1_000:
            raise ValueError("stream_buffer goes with stream: {train: ROWS}")
        return
    if unread := [split for split in config.splits if split not in config.stream]:
        raise ValueError(f"stream says which splits are read: give {unread[0]} its rows there, or drop it from splits")


def _check_labels(config: DataConfig) -> None:
    if config.label_kind == "number" and config.labels:
        raise ValueError("label_kind: number is a regression, which has no class names: drop labels or label_kind")
    if config.specialist is not None:
        if config.label_kind == "number" or config.source == RANDOM_TOKENS:
            raise ValueError("specialist makes one class of several labels, and here labels are no classes: drop it")
        unknown = [name for name in config.specialist.classes if config.labels and name not in config.labels]
        if unknown:
            raise ValueError(f"specialist.classes has {unknown[0]!r}, which is not in labels")
    if config.transfer is not None and config.transfer.tokens == "shuffled" and config.text_pair:
        raise ValueError("transfer: shuffled would move tokens from one text of a pair to the other")


def _check_messages(config: DataConfig) -> None:
    if config.messages is None:
        if config.mask_history:
            raise ValueError("mask_history goes with `messages`: a prompt has one answer")
        return
    if not config.messages.strip():
        raise ValueError("messages is the name of a column; leave it out for plain text")
    if told := [name for name in ("prompt", "chat", "text") if name in config.model_fields_set]:
        raise ValueError(f"messages holds all turns, and a chat template always writes them: drop {', '.join(told)}")
    if config.mask_history and config.prompts_only:
        raise ValueError("prompts_only has no answer to predict: drop mask_history")
    if config.source == RANDOM_TOKENS or config.transfer is not None:
        raise ValueError("chats go with real texts; drop messages, or transfer and random-tokens")


def _check_prompt(config: DataConfig) -> None:
    if config.prompt is None:
        if config.chat:
            raise ValueError("chat goes with `prompt`: the user's turn")
        if config.prompts_only and config.messages is None:
            raise ValueError("prompts_only goes with `prompt` or `messages`")
        return
    if config.prompts_only and "text" in config.model_fields_set:
        raise ValueError("prompts_only does not read `text`: drop one of them")
    if not config.prompt_columns or "" in config.prompt_columns:
        raise ValueError("prompt is the name of a column or a template; leave it out for plain text")
    if any("\\n" in line for line in config.prompt_lines):
        raise ValueError("prompt has a backslash and an n, not the end of a line: write it in double quotes")
    if config.text in config.prompt_columns and not config.prompts_only:
        raise ValueError(f"the prompt holds the response: column {config.text!r} is `text`")
    if config.source == RANDOM_TOKENS or config.transfer is not None:
        raise ValueError("prompts go with real texts; drop prompt, or transfer and random-tokens")


def _check_cloze(config: DataConfig) -> None:
    if config.cloze is None:
        return
    if "\\n" in config.cloze:
        raise ValueError("cloze has a backslash and an n, not the end of a line: write it in double quotes")
    parts = prompt_parts(config.cloze, "cloze")
    if "{" not in config.cloze or sum(text.count(BLANK) for text, _ in parts) != 1:
        raise ValueError(f"cloze is a template of columns in braces with one {BLANK}, not {config.cloze!r}")
    if config.source == RANDOM_TOKENS or config.transfer is not None:
        raise ValueError("a cloze goes with real texts; drop transfer and random-tokens")


def prompt_parts(prompt: str, what: str = "prompt") -> list[tuple[str, str | None]]:
    """Text and the column after it, in order; a prompt without braces is one column.

    Args:
        what: what the template is, for messages.

    Raises:
        ValueError: braces that do not close, no column, a conversion or a format.
    """
    if "{" not in prompt and "}" not in prompt:
        return [("", prompt)]
    parts: list[tuple[str, str | None]] = []
    for text, name, form, conversion in Formatter().parse(prompt):
        if name is not None and (not name or form or conversion):
            raise ValueError(f"a field of a {what} is the bare name of a column in braces, not {prompt!r}")
        parts.append((text, name))
    if all(name is None for _, name in parts):
        raise ValueError(f"the {what} {prompt!r} names no column")
    return parts
