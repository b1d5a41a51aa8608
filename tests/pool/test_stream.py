"""Streamed teachers give the resident numbers, hold one layer's pages, and refuse files that are not their weights."""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import CPU, NUM_IDS, causal_batch, causal_model, class_batch, classifier
from torch import Tensor, nn
from transformers import AlbertConfig, BertConfig, GPT2Config, LlamaConfig, PreTrainedModel

from mtkd.data.batch import Batch
from mtkd.errors import DataError, UserError
from mtkd.models import glm
from mtkd.models.create import empty_model
from mtkd.models.features import Features
from mtkd.models.folder import INDEX
from mtkd.models.stored import read_weights
from mtkd.models.taps import TappedModel
from mtkd.pool import LiveTeacher, OffloadedModel, TeacherPool, stream

CAUSAL, MASKED, CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
)
ALL = frozenset({"logits", "hidden.0", "hidden.1", "hidden.2", "query.1", "probs.2"})


def saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "10GB") -> Path:
    """A model folder with the weights in `dtype`."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def streamed(folder: Path, auto_class: str = CAUSAL, dtype: torch.dtype = torch.float32) -> OffloadedModel:
    """The model of a folder with its weights in the folder's files."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return stream(TappedModel(empty_model(config, auto_class), auto_class, NUM_IDS), folder, CPU, dtype)


def resident(folder: Path, auto_class: str = CAUSAL) -> TappedModel:
    """The same model, loaded by transformers."""
    made = getattr(transformers, auto_class).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="mtkd_tap"
    )
    return TappedModel(made, auto_class, NUM_IDS)


def values(features: Features, dtype: torch.dtype, columns: Tensor | None = None) -> dict[str, Tensor]:
    """Everything as tensors; logits as the objective reads them: selected, cast, in two tiles."""
    found = {}
    for key, value in features.items():
        if not isinstance(value, Tensor):
            value = value if columns is None else value.select(columns)
            value = value.in_dtype(dtype)
            value = torch.cat([value.rows(index) for index in (torch.arange(3), torch.arange(3, 8))])
        found[key] = value
    return found


def assert_equal(folder: Path, auto_class: str, batch: Batch, dtype: torch.dtype, wants: frozenset[str] = ALL) -> None:
    """A streamed teacher's features are the resident one's to the bit, in two turns."""
    model = streamed(folder, auto_class, dtype)
    one = LiveTeacher("t", resident(folder, auto_class), CPU, dtype)
    other = LiveTeacher("t", model, CPU, dtype)
    assert one.num_parameters == other.num_parameters
    wants = frozenset(key for key in wants if key.split(".")[0] in one.provides())
    for columns in (None, torch.tensor([2, 1])):
        wanted = values(one.forward(batch, wants), dtype, columns)
        for _ in range(2):
            found = values(other.forward(batch, wants), dtype, columns)
            assert wanted.keys() == found.keys()
            for key, value in wanted.items():
                assert value.isfinite().all(), key
                assert torch.equal(value, found[key]), key
    other.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["untied", "tied", "classes"])
