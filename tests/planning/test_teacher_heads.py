"""What a run may read of a teacher: trained heads only, of the data's classes, wherever the teacher is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
)

import mtkd
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import UserError

TEXTS = {"negative": "awful dull film", "positive": "great bright film"}
STUDENT = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}
HIDDEN = [{"feature": "hidden", "loss": "mse", "student_layer": 1, "teacher_layer": 1}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Texts of two classes, told apart by one word; folders of models with a tokenizer are made by `save`."""
    rows = [{"text": f"{text} {i % 5}", "label": name} for i in range(10) for name, text in TEXTS.items()]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def save(folder: Path, kind: type, names: tuple[str, ...] = (), **fields: Any) -> str:
    """A teacher with its tokenizer; a classifier's names are those given."""
    tokenizer = train_tokenizer([*TEXTS.values()] * 5, 300)
    if tokenizer_pad := fields.pop("pad", True):
        fields["pad_token_id"] = tokenizer.pad_token_id
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "num_labels": len(names) or 2, **fields}
    if names:
        shape |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    torch.manual_seed(0)
    if kind is GPT2ForSequenceClassification:
        model = kind(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=32, **shape))
    else:
        model = kind(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                max_position_embeddings=32, initializer_range=0.5, **shape))  # fmt: skip
    where = folder / f"teacher{len(list(folder.glob('teacher*')))}"
    model.save_pretrained(where)
    tokenizer.pad_token = tokenizer.pad_token if tokenizer_pad else None
    tokenizer.save_pretrained(where)
    return where.name


