"""GLM as a classifier: a pooled head, or a cloze whose blank is filled with each class's words.

Source: Du et al. 2022, GLM, arXiv 2103.10360, section 2.3; the end of the piece: the authors' tasks/superglue/pvp.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils.generic import can_return_tuple

from mtkd.models.cloze import cloze_fault
from mtkd.models.glm.configuration import GLMConfig
from mtkd.models.glm.inputs import Sep, default_positions, split_mask, two_rows
from mtkd.models.glm.model import GLMModel, GLMPreTrainedModel


class Cloze:
    """Part B of a cloze with several answers, read in one go: <|startofpiece|>, then the words of every class.

    A word sees part A, the start and the words before it in its own class, so that every class is scored as if it
    stood there alone. Where any class has several tokens, every class's words are followed by <|endofpiece|>, which is
    scored with them: the answers are then disjoint events, and one that begins with another's words can win. Where all
    have one token they are disjoint already, and nothing follows. What is predicted last is not read. So it is in the
    original: its tasks with answers of several tokens append the end to each, those with single tokens compare these.

    Attributes:
        ids: of the E tokens read, [E].
        positions: their pos2, [E] (1 at the start).
        seen: which of them one sees, bool [E,E].
        slots, words, classes: the P predictions: the token that makes one, the word, and whose it is; [P] each.

    """

    def __init__(self, sop: int, verbalizers: list[list[int]], end: int | None) -> None:
        ids, positions, owner = [sop], [1], [-1]
        slots, words, classes = [], [], []
        for number, words_alone in enumerate(verbalizers):
            answer = words_alone if end is None else [*words_alone, end]
            slot = 0
            for place, word in enumerate(answer):
                slots.append(slot)
                words.append(word)
                classes.append(number)
                if place + 1 < len(answer):
                    slot = len(ids)
                    ids.append(word)
                    positions.append(place + 2)
                    owner.append(number)
        # named as the CPU: models are also built on the meta device
        self.ids, self.positions, group, self.slots, self.words, self.classes = (
            torch.tensor(values, device="cpu") for values in (ids, positions, owner, slots, words, classes)
        )
        self.seen = ((group[:, None] == group) | (group == -1)).tril()


class GLMForSequenceClassification(GLMPreTrainedModel):
    """Class logits [B,C] of a text, which is part A: read in both directions.

    With `config.verbalizers` a cloze: a class's logit is the log-probability of its words in place of the text's
    first [MASK]; where a class has several tokens, the sum over them and the end of the piece. No new weights. Without,
    a tanh layer and a linear one on the first token's hidden state (`pooler`, `classifier`).

    Raises:
        ValueError: verbalizers without `sop_token_id` and `mask_token_id`, without `eop_token_id` where one has several
            tokens, with another number of classes, with ids that the model has not got or more of them than it has
            positions, or with an output head that is not the table of the tokens.
    """

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.glm = GLMModel(config)
        self.cloze: Cloze | None = None
        if config.verbalizers is None:
            self.head_dropout = nn.Dropout(config.hidden_dropout_prob)
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
            self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        else:
            if (fault := cloze_fault(config)) is not None:
                message, found, allowed = fault
                raise ValueError(f"{message}: {found}; allowed: {allowed}")
            assert config.sop_token_id is not None, "checked"
            self.num_labels = len(config.verbalizers)
            end = config.eop_token_id if config.has_long_answers else None
            self.cloze = Cloze(config.sop_token_id, config.verbalizers, end)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B,L]
        position_ids: Tensor | None = None,  # [B,2,L]
        attention_mask: Tensor | None = None,
        sep: Sep = None,
        inputs_embeds: Tensor | None = None,  # [B,L,H]
        labels: Tensor | None = None,  # [B]
        use_cache: bool | None = None,
        **kwargs: Any,  # transformers' interface: output_hidden_states and the like
    ) -> SequenceClassifierOutput:
        """Logits [B,C]; hidden states are those of the L tokens given.

        Args:
            attention_mask, sep: as in `GLMModel.forward`, but the default of `sep` is the whole text. A cloze takes a
                padding mask [B,L] only.
            use_cache: accepted and not heeded.
            labels: class numbers, or numbers [B] where there is one output.

        Raises:
            ValueError: a cloze with another mask, or without input_ids.
        """
        padding, sep = split_mask(attention_mask, sep)
        if self.cloze is not None:
            return self._answer(self.cloze, input_ids, position_ids, padding, sep, labels, kwargs)
        embedded = self.glm.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        if sep is None and (padding is None or padding.dim() == 2):
            sep = embedded.shape[1] if padding is None else (padding != 0).sum(1)
        output = self.glm(
            inputs_embeds=embedded,
            position_ids=position_ids,
            attention_mask=padding,
            sep=sep,
            use_cache=False,
            **kwargs,
        )
        first = output.last_hidden_state[:, 0]
        if padding is not None and padding.dim() == 2:
            start = (padding != 0).int().argmax(1)  # the first token where padding is on the left
            first = output.last_hidden_state[torch.arange(len(start), device=start.device), start]
        logits = self.classifier(self.head_dropout(torch.tanh(self.pooler(self.head_dropout(first)))))
        return SequenceClassifierOutput(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _answer(
        self,
        cloze: Cloze,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        padding: Tensor | None,
        sep: Sep,
        labels: Tensor | None,
        options: dict[str, Any],
    ) -> SequenceClassifierOutput:
        """Part A [B,L] and every class's words behind it, in one pass. A text without [MASK] is asked at its end."""
        if input_ids is None or sep is not None or (padding is not None and padding.dim() != 2):
            raise ValueError("a cloze reads input_ids with a padding mask [B,L] or none: all of it is part A")
        device, (batch, length) = input_ids.device, input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool) if padding is None else padding != 0
        if position_ids is None:
            position_ids = default_positions(real, queries=length, keys=length, device=device)
        first = two_rows(position_ids).expand(batch, -1, -1)
        blanks = (input_ids == self.config.mask_token_id) & real
        at = blanks.int().argmax(1, keepdim=True)
        place = torch.where(blanks.any(1, keepdim=True), first[:, 0].gather(1, at), real.sum(1, keepdim=True))
        words = cloze.ids.to(device).expand(batch, -1)
        second = torch.stack([place.expand_as(words), cloze.positions.to(device).expand_as(words)], 1)
        seen_a = real[:, None, :].expand(-1, length + words.shape[1], -1)
        seen_b = torch.cat(
            [torch.zeros(length, words.shape[1], dtype=torch.bool, device=device), cloze.seen.to(device)]
        ).expand(batch, -1, -1)
        output = self.glm(
            torch.cat([input_ids, words], 1),
            position_ids=torch.cat([first, second], -1),
            attention_mask=torch.cat([seen_a, seen_b], -1)[:, None],
            use_cache=False,
            **options,
        )
        hidden = output.last_hidden_state[:, length:]
        scores = self.glm.word_embeddings(hidden)
        exact = torch.promote_types(scores.dtype, torch.float32)
        log_probs = torch.log_softmax(scores, -1, dtype=exact)  # [B,E,V]
        log_probs = log_probs[:, cloze.slots.to(device), cloze.words.to(device)]  # [B,P]
        logits = log_probs.new_zeros(batch, self.num_labels).index_add(1, cloze.classes.to(device), log_probs)
        states: Any = output.hidden_states  # None, or None for those not asked for
        maps: Any = output.attentions
        return SequenceClassifierOutput(
            loss=None if labels is None else _loss(logits, labels),
            logits=logits,
            hidden_states=states if states is None else tuple(s if s is None else s[:, :length] for s in states),  # type: ignore[misc]
            # part A sees nothing of part B: what is left of its rows still sums to 1
            attentions=maps if maps is None else tuple(m if m is None else m[..., :length, :length] for m in maps),  # type: ignore[misc]
        )


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    if logits.shape[1] == 1:
        return nn.functional.mse_loss(logits[:, 0].float(), labels.float())
    return nn.functional.cross_entropy(logits.float(), labels)
