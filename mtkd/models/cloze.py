"""A GLM as a cloze: a classifier without layers of its own, which scores each class's words in place of a blank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mtkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def answer_with(config: PretrainedConfig, answers: list[list[int]] | None, *, classifies: bool) -> None:
    """Make a GLM's configuration that of a cloze with these answers; of a language model, one without any.

    Args:
        answers: token ids of every class's words; None: a classifier stays what it is.
    """
    if answers is not None:
        unended = config.has_long_answers and config.eop_token_id is None  # stays so, and is refused
        config.verbalizers, config.num_labels = answers, len(answers)
        if not unended:
            config.end_answers()
    elif not classifies:
        config.verbalizers = None


def check_glm(config: PretrainedConfig, *, classifies: bool) -> None:
    """Refuse what only building or running the model would show.

    Raises:
        UserError: an unknown activation, or a cloze whose answers do not fit its classes and ids.
    """
    from transformers.activations import ACT2FN

    if config.hidden_act not in ACT2FN:
        raise UserError("not an activation: hidden_act of its config.json", where="@model", found=config.hidden_act)
    fault = cloze_fault(config) if classifies else None
    if fault is not None:
        message, value, allowed = fault
        raise UserError(f"verbalizers of its config.json: {message}", where="@model", found=value, allowed=allowed)


def cloze_fault(config: Any) -> tuple[str, Any, Any] | None:
    """What is wrong with the answers of a GLM's configuration: (message, found, allowed); None for nothing.

    The one check of clozes, at plan time and when the model is built.
    """
    verbalizers = config.verbalizers
    if verbalizers is None:
        return None
    if config.sop_token_id is None or config.mask_token_id is None or not config.tie_word_embeddings:
        fields = {name: getattr(config, name) for name in ("sop_token_id", "mask_token_id", "tie_word_embeddings")}
        return "a cloze needs sop_token_id, mask_token_id and tied embeddings", fields, "two ids, and true"
    if config.num_labels and len(verbalizers) != config.num_labels:
        return "a cloze has one answer per class", len(verbalizers), config.num_labels
    size, ended = config.vocab_size, any(len(words) > 1 for words in verbalizers)
    most = config.max_position_embeddings - ended
    for words in verbalizers:
        if not words or not all(0 <= word < size for word in words):
            return "an answer is a list of token ids", words, f"one or more, each 0 to {size - 1}"
        if len(words) > most:
            return "an answer is longer than the model's positions", f"{len(words)} tokens", f"at most {most}"
    if ended and (config.eop_token_id is None or not 0 <= config.eop_token_id < size):
        return (
            "answers of several tokens end with <|endofpiece|>, which is scored too; without it a class whose words "
            "begin with another's never wins",
            f"eop_token_id {config.eop_token_id}",
            "its id; a cloze that was trained without it (before mtkd scored it) is trained again",
        )
    return None
