"""Fresh, loaded and cut models: what they are, and every way in which a folder is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_bank import ARCHITECTURES, EVERY_HEAD, LM_OF, NUM_IDS, batch, build, description, lively, tapped, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

from mtkd.config import ModelConfig
from mtkd.errors import DataError, UserError
from mtkd.models import folder as folders
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, MASKED_LM
from mtkd.models.load import build_model, load_config
from mtkd.models.request import ModelRequest
from mtkd.models.taps import TappedModel

WANTS = frozenset({"logits", "hidden.1"})


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, str], Path]:
    """Save a lively model of an architecture and give its folder."""

    def save(architecture: str, auto_class: str, **fields: object) -> Path:
        folder = tmp_path / f"{architecture}-{auto_class}"
        lively(build(description(architecture, **fields), auto_class)).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_fresh_models_follow_their_description(architecture: str, auto_class: str) -> None:
    model = build(description(architecture, intermediate=40), auto_class)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight.shape == (NUM_IDS, 24)
    assert any(40 in p.shape for p in model.parameters())
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
    assert not model.training
    longest = batch((16,), width=16)
    TappedModel(model, auto_class, NUM_IDS)(longest, WANTS)  # the longest sequence has positions


def test_fresh_defaults() -> None:
    assert build(description("bert"), MASKED_LM).config.intermediate_size == 96
    assert build(description("llama"), CAUSAL_LM).config.intermediate_size == 64  # 8/3 x 24, a multiple of 32
    assert build(description("llama", kv_heads=None), CAUSAL_LM).config.num_key_value_heads == 4
    assert build(description("gpt2", max_positions=20), CAUSAL_LM).config.n_positions == 20
    config = build(description("roberta"), MASKED_LM).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (1, 0, 2)
    assert config.max_position_embeddings == 16 + 1 + 1


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tied_heads(architecture: str, tie: bool) -> None:
    model = build(description(architecture, tie_embeddings=tie), LM_OF[architecture])
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie


def test_a_shared_pad_token_keeps_its_gradient() -> None:
    """With pad == eos the embedding row is also text; as `padding_idx` it would never be trained."""
    config = description("llama")
    shared = tokenizer()
    shared.pad_token = shared.eos_token
    model = build_model(config, ModelRequest(CAUSAL_LM, NUM_IDS, max_positions=8, tokenizer=shared))
    model.get_output_embeddings().weight.requires_grad_(False)
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx is None
    assert build(config, CAUSAL_LM).get_input_embeddings().padding_idx == 1


@pytest.mark.parametrize(
    ("config", "auto_class", "message"),
    [
        (description("bret"), MASKED_LM, "did you mean 'bert'"),
        (description("bert"), CAUSAL_LM, "attends in both directions"),
        (description("gpt2"), MASKED_LM, "no model for this task"),
        (description("bert", kv_heads=2), MASKED_LM, "key/value heads"),
        (description("bert", max_positions=15), MASKED_LM, "longer than the model's longest"),
        (ModelConfig(path="bert-bas"), MASKED_LM, "did you mean 'bert-base'"),
        (ModelConfig(path="no/such/folder"), MASKED_LM, "no such model folder"),
        (ModelConfig(path="glm-large"), MASKED_LM, "mtkd convert-glm FOLDER glm-large"),
    ],
)
def test_descriptions_that_are_refused(
    config: ModelConfig, auto_class: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", _offline)
    with pytest.raises(UserError) as error:
        build(config, auto_class)
    assert message in str(error.value)


def _offline(*args: object, **kwargs: object) -> str:
    raise ConnectionError("no network in tests")


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_the_seed_alone_decides(architecture: str, auto_class: str) -> None:
    torch.manual_seed(11)
    first = build(description(architecture), auto_class, seed=5)
    state = torch.random.get_rng_state()
    torch.manual_seed(12)
    assert same(first, build(description(architecture), auto_class, seed=5))
    assert not same(first, build(description(architecture), auto_class, seed=6))
    torch.manual_seed(11)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing was drawn from it


def test_dropout_sets_every_field(saved: Callable[..., Path]) -> None:
    for architecture in ARCHITECTURES:
        folder = str(saved(architecture, LM_OF[architecture]))
        for config in (description(architecture, dropout=0.3), ModelConfig(path=folder, dropout=0.3)):
            values = build(config, LM_OF[architecture]).config.to_dict()
            drops = {k: v for k, v in values.items() if "drop" in k and v is not None}
            assert drops, architecture
            assert set(drops.values()) == {0.3}, drops


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_a_saved_model_comes_back(saved: Callable[..., Path], architecture: str, auto_class: str) -> None:
    folder = saved(architecture, auto_class)
    expected = lively(build(description(architecture), auto_class))
    model = build(str(folder), auto_class)
    assert same(model, expected)
    assert model.config._attn_implementation == "mtkd_tap"
    written = (folder / "config.json").read_text()
    assert "mtkd" not in written  # it loads where mtkd is not installed
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)


def test_half_precision_weights_become_float32(saved: Callable[..., Path]) -> None:
    folder = saved("bert", MASKED_LM)
    weights = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "dtype": "bfloat16", "torch_dtype": "bfloat16"}))
    model = build(str(folder), MASKED_LM)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_stage_is_resolved(saved: Callable[..., Path]) -> None:
    folder = saved("bert", MASKED_LM)
    asked = []

    def resolve(path: str) -> Path:
        asked.append(path)
        return folder

    request = ModelRequest(MASKED_LM, NUM_IDS, max_positions=16, tokenizer=tokenizer(), resolve=resolve)
    config, _ = load_config(ModelConfig(path="stage:teacher", dropout=0.25), request)
    assert asked == ["stage:teacher"]
    assert config.num_hidden_layers == 3
    assert config.hidden_dropout_prob == 0.25


def test_a_configuration_needs_no_weights(saved: Callable[..., Path]) -> None:
    folder = saved("llama", CAUSAL_LM)
    (folder / "model.safetensors").unlink()
    request = ModelRequest(CAUSAL_LM, NUM_IDS, max_positions=16, tokenizer=tokenizer())
    config, _ = load_config(ModelConfig(path=str(folder), keep_layers=(1, 3)), request)
    assert config.num_hidden_layers == 2
    with pytest.raises(DataError, match="no weights"):
        build(str(folder), CAUSAL_LM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("bert.encoder.layer.1.output.dense.weight"), "missing"),
        (lambda w: w.pop("cls.predictions.transform.dense.weight"), "missing"),
        (lambda w: w.update({"bert.encoder.layer.7.output.dense.weight": torch.ones(2)}), "not part of"),
        (lambda w: w.update({"bert.embeddings.LayerNorm.bias": torch.ones(5)}), "another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved: Callable[..., Path], change: Callable, message: str) -> None:
    folder = saved("bert", MASKED_LM)
    weights = load_file(folder / "model.safetensors")
    before = set(weights)
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=message) as error:
        build(str(folder), MASKED_LM)
    name = next(iter(before ^ set(weights)), "bert.embeddings.LayerNorm.bias")
    assert name in str(error.value)


def test_heads_of_other_tasks_are_left_out(saved: Callable[..., Path]) -> None:
    folder = saved("bert", MASKED_LM)
    weights = load_file(folder / "model.safetensors")
    weights |= {"cls.seq_relationship.weight": torch.ones(2, 24), "bert.pooler.dense.bias": torch.ones(24)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert same(build(str(folder), MASKED_LM), lively(build(description("bert"), MASKED_LM)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_new_classification_head_is_seeded(saved: Callable[..., Path], architecture: str) -> None:
    folder = str(saved(architecture, LM_OF[architecture]))
    torch.manual_seed(1)
    first = build(folder, CLASSIFIER, seed=2)
    torch.manual_seed(3)
    assert same(first, build(folder, CLASSIFIER, seed=2))
    other = build(folder, CLASSIFIER, seed=4)
    prefix = f"{first.base_model_prefix}."
    theirs = other.state_dict()
    changed = {k for k, v in first.state_dict().items() if not torch.equal(v, theirs[k])}
    assert changed
    assert all(not k.startswith(prefix) or "pooler" in k for k in changed)
    base = build(folder, LM_OF[architecture]).base_model.state_dict()
    own = first.base_model.state_dict()
    assert all(torch.equal(own[k], v) for k, v in base.items())


def test_a_classifier_without_its_head_is_refused(saved: Callable[..., Path]) -> None:
    """A fine-tuned teacher whose head was lost must not get a random one."""
    folder = saved("roberta", CLASSIFIER)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.out_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"classifier\.out_proj\.weight"):
        build(str(folder), CLASSIFIER)


def test_an_encoder_without_a_language_model_head_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved("bert", CLASSIFIER)
    with pytest.raises(DataError, match=r"cls\.predictions"):
        build(str(folder), MASKED_LM)


def test_labels(tmp_path: Path) -> None:
    names = ("no", "yes", "maybe")
    folder = tmp_path / "model"
    build(description("bert"), CLASSIFIER, label_names=names).save_pretrained(folder)
    loaded = build(str(folder), CLASSIFIER, label_names=names)
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert loaded.config.problem_type == "single_label_classification"
    assert build(description("bert"), CLASSIFIER, num_labels=1).config.problem_type == "regression"
    with pytest.raises(DataError, match="another number of classes"):
        build(str(folder), CLASSIFIER, num_labels=2, label_names=("no", "yes"))


def test_too_many_ids(saved: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="more ids"):
        build(str(saved("bert", MASKED_LM)), MASKED_LM, num_ids=NUM_IDS + 1)


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_all_layers_kept_is_the_model_itself(saved: Callable[..., Path], architecture: str, auto_class: str) -> None:
    folder = str(saved(architecture, auto_class))
    assert same(build(ModelConfig(path=folder, keep_layers=(1, 2, 3)), auto_class), build(folder, auto_class))


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_kept_layers_have_the_teachers_weights(
    saved: Callable[..., Path], tmp_path: Path, architecture: str, auto_class: str
) -> None:
    folder = str(saved(architecture, auto_class))
    teacher = build(folder, auto_class)
    student = build(ModelConfig(path=folder, keep_layers=(1, 3)), auto_class)
    layers = next(n for n, m in teacher.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    whole, cut = teacher.state_dict(), student.state_dict()
    came_from = {f"{layers}.1.": f"{layers}.2."}
    for name, value in cut.items():
        source = name
        for here, there in came_from.items():
            source = source.replace(here, there)
        assert torch.equal(value, whole[source]), name
    assert student.config.num_hidden_layers == 2
    assert {getattr(m, "layer_idx", 0) for m in student.modules() if getattr(m, "layer_idx", None) is not None} <= {
        0,
        1,
    }
    # The first layer of both is the same function, and the cut model survives a round trip.
    wants = frozenset({"hidden.1", "probs.2"})
    ours = TappedModel(student, auto_class, NUM_IDS)(batch(), wants)
    theirs = TappedModel(teacher, auto_class, NUM_IDS)(batch(), wants)
    torch.testing.assert_close(ours["hidden.1"], theirs["hidden.1"])
    student.save_pretrained(tmp_path / "cut")
    assert same(build(str(tmp_path / "cut"), auto_class), student)


def test_lists_with_an_entry_per_layer_are_cut(tmp_path: Path) -> None:
    model = build(description("qwen2"), CAUSAL_LM)
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    model.config.sliding_window = 4
    model.save_pretrained(tmp_path / "model")
    student = build(ModelConfig(path=str(tmp_path / "model"), keep_layers=(2, 3)), CAUSAL_LM)
    assert student.config.layer_types == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("layers", [(0,), (4,), (2, 1), (1, 1), (1, 4)])
def test_layers_that_do_not_exist(saved: Callable[..., Path], layers: tuple[int, ...]) -> None:
    folder = str(saved("bert", MASKED_LM))
    config = ModelConfig.model_construct(path=folder, revision=None, keep_layers=layers, dropout=None)
    with pytest.raises(UserError, match="keep_layers") as error:
        build(config, MASKED_LM)
    assert "1 to 3" in str(error.value)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    build(description("bert"), MASKED_LM).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every file Python or safetensors is asked to open from here on."""
    import builtins
    import io

    import transformers.modeling_utils as modeling

    names: list[str] = []
    real, safe = io.open, modeling.safe_open

    def spy(file: object, *args: object, **kwargs: object) -> object:
        names.append(str(file))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    monkeypatch.setattr(io, "open", spy)
    monkeypatch.setattr(modeling, "safe_open", lambda f, *a, **k: names.append(str(f)) or safe(f, *a, **k))
    return names


