"""Co-finetuning: the loss and gradient of separate models added up, one shared head, whole exports, one whole run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from tiny import CPU, class_batch, classifier, rows_of
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import mtkd
from mtkd.config import OptimizerConfig
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import UserError
from mtkd.models.taps import TappedModel
from mtkd.objective.cofinetune import CoFinetuning, check_members, share_heads
from mtkd.running.train import global_counts

LENGTHS = [9, 3, 7, 1, 8, 2]
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup=0.0)
SHARED = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")


def members() -> dict[str, TappedModel]:
    return {"a": classifier(16, 2, 1), "b.x": classifier(16, 3, 2), "c": classifier(16, 1, 3)}


def test_loss_is_the_sum_and_the_shared_gradient_too() -> None:
    """Joint models are separate copies whose losses, and whose gradients of the shared head, are added."""
    torch.manual_seed(0)
    batch = class_batch(LENGTHS)
    alone = {name: model.model for name, model in members().items()}
    head = {n: p for n, p in alone["a"].named_parameters() if n in SHARED}
    for model in alone.values():  # separate copies with the first one's head
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in head:
                    parameter.copy_(head[name])
    losses = {}
    for name, model in alone.items():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        losses[name] = torch.nn.functional.cross_entropy(logits, batch.targets)
        losses[name].backward()
    joint = CoFinetuning(members(), regression=False, tile=4)
    counts, _ = global_counts([batch], Dist())
    loss, metrics = joint(batch, [], counts)
    loss.backward()
    torch.testing.assert_close(loss, sum(losses.values()), rtol=1e-4, atol=0)
    for name, value in losses.items():
        torch.testing.assert_close(metrics[f"row/{name}"], value.detach(), rtol=1e-4, atol=0)
    for name in SHARED:
        wanted = sum(dict(m.named_parameters())[name].grad for m in alone.values())
        for model in joint.models.values():
            found = dict(model.model.named_parameters())[name]
            assert found is dict(joint.models["a"].model.named_parameters())[name]
            torch.testing.assert_close(found.grad, wanted, rtol=1e-4, atol=1e-5)
    own = "bert.encoder.layer.0.output.dense.weight"
    for name, model in joint.models.items():
        torch.testing.assert_close(
            dict(model.model.named_parameters())[own].grad, dict(alone[name].named_parameters())[own].grad
        )


def test_different_architectures_share_by_role() -> None:
    """Pooler and classifier are one tensor each, though every architecture has its own names for them."""
    shape = {"vocab_size": 61, "num_labels": 3, "attn_implementation": "mtkd_tap", "pad_token_id": 0}
    roberta = RobertaForSequenceClassification(
        RobertaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, **shape)
    )
    distil = DistilBertForSequenceClassification(
        DistilBertConfig(dim=16, n_layers=1, n_heads=4, hidden_dim=32, **shape)
    )
    models = {"bert": classifier(16, 1, 0)}
    for name, model in (("roberta", roberta), ("distil", distil)):
        models[name] = TappedModel(model, "AutoModelForSequenceClassification", 61)
    check_members({name: model.info for name, model in models.items()}, "members")
    share_heads(models)
    assert roberta.classifier.dense.weight is models["bert"].model.bert.pooler.dense.weight
    assert distil.pre_classifier.bias is models["bert"].model.bert.pooler.dense.bias
    assert roberta.classifier.out_proj.weight is distil.classifier.weight


def test_models_that_cannot_share_are_refused() -> None:
    wide = {"a": classifier(16, 1, 0).info, "b": classifier(32, 1, 0).info}
    with pytest.raises(UserError, match=r"(?s)members\.b.*width 32"):
        check_members(wide, "members")


def _losses(kind: str, zero_stage: int) -> list[float]:
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    joint = CoFinetuning(members(), regression=False, tile=4)
    if kind == "deepspeed":
        engine = DeepSpeedEngine(joint, OPTIMIZER, 3, CPU, zero_stage=zero_stage, accumulate=1, dist=dist)
    else:
        engine = TorchEngine(joint, OPTIMIZER, 3, CPU)
    found = []
    for step in range(3):
        batch = rows_of(class_batch(LENGTHS, seed=step), list(range(len(LENGTHS)))[dist.rank :: dist.world_size])
        counts, _ = global_counts([batch], dist)
        loss, _ = engine.forward(batch, [], counts)
        engine.backward(loss)
        engine.step(step)
        found += dist.sum([float(loss.detach())])
    for name in joint.models:
        state = engine.model_state(name)
        if state is not None:
            found += [float(state[key].double().abs().sum()) for key in SHARED]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_deepspeed_equals_torch(zero_stage: int) -> None:
    """Losses and exported heads of two ranks are those of one process."""
    expected = _losses("torch", 0)
    assert expected[3:7] == expected[7:11] == expected[11:]  # the exported heads are one
    ranks = run_distributed(partial(_losses, "deepspeed", zero_stage), 2, timeout=1200)
    assert ranks[0] == pytest.approx(expected, rel=1e-5)


def write_run(folder: Path, **co: object) -> Path:
    """Two joint teachers and an MT-BERT student on made-up sentences whose class is a word."""
    rows = [{"text": f"{a} {b} {c}", "label": c} for a in "abcd" for b in "efgh" for c in ("yes", "no")]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"architecture": "bert", "layers": 1, "width": 16, "heads": 2}
    files = {split: f"{split}.jsonl" for split in ("train", "validation", "test")}
    values = {
        "name": "co",
        "output": str(folder / "runs"),
        "tokenizer": {"train_on": "data", "vocab_size": 300},
        "data": {"data": {"source": "files", "path": str(folder), "files": files, "task": "classify"}},
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {
            "teachers": {
                "kind": "cofinetune",
                "members": {"a": model, "b": {**model, "layers": 2}},
                "steps": 30,
                "optimizer": {"lr": 1e-2},
                **co,
            },
            "student": {
                "kind": "distill",
                "student": {**model, "width": 8},
                "teachers": ["stage:teachers/a", "stage:teachers/b"],
                "method": "mt_bert",
                "weighting": "mt_bert",
                "steps": 2,
            },
        },
        "evaluate": {
            "ensembles": ["student"],
            "comparisons": [{"candidate": "student", "baseline": "teachers/b"}],
            "resamples": 100,
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_a_whole_run(tmp_path: Path) -> None:
    """Plan, scores, exports and a second start of a stage that trains two teachers with one head."""
    config = mtkd.load_config(write_run(tmp_path))
    planned = mtkd.plan(config, memory=True).stages
    assert [len(stage.memory.notes) for stage in planned if stage.memory] == [1, 1]  # both steps could be counted
    assert [m.role for m in planned[0].models] == ["a", "b"]
    assert [m.origin for m in planned[1].models] == ["fresh", "stage:teachers/a", "stage:teachers/b"]
    result = mtkd.run(config)
    scored = result.results["models"]
    assert list(scored) == ["teachers/a", "teachers/b", "student", "ensemble:student"]
    assert min(scored[f"teachers/{m}"]["overall"]["accuracy"] for m in "ab") == 1.0  # the class is a word of the text
    heads = []
    for member, planned_model in zip("ab", planned[0].models, strict=True):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            result.export(f"teachers/{member}"), output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert scored[f"teachers/{member}"]["parameters"] == sum(p.numel() for p in model.parameters())
        assert abs(planned_model.parameters - scored[f"teachers/{member}"]["parameters"]) < 300 * 16
        heads.append(torch.cat([model.classifier.weight.flatten(), model.bert.pooler.dense.weight.flatten()]))
    assert torch.equal(heads[0], heads[1])
    again = mtkd.run(mtkd.load_config(write_run(tmp_path)))
    assert again.stages["teachers"]["fingerprint"] == result.stages["teachers"]["fingerprint"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"members": {"a": {"architecture": "bert", "layers": 1, "width": 16, "heads": 2}}}, "at least two"),
        ({"student": {"architecture": "bert", "layers": 1, "width": 16, "heads": 2}}, "trains its `members`"),
        ({"kind": "finetune"}, "trains one model"),
        ({"method": "kd"}, "drop method"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, change: dict[str, object], text: str) -> None:
    """A stage of kind `cofinetune` has members alone; another kind has none."""
    with pytest.raises(UserError, match=text):
        mtkd.load_config(write_run(tmp_path, **change))


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("stages.student.teachers=['stage:teachers']", "is not a model of that stage.*stage:teachers/a"),
        ("stages.student.teachers=['stage:teachers/z']", "is not a model of that stage"),
        ("stages.student.student={path: 'stage:teachers/a/b'}", "is not a model of that stage"),
        ("evaluate.stages=['teachers/z']", "is not a stage"),
        ("evaluate.comparisons=[{candidate: student, baseline: teachers}]", "is not scored"),
    ],
)
def test_members_are_named(tmp_path: Path, override: str, text: str) -> None:
    """`stage:NAME/MEMBER` wherever a model of such a stage is meant; anything else is refused."""
    with pytest.raises(UserError, match=text):
        mtkd.load_config(write_run(tmp_path), [override])


def test_token_tasks_are_refused_at_plan_time(tmp_path: Path) -> None:
    """Only classification has heads that can be shared."""
    with pytest.raises(UserError, match="classify"):
        mtkd.plan(mtkd.load_config(write_run(tmp_path), ["data.data.task=masked-lm"]))
