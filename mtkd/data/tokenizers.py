"""The run's tokenizer: trained on the run's own text or loaded, and compared id by id with a teacher's.

Two models share a vocabulary when every token has the same id in both, the special tokens play the same parts and text
is normalised alike. Equal sizes say nothing: a permuted vocabulary of equal size distils noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mtkd.errors import DataError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")
_SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte and every special token has an id


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, closed: bool = False, commands: str = "plain"
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocab_size` ids (fewer when the texts hold fewer merges); same texts, same ids.

    Args:
        texts: what it is trained on; only the train split, or the scores on held-out text are too good.
        vocab_size: ids, special tokens included.
        closed: whether `tokenizer(text)` ends with </s>: encoders expect it, and a causal model that is asked to go on
            writing must not see it. Beginning and end of training documents do not depend on this.
        commands: the special tokens: "plain" are <pad>, <s>, </s>, <unk>, <mask>; "glm" those of a GLM, whose texts
            are always closed.

    Raises:
        UserError: when there is not an id for every byte.
        DataError: when the texts are empty.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if commands == "glm":
        from mtkd.data.glm_tokens import trained_tokenizer

        return trained_tokenizer(_non_empty(texts), vocab_size)
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(
            "too few ids for every byte and special token",
            where="tokenizer.vocab_size",
            found=vocab_size,
            allowed=f"at least {_SMALLEST_VOCABULARY}",
        )
    core = byte_pairs(_non_empty(texts), vocab_size, SPECIAL_TOKENS)
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
    )


def byte_pairs(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE learnt from texts; the special tokens come first and count among its ids.

    Args: vocab_size: ids, at least those of every byte and special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return core


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; code that comes with it is never run.

    Raises:
        DataError: when there is none, or it needs remote code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # missing files, malformed files, network and remote code end here
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"the tokenizer cannot be loaded: {type(error).__name__}: {reason}",
            where="tokenizer",
            found=path,
            allowed="a folder with tokenizer.json, or a hub id; no remote code",
        ) from error


def token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token, added ones included -> its id."""
    return dict(tokenizer.get_vocab())


def num_real_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest id + 1. A model may have more columns than that: they are padding and never take part in a softmax."""
    return max(token_ids(tokenizer).values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Part (pad_token, bos_token, ...) -> id, for the parts that are filled."""
    parts = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    found = {part: getattr(tokenizer, f"{part}_id") for part in parts}
    return {part: int(number) for part, number in found.items() if number is not None}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, *, chat: bool = False) -> str:
    """sha256 (hexadecimal) over token -> id, the special ids and how text is normalised and split.

    Args: chat: whether the texts are turns of a chat: then over the template that writes them, too.
    """
    parts = [token_ids(tokenizer), special_ids(tokenizer), _text_rules(tokenizer)]
    parts += [{"chat": tokenizer.chat_template}] if chat else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse turns of a chat where nothing says how they are written.

    Args: where: `chat` of the data entry.
    Raises:
        DataError: the tokenizer has no chat template (one that the run trains never has).
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where=where,
            found="chat: true",
            todo="set chat: false, and put into `prompt` what the model expects around it",
        )


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse a teacher whose ids mean something else than the student's.

    Raises:
        DataError: naming the first tokens that differ, the special token, or the rule of normalisation.
    """
    ours, theirs = token_ids(student), token_ids(teacher)
    differing = [t for t in sorted(ours.keys() | theirs.keys(), key=lambda t: (ours.get(t, 1 << 60), t))
                 if ours.get(t) != theirs.get(t)]  # fmt: skip
    todo = "use a teacher with the student's tokenizer, or give the run the teacher's tokenizer"
    if differing:
        shown = [f"{token!r} is {_id(ours, token)} here and {_id(theirs, token)} there" for token in differing[:3]]
        raise DataError(
            f"student and teacher have different vocabularies: {len(differing)} tokens differ",
            where=where,
            found="; ".join(shown) + (", ..." if len(differing) > 3 else ""),
            allowed=f"the same id for every token ({len(ours)} here, {len(theirs)} there)",
            todo=todo,
        )
    if special_ids(student) != special_ids(teacher):
        ours, theirs = special_ids(student), special_ids(teacher)
        part = next(p for p in sorted(ours.keys() | theirs.keys()) if ours.get(p) != theirs.get(p))
        found = f"{part} is {_id(ours, part)} here and {_id(theirs, part)} there"
        raise DataError("student and teacher have different special tokens", where=where, found=found, todo=todo)
    mine, other = _text_rules(student), _text_rules(teacher)
    if mine != other:
        rule = next(name for name in mine if mine[name] != other[name])
        found = f"{rule}: {_short(mine[rule])} here, {_short(other[rule])} there"
        raise DataError("student and teacher split text differently", where=where, found=found, todo=todo)


def _id(ids: dict[str, int], token: str) -> str:
    return str(ids[token]) if token in ids else "missing"


def _text_rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The backend's normaliser and pre-tokenizer; {} each for a tokenizer without a backend."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    return {name: rules.get(name) or {} for name in ("normalizer", "pre_tokenizer")}


def _short(rule: dict[str, Any]) -> str:
    text = json.dumps(rule)
    return text if len(text) <= 160 else text[:157] + "..."


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    some = False
    for text in texts:
        some = some or bool(text.strip())
        yield text
    if not some:
        raise DataError("there is no text to train the tokenizer on", where="tokenizer.train_on", found="no text")
