"""The tokenizer of a run while it is planned: the real one or a stand-in."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from mtkd.config import ModelConfig, RunConfig
from mtkd.data.chat import check_chat_template
from mtkd.data.encode import around_text
from mtkd.data.glm_tokens import command_ids
from mtkd.data.infilling import Infilling
from mtkd.data.tasks import TaskSpec
from mtkd.data.tokenizers import num_real_ids, train_tokenizer
from mtkd.planning.locate import (
    compare_tokenizer,
    given_tokenizer,
    made_tokenizer,
    missing,
    resolve_path,
    revision_of,
    tokenizer_origin,
)
from mtkd.planning.places import placed
from mtkd.registry import TASKS


class PlannedTokenizer:
    """The tokenizer of a planned run.

    Attributes:
        tokenizer: the run's, or a stand-in with its special tokens.
        num_ids: its real ids; for a stand-in an upper bound.
        stands_in: whether the real one does not exist yet.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        settings = config.tokenizer
        self.stands_in = settings is not None and settings.train_on is not None
        card = None if self.stands_in else missing(tokenizer_origin(config)[0], config.base)
        if self.stands_in:
            assert settings is not None
            self.tokenizer: PreTrainedTokenizerBase = made_tokenizer(config, ["stand-in"])
            self.num_ids = settings.vocab_size
        elif card is not None:  # a published GLM without converted files has no tokenizer either
            assert card.ids is not None, "cards of GLM have it"
            self.tokenizer, self.num_ids = train_tokenizer(["stand-in"], card.ids, commands="glm"), card.ids
            self.stands_in = True
        else:
            self.tokenizer = given_tokenizer(config)
            self.num_ids = num_real_ids(self.tokenizer)

    def check_chats(self) -> None:
        """Refuse chats whose turns the run's tokenizer cannot write."""
        for name, data in self._config.data.items():
            if data.templated:
                check_chat_template(self.tokenizer, f"data.{name}.{'chat' if data.chat else 'messages'}")

    def check_commands(self) -> None:
        """Refuse GLM's tasks with a tokenizer that lacks their tokens, or with examples too short for a blank."""
        for name, data in self._config.data.items():
            task: TaskSpec = TASKS.find(data.task, f"data.{name}.task")
            with placed(data=f"data.{name}"):
                if task.cloze:
                    command_ids(self.tokenizer)
                if task.laid:
                    Infilling(self.tokenizer, data, around_text(self.tokenizer)).room(data.max_length)

    def compare(self, model: ModelConfig, where: str, *, masked: bool) -> list[str]:
        """Compare the tokenizers of a model and of the run, once both exist; the notes name harmless differences.

        Args:
            masked: whether the model is asked about masked tokens.
        Raises:
            DataError: they give other ids, or cut texts otherwise.
        """
        base = self._config.base
        if self.stands_in or model.path is None or model.stage is not None or missing(model.path, base) is not None:
            return []
        folder, revision = resolve_path(model.path, base), revision_of(model)
        return compare_tokenizer(self.tokenizer, folder, revision, where, masked=masked)
