"""The command line and the library as a user meets them: a whole small run, then every command on it."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from golden_recipes import made_up_documents
from tiny_run import drawn_reports, tiny_config, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mtkd
from mtkd.cli.app import app, main
from mtkd.errors import UserError

PLUGIN = """
import torch
import mtkd


@mtkd.weighting("favourite")
class Favourite(mtkd.Weighting):
    '''All the weight on one teacher.'''

    def __init__(self, teachers: tuple[str, ...], name: str):
        super().__init__()
        self.position = teachers.index(name)

    def forward(self, traits):
        weights = traits.full(0.0)
        weights[self.position] = 1.0
        return weights


@mtkd.loss("twice_kl", inputs=("logits",))
def twice_kl(student, teacher, mask):
    log_s, log_t = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return 2 * (log_t.exp() * (log_t - log_s)).sum(-1)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, mtkd.RunResult]:
    """A run with a user's own weighting and loss, made through the library."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "plugin.py").write_text(PLUGIN)
    student = {
        "method": None,
        "match": [{"loss": "twice_kl"}, {"loss": "ce", "target": "labels"}],
        "weighting": {"name": "favourite", "options": {"name": "teacher"}},
        "evaluate_every": 4,
    }
    config = tiny_config(folder, plugins=["plugin.py"], stages={"student": student})
    with drawn_reports():
        return folder, mtkd.run(config)


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def test_a_run_through_the_library(made):
    """Law: a run gives results, a report, and a model that plain transformers loads."""
    _, result = made
    assert set(result.stages) == {"teacher", "student"}
    assert set(result.results["models"]) == {"teacher", "student", "ensemble:student"}
    assert result.report.read_text().startswith("<!DOCTYPE html>")
    model = AutoModelForCausalLM.from_pretrained(result.export("student"))
    tokenizer = AutoTokenizer.from_pretrained(result.export("student"))
    with torch.no_grad():
        logits = model(**tokenizer("the teacher shows", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)


def test_metrics_hold_the_weights_of_the_plugin(made):
    """Law: the logged rows of a step sum to its loss, and weights are the plug-in's."""
    _, result = made
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    student = [line for line in lines if line["stage"] == "student" and "loss" in line]
    assert all(line["weight/teacher"] == 1.0 and line["weight_entropy"] == 0.0 for line in student)
    row = [line["row/0:logits:twice_kl"] + line["row/1:logits:ce"] for line in student]
    assert row == pytest.approx([line["loss"] for line in student], rel=1e-5)
    assert any("validation/loss" in line for line in lines)