def test_values_are_bit_equal(shape: str, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever the files hold and whatever products are in: one file, and shards that cut layers apart."""
    model, batch, head = classifier(16, 2, 3), class_batch([5, 4, 6, 3, 2, 7, 3, 1]), CLASSES
    if shape != "classes":
        model = causal_model(16, 2, 3, tied=shape == "tied", padded=7)
        batch, head = causal_batch([5, 4, 6]), CAUSAL
    for shard in ("10GB", "3KB"):
        folder = saved(model.model, tmp_path / shard, stored, shard)
        assert len(list(folder.glob("*.safetensors"))) == 1 if shard == "10GB" else (folder / INDEX).is_file()
        assert_equal(folder, head, batch, dtype)


SMALL = {"vocab_size": NUM_IDS, "pad_token_id": 0}
ARCHITECTURES: dict[str, tuple[Any, str]] = {
    # matrices stored transposed, a fused one for query, key and value, positions in a table
    "gpt2": (GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=32), CAUSAL),
    # a head of several modules, and a bias that two of them share
    "bert": (
        BertConfig(**SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32),
        MASKED,
    ),
    # one layer that runs twice
    "albert": (
        AlbertConfig(
            **SMALL,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        ),
        MASKED,
    ),
    "glm": (glm.GLMConfig(vocab_size=NUM_IDS + 3, hidden_size=16, num_hidden_layers=2, num_attention_heads=2), CAUSAL),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, tmp_path: Path) -> None:
    config, head = ARCHITECTURES[name]
    torch.manual_seed(1)
    model = getattr(transformers, head).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    folder = saved(model, tmp_path, torch.bfloat16, "2KB")
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal(folder, head, causal_batch([5, 4, 6]), dtype)


def test_files_of_the_bare_model_and_of_other_heads_are_read(tmp_path: Path) -> None:
    """GPT-2's published weights lack the prefix of the model; encoders come with heads that nobody asked for."""
    config, head = ARCHITECTURES["gpt2"]
    model = getattr(transformers, head).from_config(config)
    folder = saved(model.transformer, tmp_path)
    held = load_file(folder / "model.safetensors")
    assert not any(name.startswith("transformer.") for name in held)
    save_file({**held, "score.weight": torch.zeros(3, 16)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert_equal(folder, CAUSAL, causal_batch([5, 4, 6]), torch.float32)


def pages(folder: Path) -> int:
    """Bytes of the folder's files in this process's resident set."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def wide_model(folder: Path) -> Path:
    """Six layers of 1.3 MB in shards, between an embedding and a head of 4 MB each."""
    config = LlamaConfig(
        vocab_size=8_000, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return saved(transformers.LlamaForCausalLM(config), folder, torch.bfloat16, "5MB")


def test_only_the_layer_that_runs_is_in_memory(tmp_path: Path) -> None:
    """Looked at from inside every layer: the law that bounds the memory, whatever the number of layers."""
    folder = wide_model(tmp_path)
    model = streamed(folder)
    layers = model.model.model.model.layers
    size = sum(p.numel() for p in layers[0].parameters()) * 2
    slack = 12 * 65_536  # pages that the kernel maps around those that are touched, at each of a layer's borders
    assert sum(p.numel() for p in layers.parameters()) * 2 > 3 * (size + slack)
    seen: list[int] = []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(pages(folder)))
    for dtype in (torch.float32, torch.bfloat16):
        seen.clear()
        teacher = LiveTeacher("t", model, CPU, dtype)
        features = teacher.forward(causal_batch([5, 4, 6]), ALL)
        assert len(seen) == 6
        assert all(held < size + slack for held in seen), (seen, size)
        # products in bf16 read the pages themselves; in float32 a copy, and the pages are gone already
        assert dtype == torch.float32 or min(seen) > 0.9 * size, (seen, size)
        assert pages(folder) == 0  # after the turn
    logits: Any = features["logits"]
    logits.in_dtype(torch.bfloat16).rows(torch.arange(8))
    assert pages(folder) == 0  # and after a tile of the head, which is 4 MB
    teacher.close()


def test_between_turns_nothing_can_be_read(tmp_path: Path) -> None:
    """A weight that is not there is NaN: who reads it outside its module's pass is noticed, not served."""
    folder = saved(causal_model(16, 2, 3).model, tmp_path)
    model = streamed(folder)
    assert all(p.isnan().all() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters())
    table = model.embedding_table  # the one exception is asked for
    assert torch.equal(table, resident(folder).embedding_table)
    assert all(p.isnan().all() for p in model.parameters())
    model.close()


def test_a_model_that_reads_weights_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = saved(causal_model(16, 2, 3).model, tmp_path)
    model = TappedModel(empty_model(transformers.AutoConfig.from_pretrained(folder), CAUSAL), CAUSAL, NUM_IDS)
    norm = model.model.model.norm
    plain = norm.forward

    def strange(hidden: Tensor) -> Tensor:
        return plain(hidden) + model.model.model.layers[0].mlp.up_proj.weight.mean()

    norm.forward = strange
    with pytest.raises(UserError, match="one layer in memory at a time"):
        stream(model, folder, CPU, torch.float32)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = saved(causal_model(16, 2, 3).model, tmp_path, shard="3KB")
    before, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    content = {file: file.read_bytes() for file in folder.iterdir()}
    teachers = [LiveTeacher(name, streamed(folder), CPU, torch.bfloat16) for name in "ab"]
    pool = TeacherPool(teachers, [ALL, ALL])
    pool.forward(causal_batch([5]))
    pool.close()
    pool.close()
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == before
    assert {file: file.read_bytes() for file in folder.iterdir()} == content


def test_errors_of_the_reading_thread_reach_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = streamed(saved(causal_model(16, 2, 3).model, tmp_path))

    def broken(*_: object) -> None:
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(os, "posix_fadvise", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        model(causal_batch([5]), ALL)
    model.close()


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
LAYER = "model.layers.1.mlp.up_proj.weight"
WRONG: dict[str, tuple[Change, str]] = {
    "missing": (lambda held: {n: v for n, v in held.items() if n != LAYER}, f"1 missing: {LAYER}"),
    "unexpected": (lambda held: {**held, "model.extra": torch.zeros(2)}, "not part of the architecture: model.extra"),
    "shape": (lambda held: {**held, LAYER: torch.zeros(3, 5)}, "of another shape"),
    "type": (lambda held: {**held, LAYER: torch.zeros(held[LAYER].shape, dtype=torch.int8)}, "of another type"),
    "infinite": (lambda held: {**held, LAYER: held[LAYER].index_fill(0, torch.tensor([1]), torch.inf)}, "not finite"),
    "nan": (lambda held: {**held, LAYER: torch.full(held[LAYER].shape, torch.nan)}, "not finite"),
    "twice": (lambda held: {**held, LAYER.removeprefix("model."): held[LAYER].clone()}, "there twice"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    change, message = WRONG[name]
    folder = saved(causal_model(16, 2, 3).model, tmp_path)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(DataError) as caught:
        streamed(folder)
    assert message in str(caught.value)
    assert LAYER.removeprefix("model.") in str(caught.value) or name == "unexpected"


def test_a_head_that_should_be_the_embedding_and_is_not(tmp_path: Path) -> None:
    model = causal_model(16, 2, 3, tied=True).model
    folder = saved(model, tmp_path)
    file = folder / "model.safetensors"
    held = load_file(file)
    equal = {**held, "lm_head.weight": held["model.embed_tokens.weight"].clone()}
    save_file(equal, file, metadata={"format": "pt"})
    assert_equal(folder, CAUSAL, causal_batch([5, 4, 6]), torch.float32)
    equal["lm_head.weight"][-1, -1] += 1
    save_file(equal, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="tie_word_embeddings"):
        streamed(folder)


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    folder = saved(causal_model(16, 2, 3).model, tmp_path / "whole", shard="3KB")
    shard = sorted(folder.glob("*.safetensors"))[2]
    whole, index = shard.read_bytes(), (folder / INDEX).read_text()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(n for n in header if n != "__metadata__")
    entry = header[name]

    def written(changed: dict[str, Any]) -> bytes:
        text = json.dumps({**header, name: {**entry, **changed}}).encode()
        return len(text).to_bytes(8, "little") + text + whole[8 + length :]

    start, end = entry["data_offsets"]
    damaged = {
        whole[:-1]: "truncated",
        whole + b"x": "longer than its header",
        whole[:20]: "truncated",
        b"": "truncated",
        b"\xff" * 64: "truncated",
        whole[:8] + b"x" * length + whole[8 + length :]: "cannot be read",
        written({"dtype": "F4"}): "does not read",
        written({"shape": [1 << 40]}): "not those of its shape",
        written({"shape": [-1]}): "not described",
        written({"data_offsets": [start + 4, end + 4]}): "overlap, or leave a gap",
    }
    for content, message in damaged.items():
        shard.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_weights(folder)
    shard.write_bytes(whole)
    (folder / INDEX).write_text(index.replace('"weight_map": {', f'"weight_map": {{ "lost.weight": "{shard.name}",'))
    with pytest.raises(DataError, match="no shard has"):
        read_weights(folder)
    (folder / INDEX).write_text(index.replace(shard.name, "../outside.safetensors"))
    with pytest.raises(DataError, match="leaves the folder"):
        read_weights(folder)
    (folder / INDEX).write_text(index)
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        read_weights(folder)
    shard.symlink_to("/etc/passwd")
    with pytest.raises(DataError, match="leaves the model folder"):
        read_weights(folder)


def test_a_file_that_is_cut_short_later_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the header and the mapping: touching its pages would kill the process."""
    folder = saved(causal_model(16, 2, 3).model, tmp_path)
    file = folder / "model.safetensors"
    found = read_weights(folder)

    def stale(model: nn.Module, _: Path) -> dict[str, Any]:
        return {name: found[name] for name in model.state_dict()}

    monkeypatch.setattr(sys.modules["mtkd.pool.offload"], "find_weights", stale)
    os.truncate(file, file.stat().st_size - 8)
    with pytest.raises(DataError, match="cut short"):
        streamed(folder)


def test_values_at_odd_places_are_read(tmp_path: Path) -> None:
    """Old writers did not align their headers."""
    folder = saved(causal_model(16, 2, 3).model, tmp_path)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = whole[8 : 8 + length].rstrip() + b" "
    text += b" " * (len(text) % 2 == 0)
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    assert all(weight.start % 4 for weight in read_weights(folder).values())
    model = streamed(folder)
    batch = causal_batch([5, 4, 6])
    one, other = (values(m(batch, ALL), torch.float32) for m in (resident(folder).eval(), model))
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)
    model.close()


def test_the_benchmark_says_what_the_disk_lacks(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(benchmark.shutil, "disk_usage", lambda _: usage(0, 0, 19))
    with pytest.raises(DataError) as caught:
        benchmark.check_room(Path("somewhere") / "new", 20)
    assert "19 bytes free" in str(caught.value)
    assert "at least 20 bytes" in str(caught.value)
    benchmark.check_room(Path("somewhere"), 19)


def test_the_benchmark_makes_the_target(benchmark: ModuleType, tmp_path: Path) -> None:
    """Its small form loads as a GLM, is made the same twice, and goes on where it stopped."""
    config = glm.GLMConfig(vocab_size=384, hidden_size=16, num_hidden_layers=7, num_attention_heads=2)
    for name in ("one", "two"):
        benchmark.make_model(tmp_path / name, config, 300, seed=1)
    files = sorted(file.name for file in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) == 3  # tables, five layers, two
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)
    before = {f: (tmp_path / "two" / f).stat().st_mtime_ns for f in files}
    (tmp_path / "two" / files[1]).unlink()
    benchmark.make_model(tmp_path / "two", config, 300, seed=1)
    after = {f: (tmp_path / "two" / f).stat().st_mtime_ns for f in files}
    assert [f for f in files if before[f] != after[f]] == [files[1]]
    with pytest.raises(UserError, match="something else"):
        benchmark.make_model(tmp_path / "two", config, 300, seed=2)
    assert_equal(tmp_path / "two", CAUSAL, causal_batch([5, 4, 6]), torch.bfloat16)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """benchmarks/glm10b.py."""
    import importlib.util

    file = Path(__file__).parents[2] / "benchmarks" / "glm10b.py"
    spec = importlib.util.spec_from_file_location("glm10b", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
