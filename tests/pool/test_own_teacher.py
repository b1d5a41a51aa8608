"""A teacher of the user's own: as documented, end to end, and its laws. No file of the library knows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from tiny_run import tiny_values, write_data

import mtkd
from mtkd import registry
from mtkd.cli.check import check_plugin
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import LawBroken, UserError
from mtkd.pool.own import Own

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"


@pytest.fixture(autouse=True)
def _forget_plugins() -> Iterator[None]:
    """Names registered by a test are dropped after it."""
    before = set(registry._loaded_plugins)
    yield
    for key in set(registry._loaded_plugins) - before:
        origin = registry._loaded_plugins.pop(key)
        for kind in registry._ALL:
            kind.forget(origin)


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE.read_text(), re.S)
    assert found is not None
    return found[1]


# A token's own table: after token i comes token (i + 1) mod 7, or its neighbour, whatever stands before it.
CYCLE = """
import torch
import mtkd

TABLE = {i: {(i + 1) % 7: 0.75, (i + 2) % 7: 0.25} for i in range(7)}

@mtkd.teacher("cycle")
class Cycle:
    def __init__(self, facts, sharp: float = 1.0):
        if not facts.token_level:
            raise ValueError("for tokens")
        rows = torch.full((facts.columns, facts.columns), 1e-4)  # [V,V]
        for i in range(facts.columns):
            for j, p in TABLE[i % 7].items():
                rows[i, j] = p
        self.rows = sharp * rows.log()

    def forward(self, batch, wants):
        return {"logits": self.rows[batch.input_ids]}  # [B,L,V]
