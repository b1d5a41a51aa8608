"""Transforms between the stream and the counts: a plug-in writes other answers into the batches of a whole run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from tiny import causal_batch, class_batch
from tiny_glm import LONGEST, split_of, tokenizer
from tiny_run import NAME, STUDENT_STEPS, tiny_config, write_data, write_yaml

from mtkd.config import Named
from mtkd.data.batch import Batch, View
from mtkd.data.transforms import TRANSFORMS, StepFacts, TransformSpec, make_transforms
from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.seal import newest_sealed
from mtkd.errors import UserError
from mtkd.planning.checks import check
from mtkd.planning.stages import stage_values

slow = pytest.mark.slow
runs = pytest.mark.xdist_group("transforms")  # they share the runs of `folder`

STUDENT = Path("runs") / NAME / "stages/02-student"
CLOCK = {"time", "seconds"}

# Row b of a batch is document b's prompt and answer; what it shall answer stands in a file of its own.
ANSWERS = """
import json
from dataclasses import replace
from pathlib import Path

import torch
import mtkd

RIGHT = [json.loads(line) for line in Path(__file__).with_name("right.jsonl").read_text().splitlines()]


@mtkd.transform("answers")
def answers(batches: list[mtkd.Batch], at: mtkd.StepFacts, *, until: int = 1000) -> list[mtkd.Batch]:
    return [written(batch, at) for batch in batches] if at.step < until else batches


def written(batch, at):
    inputs, targets = batch.input_ids.clone(), batch.targets.clone()
    for row, document in enumerate(batch.origin.tolist()):
        right = RIGHT[int(at.split.document_names[document].removeprefix("train:")) - 1]
        ids = [at.tokenizer(right[column], add_special_tokens=False)["input_ids"] for column in ("prompt", "text")]
        whole = torch.tensor([at.tokenizer.bos_token_id, *ids[0], *ids[1], at.tokenizer.eos_token_id])
        inputs[row, : len(whole) - 1] = whole[:-1]
        asked = targets[row, : len(whole) - 1]
        asked[asked != -100] = whole[1:][asked != -100]
    return replace(batch, input_ids=inputs, targets=targets)
