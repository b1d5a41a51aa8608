"""One description of a stage: made once, and what is built is what was planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import tiny_config
from transformers import LlamaConfig

import mtkd
from mtkd.config import RunConfig, StageConfig
from mtkd.errors import DataError
from mtkd.models.info import CAUSAL_LM, model_info
from mtkd.planning.data import DataReader
from mtkd.planning.plan import resolve, specify, specs_of
from mtkd.planning.spec import StageSpec
from mtkd.planning.specify import Specifier
from mtkd.planning.table import planned_stage
from mtkd.running.build import _check_planned


def fresh_specs(config: RunConfig) -> dict[str, StageSpec]:
    config = resolve(config)
    return dict(specify(config, DataReader(config.base)).stages)


def test_a_run_describes_every_stage_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: plan, build, capture and judge of a run make one spec per stage, and none when all is done."""
    made: list[str] = []
    describe = Specifier.stage

    def counted(self: Specifier, name: str) -> StageSpec:
        made.append(name)
        return describe(self, name)

    monkeypatch.setattr(Specifier, "stage", counted)
    config = tiny_config(tmp_path)
    mtkd.run(config)
    assert made == list(config.stages)
    mtkd.run(config)
    assert made == list(config.stages)


def test_other_processes_plan_from_the_facts_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the same specs, and no row is read or checked again."""
    config = resolve(tiny_config(tmp_path))
    first, other = DataReader(config.base), DataReader(config.base)
    specs = specify(config, first).stages
    other.adopt(first.known())

    def read(*_: object) -> None:
        raise AssertionError("the rows are read again")

    monkeypatch.setattr("mtkd.planning.data.read_source", read)
    again = specs_of(config, other)
    assert {name: planned_stage(spec, "") for name, spec in again.items()} == {
        name: planned_stage(spec, "") for name, spec in specs.items()
    }


def test_a_spec_says_what_the_plan_shows(tmp_path: Path) -> None:
    """Law: the table's parameters, rows and needs are those of the specs."""
    config = tiny_config(tmp_path)
    shown = {stage.name: stage for stage in mtkd.plan(config).stages}
    for name, spec in fresh_specs(config).items():
        assert [model.parameters for model in shown[name].models] == [
            *(model.num_parameters for model in spec.trained.values()),
            *(teacher.numbers.parameters for teacher in spec.teachers),
        ]
        assert len(shown[name].rows) == len(spec.rows)
        assert shown[name].needs == spec.needs


def test_tokens_of_a_batch_are_counted_with_padding(tmp_path: Path) -> None:
    """Law: sequences x longest example, or the budget itself."""
    spec = fresh_specs(tiny_config(tmp_path))["teacher"]
    length = spec.data.config.max_length
    for batch, tokens in (({"sequences": 3}, 3 * length), ({"tokens": 77}, 77)):
        stage = StageConfig.model_validate({**spec.stage.model_dump(exclude_unset=True), "batch": batch})
        assert StageSpec("x", stage, spec.data, {}, (), 0).tokens_per_batch == tokens


def test_another_model_than_the_plan_saw_is_refused() -> None:
    """A folder that changes between plan and build would be compared at other layers than the rows name."""

    def info(**changes: int):
        shape = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, **changes}
        return model_info(LlamaConfig(**shape), CAUSAL_LM)

    _check_planned(info(), info(), "here", logits=True)
    _check_planned(
        info(vocab_size=50), info(), "here", logits=True
    )  # a trained tokenizer may have fewer ids than planned
    with pytest.raises(DataError, match="changed since the run was planned"):
        _check_planned(info(), info(num_hidden_layers=3), "here", logits=True)