def test_shards_load(sharded: Path, opened: list[str]) -> None:
    assert same(build(str(sharded), MASKED_LM), build(description("bert"), MASKED_LM))
    assert any(name.endswith(".safetensors") for name in opened)  # the spy would see an open outside


@pytest.mark.parametrize(
    "entry", ["../secret.safetensors", "{}/secret.safetensors", "a/b.safetensors", "..", "x.bin", 3]
)
def test_weight_map_that_leaves_the_folder(sharded: Path, opened: list[str], entry: object) -> None:
    secret = sharded.parent / "secret.safetensors"
    shutil.copy(next(sharded.glob("*.safetensors")), secret)
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    content["weight_map"][first] = entry.format(sharded.parent) if isinstance(entry, str) else entry
    index.write_text(json.dumps(content))
    opened.clear()
    with pytest.raises(DataError, match="shard name") as error:
        build(str(sharded), MASKED_LM)
    assert first in str(error.value)
    assert not [name for name in opened if "secret" in name]
    assert all(Path(name).parent == sharded for name in opened if name.startswith(str(sharded.parent)))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_links_that_leave_the_folder(saved: Callable[..., Path], opened: list[str], name: str) -> None:
    folder = saved("bert", MASKED_LM)
    outside = folder.parent / f"secret-{name}"
    if (folder / name).exists():
        shutil.move(folder / name, outside)
    else:
        outside.write_text("{}")
    (folder / name).symlink_to(outside)
    opened.clear()
    with pytest.raises(DataError, match="link leaves"):
        build(str(folder), MASKED_LM)
    assert not [n for n in opened if n in (str(outside), str(folder / name))]