"""


def write_answers(file: Path, answers: list[str]) -> None:
    lines = [json.dumps({"prompt": f"say {number} ", "text": text}) for number, text in enumerate(answers)]
    file.write_text("\n".join(lines) + "\n")


def write_run(folder: Path, answers: list[str], right: list[str], **changes: Any) -> str:
    """A run on prompts with these answers, whose tokenizer is trained on other texts: no answer changes it."""
    folder.mkdir(parents=True)
    write_data(folder / "words")
    (folder / "data").mkdir()
    for split in ("train", "validation", "test"):
        write_answers(folder / "data" / f"{split}.jsonl", answers if split == "train" else right)
    write_answers(folder / "right.jsonl", right)
    (folder / "answers.py").write_text(ANSWERS)
    words = {"source": "files", "path": "words", "files": {"train": "train.jsonl"}}
    stages = {name: {"data": "text", **stage} for name, stage in changes.pop("stages", {}).items()}
    every = {"text": {"prompt": "prompt"}, "words": words}
    return str(write_yaml(folder, data=every, tokenizer={"train_on": "words"}, plugins=["answers.py"],
                          stages={**{s: {"data": "text"} for s in ("teacher", "student")}, **stages},
                          evaluate={"data": "text"}, **changes))  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> tuple[list[str], list[str]]:
    """Right answers and wrong ones, of as many tokens each: the tokenizer knows no pair of these letters."""
    chance = random.Random(1)
    right = ["".join(chance.choices("QXZJ", k=chance.randint(4, 12))) for _ in range(48)]
    return right, [text.translate(str.maketrans("QXZJ", "ZQJX")) for text in right]


STAGE = {"kind": "distill", "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2}, "steps": 1,
         "method": "kd"}  # fmt: skip
TRANSFORMED = {name: {"transforms": ["answers"]} for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, answers: tuple[list[str], list[str]]) -> Path:
    """right/: data with right answers; wrong/: with wrong ones; transformed/: with wrong ones, replaced."""
    folder, (right, wrong) = tmp_path_factory.mktemp("transforms"), answers
    for name, given, stages in (("right", right, {}), ("wrong", wrong, {}), ("transformed", wrong, TRANSFORMED)):
        code, output = processes.run(folder, "run", write_run(folder / name, given, right, stages=stages))
        assert code == 0, output
    return folder


def export(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (run / STUDENT / "export").glob("*.safetensors")}


def lines(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in CLOCK} for line in read_jsonl(run / f"runs/{NAME}/metrics.jsonl")
    ]


@slow
@runs
def test_replaced_answers_are_the_answers(folder: Path) -> None:
    """A run whose answers a transform replaces is, bit by bit, the run whose data had them; without it another one."""
    right, wrong, transformed = (folder / name for name in ("right", "wrong", "transformed"))
    assert export(transformed) == export(right) != {}
    assert lines(transformed) == lines(right)
    assert export(wrong) != export(right)


@slow
@runs
def test_a_killed_run_goes_on_with_the_same_answers(folder: Path, answers: tuple[list[str], list[str]]) -> None:
    """Killed (-9) while it saved, and resumed: the same bits as without the kill."""
    place = folder / "killed"
    file = write_run(place, answers[1], answers[0], stages=TRANSFORMED)
    code, output = processes.run(folder, "run", file, environment={"MTKD_TEST_KILL_AT": "after-rename@6"})
    assert code == -9, output
    assert newest_sealed(place / STUDENT / "checkpoints").manifest["step"] == 6 < STUDENT_STEPS
    code, output = processes.run(folder, "run", file)
    assert (code, "resumed at step 6" in output) == (0, True), output
    assert export(place) == export(folder / "transformed")
    assert [x for x in lines(place) if x["stage"] == "student"] == [
        x for x in lines(folder / "transformed") if x["stage"] == "student"
    ]


@slow
@runs
def test_a_transform_is_part_of_what_a_stage_is(folder: Path) -> None:
    """Other options, or another text of the plug-in, make another stage: a finished one is refused by name."""
    place = folder / "transformed"
    file = str(place / "run.yaml")
    option = "stages.student.transforms=[{name: answers, options: {until: 3}}]"
    processes.assert_refused(folder, ("run", file, "-o", option), 3, "stages.student", "transforms")
    text = (place / "answers.py").read_text()
    (place / "answers.py").write_text(text + "\n# another one\n")
    processes.assert_refused(folder, ("run", file), 3, "plugins", "answers.py")
    (place / "answers.py").write_text(text)
    code, output = processes.run(folder, "run", file)
    assert code == 0, output


def test_a_stage_without_transforms_is_what_it_was(tmp_path: Path) -> None:
    """Stages that were finished before there were transforms have the identity they had."""
    config = tiny_config(tmp_path)
    assert all("transforms" not in stage_values(stage) for stage in config.stages.values())
    changed = tiny_config(tmp_path, stages={"student": {"transforms": ["answers"]}})
    assert stage_values(changed.stages["student"])["transforms"] == [{"name": "answers", "options": {}}]


PLUGIN = """
import mtkd

@mtkd.transform("{name}")
def {name}(batches: list, at: mtkd.StepFacts, *, share: float = 0.5) -> list:
    return {value}
