"""GLM's tokenizers, from the plain vocabularies of GPT-2 and BERT, or trained: the commands stand behind the others.

The commands stand at their published ids when the vocabulary is the published one (GPT-2: 50,257 entries, commands from
50257; BERT uncased: 30,522 entries, commands from 30522), and right behind it for any other.

Source: Du et al. 2022, GLM, arXiv 2103.10360; the command tokens and their order are those of the published models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mtkd.data.bytepairs import byte_pairs
from mtkd.errors import DataError, UserError

END_OF_TEXT = "<|endoftext|>"
START, END = "<|startofpiece|>", "<|endofpiece|>"
BLANKS = ("[MASK]", "[gMASK]", "[sMASK]")
"""A span, a long span, and a sentence; base and large know the first one only."""
HIDDEN = "[dBLOCK]"
"""Stands for a token of a piece that has been predicted, but is not shown to those after it."""

_GPT2_COMMANDS = (START, END, "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]", HIDDEN)
_BERT_COMMANDS = (START, END, "[gMASK]", "[sMASK]", HIDDEN)
_BERT_OWN = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def gpt2_tokenizer(vocabulary: Path, merges: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE with GLM's commands, as 2B and 10B have it; `tokenizer(text)` is ``[CLS] text <|endoftext|>``.

    A blank takes the space before it along, as in the published tokenizer.

    Args:
        vocabulary: GPT-2's vocab.json. merges: its merges.txt.

    Raises:
        DataError: files that cannot be read, do not fit each other, or hold a command already.
    """
    try:
        ids: dict[str, int] = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [(left, right) for left, right in (x.split(" ") for x in lines if x and not x.startswith("#version"))]
        _check(list(ids), sorted(ids.values()), (END_OF_TEXT,), _GPT2_COMMANDS, vocabulary)
        core = Tokenizer(models.BPE(vocab=ids, merges=pairs))
    except DataError:
        raise
    except Exception as error:  # OS, JSON, shapes of lines, and the library's plain Exception
        raise DataError(f"cannot be read as a BPE vocabulary: {error}", where=f"{vocabulary}, {merges}") from error
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    _add(core, (END_OF_TEXT, *_GPT2_COMMANDS))
    return _finish(core, END_OF_TEXT, END_OF_TEXT)


def trained_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """As `gpt2_tokenizer`, with merges learned from texts; same texts, same ids.

    Args:
        vocab_size: ids, commands included; fewer when the texts hold fewer merges.

    Raises:
        UserError: when there is not an id for every byte and command.
    """
    own = (END_OF_TEXT, *_GPT2_COMMANDS)
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(own)
    if vocab_size < least:
        raise UserError(
            "too few ids for every byte and every command of GLM",
            where="tokenizer.vocab_size",
            found=vocab_size,
            allowed=f"at least {least}",
        )
    core = byte_pairs(texts, vocab_size - len(own))
    _add(core, own)
    return _finish(core, END_OF_TEXT, END_OF_TEXT)


def bert_tokenizer(vocabulary: Path, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """WordPiece with GLM's commands, as base, large, 410M and 515M have it; `tokenizer(text)` is ``[CLS] text [SEP]``.

    Args:
        vocabulary: BERT's vocab.txt. lowercase: as the published ones, which are uncased.

    Raises:
        DataError: a file that cannot be read, lacks one of BERT's special tokens, or holds a command already.
    """
    try:
        # not splitlines: BERT's vocabularies hold characters that it takes for line ends
        tokens = vocabulary.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as a vocabulary: {error}", where=str(vocabulary)) from error
    ids = {token: number for number, token in enumerate(tokens)}
    _check(tokens, sorted(ids.values()), _BERT_OWN, _BERT_COMMANDS, vocabulary)
    core = Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    _add(core, (*_BERT_OWN, *_BERT_COMMANDS))
    return _finish(core, "[PAD]", "[SEP]")


def tokenizer_beside(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the plain vocabulary in a folder: vocab.json and merges.txt, or vocab.txt; None without one."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return gpt2_tokenizer(folder / "vocab.json", folder / "merges.txt")
    return bert_tokenizer(folder / "vocab.txt") if (folder / "vocab.txt").is_file() else None


def command_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Command -> id, for those that the tokenizer has.

    Raises:
        DataError: it lacks [MASK], <|startofpiece|> or <|endofpiece|>.
    """
    ids = tokenizer.get_vocab()
    by_name = {name: ids[name] for name in (*BLANKS, HIDDEN, START, END) if name in ids}
    missing = [name for name in ("[MASK]", START, END) if name not in by_name]
    if missing:
        raise DataError(
            "the tokenizer has not got GLM's commands",
            where="tokenizer",
            found=f"missing: {', '.join(missing)}",
            todo="build one with mtkd.models.glm.gpt2_tokenizer or bert_tokenizer, or train one with commands: glm",
        )
    return by_name


def _check(tokens: list[str], ids: list[int], needed: Sequence[str], commands: Sequence[str], file: Path) -> None:
    """Refuse a vocabulary behind which the commands would not stand at the next ids."""
    present = set(tokens)
    twice = len(tokens) - len(present)
    missing = [token for token in needed if token not in present]
    taken = [token for token in commands if token in present]
    if missing or taken or twice or ids != list(range(len(ids))):
        raise DataError(
            "is not a plain vocabulary",
            where=str(file),
            found=f"missing: {missing}; commands of GLM in it already: {taken}; {twice} tokens twice; "
            f"{len(ids)} ids up to {ids[-1] if ids else 0}",
            allowed="the file of the plain GPT-2 or BERT tokenizer: every id from 0 on, without GLM's commands",
            todo="name a folder with it (--vocabulary), or convert without a tokenizer (--no-tokenizer)",
        )


def _add(core: Tokenizer, tokens: Sequence[str]) -> None:
    """Tokens that stand for themselves; unknown ones get the next ids, in their order."""
    core.add_special_tokens([AddedToken(t, lstrip=t in BLANKS, normalized=False, special=True) for t in tokens])


def _finish(core: Tokenizer, pad: str, end: str) -> PreTrainedTokenizerFast:
    used = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]", end)]
    core.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {end}", pair=f"[CLS] $A [SEP] $B {end}", special_tokens=list(dict.fromkeys(used))
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        additional_special_tokens=[START, END, "[gMASK]", "[sMASK]", HIDDEN],
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
