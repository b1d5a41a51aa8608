"""How a tokenizer cuts text into ids: its rules in one form, their digest, and what it makes of probe texts.

Two tokenizers with the same token -> id may still cut one sentence into other ids: other merges, other scores, another
normaliser. Rules are compared where both tokenizers tell them; the probes see what a rule does not tell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mtkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rules = dict[str, Any]

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "the teacher of the student",
    "  two spaces before, two after  ",
    "\ttab\tand   several    spaces",
    "one\ntwo\n\nthree\r\nfour\n",
    "\n",
    " ",
    "0 1 12 123 1234 12345 3.14159 1,000,000 -7 2024-07-26 1e-5",
    "don't DON'T I'm WE'LL they've 'quoted' “curly” ‘quotes’",
    "UPPER lower MiXeD camelCaseName snake_case_name CONSTANT_NAME",
    "naïve café Ångström Straße ﬁne ① ½ ℌ e\u0301 n\u0303",
    "漢字かな交じり文 한국어 русский язык ελληνικά العربية עברית हिन्दी ไทย",
    "🙂 👩‍👩‍👧 🏳️‍🌈 \U0001f1e9\U0001f1ea a🙂b",
    "def f(x: int) -> int:\n    return x ** 2  # comment\n\tif x != 0 && y >= 1 || !z { }",
    "https://example.org/path?q=a%20b&c=d#e user@example.org",
    '{"key": [1, 2.5, null, true], "other": "a\\nb"}',
    "a\u00a0b\u200bc\u2009d\ufeffe\u3000f",
    "\x00\x01\x7f\u0085",
    "well-known... wait -- what?! (yes) [no] {maybe} <tag> $5 #1 @me ^ ~ `x` \\ / |",
    "an-extremely-" + "x" * 120 + " " + "w" * 250,
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
)
"""Texts whose ids differ when normaliser, pre-tokenizer, model or the treatment of unknown characters do."""

_WINDOW, _MOST_WINDOWS = 24, 200
"""Ids of a probe that is made of the vocabulary itself, and the most of such probes."""

# What says nothing about ids: offsets alone depend on it.
_WITHOUT_EFFECT = ("trim_offsets",)
# Off is not the default here: null means "as lowercase says".
_THREE_STATES = ("strip_accents",)


def probes(tokenizer: PreTrainedTokenizerBase, special: Iterable[str]) -> list[str]:
    """`PROBES`, stretches of the vocabulary as text, and every special token inside a text.

    Args:
        special: tokens that stand for themselves.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    starts = range(0, len(ids), max(_WINDOW, -(-len(ids) // _MOST_WINDOWS)))
    texts = [str(tokenizer.decode(ids[start : start + _WINDOW], skip_special_tokens=True)) for start in starts]
    return [*PROBES, *filter(None, texts), *(text for token in special for text in (f"a {token} b", f"a{token}b"))]


def cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts without special tokens around them.

    Raises:
        DataError: the tokenizer cannot write one of them.
    """
    try:
        encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    except Exception as error:  # the library's plain Exception: e.g. an unknown character without an unknown token
        raise DataError(f"the tokenizer cannot write ordinary text: {error}", where="tokenizer") from error
    return [list(ids) for ids in encoded["input_ids"]]


def check_certain(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a tokenizer that draws at random how it cuts a text: examples would differ between starts and ranks.

    Raises:
        DataError: BPE dropout, or sampling.
    """
    texts = probes(tokenizer, ())
    dropout = (_rules_of_backend(tokenizer) or {}).get("model", {}).get("dropout")
    if dropout or cut(tokenizer, texts) != cut(tokenizer, texts):
        raise DataError(
            "the tokenizer cuts a text differently each time",
            where=where,
            found=f"dropout {dropout:g}" if dropout else "two sets of ids for one text",
            allowed="one set of ids for a text",
            todo="set `dropout` in its tokenizer.json to null, or switch sampling off, and save it",
        )


def rules(tokenizer: PreTrainedTokenizerBase) -> Rules | None:
    """Model, normaliser and pre-tokenizer in one form, without token -> id; None where the tokenizer does not tell.

    Equal rules and equal token -> id give equal ids. What differs only in how it is written is written one way.
    """
    backend = _rules_of_backend(tokenizer)
    if backend is None:
        return _rules_of_python(tokenizer)
    model = dict(backend["model"])
    vocabulary = model.pop("vocab", {})
    if not isinstance(vocabulary, dict):  # Unigram: (token, score), an id is a place
        model["scores"] = [score for _, score in vocabulary]
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model["merges"]]
    if _knows_every_byte(vocabulary, backend):
        model = {key: value for key, value in model.items() if key not in ("unk_token", "fuse_unk")}
    parts = {"model": model, "normalizer": backend["normalizer"], "pre_tokenizer": backend["pre_tokenizer"]}
    return {name: _plain(part) for name, part in parts.items()}


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, bool]]:
    """Tokens that are looked for before a text is cut -> how."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {str(t): {flag: bool(getattr(t, flag)) for flag in flags} for t in tokenizer.added_tokens_decoder.values()}


def segmentation_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 (hexadecimal) over how text is cut; token -> id and the parts of special tokens are not in it."""
    parts: list[Any] = [rules(tokenizer), added_tokens(tokenizer)]
    if _rules_of_backend(tokenizer) is None:  # such a class does more than it tells
        parts.append(cut(tokenizer, probes(tokenizer, sorted(tokenizer.all_special_tokens))))
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def other_rule(mine: Rules | None, other: Rules | None) -> str | None:
    """The first rule that differs, in words; None where there is none, or where one side does not tell."""
    if mine is None or other is None or mine.keys() != other.keys():
        return None
    for name in mine:
        if mine[name] == other[name]:
            continue
        here, there = mine[name], other[name]
        if isinstance(here, dict) and isinstance(there, dict) and here.get("type") == there.get("type"):
            key = next(k for k in sorted(here.keys() | there.keys()) if here.get(k) != there.get(k))
            name, here, there = f"{name}.{key}", here.get(key), there.get(key)
        if isinstance(here, list) and isinstance(there, list):
            return f"{name}: {_first_difference(here, there)}"
        return f"{name}: {_short(here)} here, {_short(there)} there"
    return None