"""


@pytest.mark.parametrize(
    ("transforms", "where", "text"),
    [
        (["shortened2"], "stages.student.transforms[0]", "shortened"),
        ([{"name": "shortened", "options": {"shares": 0.1}}], "stages.student.transforms[0].options", "share"),
        ([{"name": "shortened", "options": {"share": "x"}}], "stages.student.transforms[0].options.share", "0.5"),
    ],
)
def test_names_and_options_are_refused_by_the_plan(
    tmp_path_factory: pytest.TempPathFactory, transforms: list[Any], where: str, text: str
) -> None:
    """Before data are read; the message names the place and what is allowed."""
    folder = plugin_folder(tmp_path_factory)
    config = tiny_config(folder, plugins=["p.py"], stages={"student": {"transforms": transforms}})
    with pytest.raises(UserError, match=text) as caught:
        check(config)
    assert caught.value.where == where


_folders: list[Path] = []


def plugin_folder(temporary: pytest.TempPathFactory) -> Path:
    """A process keeps a plug-in that it imported, under its name: one file for all tests."""
    if not _folders:
        _folders.append(temporary.mktemp("plugin"))
        (_folders[0] / "p.py").write_text(PLUGIN.format(name="shortened", value="batches"))
    return _folders[0]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("[batches.pop(), batches][1]", "as many micro-batches"),
        ("None", "no list of batches"),
        ("batches[0].keys[0] / {}", "p.py:6"),
    ],
)
@slow
def test_what_a_transform_gives_back_is_checked(tmp_path: Path, value: str, text: str) -> None:
    """Its mistakes end the run with exit code 2, its place or its line, and no traceback."""
    (tmp_path / "p.py").write_text(PLUGIN.replace("{name}", "mine").replace("{value}", value))
    file = str(write_yaml(tmp_path, plugins=["p.py"], stages={"teacher": {"transforms": ["mine"]}}))
    processes.assert_refused(tmp_path, ("run", file), 2, text)


BATCH = causal_batch((7, 4))  # [2,7]
GLM = split_of().collate([0, 1])
ROWS, LENGTH = GLM.input_ids.shape


def transformed(batches: list[Batch], change: Callable[[list[Batch]], Any], max_length: int = LONGEST) -> list[Batch]:
    """What a stage gets from its transform `mine`, on a split of rows up to `max_length`."""

    def function(batches: list[Batch], at: StepFacts) -> Any:
        return change(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRANSFORMS._values, "mine", TransformSpec("mine", function))
        facts = StepFacts(0, 1, tokenizer(), split_of(), max_length)
        (transform,) = make_transforms([Named(name="mine")], facts, "stages.s.transforms")
        return transform(batches, 0)


def refused(batches: list[Batch], change: Callable[[list[Batch]], Any], **limits: int) -> UserError:
    with pytest.raises(UserError, match=r"^stages\.s\.transforms\[0\]: transform 'mine' ") as caught:
        transformed(batches, change, **limits)
    return caught.value


def view(**fields: Any) -> dict[str, View]:
    return {"v": replace(BATCH.view(), **fields)}


@pytest.mark.parametrize(
    ("given", "fields", "found", "allowed"),
    [
        (BATCH, {"attention_mask": BATCH.attention_mask.long()}, "attention_mask: int64 [2,7]", "bool [2,7]"),
        (BATCH, {"attention_mask": BATCH.attention_mask & (BATCH.keys == 0)[:, None]}, "row 1", "one True"),
        (BATCH, {"targets": BATCH.keys}, "targets: int64 [2]", "int64 [2,7]"),
        (class_batch((7, 4)), {"targets": BATCH.targets}, "targets: int64 [2,7]", "int64 [2]"),
        (BATCH, {"input_ids": BATCH.input_ids.int()}, "input_ids: int32 [2,7]", "int64 [2,7]"),
        (BATCH, {"input_ids": BATCH.input_ids[0]}, "input_ids: int64 [7]", "int64 [2,tokens]"),
        (BATCH, {"keys": BATCH.keys[:0]}, "keys: int64 [0]", "1 to 2 rows"),
        (BATCH, {"origin": BATCH.keys[:1]}, "origin: int64 [1]", "int64 [2]"),
        (BATCH, {"targets": None}, "targets: NoneType", "int64 [2,7]"),
        (GLM, {"position_ids": GLM.input_ids}, "position_ids", f"int64 [{ROWS},2,{LENGTH}]"),
        (GLM, {"sep": torch.ones(ROWS, 1, dtype=torch.int64)}, f"sep: int64 [{ROWS},1]", f"int64 [{ROWS}]"),
        (BATCH, {"views": view(attention_mask=BATCH.attention_mask[:, 1:])}, "views['v'].attention_mask", "bool [2,7]"),
        (BATCH, {"views": view(sep=BATCH.keys[:1])}, "views['v'].sep: int64 [1]", "int64 [2]"),
        (BATCH, {"views": view(input_ids=BATCH.input_ids[:1])}, "views['v'].input_ids: int64 [1,7]", "int64 [2,7]"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(
    given: Batch, fields: dict[str, Any], found: str, allowed: str
) -> None:
    """The message names the transform, the tensor, and its type and shape; the unchanged batch passes."""
    assert transformed([given], lambda batches: batches)[0].input_ids is given.input_ids
    error = refused([given, given], lambda batches: [batches[0], replace(batches[1], **fields)])
    assert (str(error.found).startswith("batches[1]."), found in str(error.found)) == (True, True), error
    assert allowed in str(error.allowed)


def test_a_transform_may_change_its_list_and_is_checked_all_the_same() -> None:
    """A micro-batch less ends the run, also where the list itself lost it: other ranks would wait for it."""
    batches = [BATCH, BATCH]
    for change in (lambda given: given[:1], lambda given: [given.pop(), given][1]):
        error = refused(batches, change)
        assert (error.found, error.allowed, len(batches)) == (1, 2, 2)


def test_rows_and_tokens_stay_within_the_plan() -> None:
    """More rows are refused, in a batch of its own and in the one it got; so are longer ones, those of views too."""
    more = causal_batch((7, 4, 3))

    def written(batches: list[Batch]) -> list[Batch]:
        vars(batches[0]).update(vars(more))
        return batches

    for change in (lambda batches: [more], written):
        error = refused([BATCH], change)
        assert (error.found, error.allowed) == ("batches[0].keys: int64 [3]", "int64, 1 to 2 rows")
    assert len(BATCH.keys) == 2
    assert "7 tokens" in str(refused([BATCH], lambda batches: batches, max_length=6).found)
    ids, mask = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
    longer = replace(BATCH, views={"v": View(ids, mask)})
    assert refused([BATCH], lambda _: [longer], max_length=7).found == "batches[0].views['v'].input_ids: 8 tokens"
    assert transformed([BATCH], lambda _: [longer], max_length=8) == [longer]


def test_a_cached_teacher_answered_for_another_text(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Answers that were stored are those for the text of the data: with transforms they are refused."""
    cache = {"kind": "cache", "teachers": ["stage:teacher"]}
    teachers = [{"model": "stage:cache/teacher", "backend": "cached"}]
    stages = {"student": None, "cache": cache, "reader": {**STAGE, "teachers": teachers, "transforms": ["shortened"]}}
    evaluate = {"ensembles": None, "comparisons": None}
    config = tiny_config(plugin_folder(tmp_path_factory), plugins=["p.py"], stages=stages, evaluate=evaluate)
    with pytest.raises(UserError, match="teacher 'teacher' is cached") as caught:
        check(config)
    assert caught.value.where == "stages.reader.transforms"


