"""The common setting: models of one seed on every side, the same ids, and how time and memory are taken.

Student Llama 2x256, teachers Llama 4x512, V = 32,000, 4 x 256 tokens, float32; encoders are BERTs of the same sizes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

VOCABULARY, BATCH, LENGTH = 32_000, 4, 256
STUDENT = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
TEACHER = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
LEARNING_RATE, BETA = 1e-4, 0.5

Result = dict[str, float]
"""What an arm found: seconds, MB (of 1e6 bytes), losses; None-free, so that it goes through JSON."""


def llama(shape: Mapping[str, int], seed: int, attention: str | None = None):
    """A seeded Llama with untied head; `attention` is transformers' name of an implementation."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=shape["num_attention_heads"],
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **shape,
    )
    return _seeded("AutoModelForCausalLM", config, seed, attention)


def bert(shape: Mapping[str, int], seed: int, attention: str | None = None):
    """A seeded BERT classifier of 3 classes without dropout (both sides then compute the same numbers)."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=8_000,
        max_position_embeddings=LENGTH,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **shape,
    )
    return _seeded("AutoModelForSequenceClassification", config, seed, attention)


def _seeded(auto_class: str, config, seed: int, attention: str | None):
    import torch
    import transformers

    torch.manual_seed(seed)
    return getattr(transformers, auto_class).from_config(config, attn_implementation=attention, dtype=torch.float32)


def token_ids():
    """The language-model batch, [BATCH, LENGTH]; no padding."""
    import torch

    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))


def resident_mb() -> float:
    """Resident set of this process now, MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def peak_mb() -> float:
    """Largest resident set since the process began, or since `forget_peak`, MB."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def forget_peak() -> None:
    """Let `peak_mb` begin at 0."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def timed(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; the functions alternate, so that a machine that slows down hurts all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def measured_steps(step: Callable[[], float], repeats: int, loaded: float) -> Result:
    """First loss, seconds of a later step (median and least) and memory of a step function.

    Args:
        loaded: resident set when the models were loaded, MB; "step memory" is what the process grew by since.
    """
    import statistics

    first = step()
    seconds = timed({"step": step}, repeats)["step"]
    peak = peak_mb()
    return {
        "first_loss": first,
        "seconds": statistics.median(seconds),
        "best": min(seconds),
        "peak_mb": peak,
        "step_mb": peak - loaded,
    }
