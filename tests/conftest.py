"""Settings of the whole suite: offline, few threads, and the folder of shared helpers on the path."""

import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))
# processes that tests start import the helpers too
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))

# imported once, by the server whose forks are the commands and ranks that tests start
import processes
from tiny_run import drawn_reports

multiprocessing.set_forkserver_preload(list(processes.PRELOADED))


@pytest.fixture(scope="session", autouse=True)
def _no_reports() -> Iterator[None]:
    """Runs draw no report, which takes as long as the rest of a tiny run; see `reports`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtkd.running.run.write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(scope="session", autouse=True)
def _installation_read_once() -> Iterator[None]:
    """The documents of this Python installation are what they were: a second or more for each plan that has them."""
    from mtkd.data.stdlib import Document, stdlib_documents

    @cache
    def read(domains: tuple[str, ...]) -> list[Document]:
        return stdlib_documents(domains)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtkd.data.sources.stdlib_documents", lambda domains: [*read(domains)])
        yield


@pytest.fixture
def reports() -> Iterator[None]:
    """Runs of this test draw their report."""
    with drawn_reports():
        yield


@pytest.fixture(autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    processes.kill_all()


def pytest_configure(config: pytest.Config) -> None:
    # What a library says of its own lines: it changes with Python's version and no call of ours avoids it. Of our lines
    # (mtkd, every file of the tests) these are errors too.
    files = "|".join(sorted(file.stem for file in Path(__file__).parent.rglob("*.py")))
    for kind in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}:(?!mtkd|({files})$)")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a file that share a fixture of the module go to one worker: each would make it."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()  # type: ignore[attr-defined]
        shared = any(found[-1].scope == "module" for found in fixtures)
        if shared and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish() -> None:
    _freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:
        _freeze()


def _freeze() -> None:
    """Every stage of a run collects garbage: not among the million objects of what was imported."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tests/test_on_device.py computes: cpu or cuda")
    parser.addoption(
        "--golden",
        default="compare",
        choices=("compare", "renew", "record", "exact"),
        help="tests/test_golden.py: compare with tests/golden/, renew it, or record and compare this machine's bits",
    )