# The same table twice: for the run's ids, and for ids that are counted from 1 behind a mark of their own.
VIEWED = """
from dataclasses import replace

import torch
import mtkd

@mtkd.transform("counted_from_one")
def counted_from_one(batches: list, at: mtkd.StepFacts) -> list:
    return [replace(batch, views={"from-one": view_of(batch)}) for batch in batches]


def view_of(batch):
    rows = len(batch.input_ids)
    mark, real = torch.zeros(rows, 1, dtype=torch.int64), torch.ones(rows, 1, dtype=torch.bool)
    return mtkd.View(torch.cat([mark, batch.input_ids + 1], 1), torch.cat([real, batch.attention_mask], 1))


@mtkd.teacher("table")
class Table:
    def __init__(self, facts: mtkd.TeacherFacts):
        self.rows = torch.randn(facts.columns, facts.columns, generator=torch.Generator().manual_seed(1))  # [V,V]

    def forward(self, batch, wants):
        return {"logits": self.rows[batch.input_ids]}  # [B,L,V]


@mtkd.teacher("table_from_one", view="from-one")
class TableFromOne(Table):
    def forward(self, batch, wants):
        assert batch.input_ids.shape[1] == batch.view().input_ids.shape[1] + 1
        return {"logits": self.rows[batch.input_ids[:, 1:] - 1]}  # [B,L,V], at the student's positions
"""


@slow
def test_a_teacher_reads_the_view_that_a_transform_adds(tmp_path: Path) -> None:
    """A table over other ids, read from their view, teaches bit by bit what the same table over the run's ids does."""
    (tmp_path / "viewed.py").write_text(VIEWED)
    viewed = {"transforms": ["counted_from_one"], "teachers": [{"backend": "table_from_one", "name": "t"}]}
    stages = {"teacher": None, "student": {"teachers": [{"backend": "table", "name": "t"}]},
              "viewed": {**STAGE, "steps": STUDENT_STEPS, "batch": {"sequences": 8}, "optimizer": {"lr": 1e-2},
                         **viewed}}  # fmt: skip
    stages["viewed"]["student"] = {**STAGE["student"], "dropout": 0.1}  # type: ignore[dict-item]
    file = write_yaml(tmp_path, plugins=["viewed.py"], stages=stages, evaluate={"ensembles": [], "comparisons": []})
    code, output = processes.run(tmp_path, "run", str(file))
    assert code == 0, output
    own, viewed_run = (tmp_path / f"runs/{NAME}/stages/{stage}" for stage in ("01-student", "02-viewed"))
    weights = [(stage / "export/model.safetensors").read_bytes() for stage in (own, viewed_run)]
    assert weights[0] == weights[1]
    without = "stages.viewed.transforms=[]"
    processes.assert_refused(
        tmp_path, ("run", str(file), "-o", without, "--redo", "viewed"), 2, "reads the view 'from-one'"
    )


@slow
def test_mtkd_lists_and_checks_a_transform(tmp_path: Path) -> None:
    """`mtkd check` loads it; `mtkd ls transforms` shows nothing where there is none."""
    file = tmp_path / "p.py"
    file.write_text(PLUGIN.format(name="mine", value="batches"))
    code, output = processes.run(tmp_path, "check", str(file))
    assert (code, "transform 'mine': loaded" in output) == (0, True), output
    code, output = processes.run(tmp_path, "ls", "transforms")
    assert code == 0, output