def config(folder: Path, teachers: list[Any], data: dict[str, Any] | None = None, **stage: Any) -> mtkd.RunConfig:
    """A run whose one student learns from these teachers."""
    student = {"kind": "distill", "student": STUDENT, "teachers": teachers, "steps": 2, "batch": {"sequences": 4}}
    method = {} if "match" in stage else {"method": {"name": "kd", "options": {"soft": 1.0, "hard": 0.0}}}
    text = {"source": "files", "files": {s: f"{s}.jsonl" for s in ("train", "test")}, "max_length": 16}
    values = {
        "name": "run",
        "output": str(folder / "runs"),
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        "data": {"text": {**text, "task": "classify", **(data or {})}},
        "stages": {"student": {**student, **method, **stage}},
        "evaluate": {"resamples": 50},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return mtkd.load_config(file)


def refused(made: mtkd.RunConfig, message: str) -> UserError:
    with pytest.raises(UserError, match=message) as caught:
        mtkd.plan(made)
    assert not (Path(made.output) / made.name).exists()
    return caught.value


@pytest.mark.parametrize("backend", ["resident", "offload", "streamed"])
@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_model_without_a_classifier_teaches_no_classes(folder: Path, kind: type, backend: str) -> None:
    """With rows on logits, whatever its backend; the message says where and what to do."""
    name = save(folder, kind)
    error = refused(config(folder, [{"model": name, "backend": backend}]), "no trained head")
    assert error.where == "stages.student.teachers[0].model"
    assert "kind: finetune" in error.todo


@pytest.mark.parametrize("reads", [{"weighting": "confidence"}, {"ensembles": True}, {"kind": "cache"}])
def test_everything_that_reads_predictions_needs_a_head(folder: Path, reads: dict[str, Any]) -> None:
    """A weighting that looks, the score of the ensemble, a cache; rows on hidden states alone need none."""
    name = save(folder, BertModel)
    label = {"feature": "logits", "loss": "ce", "target": "labels"}
    made = config(folder, [name], match=[*HIDDEN, label])
    assert mtkd.plan(made).stages[0].models[1].role == name
    values = yaml.safe_load((folder / "run.yaml").read_text())
    if "ensembles" in reads:
        values["evaluate"]["ensembles"] = ["student"]
    elif "kind" in reads:
        values["stages"]["student"] = {"kind": "cache", "teachers": [name], "batch": {"sequences": 4}}
    else:
        values["stages"]["student"] |= reads
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    refused(mtkd.load_config(folder / "run.yaml"), "no trained head")


@pytest.mark.parametrize("names", [(), ("a", "b", "c"), ("only",)])
def test_a_teacher_of_hidden_states_may_have_any_head(folder: Path, names: tuple[str, ...]) -> None:
    """None, other classes than the data's, a regression: rows on its hidden states read none of it."""
    label = {"feature": "logits", "loss": "ce", "target": "labels"}
    kind = BertForSequenceClassification if names else BertModel
    result = mtkd.run(config(folder, [save(folder, kind, names)], match=[*HIDDEN, label]))
    assert set(result.results["models"]) == {"student"}


def test_a_plain_encoder_teaches_no_masked_tokens(folder: Path) -> None:
    task = {"task": "masked-lm"}
    refused(config(folder, [save(folder, BertModel)], task), "no trained head")
    assert mtkd.plan(config(folder, [save(folder, BertForMaskedLM)], task)).stages
    assert mtkd.plan(config(folder, [save(folder, BertModel)], task, match=HIDDEN)).stages


def test_a_model_that_never_learns_to_predict_is_not_scored(folder: Path) -> None:
    """It has the head that it was drawn with: no score, no teacher of a later stage."""
    made = config(folder, [save(folder, BertModel)], match=HIDDEN)
    assert any("never learns" in note for note in mtkd.plan(made).stages[0].notes)
    values = yaml.safe_load((folder / "run.yaml").read_text())
    for change, message in (
        ({"evaluate": {"stages": ["student"]}}, "never learns to predict"),
        ({"stages": {**values["stages"], "next": {**values["stages"]["student"], "teachers": ["stage:student"],
                                                  "match": [{"feature": "logits", "loss": "kl"}]}}},
         "never learns to predict"),
    ):  # fmt: skip
        (folder / "run.yaml").write_text(yaml.safe_dump({**values, **change}, sort_keys=False))
        refused(mtkd.load_config(folder / "run.yaml"), message)


@pytest.mark.parametrize("fields", [{"problem_type": "multi_label_classification"}, {"num_labels": 1}])
def test_a_teacher_of_other_outputs_than_a_distribution_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    names = () if "num_labels" in fields else ("negative", "positive")
    refused(config(folder, [save(folder, BertForSequenceClassification, names, **fields)]), "sigmoid|a number")


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("POSITIVE", "NEGATIVE"), "0: POSITIVE = positive, by name; 1: NEGATIVE = negative, by name"),
        (("LABEL_0", "LABEL_1"), "0: LABEL_0 = negative, by position; 1: LABEL_1 = positive, by position"),
    ],
)
def test_the_plan_says_which_output_is_which_class(folder: Path, names: tuple[str, ...], note: str) -> None:
    made = config(folder, [save(folder, BertForSequenceClassification, names)])
    assert f"stages.student.teachers[0]: {note}" in mtkd.plan(made).stages[0].notes


def test_classes_with_other_names_are_refused(folder: Path) -> None:
    error = refused(config(folder, [save(folder, BertForSequenceClassification, ("neg", "pos"))]), "not those of the")
    assert (error.found, error.allowed) == ("2: neg, pos", "2: negative, positive")


def test_classes_go_with_classifiers_and_not_with_caches(folder: Path) -> None:
    teacher = {"model": save(folder, BertForMaskedLM), "classes": ["a", "b"]}
    refused(config(folder, [teacher], {"task": "masked-lm"}), "classes is for classifiers")
    with pytest.raises(UserError, match="give classes where the cache is made"):
        config(folder, [{**teacher, "backend": "cached"}])


def test_a_stage_without_the_key_keeps_its_name(folder: Path) -> None:
    """What was finished before the key existed is not made a second time."""
    from mtkd.planning.stages import stage_values

    teacher = save(folder, BertForSequenceClassification, ("negative", "positive"))
    plain = stage_values(config(folder, [teacher]).stages["student"])
    said = stage_values(config(folder, [{"model": teacher, "classes": ["negative", "positive"]}]).stages["student"])
    assert "classes" not in plain["teachers"][0]
    assert said["teachers"][0].pop("classes") == ["negative", "positive"]
    assert said == plain