def test_links_inside_the_hubs_cache_are_fine(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("bert", MASKED_LM)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert same(build(str(snapshot), MASKED_LM), build(str(folder), MASKED_LM))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_x.X"}}, "remote code is off"),
        ({"_attn_implementation": "owner/kernel"}, "kernel from the hub"),
        ({"attn_implementation": "owner/kernel"}, "kernel from the hub"),
        ({"text_config": {"_attn_implementation": "owner/kernel"}}, "kernel from the hub"),
        ({"attn_implementation": {"text": "owner/kernel"}}, "kernel from the hub"),
        ({"transformers_weights": "../secret.safetensors"}, "redirects its weights"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": "no_such_type"}, "configuration cannot be read"),
    ],
)
def test_configurations_that_are_refused(saved: Callable[..., Path], extra: dict[str, object], message: str) -> None:
    folder = saved("bert", MASKED_LM)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **extra}))
    (folder / "modeling_x.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(DataError, match=message):
        build(str(folder), MASKED_LM)


class Payload:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.mkdir, (self.mark,))  # type: ignore[return-value]


def test_pickle_weights_are_not_read(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("bert", MASKED_LM)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="pickle") as error:
        build(str(folder), MASKED_LM)
    assert "convert" in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"config\.json is missing"):
        build(str(tmp_path), MASKED_LM)
    (tmp_path / "config.json").write_text("[1, 2")
    with pytest.raises(DataError, match="JSON"):
        build(str(tmp_path), MASKED_LM)


