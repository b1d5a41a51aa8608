"""Several data sets in one entry: shares by weight in every epoch, names and places of each row's own file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_examples import sentences
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from mtkd.config import BatchConfig, DataConfig, RunConfig
from mtkd.config.mix import resolve_mixes
from mtkd.data.chat_templates import BUILT_IN, give_template
from mtkd.data.load import LoadedData, load_data
from mtkd.data.mixture import Mixture
from mtkd.data.sampler import Order, TrainStream
from mtkd.data.sources import check_source, choose_rows, read_source
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError

BATCH = BatchConfig(sequences=4)


def test_an_epoch_has_the_shares_and_the_next_one_goes_on() -> None:
    """Law: over many epochs every example of a part comes equally often, one time more or less; counts are exact."""
    part_of = np.array([0] * 30 + [1] * 10 + [2] * 3)
    mixture = Mixture.of(["a", "b", "c"], [1, 2, 1], part_of)
    assert mixture.counts.sum() == 43
    np.testing.assert_allclose(mixture.counts / 43, [0.25, 0.5, 0.25], atol=1 / 43)
    seen: Counter[int] = Counter()
    for epoch in range(12):
        examples = mixture.epoch(7, epoch)
        assert np.bincount(part_of[examples], minlength=3).tolist() == mixture.counts.tolist()
        assert examples.tolist() == mixture.epoch(7, epoch).tolist()
        seen.update(examples.tolist())
    for part in range(3):
        times = [seen[example] for example in np.flatnonzero(part_of == part)]
        assert max(times) - min(times) <= 1
        assert min(times) >= 1
    assert mixture.epoch(8, 0).tolist() != mixture.epoch(7, 0).tolist()


@pytest.mark.parametrize(("weights", "counts"), [([1, 1e-6], [9, 1]), ([1e-6, 1], [5, 5]), ([3, 1], [8, 2])])
def test_small_shares(weights: list[float], counts: list[int]) -> None:
    """Every part that is there has an example; the sum is that of the split."""
    part_of = np.array([0] * 5 + [1] * 5)
    made = Mixture.of(["a", "b"], weights, part_of).counts
    assert made.sum() == 10
    assert made.min() >= 1
    assert made.tolist() == (counts if weights != [1e-6, 1] else [1, 9])
    alone = Mixture.of(["a", "b", "none"], [1, 1, 5], part_of)
    assert alone.counts.tolist() == [5, 5, 0]
    assert sorted(alone.epoch(0, 0)) == list(range(10))


def test_a_stream_is_resumed_inside_an_epoch_of_a_mix(tmp_path: Path) -> None:
    """Law: two integers of state; two ranks together have the examples of one."""
    split = mixed(tmp_path, {"math": 3, "code": 1}).splits["train"]

    def stream(rank: int = 0, ranks: int = 1) -> TrainStream:
        return TrainStream(split, Order(split.lengths, BATCH, 5, mixture=split.mixture), rank, ranks, 1)

    first = stream()
    steps = [next(first)[0].keys.tolist() for _ in range(9)]
    second = stream()
    for _ in range(5):
        next(second)
    third = stream()
    third.load_state(second.state())
    assert [next(third)[0].keys.tolist() for _ in range(4)] == steps[5:]
    both = [stream(rank, 2) for rank in (0, 1)]
    for step in steps:
        batches = [next(each)[0] for each in both]
        assert sorted(key for batch in batches for key in batch.keys.tolist()) == sorted(step)


def files(folder: Path) -> dict[str, DataConfig]:
    """Three entries: 12 prompts of math with domains, 4 of code, and chats."""
    rows = {
        "math": [{"q": f"{n} and one", "a": f"{n + 1}", "kind": "sum" if n % 2 else "more"} for n in range(12)],
        "code": [{"text": f"def f{n}", "prompt": f"write f{n}", "extra": n} for n in range(4)],
        "chats": [
            {"m": [{"from": "human", "value": f"hi {n}"}, {"from": "gpt", "value": "hello"}] * 2} for n in range(3)
        ],
        "words": [{"text": text} for text in sentences(5)],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    fields: dict[str, dict[str, Any]] = {
        "math": {"prompt": "q", "text": "a", "domain": "kind", "limit": {"train": 8}, "validation_share": 0.2},
        "code": {"prompt": "prompt"},
        "chats": {"messages": "m", "mask_history": True},
        "words": {},
    }
    return {
        name: DataConfig(source="files", path=str(folder), files={"train": f"{name}.jsonl"}, **each)
        for name, each in fields.items()
    }


def resolved(folder: Path, weights: dict[str, float], **fields: Any) -> DataConfig:
    parts = files(folder)
    for name in fields.pop("chat", ()):
        parts[name] = parts[name].model_copy(update={"chat": True})
    return resolve_mixes({**parts, "all": DataConfig(source="mix", mix=weights, **fields)})["all"]


def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(sentences(200), 400, special_tokens=BUILT_IN["chatml"].tokens)
    give_template(made, BUILT_IN["chatml"], trained=True)
    return made


def mixed(folder: Path, weights: dict[str, float], **fields: Any) -> LoadedData:
    config = resolved(folder, weights, **fields)
    check_source(config, folder)
    return load_data("all", config, choose_rows(read_source(config, folder), config), tokenizer())


def test_rows_keep_names_domains_and_what_they_say(tmp_path: Path) -> None:
    """A row's domain is its own, else its entry; hold-out and limit of each entry come first."""
    data = mixed(tmp_path, {"math": 1, "code": 3})
    train, validation = data.splits["train"], data.splits["validation"]
    assert (len(train), len(validation)) == (12, 2)
    assert set(train.document_domains) == {"sum", "more", "code"}
    assert train.document_names[:4] == [f"code/train:{n}" for n in range(1, 5)]
    assert all(name.startswith("math/train:") for name in train.document_names[4:])
    assert validation.mixture is None
    assert train.mixture is not None
    assert dict(zip(train.mixture.names, train.mixture.counts.tolist(), strict=True)) == {"math": 3, "code": 9}
    assert "9 of code (it has 4), 3 of math (it has 8)" in train.note
    made = tokenizer()
    alone = load_data("code", files(tmp_path)["code"], read_source(files(tmp_path)["code"], tmp_path), made)
    for row in range(4):
        here, there = train.collate([row]), alone.splits["train"].collate([row])
        assert here.input_ids.tolist() == there.input_ids.tolist()
        assert here.targets.tolist() == there.targets.tolist()