@pytest.mark.parametrize("backend", ["resident", "offload", "streamed", "cached"])
def test_teachers_of_different_order_teach_together(folder: Path, backend: str) -> None:
    """One model under two orders of its outputs is one teacher: with itself it teaches as alone. A third is dropped."""
    order = ("positive", "neutral", "negative")
    first = save(folder, BertForSequenceClassification, order)
    second = folder / "teacher1"
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder / first)
    model.classifier.weight.data = model.classifier.weight.data.flip(0)
    model.classifier.bias.data = model.classifier.bias.data.flip(0)
    model.config.id2label, model.config.label2id = {0: "A", 1: "B", 2: "C"}, {"A": 0, "B": 1, "C": 2}
    model.save_pretrained(second)
    for file in (folder / first).glob("tokenizer*"):
        (second / file.name).write_bytes(file.read_bytes())
    how = {} if backend == "cached" else {"backend": backend}
    listed = {"name": "x", "model": first, "classes": ["positive", None, "negative"], **how}
    mapped = {"name": "y", "model": "teacher1", "classes": {"A": "negative", "C": "positive"}, **how}
    made = config(folder, [listed, mapped])
    values = yaml.safe_load((folder / "run.yaml").read_text())
    student = values["stages"].pop("student")
    values["stages"] = {"one": {**student, "teachers": [listed]}, "two": student}
    values["evaluate"] |= {"ensembles": ["one", "two"]}
    if backend == "cached":
        values["stages"] = {
            "cache": {"kind": "cache", "teachers": [listed, mapped], "batch": {"sequences": 4}},
            **values["stages"],
        }
        for stage, names in (("one", "x"), ("two", "xy")):
            teachers = [{"name": n, "model": f"stage:cache/{n}", "backend": "cached"} for n in names]
            values["stages"][stage] = {**values["stages"][stage], "teachers": teachers}
        values["evaluate"]["ensembles"] = ["cache"]
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    made = mtkd.load_config(folder / "run.yaml")
    result = mtkd.run(made)
    losses = {}
    for line in (result.folder / "metrics.jsonl").read_text().splitlines():
        found = json.loads(line)
        if "loss" in found:
            losses[found["stage"], found["step"]] = found["loss"]
    assert losses["one", 1] > 1e-3
    assert losses["two", 1] == pytest.approx(losses["one", 1], rel=1e-4)
    assert losses["two", 2] == pytest.approx(losses["one", 2], rel=1e-3)
    assert result.results["models"]["one"]["overall"] == result.results["models"]["two"]["overall"]


def test_a_teacher_below_chance_is_said_before_training(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights, named rightly and the wrong way round: one of the two is right less often than a guess."""
    name = save(folder, BertForSequenceClassification, ("LABEL_0", "LABEL_1"))
    model = BertForSequenceClassification.from_pretrained(folder / name)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([1.0, -1.0])  # always the first output
    model.save_pretrained(folder / name)
    rows = [{"text": TEXTS["negative"], "label": "negative"}] * 9 + [{"text": TEXTS["positive"], "label": "positive"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mtkd.run(config(folder, [{"model": name, "classes": ["positive", "negative"]}]))
    wrong = capsys.readouterr().err
    assert "stages.student.teachers[0]: teacher 'teacher0' is right on 1 of 10 labelled train texts" in wrong
    assert wrong.index("less often than a guess") < wrong.index("step 2/2")
    made = config(folder, [name])
    mtkd.run(made.model_copy(update={"name": "right"}))
    assert "less often than a guess" not in capsys.readouterr().err


def test_a_decoder_without_a_padding_token_teaches_and_is_taught(folder: Path) -> None:
    """Teacher, student and export; a plain model of the export reads a padded batch."""
    name = save(folder, GPT2ForSequenceClassification, ("negative", "positive"), pad=False, eos_token_id=2)
    student = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}
    result = mtkd.run(config(folder, [name], student=student))
    exported = json.loads((result.export("student") / "config.json").read_text())
    assert isinstance(exported["pad_token_id"], int)
    plain = GPT2ForSequenceClassification.from_pretrained(result.export("student"))
    pad = exported["pad_token_id"]
    ids = torch.tensor([[5, 6, 7], [8, pad, pad]])
    logits = plain(input_ids=ids, attention_mask=(ids != pad).long()).logits
    torch.testing.assert_close(logits[1:], plain(input_ids=ids[1:, :1]).logits, rtol=1e-4, atol=1e-6)