def test_an_adapter_is_refused(saved: Callable[..., Path]) -> None:
    folder = saved("bert", MASKED_LM)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/somewhere"}')
    with pytest.raises(DataError, match="adapter"):
        build(str(folder), MASKED_LM)


def test_a_truncated_file_is_refused(saved: Callable[..., Path]) -> None:
    file = saved("bert", MASKED_LM) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(DataError, match="truncated"):
        build(str(file.parent), MASKED_LM)


def test_a_card_is_fetched_from_its_source(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the configuration and the index, then the shards it names, nothing else of the repository."""
    calls: list[tuple[str, str | None, list[str]]] = []

    def fetch(repo: str, revision: str | None = None, allow_patterns: list[str] | None = None) -> str:
        calls.append((repo, revision, list(allow_patterns or [])))
        return str(sharded)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    build(ModelConfig(path="bert-base", revision="v1"), MASKED_LM)
    shards = sorted(f.name for f in sharded.glob("*.safetensors"))
    assert [c[:2] for c in calls] == [("google-bert/bert-base-uncased", "v1")] * 2
    assert not [p for p in calls[0][2] if p in shards]
    assert set(shards) <= set(calls[1][2])


def test_a_hostile_index_is_refused_before_its_shards_are_fetched(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append(1) or str(sharded))
    (sharded / folders.INDEX).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(DataError, match="shard name"):
        build("owner/name", MASKED_LM)
    assert len(calls) == 1


def test_a_tapped_models_export_loads_without_mtkd(tmp_path: Path) -> None:
    for auto_class, auto in ((MASKED_LM, AutoModelForMaskedLM), (CLASSIFIER, AutoModelForSequenceClassification)):
        model = tapped("roberta", auto_class)
        folder = tmp_path / auto_class
        model.model.save_pretrained(folder)
        plain, report = auto.from_pretrained(folder, output_loading_info=True)
        assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        own = plain(batch().input_ids, attention_mask=batch().attention_mask.long()).logits.flatten(0, -2)
        ours = model(batch(), frozenset({"logits"}))["logits"]
        torch.testing.assert_close(ours.rows(torch.arange(len(own))), own, atol=1e-5, rtol=1e-5)


def test_the_answers_of_a_cloze_have_an_order(saved: Callable[..., Path]) -> None:
    """Its folder is that of a language model, to whose config.json somebody added the answers and their names."""
    folder = saved("glm_blocklm", CAUSAL_LM)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    answers = {"verbalizers": [[5], [6]], "id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}}
    file.write_text(json.dumps({**config, "mask_token_id": 3, "sop_token_id": 4, **answers}))
    assert build(str(folder), CLASSIFIER, num_labels=2, label_names=("no", "yes")).config.verbalizers == [[5], [6]]
    swapped = build(str(folder), CLASSIFIER, num_labels=2, label_names=("yes", "no"))
    assert (swapped.config.verbalizers, swapped.config.id2label) == ([[6], [5]], {0: "yes", 1: "no"})