def test_prompts_and_chats_are_turns_of_one_template(tmp_path: Path) -> None:
    """The chats' mask_history goes with them: their first answers are not predicted."""
    data = mixed(tmp_path, {"code": 1, "chats": 1}, chat=("code",))
    train, made = data.splits["train"], tokenizer()
    text = made.decode(train.collate([3]).input_ids[0])
    assert text == "<|im_start|>user\nwrite f0<|im_end|>\n<|im_start|>assistant\ndef f0"
    targets = train.collate([0]).targets[0]
    assert made.decode(targets[targets >= 0]) == "hello<|im_end|>"
    assert train.document_names[:3] == [f"chats/train:{n}" for n in (1, 2, 3)]


def test_the_fingerprint_is_of_content_and_the_weights_are_of_the_stage(tmp_path: Path) -> None:
    """A cache of the mix serves other weights; a stage of other weights is another one, and so are other rows."""
    one, two = mixed(tmp_path, {"math": 1, "code": 1}), mixed(tmp_path, {"math": 2, "code": 1})
    assert one.fingerprint == two.fingerprint
    assert one.config.values() != two.config.values()
    (tmp_path / "code.jsonl").write_text('{"text": "x", "prompt": "y"}\n')
    changed = choose_rows(read_source(one.config, tmp_path), one.config)
    assert load_data("all", one.config, changed, tokenizer()).fingerprint != one.fingerprint


def test_the_order_of_names_changes_nothing(tmp_path: Path) -> None:
    """A cache knows its rows by number, and a run its place by the order: both are those of the sorted names."""
    one, two = mixed(tmp_path, {"math": 1, "code": 2}), mixed(tmp_path, {"code": 2, "math": 1})
    assert one.fingerprint == two.fingerprint
    first, second = (each.splits["train"] for each in (one, two))
    assert first.document_names == second.document_names
    assert first.mixture is not None
    assert second.mixture is not None
    assert first.mixture.epoch(3, 1).tolist() == second.mixture.epoch(3, 1).tolist()


def test_what_makes_examples_of_rows_is_one_for_all_parts(tmp_path: Path) -> None:
    """The mix's own value is before that of its parts; where it has none, and they differ, it is asked for."""
    parts = files(tmp_path)
    parts = {name: parts[name].model_copy(update={"max_length": 64}) for name in ("math", "code")}
    mix = {"source": "mix", "mix": {"math": 1, "code": 1}}
    assert resolve_mixes({**parts, "all": DataConfig(**mix)})["all"].max_length == 64
    assert resolve_mixes({**parts, "all": DataConfig(**mix, max_length=32)})["all"].max_length == 32
    parts["code"] = parts["code"].model_copy(update={"max_length": 48})
    with pytest.raises(ValueError, match=r"data\.all\.max_length: .*48 of data\.code, 64 of data\.math; set it here"):
        resolve_mixes({**parts, "all": DataConfig(**mix)})
    assert resolve_mixes({**parts, "all": DataConfig(**mix, max_length=32)})["all"].max_length == 32


