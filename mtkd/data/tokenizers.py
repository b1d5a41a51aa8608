"""The run's tokenizer: trained on the run's own text or loaded, and compared id by id with a teacher's.

Two models share a tokenizer when every token has the same id in both and text is cut into the same ids. Equal sizes say
nothing: a permuted vocabulary of equal size distils noise. Which token ends or pads is the run's choice alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mtkd.data.bytepairs import byte_pairs
from mtkd.data.segmentation import added_tokens, cut, other_rule, probes, rules
from mtkd.errors import DataError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
_PARTS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte and every special token has an id


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    closed: bool = False,
    commands: str = "plain",
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` ids (fewer when the texts hold fewer merges); same texts, same ids.

    Args:
        texts: what it is trained on; only the train split, or the scores on held-out text are too good.
        vocab_size: ids, special tokens included.
        closed: whether `tokenizer(text)` ends with </s>: encoders expect it, and a causal model that is asked to go on
            writing must not see it. Beginning and end of training documents do not depend on this.
        commands: the special tokens: "plain" are <pad>, <s>, </s>, <unk>, <mask>; "glm" those of a GLM, whose texts
            are always closed.
        special_tokens: further ones, for plain texts; they count among the ids.

    Raises:
        UserError: when there is not an id for every byte.
        DataError: when the texts are empty.
    """
    if commands == "glm":
        from mtkd.data.glm_tokens import trained_tokenizer

        return trained_tokenizer(_non_empty(texts), vocab_size)
    more = [token for token in dict.fromkeys(special_tokens) if token not in SPECIAL_TOKENS]
    smallest = _SMALLEST_VOCABULARY + len(more)
    if vocab_size < smallest:
        raise UserError(
            "too few ids for every byte and special token",
            where="tokenizer.vocab_size",
            found=vocab_size,
            allowed=f"at least {smallest}",
        )
    return _wrapped(byte_pairs(_non_empty(texts), vocab_size, (*SPECIAL_TOKENS, *more)), more, closed=closed)


def _wrapped(core: Tokenizer, more: Sequence[str], *, closed: bool) -> PreTrainedTokenizerFast:
    """Trained byte pairs with their special tokens' parts, and what stands around a text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    end = " </s>" if closed else ""
    core.post_processor = processors.TemplateProcessing(
        single=f"<s> $A{end}",
        pair=f"<s> $A </s> $B{end}",
        special_tokens=[(token, core.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    pad, begin, end_token, unknown, mask = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        bos_token=begin,
        eos_token=end_token,
        unk_token=unknown,
        mask_token=mask,
        cls_token=begin,
        sep_token=end_token,
        **({"extra_special_tokens": more} if more else {}),
    )


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; code that comes with it is never run.

    Raises:
        DataError: when there is none, or it needs remote code.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # missing files, malformed files, network and remote code end here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"the tokenizer cannot be loaded: {type(error).__name__}: {reason}",
            where="tokenizer",
            found=path,
            allowed="a folder with tokenizer.json, or a hub id; no remote code",
            todo="look at its files, or name another tokenizer: tokenizer.path",
        ) from error
    if set(token_ids(tokenizer)) <= set(tokenizer.all_special_tokens):
        raise DataError(
            "the tokenizer has no vocabulary: every word would be unknown",
            where="tokenizer",
            found=f"{path}: {len(tokenizer)} special tokens",
            todo="bring its tokenizer.json, vocab.txt or the like into the folder",
        )
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token, added ones included -> its id."""
    return dict(tokenizer.get_vocab())


def num_real_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest id + 1. A model may have more columns than that: they are padding and never take part in a softmax."""
    return max(token_ids(tokenizer).values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Part (pad_token, bos_token, ...) -> id, for the parts that are filled."""
    ids = {part: getattr(tokenizer, f"{part}_id") for part in _PARTS}
    return {part: int(number) for part, number in ids.items() if number is not None}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> str:
    """sha256 (hexadecimal) over token -> id, the special ids and how text is normalised and split.

    Merges and scores are not in it: `segmentation_digest` has them. A stage's identity has both; a cache's origin and
    the scores have this one alone.

    Args:
        chat: whether the texts are turns of a chat: then over the template that writes them, too.
    """
    parts = [token_ids(tokenizer), special_ids(tokenizer), _text_rules(tokenizer)]
    parts += [{"chat": tokenizer.chat_template}] if chat else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, where: str, *, masked: bool = False
) -> list[str]:
    """Refuse a model whose tokenizer gives other ids than the run's: for a token, or for a text.

    Args:
        student: the run's, which writes all texts. teacher: the one that the model at `where` brings.
        masked: whether the model is asked about masked tokens.
    Returns:
        What differs and does not matter, in words: the run's tokenizer decides about ends, padding, and what stands
        around a text.
    Raises:
        DataError: naming the first tokens or the rule that differ, or the text that is cut into other ids.
    """
    notes = _check_ids(token_ids(student), teacher, where)
    todo = "use a model with the run's tokenizer, or give the run (tokenizer.path) and all its models this one"
    rule = other_rule(rules(student), rules(teacher))
    if rule is None:
        rule, tokens, recognised = _other_added(student, teacher)
        notes += recognised
    if rule is None:
        texts = probes(student, tokens)
        both = zip(texts, cut(student, texts), cut(teacher, texts), strict=True)
        differing = next(((text, here, there) for text, here, there in both if here != there), None)
        rule = None if differing is None else _other_cut(*differing)
    if rule is not None:
        raise DataError("student and teacher cut text into other ids", where=where, found=rule, todo=todo)
    return notes + _check_parts(student, teacher, where, todo, masked=masked)


