"""A stage's rows: its method's at the step of its data, rows added, replaced and dropped; mistakes are told by name."""

from __future__ import annotations

from typing import Any

import pytest

from mtkd.config import DataConfig, StageConfig
from mtkd.config.match import Match
from mtkd.errors import UserError
from mtkd.methods.rows import stage_rows

CLASSES = DataConfig(source="files", task="classify")
TOKENS = DataConfig(source="files", task="masked-lm")


def stage(method: object, *match: dict[str, Any], **fields: Any) -> StageConfig:
    student = {"architecture": "bert", "layers": 2, "width": 8, "heads": 2}
    values = {"kind": "distill", "teachers": ["folder"], "method": method, "match": match, "steps": 1, **fields}
    return StageConfig.model_validate({"student": student, **values})


def features(*rows: Match) -> list[str]:
    return [f"{row.feature}:{row.loss}:{row.target}" for row in rows]


def test_one_line_takes_the_step_of_the_data() -> None:
    layers = ["embedding:mse:teacher", "hidden:mse:teacher", "scores:attention_mse:teacher"]
    assert features(*stage_rows(stage("tinybert"), TOKENS, "s")) == layers
    assert features(*stage_rows(stage("tinybert"), CLASSES, "s")) == layers
    prediction = {"name": "tinybert", "options": {"step": "prediction"}}
    assert features(*stage_rows(stage(prediction), CLASSES, "s")) == ["logits:soft_ce:teacher"]
    assert stage_rows(stage("glmd"), TOKENS, "s")[0].positions == "all"
    assert features(*stage_rows(stage("glmd"), CLASSES, "s")) == ["logits:soft_ce:teacher"]
    labels = stage_rows(stage("best_mix"), TOKENS, "s")[-1]
    assert (labels.target, labels.weight) == ("labels", 2.0)


def test_rows_are_added_replaced_in_their_place_and_dropped() -> None:
    cosine = {"replace": "hidden", "feature": "hidden", "loss": "cosine", "weight": 0.5}
    more = {"feature": "cls", "loss": "mse"}
    rows = stage_rows(stage("tinybert", more, cosine, {"replace": "scores", "weight": 0}), TOKENS, "s")
    assert features(*rows) == ["embedding:mse:teacher", "hidden:cosine:teacher", "cls:mse:teacher"]
    assert [row.weight for row in rows] == [1.0, 0.5, 1.0]
    soft = {"replace": "soft", "loss": "jsd", "options": {"temperature": 2.0}}
    assert features(*stage_rows(stage("kd", soft), CLASSES, "s")) == ["logits:jsd:teacher", "logits:ce:labels"]


def test_mistakes_name_the_place_and_what_there_is() -> None:
    with pytest.raises(UserError, match="no row of this label") as caught:
        stage_rows(stage("tinybert", {}, {"replace": "hiden"}), TOKENS, "stages.s")
    assert caught.value.where == "stages.s.match[1].replace"
    assert caught.value.allowed == ["embedding", "hidden", "scores"]
    assert "hidden" in caught.value.todo
    with pytest.raises(UserError, match="no row of this label") as caught:
        stage_rows(stage(None, {"replace": "soft"}), TOKENS, "s")
    assert "no method" in str(caught.value.allowed)
    with pytest.raises(UserError, match="replaced twice"):
        stage_rows(stage("kd", {"replace": "soft"}, {"replace": "soft"}), TOKENS, "s")
    with pytest.raises(UserError, match="no row is left"):
        stage_rows(stage("pd", {"replace": "soft", "weight": 0}), CLASSES, "s")
    with pytest.raises(UserError, match="step is one of pre-train, fine-tune, prediction; found 'layers'") as caught:
        stage_rows(stage({"name": "tinybert", "options": {"step": "layers"}}), TOKENS, "s")
    assert caught.value.where == "s.method.options"
    with pytest.raises(UserError, match="layers is 'skip' or 'last'"):
        stage_rows(stage({"name": "pkd", "options": {"layers": "each"}}), CLASSES, "s")
    with pytest.raises(UserError, match="unknown option"):
        stage_rows(stage({"name": "kd", "options": {"step": "prediction"}}), CLASSES, "s")


def test_labels_alone() -> None:
    alone = stage(None, kind="finetune", teachers=[])
    assert features(*stage_rows(alone, TOKENS, "s")) == ["logits:ce:labels"]
    assert features(*stage_rows(alone, CLASSES, "s", regression=True)) == ["logits:label_mse:labels"]
    pairs = TOKENS.model_copy(update={"next_sentence": True})
    assert features(*stage_rows(alone, pairs, "s")) == ["logits:ce:labels", "nsp_logits:ce:labels"]
