"""`chain:` of a run file: which stages it stands for, and what is refused."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from mtkd.config import RunConfig

TINY = {"architecture": "llama", "layers": 1, "width": 16, "heads": 2, "dropout": 0.1}
RUNGS = [{"layers": 3, "width": 48, "heads": 4}, {"layers": 2, "width": 32, "heads": 2}]


def values(**chain: Any) -> dict[str, Any]:
    """A run with two teachers and a chain below them; None takes a key away."""
    teacher = {"kind": "finetune", "student": {**TINY, "layers": 4, "width": 64}, "steps": 5}
    written = {"mode": "takd", "teachers": ["stage:one", "stage:two"], "student": TINY, "rungs": RUNGS, "steps": 10}
    return {
        "name": "run",
        "data": {"text": {"source": "python-stdlib"}},
        "tokenizer": {"train_on": "text"},
        "stages": {"one": teacher, "two": teacher, "other": teacher},
        "chain": {key: value for key, value in {**written, **chain}.items() if value is not None},
    }


def read(**chain: Any) -> RunConfig:
    return RunConfig.model_validate(values(**chain))


def refused(text: str, **chain: Any) -> None:
    with pytest.raises(ValidationError, match=text):
        read(**chain)


def teachers(config: RunConfig) -> dict[str, list[str | None]]:
    assert config.chain is not None
    return {name: [t.model.path for t in config.stages[name].teachers] for name in config.chain.names}


def test_takd_learns_from_the_one_before() -> None:
    """Law: in TAKD a stage learns from the one before; the first and the control from the teachers of the chain."""
    config = read()
    assert list(config.stages) == ["one", "two", "assistant-1", "assistant-2", "student", "direct", "other"]
    assert teachers(config) == {
        "assistant-1": ["stage:one", "stage:two"],
        "assistant-2": ["stage:assistant-1"],
        "student": ["stage:assistant-2"],
        "direct": ["stage:one", "stage:two"],
    }
    first = config.stages["assistant-1"]
    assert (first.student.layers, first.student.width, first.student.heads) == (3, 48, 4)
    assert (first.student.architecture, first.student.dropout) == ("llama", 0.1)
    assert config.stages["student"].student == config.stages["direct"].student
    assert {config.stages[name].weighting.name for name in teachers(config)} == {"uniform"}


def test_dgkd_learns_from_all_before() -> None:
    """Law: in DGKD each stage has all before as teachers, and drops fewer than it has."""
    config = read(mode="dgkd", drop=2)
    assert teachers(config) == {
        "assistant-1": ["stage:one", "stage:two"],
        "assistant-2": ["stage:one", "stage:two", "stage:assistant-1"],
        "student": ["stage:one", "stage:two", "stage:assistant-1", "stage:assistant-2"],
        "direct": ["stage:one", "stage:two"],
    }
    dropped = {name: config.stages[name].weighting.options["count"] for name in teachers(config)}
    assert dropped == {"assistant-1": 1, "assistant-2": 2, "student": 2, "direct": 1}  # never all


@pytest.mark.parametrize(
    ("chain", "soft"),
    [
        ({"mode": "takd"}, [0.3, 0.3, 0.3, 0.3]),
        ({"mode": "dgkd", "drop": 0}, [0.6, 0.9, 1.2, 0.6]),  # the sum over 2, 3, 4 and 2 teachers
        ({"mode": "dgkd", "drop": 1}, [0.3, 0.6, 0.9, 0.3]),  # over those that are not dropped
        ({"mode": "dgkd", "weighting": "ca_mkd"}, [0.6, 0.9, 1.2, 0.6]),
    ],
)
def test_the_default_objective_is_labels_and_the_sum_of_the_teachers(chain: dict[str, Any], soft: list[float]) -> None:
    """Law: the labels weigh 1 - lam, every teacher that is not dropped lam."""
    config = read(lam=0.3, temperature=4.0, **chain)
    methods = [config.stages[name].method for name in teachers(config)]
    assert [m.options["soft"] for m in methods if m] == pytest.approx(soft)
    assert {(m.name, m.options["temperature"], m.options["hard"]) for m in methods if m} == {("kd", 4.0, 0.7)}


def test_settings_of_one_stage() -> None:
    """Law: an override changes its keys in its stage alone; the control follows the student."""
    config = read(
        optimizer={"lr": 1e-3, "clip": 2.0},
        evaluate_every=5,
        overrides={
            "assistant-1": {"optimizer": {"lr": 1e-2}, "method": "minilmv2"},
            "student": {"epochs": 2, "batch": {"tokens": 64}},
            "direct": {"per": "token"},
        },
    )
    first, second, student, direct = (config.stages[name] for name in teachers(config))
    assert (first.optimizer.lr, first.optimizer.clip, first.steps) == (1e-2, 2.0, 10)
    assert (first.method.name, second.method.name) == ("minilmv2", "kd") if first.method and second.method else False
    assert (second.optimizer.lr, second.evaluate_every) == (1e-3, 5)
    for stage in (student, direct):  # the control has the student's steps, data and seed
        assert (stage.steps, stage.epochs, stage.batch.tokens) == (None, 2, 64)
    assert (student.per, direct.per) == ("example", "token")


def test_the_comparison_with_the_control_is_added_once() -> None:
    """Law: a chain asks for student against control, and for the ensemble of several teachers."""
    config = read()
    assert [(c.candidate, c.baseline) for c in config.evaluate.comparisons] == [("student", "direct")]
    assert config.evaluate.ensembles == ("assistant-1",)  # two teachers: their ensemble is what the ladder is held to
    assert read(teachers=["stage:one"]).evaluate.ensembles == ()
    alone = read(direct=False)
    assert (alone.evaluate.comparisons, "direct" in alone.stages) == ((), False)


def test_expanding_twice_changes_nothing() -> None:
    """The run folder's copy holds the chain and its stages."""
    for chain in ({}, {"mode": "dgkd"}, {"overrides": {"student": {"steps": 3}}}):
        config = read(**chain)
        again = RunConfig.model_validate(config.model_dump(mode="json", exclude_unset=True))
        assert again == config
        assert list(again.stages) == list(config.stages)


