"""Small texts, a tokenizer trained on them, and a shortcut from text to a loaded split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_examples import sentences
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mtkd.config import DataConfig
from mtkd.data.load import LoadedData, load_data
from mtkd.data.raw import Raw
from mtkd.data.tasks import check_task
from mtkd.data.tokenizers import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(sentences(200), 400, closed=True)


@pytest.fixture
def load(tokenizer: PreTrainedTokenizerFast) -> Callable[..., LoadedData]:
    """Columns of a train split and fields of the `data` block -> LoadedData."""

    def loader(
        columns: dict[str, list], tokenizer: PreTrainedTokenizerFast = tokenizer, **fields: object
    ) -> LoadedData:
        raw = Raw({"train": Dataset.from_dict(columns)}, "0" * 64, "test")
        config = DataConfig(source="files", **fields)
        check_task(config, "data.corpus")
        return load_data("corpus", config, raw, tokenizer)

    return loader


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], DataConfig]:
    """File name and content -> the `data` block that reads it as the train split."""

    def writer(name: str, content: str | bytes, **fields: object) -> DataConfig:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return DataConfig(source="files", files={"train": name}, **fields)

    return writer