"""


def token_run(folder: Path, **student: Any) -> Path:
    """The tiny run's student with a plug-in's teacher next to the fine-tuned one."""
    write_data(folder / "data")
    (folder / "cycle.py").write_text(CYCLE)
    values = tiny_values(folder)
    values["plugins"] = ["cycle.py"]
    values["stages"]["student"] |= student
    values["evaluate"] |= {"comparisons": []}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def rows_of(folder: Path, name: str, stage: str = "student") -> list[float]:
    lines = read_jsonl(folder / "runs" / "tiny" / "metrics.jsonl")
    return [line[name] for line in lines if line["stage"] == stage and name in line]


def test_a_student_approaches_a_teacher_that_answers_from_a_dictionary(tmp_path: Path) -> None:
    """Law: the divergence from the teacher falls by more than half; plan, report and scores know the teacher."""
    soft = {"name": "kd", "options": {"soft": 1.0, "hard": 0.0}}
    file = token_run(tmp_path, teachers=[{"backend": "cycle"}], method=soft, steps=60)
    (line,) = [model for model in mtkd.plan(load_config(file), memory=True).stages[1].models if model.role == "cycle"]
    assert (line.origin, line.architecture, line.parameters) == ("plug-in cycle.py", "cycle", 0)
    mtkd.run(load_config(file))
    losses = rows_of(tmp_path, "row/0:logits:kl")
    assert losses[-1] < losses[0] / 2
    results = json.loads((tmp_path / "runs/tiny/results.json").read_text())
    assert results["models"]["ensemble:student"]["members"] == ["cycle"]


def test_a_weighting_reads_its_traits(tmp_path: Path) -> None:
    """Law: next to a teacher that hardly learned anything the sure one has the larger weight, by its confidence."""
    teachers = [{"backend": "cycle", "name": "sure"}, "stage:teacher"]
    file = token_run(tmp_path, teachers=teachers, weighting="confidence", per="token")
    mtkd.run(load_config(file))
    assert min(rows_of(tmp_path, "weight/sure")) > 0.5 > max(rows_of(tmp_path, "weight/teacher"))


def test_its_cache_teaches_as_it_does(tmp_path: Path) -> None:
    """Law: a student of the whole cache of a teacher is the student of the teacher, to the rounding of the cache."""
    soft = {"name": "kd", "options": {"soft": 1.0, "hard": 0.0}}
    file = token_run(tmp_path, teachers=[{"backend": "cycle"}], method=soft, export="last")
    values = yaml.safe_load(file.read_text())
    cache = {"kind": "cache", "teachers": [{"backend": "cycle"}], "cache": {"k": 260, "bits": 12}}
    cached = {**values["stages"]["student"], "teachers": [{"model": "stage:kept/cycle", "backend": "cached"}]}
    values["stages"] = {"student": values["stages"]["student"], "kept": cache, "again": cached}
    values["evaluate"] = {}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    mtkd.run(load_config(file))
    live, read = (rows_of(tmp_path, "row/0:logits:kl", stage) for stage in ("student", "again"))
    assert read == pytest.approx(live, rel=2e-2)


def test_two_processes_are_taught_as_one(tmp_path: Path) -> None:
    """Law: the losses of two ranks are those of one process."""
    soft = {"name": "kd", "options": {"soft": 1.0, "hard": 0.0}}
    losses = []
    for processes_ in (1, 2):
        folder = tmp_path / str(processes_)
        folder.mkdir()
        file = token_run(folder, teachers=[{"backend": "cycle"}], method=soft)
        engine = ["engine.kind=deepspeed", f"engine.processes={processes_}", "stages.student.student.dropout=0"]
        options = [part for change in engine for part in ("-o", change)]
        code, output = processes.run(folder, "run", str(file), *options)
        assert code == 0, output
        losses.append(rows_of(folder, "row/0:logits:kl"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_another_option_or_another_code_is_another_stage(tmp_path: Path) -> None:
    """Law: the identity of a stage has the options of its teacher and the digest of its code."""
    file = token_run(tmp_path, teachers=[{"backend": "cycle"}])
    code, output = processes.run(tmp_path, "run", str(file))
    assert code == 0, output
    place = "stages.student.teachers.0.options.sharp"
    code, output = processes.run(tmp_path, "run", str(file), "-o", f"{place}=2.0")
    assert code != 0
    assert "stage.teachers[0].options.sharp: (absent) -> 2.0" in output
    (tmp_path / "cycle.py").write_text(CYCLE.replace("0.75", "0.5"))
    code, output = processes.run(tmp_path, "run", str(file))
    assert code != 0
    assert "plugins.cycle.py" in output


# As the page has it, with what a run needs around it.
TEXTS = {"good day": 1, "good work": 1, "fine day": 1, "bad day": 0, "bad work": 0, "poor work": 0}


def test_the_documented_teacher_works_as_it_is_written(tmp_path: Path) -> None:
    """Law: the page's file and the page's YAML make a student that says of every text what the table says."""
    (tmp_path / "table.py").write_text(block("python"))
    answers = {text: [0.1, 0.9] if label else [0.9, 0.1] for text, label in TEXTS.items()}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    lines = [json.dumps({"text": text, "label": "yes" if label else "no"}) for text, label in TEXTS.items()]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines * 4))
    values = {
        "name": "own",
        "output": str(tmp_path / "runs"),
        "tokenizer": {"train_on": "text", "vocab_size": 300},
        "data": {
            "text": {
                "source": "files",
                "task": "classify",
                "files": {split: f"{split}.jsonl" for split in ("train", "test")},
                "labels": ["no", "yes"],
                "max_length": 32,
            }
        },
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        **yaml.safe_load(block("yaml")),
    }
    values["stages"]["student"]["optimizer"] = {"lr": 1e-2}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    mtkd.run(load_config(file))
    results = json.loads((tmp_path / "runs/own/results.json").read_text())
    assert results["models"]["student"]["overall"]["accuracy"] == 1.0


def test_the_documented_teacher_keeps_the_laws(tmp_path: Path) -> None:
    """Law: what the page shows passes `mtkd check`."""
    (tmp_path / "table.py").write_text(block("python"))
    (line,) = map(str, check_plugin(tmp_path / "table.py"))
    assert line.startswith("teacher backend 'table': keeps the teacher laws (shape, finite, untouched, repeatable, ")


class Sums:
    """Keeps every law: a row's logits are a function of its real tokens."""

    def __init__(self, facts: mtkd.TeacherFacts) -> None:
        if facts.token_level:
            raise ValueError("for classes")
        self.columns, self.calls = facts.columns, 0

    def forward(self, batch: Any, wants: Any) -> dict[str, torch.Tensor]:
        return {"logits": self.of(batch)[:, None] * torch.arange(self.columns)}

    def of(self, batch: Any) -> torch.Tensor:
        return (batch.input_ids * batch.attention_mask).sum(1).float() / 100