def test_later_stages_may_use_the_chain() -> None:
    """Law: a stage after the chain may name its stages."""
    written = values()
    written["stages"]["other"] = {
        "kind": "distill",
        "student": TINY,
        "teachers": ["stage:assistant-1"],
        "method": "kd",
        "equal_time": {"to": "student", "rate_of": "direct"},
    }
    assert list(RunConfig.model_validate(written).stages)[-1] == "other"


def test_assistants_teach_from_where_the_chain_says() -> None:
    """Law: `backend` of the chain is that of assistants; the teachers at the top keep theirs."""
    top = [{"model": "stage:one", "backend": "offload"}, "stage:two"]
    for mode in ("takd", "dgkd"):
        config = read(mode=mode, teachers=top, backend="streamed")
        backends = {t.model.path: t.backend for name in config.chain.names for t in config.stages[name].teachers}  # type: ignore[union-attr]
        assert backends == {
            "stage:one": "offload",
            "stage:two": "resident",
            "stage:assistant-1": "streamed",
            "stage:assistant-2": "streamed",
        }


def test_a_taken_name_is_refused_and_a_prefix_helps() -> None:
    """Law: a stage's name is never taken over by the chain."""
    written = values()
    written["stages"]["student"] = copy.deepcopy(written["stages"]["one"])
    with pytest.raises(ValidationError, match=r"stages.student: `chain` makes another stage of this name"):
        RunConfig.model_validate(written)
    written["chain"]["prefix"] = "c-"
    assert [n for n in RunConfig.model_validate(written).stages if n[:2] == "c-"] == [
        *("c-assistant-1", "c-assistant-2", "c-student", "c-direct")
    ]


def test_a_rung_may_have_its_own_name() -> None:
    """So that another rung between two of them does not rename the second."""
    config = read(rungs=[{**RUNGS[0], "name": "large"}, RUNGS[1]])
    assert list(teachers(config)) == ["large", "assistant-2", "student", "direct"]
    assert teachers(config)["assistant-2"] == ["stage:large"]


def test_what_is_refused() -> None:
    """Law: a chain that contradicts itself is refused with the key at fault."""
    refused("give either `rungs`", num_rungs=2)
    refused("give either `rungs`", rungs=None)
    refused(r"rungs\[0\]: 3 heads do not divide a width of 16", rungs=[{"layers": 1, "width": 16, "heads": 3}])
    refused("'stage:three' is not a stage", teachers=["stage:three"])
    refused("'assistant-7' is not a stage of the chain", overrides={"assistant-7": {"steps": 2}})
    refused("overrides.direct: the control has the student's steps", overrides={"direct": {"steps": 2}})
    refused("drop is for mode: dgkd", drop=1)
    refused("drop is for mode: dgkd without a weighting", mode="dgkd", weighting="entropy", drop=1)
    refused("lam: of the default method", method="kd", lam=0.2)
    refused("chain: stage 'assistant-1': give exactly one of `steps`", steps=None)
    refused("described by architecture", student={"path": "bert-base"})
    refused("need evaluate_every", early_stop={})
    refused("two stages of the chain have one name", rungs=[{**RUNGS[0], "name": "student"}])


def test_reading_a_chain_imports_nothing_heavy() -> None:
    """Law: validating a configuration imports neither torch nor transformers."""
    code = f"""
import sys
from mtkd.config import RunConfig
RunConfig.model_validate({values()!r})
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