def test_an_error_of_a_part_is_at_its_place(tmp_path: Path) -> None:
    """Not at the mix, which is as it should be."""
    parts = files(tmp_path)
    for wrong, place in ({"limit": {"test": 3}}, "data.math.limit.test"), ({"skip": {"train": 99}}, "data.math.skip"):
        math = parts["math"].model_copy(update=wrong)
        config = resolve_mixes({**parts, "math": math, "all": DataConfig(source="mix", mix={"math": 1, "code": 1})})
        with pytest.raises(UserError) as refused:
            read_source(config["all"], tmp_path)
        assert refused.value.where.startswith(place)


@pytest.mark.parametrize("fields", [{"limit": {"train": 1}}, {"skip": {"train": 10}, "limit": {"train": 1}}])
def test_a_limit_that_leaves_nothing_of_a_part(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Else a weight is given to nothing."""
    config = resolved(tmp_path, {"math": 1, "code": 1}, **fields)
    with pytest.raises(UserError, match=r"no row of data\.(math|code) is left") as refused:
        choose_rows(read_source(config, tmp_path), config)
    assert refused.value.where == "@data.limit.train"


def test_a_part_whose_every_chat_is_too_long(tmp_path: Path) -> None:
    config = resolved(tmp_path, {"code": 1, "chats": 1}, chat=("code",), max_length=48)
    rows = [{"prompt": f"{number} and one " * 30, "text": "yes"} for number in range(4)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = choose_rows(read_source(config, tmp_path), config)
    with pytest.raises(DataError, match=r"no example of data\.code is left"):
        load_data("all", config, raw, tokenizer())


def test_a_split_that_a_part_lacks_is_said(tmp_path: Path) -> None:
    config = resolved(tmp_path, {"math": 1, "code": 1})
    assert "the validation split has nothing of code" in " ".join(read_source(config, tmp_path).notes)


def test_an_error_names_the_file_of_the_row(tmp_path: Path) -> None:
    config = resolved(tmp_path, {"math": 1, "code": 1}, chat=("math", "code"))
    origin = choose_rows(read_source(config, tmp_path), config).origin("train")
    few = origin.select(np.array([9, 1]))
    assert origin.where(0).endswith("code.jsonl, row 1 (line 1)")
    assert "math.jsonl" in few.where(0)
    assert few.where(1).endswith("code.jsonl, row 2 (line 2)")
    (tmp_path / "code.jsonl").write_text('{"text": 1, "prompt": "y"}\n')
    with pytest.raises(DataError, match="no text") as refused:
        read_source(config, tmp_path)
    assert refused.value.where.endswith("code.jsonl, row 1 (line 1)")


@pytest.mark.parametrize(
    ("weights", "fields", "message"),
    [
        ({"math": 1, "nothing": 1}, {}, "no other data named 'nothing'"),
        ({"all": 1}, {}, "no other data named 'all'"),
        ({"math": 1, "words": 1}, {}, "data.math holds prompts, data.words texts"),
        ({"math": 1, "chats": 1}, {}, "set chat: true"),
        ({"math": 1}, {"task": "masked-lm"}, "data.math has task causal-lm"),
        ({"math": 1}, {"text": "a"}, "drop it here"),
        ({"math": 1}, {"domain": "kind"}, "drop it here"),
        ({"math": 1}, {"teacher": "by"}, "drop it here"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, weights: dict[str, float], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolved(tmp_path, weights, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"source": "mix"},
        {"source": "files", "mix": {"a": 1}},
        {"source": "mix", "mix": {"a": 0}},
        {"source": "mix", "mix": {"a": -1}},
        {"source": "mix", "mix": {"a": "much"}},
        {"source": "mix", "mix": {"a/b": 1}},
        {"source": "mix", "mix": {"a": 1}, "mask_history": True},
        {"source": "mix", "mix": {"a": 1}, "transfer": {"tokens": "uniform"}},
    ],
)
def test_blocks_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DataConfig(**fields)


def test_a_mix_of_classes_or_with_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not classes"):
        check_source(DataConfig(source="mix", mix={"a": 1}, task="classify"), tmp_path)
    with pytest.raises(UserError, match="does not read this"):
        check_source(DataConfig(source="mix", mix={"a": 1}, path="x"), tmp_path)


def test_a_resolved_run_is_read_again_as_it_was_written(tmp_path: Path) -> None:
    """run.yaml holds the resolved entry: its columns are those that it would be given."""
    data = {"words": {"source": "files", "files": {"train": "w.jsonl"}}, "all": {"source": "mix", "mix": {"words": 2}}}
    stage = {
        "kind": "finetune",
        "data": "all",
        "steps": 1,
        "student": {"architecture": "llama", "layers": 1, "width": 32, "heads": 2},
    }
    config = RunConfig(
        name="r", data=data, stages={"s": stage}, tokenizer={"train_on": "all"}, evaluate={"data": "all"}
    )
    again = RunConfig(**config.model_dump(mode="json", exclude_unset=True))
    assert again == config
    assert again.data["all"].parts["words"] == config.data["words"]
    assert again.data["all"].domain == "domain"