class LastColumn(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        return batch.input_ids[:, -1].float()


class BatchMean(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        return super().of(batch).mean().expand(len(batch.keys))


class ByPosition(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        return torch.arange(len(batch.keys)).float()


class Counting(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        return super().of(batch) + self.calls


class Endless(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        return super().of(batch) / 0


class Transposed(Sums):
    def forward(self, batch: Any, wants: Any) -> dict[str, torch.Tensor]:
        return {"logits": super().forward(batch, wants)["logits"].t()}


class Silent(Sums):
    def forward(self, batch: Any, wants: Any) -> dict[str, torch.Tensor]:
        return {}


class Careless(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        values = super().of(batch)
        batch.input_ids.zero_()
        return values


class Learning(Sums):
    def forward(self, batch: Any, wants: Any) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            return {"logits": super().forward(batch, wants)["logits"] * torch.ones(1, requires_grad=True)}


BROKEN: dict[type, str] = {
    LastColumn: "padding",
    BatchMean: "cut",
    ByPosition: "order",
    Counting: "repeatable",
    Endless: "finite",
    Transposed: "shape",
    Silent: "shape",
    Careless: "untouched",
    Learning: "gradient",
}


def test_a_teacher_that_keeps_the_laws_passes() -> None:
    """Law: what follows from the law's text alone passes."""
    mtkd.check_teacher(Own("sums", Sums, frozenset({"logits"})))


@pytest.mark.parametrize("cls", BROKEN)
def test_a_broken_law_is_named(cls: type) -> None:
    """Law: a teacher that breaks one law is refused by that law."""
    with pytest.raises(LawBroken) as caught:
        mtkd.check_teacher(Own("broken", cls, frozenset({"logits"})))
    assert caught.value.law == BROKEN[cls]


class Hidden:
    """Gives hidden states of its own width."""

    def forward(self, batch: Any, wants: Any) -> dict[str, torch.Tensor]:
        states = batch.input_ids[..., None].float() * torch.arange(6) / 100  # [B,L,H]
        return {"hidden.2": states, "cls.2": states[:, 0]}


def test_hidden_states_of_its_own_width() -> None:
    """Law: a teacher may give hidden states, of the layers and the width that it says."""
    mtkd.check_teacher(Own("hidden", Hidden, frozenset({"hidden", "cls"}), layers=2, width=6))
    with pytest.raises(LawBroken, match="shape"):
        mtkd.check_teacher(Own("hidden", Hidden, frozenset({"hidden", "cls"}), layers=2, width=5))


REFUSED = {
    "an unknown option": (
        {"teachers": [{"backend": "cycle", "options": {"sharpp": 2.0}}]},
        ("stages.student.teachers[0].options: unknown option", "sharpp", "did you mean 'sharp'"),
    ),
    "an option of another type": (
        {"teachers": [{"backend": "cycle", "options": {"sharp": "very"}}]},
        ("stages.student.teachers[0].options.sharp: an option has the wrong type",),
    ),
    "an unknown name": (
        {"teachers": [{"backend": "cycl"}]},
        ("stages.student.teachers[0].backend: unknown teacher backend", "did you mean 'cycle'"),
    ),
    "a feature that it does not give": (
        {"teachers": [{"backend": "cycle"}], "match": [{"feature": "hidden", "loss": "mse"}]},
        ("hidden", "cycle", "logits"),
    ),
    "a vocabulary without an embedding": (
        {
            "teachers": [{"backend": "cycle"}],
            "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "vocabulary": {"keep": 0.5}},
        },
        ("stages.student.student.vocabulary", "a teacher of your own does not have"),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_by_the_plan(what: str, tmp_path: Path) -> None:
    """Law: the plan says place, found and allowed before a weight is loaded."""
    student, texts = REFUSED[what]
    file = token_run(tmp_path, **student)
    with pytest.raises(UserError) as caught:
        mtkd.plan(load_config(file))
    for text in texts:
        assert text in str(caught.value), caught.value


MORE = """
from dataclasses import replace
import torch
import mtkd

@mtkd.teacher("states", gives=("hidden",), layers=2, width=8)
class States:
    def __init__(self, facts): pass
    def forward(self, batch, wants):
        return {key: batch.input_ids[..., None].expand(-1, -1, 8) / 100 for key in wants}  # [B,L,8]

@mtkd.teacher("reader", view="other")
class Reader:
    def __init__(self, facts): self.columns, self.token_level = facts.columns, facts.token_level
    def forward(self, batch, wants):
        student = batch.view().input_ids
        assert batch.input_ids is batch.views["other"].input_ids
        shape = student.shape if self.token_level else student.shape[:1]
        return {"logits": torch.zeros(*shape, self.columns)}

@mtkd.transform("copies")
def copies(batches, facts):
    return [replace(b, views={"other": mtkd.View(b.input_ids.clone(), b.attention_mask)}) for b in batches]
"""


def more_run(folder: Path, stages: dict[str, Any], evaluate: dict[str, Any] | None = None) -> Path:
    """The tiny run with some changes to its stages, and the teachers of MORE."""
    file = token_run(folder)
    (folder / "more.py").write_text(MORE)
    values = yaml.safe_load(file.read_text())
    values["plugins"] = ["cycle.py", "more.py"]
    values["stages"]["student"] |= stages.pop("student", {})
    values["stages"] |= stages
    values["evaluate"] = evaluate or {}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


HIDDEN_ROWS = [
    {"feature": "hidden", "loss": "mse", "student_layer": 1, "teacher_layer": 1},
    {"feature": "logits", "loss": "ce", "target": "labels"},
]


def test_a_teacher_of_hidden_states_alone_teaches(tmp_path: Path) -> None:
    """Law: where nothing reads logits, a teacher without any is planned, counted and run."""
    student = {"teachers": [{"backend": "states"}], "match": HIDDEN_ROWS, "method": None}
    file = more_run(tmp_path, {"student": student}, {"comparisons": [], "ensembles": []})
    mtkd.plan(load_config(file), memory=True)
    mtkd.run(load_config(file))
    assert rows_of(tmp_path, "row/0:hidden:mse")


CANNOT: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "an ensemble without logits": (
        {"student": {"teachers": [{"backend": "states"}], "match": HIDDEN_ROWS, "method": None}},
        {"ensembles": ["student"]},
        ("stages.student.teachers[0]: teacher 'states' gives no logits",),
    ),
    "a cache without logits": (
        {"kept": {"kind": "cache", "teachers": [{"backend": "states"}], "cache": {"hidden": ["hidden.1"]}}},
        {},
        ("stages.kept.teachers[0]: teacher 'states' gives no logits",),
    ),
    "a view without transforms": (
        {"student": {"teachers": [{"backend": "reader"}]}},
        {"ensembles": []},
        ("stages.student.teachers[0]: teacher 'reader' reads the view 'other'", "stages.student.transforms"),
    ),
    "a cache of a view": (
        {"kept": {"kind": "cache", "teachers": [{"backend": "reader"}]}},
        {},
        ("stages.kept.teachers[0]: teacher 'reader' reads the view 'other'", "a cache stage"),
    ),
    "a view in an ensemble": (
        {"student": {"teachers": [{"backend": "reader"}], "transforms": ["copies"]}},
        {"ensembles": ["student"]},
        ("evaluate.ensembles: teacher 'reader' reads the view 'other'",),
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_a_stage_that_cannot_serve_the_teacher_is_refused_by_the_plan(what: str, tmp_path: Path) -> None:
    """Law: the plan knows what the decorator says of features and views, and names the place."""
    stages, evaluate, texts = CANNOT[what]
    file = more_run(tmp_path, json.loads(json.dumps(stages)), {"comparisons": [], **evaluate})
    with pytest.raises(UserError) as caught:
        mtkd.plan(load_config(file))
    for text in texts:
        assert text in str(caught.value), caught.value


def test_a_teacher_with_a_view_teaches_where_a_transform_writes_it(tmp_path: Path) -> None:
    """Law: the stage runs to its end; the test of classes before it does not ask this teacher."""
    student = {"teachers": [{"backend": "reader"}], "transforms": ["copies"]}
    file = more_run(tmp_path, {"student": student}, {"comparisons": [], "ensembles": []})
    mtkd.run(load_config(file))
    assert rows_of(tmp_path, "loss")


READS = """
import json
from pathlib import Path
import torch
import mtkd

@mtkd.teacher("from_file")
class FromFile:
    def __init__(self, facts, files: dict = {}):
        self.columns, self.value = facts.columns, json.loads((Path(__file__).parent / files["table"][0]).read_text())
    def forward(self, batch, wants):
        return {"logits": torch.full((*batch.input_ids.shape, self.columns), self.value)}  # [B,L,V]
"""


@pytest.mark.parametrize("kind", ["student", "kept"])
def test_another_content_of_a_file_in_the_options_is_another_stage(kind: str, tmp_path: Path) -> None:
    """Law: a finished stage is refused when a file that an option names has other content, at any depth of it."""
    teachers = [{"backend": "from_file", "options": {"files": {"table": ["values.json"]}}}]
    stages = (
        {"kept": {"kind": "cache", "teachers": teachers}} if kind == "kept" else {"student": {"teachers": teachers}}
    )
    file = more_run(tmp_path, stages, {"comparisons": []})
    (tmp_path / "more.py").write_text(READS)
    (tmp_path / "values.json").write_text("0.5")
    mtkd.run(load_config(file))
    mtkd.run(load_config(file))
    (tmp_path / "values.json").write_text("0.75")
    with pytest.raises(
        UserError, match=rf"stages\.{kind}: this stage is finished(.|\n)*teacher from_file': 'plug-in; values.json"
    ):
        mtkd.run(load_config(file))


class Wanting(Sums):
    def forward(self, batch: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {}


class Nothing:
    forward = None


@pytest.mark.parametrize("cls", [Wanting, Nothing, object])
def test_a_class_that_cannot_be_asked_is_refused_when_it_registers(cls: type) -> None:
    """Law: forward takes the batch and the wanted features."""
    with pytest.raises(UserError, match=r"decorator of 'x': a teacher is a class with forward\(self, batch, wants\)"):
        Own("x", cls, frozenset({"logits"}))


def test_an_object_that_hides_its_forward_is_named_with_its_place(tmp_path: Path) -> None:
    """Law: a call that cannot be made is the plug-in's error, at the teacher."""
    file = token_run(tmp_path, teachers=[{"backend": "cycle"}])
    (tmp_path / "cycle.py").write_text(CYCLE.replace("self.rows = sharp", "self.forward, self.rows = None, sharp"))
    with pytest.raises(UserError, match=r"teachers\[0\]: forward of the plug-in's teacher 'cycle' cannot be called"):
        mtkd.run(load_config(file))


@pytest.mark.parametrize(
    ("write", "field"),
    [("batch.input_ids[:] = 5", "input_ids"), ("batch.targets = batch.targets + 0", "targets")],
)
def test_a_teacher_that_writes_into_the_batch_ends_the_run(write: str, field: str, tmp_path: Path) -> None:
    """Law: what the student trains on is what the data says; who changes it is named."""
    file = token_run(tmp_path, teachers=[{"backend": "cycle"}])
    (tmp_path / "cycle.py").write_text(CYCLE.replace("        return {", f"        {write}\n        return {{"))
    with pytest.raises(UserError, match=rf"teachers\[0\]: teacher 'cycle' changes the batch(.|\n)*found: +{field}"):
        mtkd.run(load_config(file))


@pytest.mark.parametrize("needs", [False, True])
def test_a_folder_that_is_not_there_is_refused_by_the_plan(needs: bool, tmp_path: Path) -> None:
    """Law: no earlier stage trains before the missing model of a plug-in is noticed."""
    file = token_run(tmp_path, teachers=[{"backend": "cycle", "model": "nowhere/at/all"}])
    if needs:
        (tmp_path / "cycle.py").write_text(CYCLE.replace('"cycle")', '"cycle", needs_model=True)'))
    with pytest.raises(UserError) as caught:
        mtkd.plan(load_config(file))
    assert "stages.student.teachers[0].model" in str(caught.value)
    assert "nowhere/at/all" in str(caught.value)


class Numbered(Sums):
    def of(self, batch: Any) -> torch.Tensor:
        return super().of(batch) * self.number

    def __init__(self, facts: mtkd.TeacherFacts) -> None:
        super().__init__(facts)
        assert facts.folder is not None
        self.number = float((facts.folder / "number.txt").read_text())


def test_the_laws_of_a_teacher_that_reads_a_model(tmp_path: Path) -> None:
    """Law: `mtkd check` says that it does not run them, and how a test does; with a folder they are run."""
    (tmp_path / "needs.py").write_text(CYCLE.replace('"cycle")', '"cycle", needs_model=True)'))
    (line,) = map(str, check_plugin(tmp_path / "needs.py"))
    assert line.endswith('its laws are not run: it reads a model; in a test: mtkd.check_teacher("cycle", folder=PATH)')
    (tmp_path / "number.txt").write_text("2")
    own = Own("numbered", Numbered, frozenset({"logits"}), needs_model=True)
    mtkd.check_teacher(own, folder=tmp_path)
    with pytest.raises(UserError, match="it reads a model, and there is no folder"):
        mtkd.check_teacher(own)


MISSPELLED = {
    "keep_layers": {"backend": "offlod", "model": {"path": "x", "keep_layers": [1]}},
    "classes": {"backend": "residnt", "model": "x", "classes": ["a", "b"]},
}


@pytest.mark.parametrize("key", MISSPELLED)
def test_a_misspelled_backend_is_the_first_thing_that_is_said(key: str, tmp_path: Path) -> None:
    """Law: the name of a built-in backend is offered before a rule for a plug-in's teachers."""
    file = token_run(tmp_path, teachers=[MISSPELLED[key]])
    with pytest.raises(UserError, match=r"unknown backend '(offlod|residnt)'; did you mean '(offload|resident)'\?"):
        load_config(file)


@pytest.mark.parametrize("backend", [None, 5])
def test_a_backend_without_a_name_is_refused(backend: Any, tmp_path: Path) -> None:
    """Law: what is no text is no backend."""
    file = token_run(tmp_path, teachers=[{"backend": backend, "model": "x"}])
    with pytest.raises(UserError, match=r"teachers\[0\]\.backend: unknown teacher backend"):
        mtkd.plan(load_config(file))


def test_a_wrong_shape_is_told_with_the_teacher(tmp_path: Path) -> None:
    """Law: logits of the wrong width are the plug-in author's to fix: exit 2, teacher and both shapes."""
    file = token_run(tmp_path, teachers=[{"backend": "cycle"}])
    (tmp_path / "cycle.py").write_text(
        CYCLE.replace("self.rows[batch.input_ids]", "self.rows[batch.input_ids][..., 1:]")
    )
    code, output = processes.run(tmp_path, "run", str(file))
    assert code == 2
    assert "teacher 'cycle' gives 'logits' in another shape" in output
