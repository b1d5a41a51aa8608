"""The four published forms of a GLM, written out here name by name, and what is refused instead of converted."""

from __future__ import annotations

import argparse
import json
import os
import re
import weakref
from pathlib import Path

import pytest
import torch
from glm_bank import rows
from glm_files import WIDTH, Weights, bert_file, originals, split, swiss, write
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mtkd.cli.app import app
from mtkd.errors import DataError, UserError
from mtkd.models.folder import check_folder
from mtkd.models.glm import convert_checkpoint, convert_state_dict
from mtkd.models.glm.convert import _merged
from mtkd.models.glm.names import Stored, stored
from mtkd.models.glm.shards import write_shards

ORIGINAL = ("original", "parts 2", "parts 4", "swiss")
HUB = ("hub", "hub without prefix", "hub safetensors", "hub shards")


@pytest.mark.parametrize("form", ORIGINAL + HUB)
def test_every_form_becomes_the_model(form: str, tmp_path: Path) -> None:
    model, weights = originals()
    if form.startswith("parts"):  # 70 ids cannot be cut in four
        extra = torch.zeros(2, WIDTH, dtype=torch.float16)
        weights["word_embeddings.weight"] = torch.cat([weights["word_embeddings.weight"], extra])
    made = convert_checkpoint(write(tmp_path / "source", form, weights), tmp_path / "out" / "glm", heads=4)
    assert made.folder == tmp_path / "out" / "glm"
    check_folder(made.folder)
    loaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert loaded.dtype == torch.float16
    config = loaded.config
    assert config.hidden_act == ("gelu" if form in HUB else "gelu_pytorch_tanh")
    assert (config.num_attention_heads, config.intermediate_size, config.max_position_embeddings) == (4, 96, 20)
    assert config.architectures == ["GLMForConditionalGeneration"]
    assert made.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    for name, value in model.state_dict().items():
        found = loaded.state_dict()[name]
        if found.shape != value.shape:
            assert not found[len(value) :].any()
            found = found[: len(value)]
        assert torch.equal(found, value), name
    ids = torch.tensor([rows()[0][0]])
    if form not in HUB:
        ours, theirs = (m.float()(ids, sep=4).logits[..., :70] for m in (loaded, model))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["glm"]


def test_a_file_is_told_by_what_is_in_it(tmp_path: Path) -> None:
    """Renamed files: the original's training code wraps its weights, the hub port does not."""
    _, weights = originals()
    torch.save({"module": weights}, tmp_path / "a.pt")
    torch.save(weights, tmp_path / "b.pt")
    assert convert_checkpoint(tmp_path / "a.pt", tmp_path / "a", heads=4).config.hidden_act == "gelu_pytorch_tanh"
    assert convert_checkpoint(tmp_path / "b.pt", tmp_path / "b", heads=4).config.hidden_act == "gelu"
    chosen = convert_checkpoint(tmp_path / "b.pt", tmp_path / "c", heads=4, hidden_act="gelu_pytorch_tanh")
    assert chosen.config.hidden_act == "gelu_pytorch_tanh"