def _first_difference(here: list[Any], there: list[Any]) -> str:
    both = zip(here, there, strict=False)
    place = next((i for i, (a, b) in enumerate(both) if a != b), min(len(here), len(there)))
    shown = [_short(values[place]) if place < len(values) else "nothing" for values in (here, there)]
    return f"number {place + 1} is {shown[0]} here, {shown[1]} there ({len(here):,} here, {len(there):,} there)"


def _rules_of_backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else dict(json.loads(backend.to_str()))


def _rules_of_python(tokenizer: PreTrainedTokenizerBase) -> Rules | None:
    """The scores of a SentencePiece model, or merges; only the probes see what such a class does otherwise."""
    pieces, ranks = getattr(tokenizer, "sp_model", None), getattr(tokenizer, "bpe_ranks", None)
    if pieces is not None:
        return {"scores": [pieces.GetScore(i) for i in range(pieces.GetPieceSize())]}
    return {"merges": [list(pair) for pair in sorted(ranks, key=ranks.__getitem__)]} if ranks else None


def _knows_every_byte(vocabulary: Any, backend: dict[str, Any]) -> bool:
    """Whether no character is unknown: then how unknown ones are treated has no effect."""
    from tokenizers import pre_tokenizers

    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {token for token, _ in vocabulary}
    if backend["model"].get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in tokens for byte in range(256))
    first = json.dumps([backend["normalizer"], backend["pre_tokenizer"]])
    return '"ByteLevel"' in first and tokens.issuperset(pre_tokenizers.ByteLevel.alphabet())


def _plain(rule: Any) -> Any:
    """A rule without what is off, and a sequence of one rule as that rule."""
    if isinstance(rule, list):
        return [_plain(each) for each in rule]
    if not isinstance(rule, dict):
        return rule
    effective = {key: _plain(value) for key, value in rule.items() if key not in _WITHOUT_EFFECT}
    effective = {
        k: v
        for k, v in effective.items()
        if v not in (None, False, "", 0, [], {}) or (k in _THREE_STATES and v is False)
    }
    if effective.get("type") == "Sequence":
        steps = next((value for value in effective.values() if isinstance(value, list)), [])
        steps = [step for step in steps if step is not None]
        return None if not steps else steps[0] if len(steps) == 1 else effective
    return effective


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "..."
