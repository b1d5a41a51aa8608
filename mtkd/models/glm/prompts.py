"""Texts with a blank, as inputs of `GLMForConditionalGeneration.generate`, and what it wrote into the blank.

    tokenizer = gpt2_tokenizer(vocab_json, merges_txt)
    inputs = blank_prompts(tokenizer, ["Ng is a professor at [MASK] in California."])
    output = model.generate(**inputs, max_new_tokens=32)
    pieces(tokenizer, output, inputs["input_ids"].shape[1])

Source: Du et al. 2022, GLM, arXiv 2103.10360, sections 2.1 and 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtkd.data.glm_tokens import BLANKS, END, START, command_ids
from mtkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def blank_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts with [MASK], [gMASK] or [sMASK] as the keyword arguments of `generate`, which fills each text's first one.

    Part A is the text as the tokenizer frames it, part B begins with <|startofpiece|> at the blank's position.
    Texts of unequal length are padded on the left.

    Returns:
        `input_ids` [B,L], `position_ids` [B,2,L], `attention_mask` [B,L], and `sep` [B], the length of part A.

    Raises:
        UserError: no texts, or one without a blank.
        DataError: a tokenizer without GLM's commands.
    """
    if not texts:
        raise UserError("there is no text to fill", where="blank_prompts", found="no texts")
    ids = command_ids(tokenizer)
    blanks = {ids[name] for name in BLANKS if name in ids}
    rows: list[tuple[list[int], int]] = []
    for number, text in enumerate(texts):
        tokens: list[int] = tokenizer(text)["input_ids"]
        at = next((i for i, token in enumerate(tokens) if token in blanks), None)
        if at is None:
            raise UserError("the text has no blank", where=f"text {number}", found=text[:80], allowed=BLANKS)
        rows.append((tokens, at))
    width = max(len(tokens) for tokens, _ in rows) + 1
    pad = tokenizer.pad_token_id or 0
    input_ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
    positions = torch.zeros(len(rows), 2, width, dtype=torch.int64)
    for row, (tokens, at) in enumerate(rows):
        start = width - len(tokens) - 1
        input_ids[row, start:] = torch.tensor([*tokens, ids[START]])
        mask[row, start:] = 1
        positions[row, 0, start:-1] = torch.arange(len(tokens))
        positions[row, :, -1] = torch.tensor([at, 1])
    sep = torch.tensor([len(tokens) for tokens, _ in rows])
    return {"input_ids": input_ids, "position_ids": positions, "attention_mask": mask, "sep": sep}


def pieces(tokenizer: PreTrainedTokenizerBase, generated: Tensor, prompt_length: int) -> list[str]:
    """What stands in the blanks: the text behind the prompt up to <|endofpiece|>.

    Args:
        generated: ids, [B,L + new], as `generate` returns them.
        prompt_length: L of the inputs.
    """
    end = command_ids(tokenizer)[END]
    texts = []
    for row in generated[:, prompt_length:].tolist():
        piece = row[: row.index(end)] if end in row else row
        texts.append(str(tokenizer.decode(piece, skip_special_tokens=True)).strip())
    return texts
