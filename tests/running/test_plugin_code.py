"""A stage that uses a plug-in is another one when what the plug-in depends on changes, and only then."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
from tiny_run import NAME, write_yaml

import mtkd
from mtkd import registry
from mtkd.config.plugincode import depends_on
from mtkd.errors import UserError
from mtkd.registry import load_plugins, plugin_code


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a plug-in, which is not where the process works; what is imported from it is forgotten."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plugin").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, empty in (("_loaded_plugins", {}), ("_code", {}), ("_everywhere", set())):
        monkeypatch.setattr(registry, name, empty)
    before = set(sys.modules)
    yield tmp_path / "plugin"
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "mine.py"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


IMPORTS: list[tuple[str, dict[str, str], set[str]]] = [
    ("import helper", {"helper.py": "a = 1"}, {"imports helper"}),
    ("def f():\n    from helper import a as b", {"helper.py": "a = 1"}, {"imports helper"}),
    ("import helper", {"helper.py": "import deeper", "deeper.py": "a = 1"}, {"imports helper", "imports deeper"}),
    ("import helper", {"helper.py": "import other", "other.py": "import helper"}, {"imports helper", "imports other"}),
    ("import pkg.part", {"pkg/__init__.py": "a = 1", "pkg/part.py": "b = 1"}, {"imports pkg", "imports pkg.part"}),
    ("import space.part", {"space/part.py": "b = 1"}, {"imports space.part"}),
    ("from space import part", {"space/part.py": "b = 1"}, {"imports space.part"}),
    (
        "import pkg",
        {"pkg/__init__.py": "from .part import b", "pkg/part.py": "from . import low", "pkg/low.py": "c = 1"},
        {"imports pkg", "imports pkg.part", "imports pkg.low"},
    ),
    (
        "import pkg.sub.leaf",
        {"pkg/__init__.py": "a = 1", "pkg/sub/__init__.py": "a = 2", "pkg/sub/leaf.py": "from ..top import a",
         "pkg/top.py": "a = 3"},
        {"imports pkg", "imports pkg.sub", "imports pkg.sub.leaf", "imports pkg.top"},
    ),
    ("import importlib\nimportlib.import_module('helper')", {"helper.py": "a = 1"}, {"imports helper"}),
    ("__import__('helper')", {"helper.py": "a = 1"}, {"imports helper"}),
    (
        "import pkg",
        {"pkg/__init__.py": "import importlib\nimportlib.import_module('.part', __name__)", "pkg/part.py": "1"},
        {"imports pkg", "imports pkg.part"},
    ),
    ("import json, torch, numpy, mtkd, yaml, sys", {}, set()),
    ("try:\n    import not_here_at_all\nexcept ImportError: pass", {}, set()),
]  # fmt: skip


@pytest.mark.parametrize(("text", "files", "names"), IMPORTS)
def test_modules_of_the_users_own_count(folder: Path, text: str, files: dict[str, str], names: set[str]) -> None:
    """However they are imported; installed ones and those of Python do not. Each of them changes the digests."""
    file = write(folder, {"mine.py": text, **files})
    found = depends_on(file)
    assert set(found) == names
    for name in files:
        (folder / name).write_text(files[name] + "\nchanged = 1\n")
        assert depends_on(file) != found
        (folder / name).write_text(files[name])
        os.utime(folder / name, (1, 1))
        assert depends_on(file) == found


READS: list[tuple[str, set[str]]] = [
    ("open(HERE / 'table.json')", {"reads table.json"}),
    ("json.loads((HERE / 'table.json').read_text(encoding='utf-8'))", {"reads table.json"}),
    ("open(os.path.join(os.path.dirname(__file__), 'sub', 'a.txt'), 'rb')", {"reads sub/a.txt"}),
    ("HERE.joinpath('sub', 'a.txt').open()", {"reads sub/a.txt"}),
    ("Path(__file__).with_name('table.json')", {"reads table.json"}),
    ("TABLE = 'sub/a.txt'\nopen(HERE / TABLE)", {"reads sub/a.txt"}),
    ("exec(open('part.py').read())", {"reads part.py", "reads table.json"}),
    ("spec_from_file_location('part', HERE / 'part.py')", {"reads part.py", "reads table.json"}),
    ("open('LOG', 'a').write('x')", set()),
    ("LOG = HERE / 'LOG'\nopen(LOG, mode='w')", set()),
    ("(HERE / 'LOG').write_text('x')", set()),
    ("os.path.exists('FLAG')", set()),
    ("L = HERE / 'LOG'\nif L.exists(): x = torch.load(L)\nelse: torch.save(x, L)", set()),
    ("if not os.path.exists('LOG'): open('LOG', 'wb')\nopen('LOG', 'rb')", set()),
    ("logging.FileHandler(os.path.join(os.path.dirname(__file__), 'LOG'))", set()),
    ("T = HERE / 'table.json'\nif T.exists(): open(T)", {"reads table.json"}),
    ("open(HERE / 'FLAG')", set()),
    ("open('/proc/meminfo')", set()),
    ("x = 'nothing.json', 'sub', '.', '', 'a\\nb', '\\0', '?', '[', '" + "x" * 5000 + "'", set()),
]


@pytest.mark.parametrize(("text", "names"), READS)
def test_files_that_are_named_count(folder: Path, text: str, names: set[str]) -> None:
    """What is read, from the plug-in's folder; not what the program writes itself."""
    others = {"table.json": "{}", "sub/a.txt": "a", "sub/b.txt": "b", "part.py": "open('table.json')"}
    file = write(folder, {"mine.py": text, **others, "LOG": "log", "FLAG": ""})
    found = depends_on(file)
    assert set(found) == names
    for name in others:
        (folder / name).write_text(others[name] + " ")
    assert (depends_on(file) == found) == (not names)