def merged(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The whole model out of the state dicts of its model-parallel ranks."""
    wrapped = [{name: stored(value) for name, value in part.items()} for part in parts]
    return {name: weight.read() for name, weight in _merged(wrapped, "parts").items()}


def test_state_dicts_in_memory() -> None:
    model, weights = originals(torch.float32)
    wanted = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for form in (weights, swiss(weights), {f"glm.{name}": value for name, value in weights.items()}):
        found = convert_state_dict(form)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert convert_state_dict(weights)["glm.final_layernorm.bias"] is weights["transformer.final_layernorm.bias"]
    whole = merged(split(weights, 2))
    assert all(torch.equal(whole[name], wanted[name]) for name in wanted)
    model.load_state_dict(found, strict=False)
    with pytest.raises(DataError, match="do not fit the others"):
        convert_state_dict(split(weights, 2)[0])


def test_the_published_shapes_have_their_heads_and_ids(tmp_path: Path) -> None:
    """GLM-base's widths with one layer less is no card; with all of them its heads are known."""
    shapes = {"width": 768, "layers": 12, "rows": 513, "ids": 30592}
    zero = torch.zeros(1, dtype=torch.float16)  # expanded: no memory, and files of a few kilobytes cannot be written so

    def weights(layers: int) -> Weights:
        h = shapes["width"]
        found = {
            "word_embeddings.weight": zero.expand(shapes["ids"], h),
            "transformer.position_embeddings.weight": zero.expand(shapes["rows"], h),
            "transformer.block_position_embeddings.weight": zero.expand(shapes["rows"], h),
        }
        for i in range(layers):
            own = {
                "input_layernorm": (h,),
                "post_attention_layernorm": (h,),
                "attention.query_key_value": (3 * h, h),
                "attention.dense": (h, h),
                "mlp.dense_h_to_4h": (4 * h, h),
                "mlp.dense_4h_to_h": (h, 4 * h),
            }
            for module, shape in own.items():
                found[f"transformer.layers.{i}.{module}.weight"] = zero.expand(shape)
                found[f"transformer.layers.{i}.{module}.bias"] = zero.expand(shape[:1])
        return found | {f"transformer.final_layernorm.{kind}": zero.expand(h) for kind in ("weight", "bias")}

    torch.save({"module": weights(12)}, tmp_path / "base.pt")
    made = convert_checkpoint(tmp_path / "base.pt", tmp_path / "base", shard_bytes=100 << 20)
    assert made.parameters == 109_338_624
    assert made.num_files == 3
    config = made.config
    assert (config.num_attention_heads, config.pad_token_id, config.eos_token_id) == (12, 0, 30523)
    assert (config.sop_token_id, config.mask_token_id) == (30522, 103)
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * made.parameters
    check_folder(tmp_path / "base")
    bert_file(tmp_path / "bert", 30_521)  # one entry short: every command stands one place before the weights' own
    with pytest.raises(UserError, match="not that of weights with 30592 ids"):
        convert_checkpoint(tmp_path / "base.pt", tmp_path / "other", vocabulary=tmp_path / "bert")
    torch.save({"module": weights(11)}, tmp_path / "less.pt")
    with pytest.raises(UserError, match="cannot be read from the weights"):
        convert_checkpoint(tmp_path / "less.pt", tmp_path / "less")


def test_heads_of_the_configuration_beside_the_weights(tmp_path: Path) -> None:
    _, weights = originals()
    for name, form in (("config.json", "hub"), ("model_config.json", "swiss")):
        source = write(tmp_path / form, form, weights)
        (source / name).write_text(json.dumps({"num_attention_heads": 6}))
        assert convert_checkpoint(source, tmp_path / f"{form} out").config.num_attention_heads == 6
        with pytest.raises(UserError, match="another number of heads"):
            convert_checkpoint(source, tmp_path / "never", heads=4)
        (source / name).write_text("{")
        with pytest.raises(DataError, match="JSON"):
            convert_checkpoint(source, tmp_path / "never")
    with pytest.raises(UserError, match="divisor of the width 24"):
        convert_checkpoint(write(tmp_path / "x", "hub", weights), tmp_path / "never", heads=5)


class Hostile:
    """A pickle that writes a file when it is read."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("form", ["original", "hub"])
def test_a_hostile_pickle_is_not_run(form: str, tmp_path: Path) -> None:
    _, weights = originals()
    source, trap = write(tmp_path / "source", form, weights), tmp_path / "trap"
    content = {"module": weights, "extra": Hostile(trap)} if form == "original" else {**weights, "x": Hostile(trap)}
    file = source / ("mp_rank_00_model_states.pt" if form == "original" else "pytorch_model.bin")
    torch.save(content, file)
    with pytest.raises(DataError, match="weights alone") as error:
        convert_checkpoint(source, tmp_path / "out", heads=4)
    assert "mkdir" in str(error.value)
    assert not trap.exists()
    assert not (tmp_path / "out").exists()
    torch.save({"module": weights, "args": argparse.Namespace(x=1)}, file)
    with pytest.raises(DataError, match="Namespace"):
        convert_checkpoint(source, tmp_path / "out", heads=4)


def test_a_pickle_of_the_old_kind_is_refused(tmp_path: Path) -> None:
    _, weights = originals()
    torch.save({"module": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"torch 1.6 or later"):
        convert_checkpoint(tmp_path / "old.pt", tmp_path / "out", heads=4)


def changed(weights: Weights, change: str) -> Weights:
    found = dict(weights)
    if change == "missing":
        del found["transformer.layers.1.mlp.dense_h_to_4h.bias"]
        del found["transformer.final_layernorm.weight"]
    elif change == "unexpected":
        found["transformer.layers.0.attention.extra"] = torch.zeros(1)
        found["classifier.weight"] = torch.zeros(1)
    elif change == "twice":
        found["glm.word_embeddings.weight"] = found["word_embeddings.weight"]
    elif change == "a hole":
        found = {name: value for name, value in found.items() if ".layers.1." not in name}
    elif change == "shape":
        found["transformer.layers.2.attention.dense.weight"] = torch.zeros(24, 23)
    elif change == "another model":
        found = {"model.embed_tokens.weight": torch.zeros(3, 4)}
    elif change == "flat":
        found["word_embeddings.weight"] = torch.zeros(24)
    return found


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ("missing", ["missing: layers.1.mlp.dense_h_to_4h.bias, final_layernorm.weight; unexpected: none"]),
        ("unexpected", ["missing: none", "transformer.layers.0.attention.extra", "classifier.weight"]),
        ("twice", ["glm.word_embeddings.weight (in addition to word_embeddings.weight)"]),
        ("a hole", ["missing: layers.1.input_layernorm.weight", "and 4 more"]),
        ("shape", ["layers.2.attention.dense.weight [24, 23] instead of [24, 24]"]),
        ("another model", ["model.embed_tokens.weight", "and 9 more"]),
        ("flat", ["two axes"]),
    ],
)
def test_what_does_not_fit_is_named(change: str, messages: list[str], tmp_path: Path) -> None:
    _, weights = originals()
    wrong = changed(weights, change)
    source = write(tmp_path / "source", "hub without prefix", wrong)
    for attempt in (lambda: convert_checkpoint(source, tmp_path / "out", heads=4), lambda: convert_state_dict(wrong)):
        with pytest.raises(DataError) as error:
            attempt()
        for message in messages:
            assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    _, weights = originals()
    parts = split(weights, 2)
    parts[1]["transformer.layers.0.input_layernorm.weight"] += 1
    with pytest.raises(DataError, match=r"input_layernorm.weight' is not the same in every part"):
        merged(parts)
    nan = split(weights, 2)
    nan[1]["transformer.final_layernorm.bias"][0] = torch.nan
    with pytest.raises(DataError, match="not the same"):
        merged(nan)
    with pytest.raises(DataError, match="do not fit each other"):
        merged([split(weights, 2)[0], weights])
    with pytest.raises(DataError, match="numbers of layers"):
        merged([parts[0], {name: v for name, v in parts[1].items() if ".layers.2." not in name}])
    source = write(tmp_path / "source", "parts 2", weights)
    (source / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(DataError, match="part is missing"):
        convert_checkpoint(source, tmp_path / "out", heads=4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"module": {"word_embeddings.weight": [1.0]}}, "other things than weights"),
        ([1, 2], "no state dict"),
    ],
)
def test_files_without_weights(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(DataError, match=message):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "out", heads=4)


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        convert_checkpoint(tmp_path / "none", tmp_path / "out")
    with pytest.raises(DataError, match="holds no checkpoint"):
        convert_checkpoint(tmp_path, tmp_path / "out")
    _, weights = originals()
    write(tmp_path / "150000", "original", weights)
    with pytest.raises(DataError, match="name the inner folder") as error:
        convert_checkpoint(tmp_path, tmp_path / "out")
    assert "150000" in str(error.value)
    source = write(tmp_path / "hub", "hub shards", weights)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(DataError, match="shard is missing"):
        convert_checkpoint(source, tmp_path / "out")


def test_no_half_written_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, weights = originals()
    parts = split(weights, 2)
    parts[1]["transformer.final_layernorm.bias"] += 1  # found when most of it is written
    source = tmp_path / "source"
    source.mkdir()
    for rank, part in enumerate(parts):
        torch.save({"module": part}, source / f"mp_rank_{rank:02d}_model_states.pt")
    with pytest.raises(DataError, match="not the same"):
        convert_checkpoint(source, tmp_path / "out", heads=4)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert_checkpoint(source, tmp_path / "out", heads=4)
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="disk is too small"):
        convert_checkpoint(write(tmp_path / "fine", "original", weights), tmp_path / "new", heads=4)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shards_are_those_of_the_library_and_one_weight_is_held(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = {f"w{i}": torch.randn(3, 5 + i, generator=generator).to(dtype) for i in range(7)}
    alive: list[weakref.ref[Tensor]] = []

    def reader(name: str):  # type: ignore[no-untyped-def]
        def read() -> Tensor:
            assert not any(held() is not None for held in alive), "an earlier weight is still in memory"
            value = values[name].t().contiguous().t()  # not contiguous
            alive.append(weakref.ref(value))
            return value

        return read

    weights = {name: Stored(tuple(v.shape), v.dtype, reader(name)) for name, v in values.items()}
    size = values["w0"].element_size() * 15
    assert write_shards(tmp_path, weights, shard_bytes=2 * size + 1) > 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name, value in values.items():
        with safe_open(tmp_path / index[name], framework="pt") as file:
            assert torch.equal(file.get_tensor(name), value)
            assert file.metadata() == {"format": "pt"}
    first = (tmp_path / index["w0"]).read_bytes()
    assert (8 + int.from_bytes(first[:8], "little")) % 8 == 0


def test_the_command(tmp_path: Path) -> None:
    _, weights = originals()
    source = write(tmp_path / "source", "parts 2", weights)
    found = CliRunner().invoke(app, ["convert-glm", str(source), str(tmp_path / "out"), "--heads", "4"])
    assert found.exit_code == 0, found.output
    assert re.search(r"[\d,]+ parameters, 3 layers, width 24, 4 heads, gelu_pytorch_tanh; 1 files", found.output)
    found = CliRunner().invoke(app, ["convert-glm", str(source), str(tmp_path / "b"), "--heads", "4", "--json"])
    assert json.loads(found.stdout)["config"]["hidden_size"] == 24
    found = CliRunner().invoke(app, ["convert-glm", str(source), str(tmp_path / "c"), "--hidden-act", "relu"])
    assert isinstance(found.exception, UserError)


def test_the_activation_beside_the_weights(tmp_path: Path) -> None:
    _, weights = originals()
    source = write(tmp_path / "source", "hub", weights)
    (source / "config.json").write_text(json.dumps({"hidden_act": "gelu_pytorch_tanh"}))
    assert convert_checkpoint(source, tmp_path / "a", heads=4).config.hidden_act == "gelu_pytorch_tanh"
    assert convert_checkpoint(source, tmp_path / "b", heads=4, hidden_act="gelu").config.hidden_act == "gelu"
    (source / "config.json").write_text(json.dumps({"hidden_act": "relu"}))
    with pytest.raises(DataError, match="relu"):
        convert_checkpoint(source, tmp_path / "c", heads=4)


def test_a_rank_s_file_by_itself_is_the_original_s(tmp_path: Path) -> None:
    _, weights = originals()
    file = tmp_path / "source" / "mp_rank_00_model_states.pt"
    file.parent.mkdir()
    torch.save(weights, file)
    for number, source in enumerate((file, file.parent)):
        made = convert_checkpoint(source, tmp_path / str(number), heads=4)
        assert made.config.hidden_act == "gelu_pytorch_tanh"


@pytest.mark.parametrize("number", ["9999999999", "9" * 5000])
def test_a_hostile_layer_number(number: str) -> None:
    _, weights = originals()
    weights[f"transformer.layers.{number}.attention.dense.weight"] = torch.zeros(1)
    with pytest.raises(DataError, match="unexpected"):
        convert_state_dict(weights)


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    _, weights = originals()
    source = write(tmp_path / "source", "hub", weights)
    file = source / "pytorch_model.bin"
    file.rename(tmp_path / "elsewhere.bin")
    file.symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(DataError, match="a link leaves the model folder"):
        convert_checkpoint(source, tmp_path / "out", heads=4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool])
def test_types_that_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    _, weights = originals()
    weights["word_embeddings.weight"] = weights["word_embeddings.weight"].to(dtype)
    with pytest.raises(DataError, match=r"word_embeddings\.weight") as caught:
        convert_checkpoint(write(tmp_path / "source", "original", weights), tmp_path / "out", heads=4)
    assert "cannot be converted" in str(caught.value)


def test_a_vocabulary_that_is_not_plain_can_be_left_alone(tmp_path: Path) -> None:
    """The hub's folders may hold GLM's commands already."""
    _, weights = originals()
    source = write(tmp_path / "published", "original", weights)
    bert_file(source)
    with (source / "vocab.txt").open("a") as file:
        file.write("<|startofpiece|>\n")
    with pytest.raises(DataError, match="--no-tokenizer"):
        convert_checkpoint(source, tmp_path / "first", heads=4)
    made = convert_checkpoint(source, tmp_path / "second", heads=4, with_tokenizer=False)
    assert {file.name for file in made.folder.iterdir()} == {"config.json", "model.safetensors"}
    with pytest.raises(UserError, match="a vocabulary, and none"):
        convert_checkpoint(source, tmp_path / "third", heads=4, vocabulary=source, with_tokenizer=False)
