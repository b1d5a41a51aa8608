"""A stage that ends on its validation score, and exports the best step: exact, also after a resume in the middle."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from pydantic import ValidationError
from tiny_run import NAME, ids_file, with_teacher, write_yaml
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mtkd.config import StageConfig
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.seal import newest_sealed
from mtkd.errors import UserError
from mtkd.planning.checks import check

RUN = f"runs/{NAME}"
STUDENT = f"{RUN}/stages/02-student"
STEPS = 30

# So high a learning rate that the validation loss soon rises; constant, so that fewer steps are a prefix of more.
RATE = {"lr": 0.1, "warmup": 0.0, "schedule": "constant"}
FIELDS = {"steps": STEPS, "optimizer": RATE, "evaluate_every": 2, "save_every": 3, "keep": 1}
SELECT = {"early_stop": {"metric": "loss", "patience": 3}, "export": "best"}

runs = pytest.mark.xdist_group("runs")


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STUDENT / "DONE").read_text())


def weights(folder: Path) -> bytes:
    return (folder / STUDENT / "export/model.safetensors").read_bytes()


def validation(folder: Path, metric: str = "loss") -> dict[int, float]:
    """Step -> score of the student, as logged."""
    name = f"validation/{metric}"
    lines = read_jsonl(folder / RUN / "metrics.jsonl")
    return {line["step"]: line[name] for line in lines if line["stage"] == "student" and name in line}


@pytest.fixture(scope="module")
def ended(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student ended early."""
    folder = tmp_path_factory.mktemp("ended")
    code, output = processes.run(folder, "run", str(with_teacher(whole, folder, stages={"student": FIELDS | SELECT})))
    assert code == 0, output
    return folder


@runs
def test_it_ends_after_patience_and_exports_the_best_step(whole: Path, ended: Path, tmp_path: Path) -> None:
    scores, done = validation(ended), record(ended)
    best = min(scores, key=lambda step: scores[step])
    assert best >= 4, "the loss must fall first, or the test shows little"
    assert list(scores) == list(range(2, best + 7, 2))  # three evaluations beyond the best
    assert (done["steps"], done["exported_step"]) == (best + 6, best)
    assert done["ended"].startswith(f"early stop: loss was not better than {scores[best]:.6g} of step {best} in 3 ")
    # The best checkpoint outlived the pruning to one; the model is that of a run of so many steps.
    assert {p.name for p in (ended / STUDENT / "checkpoints").iterdir()} == {f"step-{n:06d}" for n in (best, best + 6)}
    shorter = with_teacher(whole, tmp_path, stages={"student": {**FIELDS, "steps": best}})
    code, output = processes.run(tmp_path, "run", str(shorter))
    assert code == 0, output
    assert weights(tmp_path) == weights(ended)


@runs
@pytest.mark.parametrize("after_the_best", [-1, 1, 4])
def test_a_resume_in_the_middle_changes_nothing(whole: Path, ended: Path, tmp_path: Path, after_the_best: int) -> None:
    """Stopped before and after the best step: the same end, export and record."""
    stop = record(ended)["exported_step"] + after_the_best
    file = str(with_teacher(whole, tmp_path, stages={"student": FIELDS | SELECT}))
    code, output = processes.run(tmp_path, "run", file, prepare=partial(processes.watch, ids_file(tmp_path), stop))
    assert (code, newest_sealed(tmp_path / STUDENT / "checkpoints").manifest["step"]) == (75, stop), output
    code, output = processes.run(tmp_path, "run", file)
    assert (code, f"resumed at step {stop}" in output) == (0, True), output
    assert weights(tmp_path) == weights(ended)
    assert validation(tmp_path) == validation(ended)
    unlike = {"seconds", "peak_memory_bytes", "sha256"}  # the record's own digest holds the others
    one, other = ({k: v for k, v in record(f).items() if k not in unlike} for f in (tmp_path, ended))
    assert one == other


@runs
def test_a_kill_after_the_end_exports_the_best_step_again(ended: Path, tmp_path: Path) -> None:
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    student = tmp_path / STUDENT
    (student / "DONE").unlink()
    shutil.rmtree(student / "export")
    file = str(write_yaml(tmp_path, stages={"student": FIELDS | SELECT}))
    code, output = processes.run(tmp_path, "run", file)
    assert code == 0, output
    assert weights(tmp_path) == weights(ended)
    assert record(tmp_path)["ended"] == record(ended)["ended"]
    best = student / "checkpoints" / f"step-{record(ended)['exported_step']:06d}"
    (best / "state.json").write_text("{}")
    (student / "DONE").unlink()
    texts = ("the checkpoint of the best step is not whole", "--redo student")
    processes.assert_refused(tmp_path, ("run", file), 3, *texts)