def test_files_from_where_the_run_was_started(folder: Path) -> None:
    """A file that a plug-in names is looked for next to it first, then there."""
    file = write(folder, {"mine.py": "open('there.json')"})
    assert depends_on(file) == {}
    Path("there.json").write_text("1")
    assert depends_on(file) == {"reads there.json": sha("1")}
    write(folder, {"there.json": "2"})  # next to the plug-in comes first
    assert depends_on(file) == {"reads there.json": sha("2")}


def test_a_link_counts_by_what_it_leads_to(folder: Path) -> None:
    file = write(folder, {"mine.py": "import helper\nopen('table')", "one": "1", "two": "2"})
    (folder / "helper.py").symlink_to("one")
    (folder / "table").symlink_to("two")
    first = depends_on(file)
    assert first == {"imports helper": sha("1"), "reads table": sha("2")}
    (folder / "helper.py").unlink()
    (folder / "helper.py").symlink_to("two")
    assert depends_on(file)["imports helper"] == sha("2")


def test_variables_count_by_their_digest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that a plug-in reads count, and no value is kept; those of a rank or set by it do not."""
    text = (
        "import os\nfrom os import environ, getenv\n"
        "a = os.environ['ALPHA'], environ.get('BETA', '1'), getenv('TEMPERATURE')\n"
        "os.environ['SET'] = '1'\n'FLAG' in os.environ\n"
        "os.environ.get('RANK'), os.getenv('LOCAL_RANK'), os.environ['HOME']\n"
    )
    file = write(folder, {"mine.py": text})
    monkeypatch.setenv("ALPHA", "secret")
    found = depends_on(file)
    assert set(found) == {"reads $ALPHA", "reads $BETA", "reads $TEMPERATURE"}
    assert "secret" not in str(found)
    for name in ("RANK", "SET", "FLAG"):
        monkeypatch.setenv(name, "7")
    assert depends_on(file) == found
    monkeypatch.setenv("BETA", "")  # an empty one is not none
    assert {name for name, digest in depends_on(file).items() if digest != found[name]} == {"reads $BETA"}


def test_a_process_does_not_go_on_with_what_it_imported_before(folder: Path) -> None:
    """A notebook that edits its plug-in runs the old one: that is said, and a new name is not given to old code."""
    file = write(folder, {"mine.py": "import mtkd\n", "helper.py": "a = 1\n"})
    file.write_text("import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\nimport helper\n")
    load_plugins(("mine.py",), folder)
    before = plugin_code({"mine.py": file}, set())
    assert before == {"mine.py": sha(file.read_text()), "mine.py imports helper": sha("a = 1\n")}
    load_plugins(("mine.py",), folder)
    (folder / "helper.py").write_text("a = 2\n")
    with pytest.raises(UserError, match="changed after this process had imported it") as refused:
        load_plugins(("mine.py",), folder)
    assert refused.value.found == "imports helper"
    assert plugin_code({"mine.py": file}, set()) == before


def test_what_is_used_without_being_named_counts_for_every_stage(folder: Path) -> None:
    """A trait is read by a weighting of another file; a file that registers nothing works in its own way."""
    texts = {
        "trait.py": "import mtkd\n@mtkd.trait\ndef of_plugin_code(logits, labels): return logits.amax(-1)\n",
        "silent.py": "x = 1\n",
        "loss.py": "import mtkd\n@mtkd.loss('of_plugin_code')\ndef f(student, teacher, mask): return student.sum(-1)\n",
    }
    write(folder, texts)
    try:
        load_plugins(tuple(texts), folder)
        files = {name: folder / name for name in texts}
        assert set(plugin_code(files, set())) == {"trait.py", "silent.py"}
        assert set(plugin_code(files, {"loss.py"})) == set(texts)
        assert plugin_code({}, set()) == {}
    finally:
        mtkd.LOSSES.forget("loss.py")
        mtkd.weightings.traits.TRAITS.pop("of_plugin_code", None)


def test_an_installed_plug_in_counts_with_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules lie where those of others do not count."""
    site = folder / "site-packages"
    loss = "import mtkd\n@mtkd.loss('of_company')\ndef f(student, teacher, mask): return student.sum(-1)\n"
    files = {"company/__init__.py": "", "company/losses.py": f"from .low import a\nimport third\n{loss}"}
    write(site, {**files, "company/low.py": "a = 1", "third.py": "b = 1"})
    monkeypatch.syspath_prepend(str(site))
    entry = registry.EntryPoint("company", "company.losses", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    try:
        load_plugins()
        found = plugin_code({}, {"company"})
        assert set(found) == {"company", "company imports company", "company imports company.low"}
        assert plugin_code({}, {"mtkd"}) == {}
    finally:
        mtkd.LOSSES.forget("company")


def test_an_installed_trait_counts_where_a_plug_in_may_read_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage of built-in parts is the same with another version of a package that it does not use."""
    site = folder / "site-packages"
    trait = "import mtkd\n@mtkd.trait\ndef of_installed_code(logits, labels): return logits.amax(-1)\n"
    write(site, {"traits_package.py": trait, "says_nothing.py": "x = 1\n"})
    monkeypatch.syspath_prepend(str(site))
    names = ("traits_package", "says_nothing")
    entries = [registry.EntryPoint(name, name, registry.ENTRY_POINT_GROUP) for name in names]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    try:
        load_plugins()
        assert plugin_code({}, {"mtkd"}) == {}
        assert set(plugin_code({}, {"mtkd", "mine.py"})) == {"traits_package"}
    finally:
        mtkd.weightings.traits.TRAITS.pop("of_installed_code", None)


WEIGHTING = """
import sys, torch, mtkd
from pathlib import Path
sys.path.insert(0, str(Path(__file__).parent))
import helper

@mtkd.weighting("mine")
class Mine(mtkd.Weighting):
    def forward(self, traits):
        return torch.full_like(traits.entropy, helper.SHARE / len(traits.entropy))
"""


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_module(tmp_path: Path) -> None:
    """Refused by name; touched, moved to another working directory, or changed where nobody uses it: skipped."""
    write(tmp_path, {"mine.py": WEIGHTING, "helper.py": "SHARE = 1.0\n"})
    file = str(write_yaml(tmp_path, plugins=["mine.py"], stages={"student": {"weighting": "mine"}}))
    code, output = processes.run(tmp_path, "run", file)
    assert code == 0, output
    done = tmp_path / "runs" / NAME / "stages/02-student/DONE"
    before = done.read_bytes()
    os.utime(tmp_path / "helper.py", (1, 1))
    (tmp_path / "elsewhere").mkdir()
    code, output = processes.run(tmp_path / "elsewhere", "run", file)
    assert (code, done.read_bytes()) == (0, before), output
    (tmp_path / "helper.py").write_text("SHARE = 0.5 + 0.5\n")
    processes.assert_refused(tmp_path, ("run", file), 3, "stages.student", "plugins.'mine.py imports helper'")
    shutil.move(tmp_path / "helper.py", tmp_path / "other.py")
    write(tmp_path, {"helper.py": "SHARE = 1.0\n"})
    code, output = processes.run(tmp_path, "run", file)
    assert (code, done.read_bytes()) == (0, before), output
