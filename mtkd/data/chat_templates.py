"""Chat templates that a run can give its tokenizer: built-in ones by name, or a file of jinja.

All built-in ones mark the assistant's words with `{% generation %}`. What ends an answer is the special token that the
template writes behind it; a tokenizer that the run trains has it as its end token, so that plain texts end alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mtkd.data.chat import check_chat_template, write_turns
from mtkd.errors import DataError, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LARGEST = 1_000_000
"""Bytes of a file; the longest published templates have about ten thousand."""
_WHERE = "tokenizer.chat_template"
_CALLS = "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"


@dataclass(frozen=True)
class ChatTemplate:
    """A template of jinja, and the special tokens that it writes in addition to beginning and end tokens."""

    text: str
    tokens: tuple[str, ...] = ()


# A line end straight behind a block is dropped by `trim_blocks`, with which templates are read.
BUILT_IN = {
    # Qwen's and SmolLM's turns, without a system turn of its own
    "chatml": ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}" + _CALLS + "<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    # Llama 3's turns, without its date
    "llama3": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}" + _CALLS + "<|eot_id|>"
        "{% endgeneration %}{% else %}{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    # Alpaca's headings in plain letters: no token of its own
    "alpaca": ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% elif m.role == 'tool' %}### Input:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{% generation %}{{ m.content }}"
        + _CALLS
        + "{{ eos_token }}{% endgeneration %}{{ '\n\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


def find_template(setting: str, base: Path) -> ChatTemplate:
    """The template of `tokenizer.chat_template`: a built-in name, or a file next to the run's or in the working folder.

    Raises:
        UserError: neither.
        DataError: the file is empty, too large or no text.
    """
    if setting in BUILT_IN:
        return BUILT_IN[setting]
    file = next((path for path in (base / setting, Path(setting)) if path.is_file()), None)
    if file is None:
        todo = nearest(setting, BUILT_IN) or "name a built-in template, or correct the path"
        raise UserError(
            "no such chat template", where=_WHERE, found=setting, allowed=[*BUILT_IN, "a file of jinja"], todo=todo
        )
    if (size := file.stat().st_size) > _LARGEST:
        raise DataError("the file is too large for a chat template", where=_WHERE, found=f"{setting}: {size:,} bytes")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("the chat template is not UTF-8", where=_WHERE, found=f"{setting}: {error.reason}") from error
    if not text.strip():
        raise DataError("the chat template is empty", where=_WHERE, found=setting)
    return ChatTemplate(text)


def give_template(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, tokens: Sequence[str] = (), *, trained: bool
) -> None:
    """Give a tokenizer a chat template; a trained one ends texts with what the template writes behind an answer.

    Args:
        tokens: further special tokens of the configuration. trained: whether the run trains it, with all tokens.
    Raises:
        DataError: the template cannot be relied on, or nothing ends an answer; or a tokenizer that was loaded lacks a
            token, for which no model has a row.
    """
    for token in (*template.tokens, *tokens):
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [tokenizer.get_vocab().get(token)]:
            raise DataError(
                "the tokenizer lacks a token of the chat template, and its models have no row for it",
                where=_WHERE,
                found=token,
                todo="choose a template for this tokenizer, or train one: tokenizer.train_on",
            )
    tokenizer.chat_template = template.text
    check_chat_template(tokenizer, _WHERE)
    end = turn_end(tokenizer)
    if end is None:
        raise DataError(
            "nothing ends an answer of the chat template: a model would never learn to stop",
            where=_WHERE,
            found=write_turns(tokenizer, ["ab"], ["cd"], lambda _: _WHERE)[1][0],
            allowed="a special token behind the text of the assistant's turn",
            todo="write {{ eos_token }} behind it"
            + (", or name the token that stands there in tokenizer.special_tokens" if trained else ""),
        )
    if trained:
        tokenizer.eos_token = str(tokenizer.convert_ids_to_tokens(end))


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes behind an answer; None where it writes none."""
    added = write_turns(tokenizer, ["ab"], ["cd"], lambda _: "tokenizer")[1][0]
    ids = tokenizer(added, add_special_tokens=False)["input_ids"]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in special), None)
    if last is None or str(tokenizer.decode(ids[last + 1 :])).strip():
        return None
    return int(ids[last])