@runs
def test_a_metric_of_the_task_may_choose(whole: Path, tmp_path: Path) -> None:
    """Perplexity is a rising function of the loss: it chooses the same step."""
    fields = FIELDS | {"steps": 8, "export": "best", "export_metric": "perplexity"}
    code, output = processes.run(tmp_path, "run", str(with_teacher(whole, tmp_path, stages={"student": fields})))
    assert code == 0, output
    scores, losses = validation(tmp_path, "perplexity"), validation(tmp_path)
    assert scores.keys() == losses.keys() == {2, 4, 6, 8}
    assert record(tmp_path)["exported_step"] == min(losses, key=lambda step: losses[step])
    assert record(tmp_path)["exported_step"] == min(scores, key=lambda step: scores[step])
    assert record(tmp_path)["ended"] == "all steps"


def stage(**fields: Any) -> StageConfig:
    student = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}
    return StageConfig.model_validate({"kind": "finetune", "student": student, "steps": 5} | fields)


def test_which_metric_decides() -> None:
    """The export's, else that of the early stop, else the loss; two that differ are refused."""
    assert stage().selects == ""
    assert stage(evaluate_every=1, export="best").selects == "loss"
    assert stage(evaluate_every=1, export="best", export_metric="accuracy").selects == "accuracy"
    assert stage(evaluate_every=1, export="best", early_stop={"metric": "accuracy"}).selects == "accuracy"
    for fields, text in (
        ({"early_stop": {}}, "need evaluate_every"),
        ({"export_metric": "loss", "evaluate_every": 1}, "goes with export: best"),
        ({"export": "best", "export_metric": "f1", "early_stop": {}, "evaluate_every": 1}, "one metric decides"),
    ):
        with pytest.raises(ValidationError, match=text):
            stage(**fields)


def test_the_plan_refuses_what_cannot_be_chosen_by(tmp_path: Path) -> None:
    """A metric that the task lacks, or data without a validation split."""
    fields = {"evaluate_every": 1, "early_stop": {"metric": "accuracy"}}
    config = load_config(write_yaml(tmp_path, stages={"student": fields}))
    with pytest.raises(UserError, match=r"stages.student.early_stop.metric: task 'causal-lm' has no such metric"):
        check(config)
    fields["early_stop"] = {"metric": "loss"}
    data = {"text": {"files": {"validation": None}}}
    config = load_config(write_yaml(tmp_path, data=data, stages={"student": fields}))
    with pytest.raises(UserError, match=r"data.text.files: there is no validation split to choose by"):
        check(config)


def test_classifiers_choose_by_accuracy_in_a_chain_too(tmp_path: Path) -> None:
    """The exported student's accuracy on the validation split, by plain transformers, is the best one logged."""
    write_yaml(tmp_path)
    for split in ("train", "validation", "test"):
        file = tmp_path / f"data/{split}.jsonl"
        texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
        rows = [{"text": t, "label": "yes" if "the" in t.split() else "no"} for t in texts]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"architecture": "bert", "layers": 1, "width": 16, "heads": 2}
    training = {"steps": 12, "batch": {"sequences": 8}, "optimizer": {"lr": 1e-2}, "evaluate_every": 2}
    file = write_yaml(
        tmp_path,
        data={"text": {"task": "classify"}},
        stages={"teacher": {"student": {**model, "layers": 2}, "steps": 6, "optimizer": {"lr": 1e-2}}, "student": None},
        chain={"mode": "takd", "teachers": ["stage:teacher"], "student": {**model, "width": 8}}
        | {"rungs": [{"layers": 1, "width": 16, "heads": 2}], **training}
        | {"export": "best", "early_stop": {"metric": "accuracy", "patience": 4}},
        evaluate={"ensembles": [], "comparisons": []},
    )
    code, output = processes.run(tmp_path, "run", str(file))
    assert code == 0, output
    scores = validation(tmp_path, "accuracy")
    (folder,) = (tmp_path / RUN / "stages").glob("*-student")
    assert json.loads((folder / "DONE").read_text())["exported_step"] == max(scores, key=lambda step: scores[step])
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    student = AutoModelForSequenceClassification.from_pretrained(folder / "export").eval()
    rows = [json.loads(line) for line in (tmp_path / "data/validation.jsonl").read_text().splitlines()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = [student.config.id2label[i] for i in student(**batch).logits.argmax(-1).tolist()]
    right = sum(a == row["label"] for a, row in zip(said, rows, strict=True)) / len(rows)
    assert right == pytest.approx(max(scores.values()))