def _check_ids(here: dict[str, int], teacher: PreTrainedTokenizerBase, where: str) -> list[str]:
    """Every token of the run has the same id there; special tokens behind all of the run's ids are not asked about."""
    there, behind = token_ids(teacher), max(here.values())
    special = {str(token) for token in teacher.added_tokens_decoder.values() if token.special}
    more = sorted(t for t in there.keys() - here.keys() if there[t] > behind and t in special)
    differing = [t for t in sorted(here.keys() | there.keys() - set(more), key=lambda t: (here.get(t, 1 << 60), t))
                 if here.get(t) != there.get(t)]  # fmt: skip
    if differing:
        shown = [f"{token!r} is {_id(here, token)} here and {_id(there, token)} there" for token in differing[:3]]
        raise DataError(
            f"student and teacher have different vocabularies: {len(differing)} tokens differ",
            where=where,
            found="; ".join(shown) + (", ..." if len(differing) > 3 else ""),
            allowed=f"the same id for every token ({len(here)} here, {len(there)} there)",
            todo="use a teacher with the student's tokenizer, or give the run the teacher's tokenizer",
        )
    shown = [f"{token!r} ({there[token]})" for token in more[:3]]
    return [f"special tokens that the run's tokenizer lacks, never asked about: {', '.join(shown)}"] if more else []


def _other_added(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> tuple[str | None, list[str], list[str]]:
    """The first token that is looked for in texts in another way; else the tokens to probe, and notes.

    A token with a part (the end, the padding) may be looked for by one side alone: the run's tokenizer decides.
    """
    here, there = added_tokens(student), added_tokens(teacher)
    ids = token_ids(student)
    parts = {t for each in (student, teacher) for t in each.all_special_tokens}
    flags = ["single_word", "lstrip", "rstrip"]
    flags += ["normalized"] if (rules(student) or {}).get("normalizer") else []
    notes = []
    for token in sorted((here.keys() | there.keys()) & ids.keys()):
        one, other = here.get(token), there.get(token)
        if one is None or other is None:
            if token not in parts:
                sides = ("here", "there") if other is None else ("there", "here")
                return f"the token {token!r} is looked for before text is cut {sides[0]}, not {sides[1]}", [], []
            side = "the run's" if other is None else "its"
            notes.append(f"only {side} tokenizer takes {token!r} in a text for the special token")
        elif any(one[flag] != other[flag] for flag in flags):
            flag = next(flag for flag in flags if one[flag] != other[flag])
            return f"added token {token!r}: {flag} is {one[flag]} here, {other[flag]} there", [], []
    return None, sorted(here.keys() & there.keys() & ids.keys()), notes


def _other_cut(text: str, here: list[int], there: list[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), min(len(here), len(there)))
    shown = text if len(text) <= 60 else text[:57] + "..."
    first = [str(ids[place]) if place < len(ids) else "the end" for ids in (here, there)]
    return (
        f"{shown!r} is {len(here)} ids here and {len(there)} there; number {place + 1} is {first[0]} here, "
        f"{first[1]} there"
    )


def _check_parts(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, where: str, todo: str, *, masked: bool
) -> list[str]:
    """Notes of parts that other tokens play; refuses another mask where masked tokens are asked about."""
    here, there = special_ids(student), special_ids(teacher)
    notes = []
    for part in (part for part in _PARTS if here.get(part) != there.get(part)):
        if part == "mask_token" and masked and part in here and part in there:
            difference = f"{part} is {_id(here, part)} here and {_id(there, part)} there"
            raise DataError("student and teacher have different masks", where=where, found=difference, todo=todo)
        own, run = getattr(teacher, part) or "none", getattr(student, part) or "none"
        notes.append(f"its {part} is {own}, the run's {run}: the run's counts")
    return notes


def _id(ids: dict[str, int], token: str) -> str:
    return str(ids[token]) if token in ids else "missing"


def _text_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The backend's normaliser and pre-tokenizer as they are written; {} each for a tokenizer without a backend.

    For `tokenizer_fingerprint` alone, which finished stages and caches know in this form.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    return {name: rules.get(name) or {} for name in ("normalizer", "pre_tokenizer")}


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    some = False
    for text in texts:
        some = some or bool(text.strip())
        yield text
    if not some:
        raise DataError("there is no text to train the tokenizer on", where="tokenizer.train_on", found="no text")