def test_a_single_member_ensemble_scores_as_its_member(made):
    """Law: a mixture of one model scores as the model."""
    _, result = made
    models = result.results["models"]
    alone, ensemble = models["teacher"]["overall"], models["ensemble:student"]["overall"]
    assert ensemble["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-5)


def test_perplexity_equals_the_exported_models_own(made):
    """Bits per byte and perplexity of the report, recomputed with plain transformers on the test documents."""
    folder, result = made
    export = result.export("student")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export).eval(), AutoTokenizer.from_pretrained(export)
    nll, count = 0.0, 0
    for line in (folder / "data/test.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        nll -= sum(float(logs[i, ids[i + 1]]) for i in range(len(ids) - 1))
        count += len(ids) - 1
    overall = result.results["models"]["student"]["overall"]
    assert overall["tokens"] == count
    assert overall["perplexity"] == pytest.approx(float(torch.tensor(nll / count).exp()), rel=1e-5)


def test_a_second_call_redoes_nothing(made):
    """Law: a finished run writes no file of a stage again."""
    folder, result = made
    before = {p: p.stat().st_mtime_ns for p in result.folder.rglob("stages/*/*") if p.is_file()}
    invoke("run", folder / "run.yaml")
    assert {p: p.stat().st_mtime_ns for p in result.folder.rglob("stages/*/*") if p.is_file()} == before


def test_status_report_and_plan(made):
    """Law: every command agrees with the files of the run."""
    folder, result = made
    status = json.loads(invoke("status", result.folder, "--json"))
    assert [(s["stage"], s["state"], s["step"]) for s in status["stages"]] == [
        ("teacher", "done", 3),
        ("student", "done", 8),
    ]
    assert status["held_by"] == "no process"
    assert "student" in invoke("report", result.folder)
    plan = json.loads(invoke("plan", folder / "run.yaml", "--json"))
    assert [s["state"] for s in plan["stages"]] == ["done, skipped"] * 2
    for planned in plan["stages"]:
        export = AutoModelForCausalLM.from_pretrained(result.export(planned["name"]))
        unused = 300 - len(AutoTokenizer.from_pretrained(result.export(planned["name"])))  # the plan's upper bound
        width = export.config.hidden_size
        assert planned["models"][0]["parameters"] == export.num_parameters() + unused * width
    assert "2 stages" in invoke("validate", folder / "run.yaml")


def test_plan_sees_a_changed_stage(made):
    """Law: a changed stage differs, those before it do not."""
    folder, _ = made
    plan = json.loads(invoke("plan", folder / "run.yaml", "--json", "-o", "stages.student.steps=9"))
    assert [s["state"] for s in plan["stages"]] == ["done, skipped", "done, but differs"]


@pytest.mark.parametrize("what", ["methods", "losses", "weightings", "teachers", "tasks", "sources"])
def test_ls(what, made):
    """Law: each list has built-ins and plug-ins with their origin."""
    folder, _ = made
    rows = json.loads(invoke("ls", what, "--json", "--plugin", folder / "plugin.py"))
    names = {row["name"]: row for row in rows}
    expected = {"methods": "kd", "losses": "jsd", "weightings": "mt_bert", "teachers": "glm-10b", "tasks": "classify"}
    assert expected.get(what, "python-stdlib") in names
    if what == "losses":
        assert names["kl"]["from"] == "mtkd"
        assert names["twice_kl"]["from"].endswith("plugin.py")


def test_a_list_without_entries_says_where_they_come_from():
    """Law: an empty list is a sentence, and [] in JSON."""
    assert "--plugin FILE" in invoke("ls", "transforms")
    assert json.loads(invoke("ls", "transforms", "--json")) == []


RECIPES = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_can_be_read(file):
    """Law: every recipe of configs/ is a valid configuration."""
    assert mtkd.load_config(file).stages


def test_student_and_control_differ_in_their_teachers_alone(tmp_path, monkeypatch):
    """Law: an assistant between two teachers and a student; the control has the student's model, steps and tokens."""
    monkeypatch.setattr("mtkd.data.sources.stdlib_documents", made_up_documents)
    file = next(file for file in RECIPES if file.stem == "assistant")
    stages = {s["name"]: s for s in json.loads(invoke("plan", file, "--json", "-o", f"output={tmp_path}"))["stages"]}
    assert stages["assistant"]["needs"] == ["prose-teacher", "code-teacher"]
    assert stages["student"]["needs"] == ["assistant", "prose-teacher", "code-teacher"]
    student, control = stages["student"], stages["labels-only"]
    assert student["models"][0] == control["models"][0]
    assert (student["steps"], student["tokens"]) == (control["steps"], control["tokens"])
    sizes = {name: stage["models"][0]["parameters"] for name, stage in stages.items()}
    assert sizes["prose-teacher"] > sizes["code-teacher"] > sizes["assistant"] > sizes["student"]


def test_the_quickstart_compares_with_what_labels_alone_do():
    """Law: both controls start as the student does, with its steps or its time; the texts' labels are not read."""
    config = mtkd.load_config(next(file for file in RECIPES if file.stem == "quickstart"))
    student, steps, time = (config.stages[name] for name in ("student", "labels-only", "labels-equal-time"))
    assert student.student == steps.student == time.student
    assert (student.batch, student.optimizer, student.steps) == (steps.batch, steps.optimizer, steps.steps)
    assert time.equal_time is not None
    assert time.equal_time.to == "student"
    assert student.method is not None
    assert student.method.options["hard"] == 0
    assert {(c.candidate, c.baseline) for c in config.evaluate.comparisons} == {
        ("student", "labels-only"),
        ("student", "labels-equal-time"),
    }


def test_schema_is_json_schema():
    """Law: the schema forbids unknown keys and describes each."""
    schema = json.loads(invoke("schema"))
    assert schema["additionalProperties"] is False
    assert schema["properties"]["stages"]["description"]


def test_doctor():
    """Law: the doctor names the version of torch."""
    facts = json.loads(invoke("doctor", "--json"))
    assert facts["torch"].startswith("2.")


def test_a_plugin_does_not_become_the_origin_of_what_it_imports(tmp_path):
    """In a fresh process: the plug-in is what imports the built-in weightings, and then fails."""
    (tmp_path / "late.py").write_text("import mtkd\nmtkd.Weighting\nraise RuntimeError('too late')\n")
    code = (
        "import mtkd, mtkd.registry as r\n"
        "try: r.load_plugins(('late.py',))\n"
        "except mtkd.UserError: print(mtkd.WEIGHTINGS.origin('uniform'), mtkd.WEIGHTINGS.origin('ca_mkd'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "mtkd mtkd", done.stdout + done.stderr


def test_plan_follows_a_changed_teacher(made):
    """Law: a stage whose teacher differs is not done either."""
    folder, _ = made
    plan = json.loads(invoke("plan", folder / "run.yaml", "--json", "-o", "stages.teacher.steps=9"))
    assert [s["state"] for s in plan["stages"]] == ["done, but differs", "done, but teacher is not"]


def test_plugin_cannot_shadow_a_builtin(tmp_path):
    """Law: a plug-in cannot replace a built-in."""
    (tmp_path / "bad.py").write_text("import mtkd\n\n@mtkd.loss('kl')\ndef kl(student, teacher, mask):\n    return 0\n")
    config = tiny_config(tmp_path, plugins=["bad.py"])
    with pytest.raises(UserError, match="already registered by mtkd"):
        mtkd.run(config)
    assert mtkd.LOSSES["kl"].function.__module__ == "mtkd.losses.distributions"


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("stages.student.method=kdd", 2, "did you mean 'kd'?"),
        ("stages.student.method={name: kd, options: {temprature: 2}}", 2, "temperature"),
        ("stages.student.weighting=mt_brt", 2, "mt_bert"),
        ("stages.student.match=[{loss: cosin}]", 2, "cosine"),
        ("stages.student.match=[{loss: kl, options: {margin: 1}}]", 2, "margin"),
        ("stages.student.match=[{feature: hidden, loss: kl}]", 2, "cannot read"),
        ("stages.student.match=[{feature: hidden, loss: mse, teacher_layer: 7}]", 2, "no such layer"),
        ("data.text.task=classfy", 2, "classify"),
        ("data.text.files={train: nothing.jsonl}", 3, "nothing.jsonl"),
        ("stages.student.teachers=[no/such-folder]", 3, "no/such-folder"),
        ("stages.student.steps=0", 2, "steps"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(tmp_path, monkeypatch, capsys, override, code, says):
    """Law: a mistake ends the plan with its exit code and what helps."""
    monkeypatch.setattr("mtkd.running.train.train", lambda *a: pytest.fail("trained"))
    monkeypatch.setattr(sys, "argv", ["mtkd", "plan", str(write_yaml(tmp_path)), "-o", override])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert says in capsys.readouterr().err


def test_help_does_not_wait_for_torch():
    """Law: the command line imports nothing heavy."""
    heavy = {"torch", "transformers", "deepspeed", "matplotlib"}
    code = f"import sys, mtkd.cli.app; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_survive_any_import_order():
    """Importing a module sets its name in its package: none is called like something public."""
    modules = {module.name for module in pkgutil.iter_modules(mtkd.__path__)}
    assert "weightings" in modules
    assert not modules & {*mtkd.__all__}


@pytest.mark.slow
def test_mtkd_run_starts_the_launcher_itself(tmp_path):
    """Two processes under ZeRO 2 through the command line; the export is one model, and the exit code the ranks'."""
    file = write_yaml(tmp_path, engine={"kind": "deepspeed", "processes": 2, "zero_stage": 2})
    code, output = processes.run(tmp_path, "run", str(file), executes=True)  # new interpreters, as for a user
    assert code == 0, output
    results = json.loads((tmp_path / "runs/tiny/results.json").read_text())
    assert set(results["models"]) == {"teacher", "student", "ensemble:student"}
    diverging = ("-o", "name=other", "-o", "stages.teacher.optimizer.lr=1e30")
    code, output = processes.run(tmp_path, "run", str(file), *diverging)
    assert code == 64, output
    assert output.count("is not finite at step") == 1  # of all ranks of the node one speaks
