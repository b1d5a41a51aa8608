"""The tokenizer's side of a compressed vocabulary: which ids may share one, how often each occurs, and the new file.

In a tokenizer.json the vocabulary maps a token to an id, and several tokens may have the same one: text is then
segmented as before and comes out in the compressed ids. Where that holds depends on the kind of model:

- WordPiece looks a piece of a word up by its text: any two tokens may share an id.
- BPE merges *ids*: a token that another merge is built from needs its own, or the merges of its namesake would apply to
  it. Tokens that no merge starts from may share an id.
- Others (Unigram: an id is a place in a list) cannot say it.

The `tokenizers` library keeps one token per id when it writes such a tokenizer, so a copy that it makes
(save_pretrained of the loaded tokenizer, pickle, deepcopy) has lost the other tokens. The exported folder is what to
load and pass on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.data.tokenizers import load_tokenizer
from mtkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COUNTED_AT_ONCE = 1_000  # texts


def shareable_ids(tokenizer: PreTrainedTokenizerBase, where: str) -> np.ndarray:
    """Ids whose tokens may be given the id of another one, rising; special and added tokens are never among them.

    Raises:
        UserError: for a tokenizer whose file cannot say that tokens share an id.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: dict[str, Any] = json.loads(backend.to_str())["model"] if backend is not None else {}
    kind = model.get("type", type(tokenizer).__name__)
    if kind not in ("WordPiece", "BPE"):
        raise UserError(
            f"a vocabulary of kind {kind} cannot be compressed: its file cannot give several tokens one id, so the "
            "exported student would not work on plain text",
            where=where,
            found=kind,
            allowed="WordPiece, BPE",
            todo="drop `vocabulary`, or use models with a WordPiece or BPE tokenizer",
        )
    ids: dict[str, int] = model["vocab"]
    fixed = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    if kind == "BPE":
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        fixed |= {ids[part] for pair in pairs for part in pair}
    return np.array(sorted(set(ids.values()) - fixed), np.int64)


def count_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], num_ids: int) -> np.ndarray:
    """How often each id occurs in the texts, without the special tokens around them, [V] int64."""
    counts = np.zeros(num_ids, np.int64)
    for start in range(0, len(texts), _COUNTED_AT_ONCE):
        part = list(texts[start : start + _COUNTED_AT_ONCE])
        encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
        flat = [number for ids in encoded["input_ids"] for number in ids]
        counts += np.bincount(np.array(flat, np.int64), minlength=num_ids)
    return counts


def compress_tokenizer(folder: Path, kept: Sequence[int], to_kept: Sequence[int]) -> None:
    """Give a saved tokenizer the compressed ids, in place.

    Text is segmented as before; a removed token has the id of the kept one that stands for it; an id decodes to its
    kept token.

    Args:
        folder: as `save_pretrained` wrote it.
        kept: per new id the old one, [K]. to_kept: per old id the new one, [V].
    """
    names_of_inputs = load_tokenizer(str(folder)).model_input_names
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    old: dict[str, int] = model["vocab"]
    model["vocab"] = {token: to_kept[number] for token, number in old.items()}
    for token in content.get("added_tokens") or ():
        token["id"] = to_kept[token["id"]]
    if content.get("post_processor"):
        content["post_processor"] = _renamed_processor(content["post_processor"], to_kept)
    if content.get("padding"):
        content["padding"]["pad_id"] = to_kept[content["padding"]["pad_id"]]
    names = {number: token for token, number in old.items()}
    content["decoder"] = _decoder(content.get("decoder"), _classes(names, kept, to_kept))
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings_file = folder / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    added = settings.get("added_tokens_decoder")
    if added:
        settings["added_tokens_decoder"] = {str(to_kept[int(number)]): token for number, token in added.items()}
    # the plain class reads tokenizer.json as it stands; an architecture's own rebuilds parts of it
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = list(names_of_inputs)  # those of the architecture's class, lost with it
    settings_file.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")


def _classes(names: dict[int, str], kept: Sequence[int], to_kept: Sequence[int]) -> dict[str, list[str]]:
    """Kept token -> the removed tokens that it stands for."""
    classes: dict[str, list[str]] = {}
    for number, token in sorted(names.items()):
        representative = kept[to_kept[number]]
        if representative != number:
            classes.setdefault(names[representative], []).append(token)
    return classes


def _decoder(decoder: dict[str, Any] | None, classes: dict[str, list[str]]) -> dict[str, Any] | None:
    """The decoder after replacements of removed tokens by kept ones.

    Which of the tokens of an id the library finds first is a matter of chance (the order of a hash table). One
    replacement per kept token: some microseconds each and decoded token.
    """
    if not classes:
        return decoder
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"Regex": f"\\A(?:{'|'.join(map(re.escape, removed))})\\z"}, "content": token}
        for token, removed in classes.items()
    ]
    # without a decoder tokens are joined by spaces; so does this one, whose prefix no token has
    joined = {"type": "WordPiece", "prefix": "\0", "cleanup": False}
    rest = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder or joined]
    return {"type": "Sequence", "decoders": [*steps, *rest]}


def _renamed_processor(processor: dict[str, Any], to_kept: Sequence[int]) -> dict[str, Any]:
    """A post-processor with the new ids of the special tokens that it inserts."""
    renamed = dict(processor)
    if processor["type"] == "Sequence":
        renamed["processors"] = [_renamed_processor(each, to_kept) for each in processor["processors"]]
    elif processor["type"] == "TemplateProcessing":
        renamed["special_tokens"] = {
            name: {**token, "ids": [to_kept[number] for number in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
    elif processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for part in ("sep", "cls"):
            token, number = processor[part]
            renamed[part] = [token, to_kept[number]]
    return renamed
