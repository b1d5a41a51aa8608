"""The folder of a run: made or refused, locked, described, its stages (faults F08, F19, F24, F26)."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtkd.config import RunConfig
from mtkd.config.read import config_digest, fingerprint, load_config
from mtkd.engine import lock
from mtkd.engine.folder import RunDir, StageDir, environment
from mtkd.engine.notes import Done
from mtkd.engine.record import json_object
from mtkd.engine.seal import MANIFEST, check_seal
from mtkd.errors import EXIT_USAGE, DataError, UserError

CONFIG = {
    "name": "demo",
    "data": {"text": {"source": "python-stdlib", "domains": ["prose"]}},
    "stages": {
        "teacher": {
            "kind": "finetune",
            "student": {"architecture": "llama", "layers": 2, "width": 8, "heads": 2},
            "steps": 3,
        },
        "a.student": {
            "kind": "distill",
            "student": {"architecture": "llama", "layers": 1, "width": 8, "heads": 2},
            "teachers": ["stage:teacher"],
            "match": [{"loss": "kl", "options": {"temperature": 2.0}}, {"feature": "hidden", "student_layer": [1]}],
            "steps": 3,
        },
    },
}


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate(CONFIG)


def test_a_run_is_made_and_found_again(config: RunConfig, tmp_path: Path) -> None:
    run = RunDir.create(config, base=tmp_path / "runs")
    assert run.path == tmp_path / "runs" / "demo"
    assert RunDir.open(run.path) == run
    assert sorted(p.name for p in run.path.iterdir()) == ["env.json", "run.yaml"]
    found = load_config(run.config_file)
    assert config_digest(found) == config_digest(config)
    assert found.stages == config.stages
    RunDir.create(config.model_copy(update={"seed": 5}), base=tmp_path / "runs")
    assert load_config(run.config_file).seed == 0  # what an existing run was made from stays


def test_the_layout(tmp_path: Path) -> None:
    """Where a run keeps what: the paths that users and tools rely on."""
    run = RunDir(tmp_path)
    stage = run.stage(1, "teacher")
    paths = [
        run.metrics_file,
        run.report_file,
        run.plots,
        run.lock_file,
        run.rank_log(3),
        stage.checkpoints,
        stage.export,
        stage.done_file,
    ]
    assert [str(p.relative_to(tmp_path)) for p in paths] == [
        "metrics.jsonl",
        "report.html",
        "plots",
        "LOCK",
        "logs/rank-3.log",
        "stages/01-teacher/checkpoints",
        "stages/01-teacher/export",
        "stages/01-teacher/DONE",
    ]
    assert list(tmp_path.iterdir()) == []  # looking makes nothing
    for name in ("../x", "a/b"):
        with pytest.raises(ValueError, match="a name has"):
            run.stage(1, name)


def test_a_folder_that_is_no_run_is_neither_opened_nor_filled(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.yaml"):
        RunDir.open(tmp_path)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a run") as caught:
        RunDir.create(config, base=tmp_path)
    assert "thesis.tex" in str(caught.value)
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["thesis.tex"]


def test_a_start_that_was_killed_early_is_started_again(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    for name in ("LOCK", ".tmp-run.yaml-123", "env.json"):
        (tmp_path / "demo" / name).write_text("")
    run = RunDir.create(config, base=tmp_path)
    assert load_config(run.config_file).name == "demo"


# ---- F08


def test_a_folder_that_cannot_be_made_is_refused(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for base in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot be written") as caught:
            RunDir.create(config, base=base)
        assert caught.value.exit_code == EXIT_USAGE
        assert caught.value.where == str(base / "demo")


@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_folder_without_write_permission_is_refused(config: RunConfig, tmp_path: Path) -> None:
    RunDir.create(config, base=tmp_path)
    (tmp_path / "demo").chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written"):
            RunDir.create(config, base=tmp_path)
    finally:
        (tmp_path / "demo").chmod(0o700)


def test_an_existing_folder_is_probed_by_a_real_write(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    RunDir.create(config, base=tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        RunDir.create(config, base=tmp_path)


# ---- F26

HOLD = """
import sys, time
from pathlib import Path
from mtkd.engine.folder import RunDir
with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(6000)
"""


@pytest.fixture
def holder(tmp_path: Path) -> object:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_is_refused_and_told_who_holds_the_run(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="another process is working in this run") as caught, RunDir(tmp_path).lock():
        pass
    assert caught.value.exit_code == EXIT_USAGE
    assert f"pid {holder.pid} on {socket.gethostname()}, started {time.strftime('%Y-', time.gmtime())}" in str(
        caught.value
    )


def test_whoever_asks_is_told_who_holds_the_run(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    """Asking takes nothing: one may ask while another does, without the right to write; the dead hold nothing."""
    file = tmp_path / "LOCK"
    file.chmod(0o444)
    said = lock.holder(file)
    assert said is not None
    assert said.startswith(f"pid {holder.pid} on {socket.gethostname()}")
    holder.kill()
    holder.wait()
    with file.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert lock.holder(file) is None


def test_the_lock_dies_with_its_process(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDir(tmp_path).lock():
        assert f"pid {os.getpid()} " in (tmp_path / "LOCK").read_text()
    assert (tmp_path / "LOCK").read_text() == ""


def test_the_lock_is_freed_by_an_exception_and_excludes_within_a_process(tmp_path: Path) -> None:
    run = RunDir(tmp_path)

    def hold(then: BaseException) -> None:
        with run.lock():
            with pytest.raises(UserError, match=f"pid {os.getpid()} "), run.lock():
                pass
            raise then

    with pytest.raises(KeyError):
        hold(KeyError())
    with run.lock():
        pass


FORK = """
import os, signal, sys, time
from pathlib import Path
from mtkd.engine.folder import RunDir
run = RunDir(Path(sys.argv[1]))
with run.lock():
    child = os.fork()
    if child == 0:
        time.sleep(6000)
        os._exit(0)
try:
    with run.lock():
        pass
finally:
    os.kill(child, signal.SIGKILL)
"""


def test_a_forked_data_worker_does_not_keep_a_released_lock(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORK, str(tmp_path)], check=True, timeout=600)


# ---- stages


def test_a_stage_is_done_when_its_record_is_there(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "01-a")
    assert stage.done() is None
    assert stage.done() is None
    stage.mark_done(Done.of(DONE))
    assert stage.done() == Done.of(DONE)


DONE = {
    "stage": "a",
    "kind": "distill",
    "steps": 3,
    "seconds": 1.5,
    "tokens": 9,
    "parameters": 2,
    "teachers": ["t"],
    "fingerprint": fingerprint({"seed": 1}),
    "identity": {"seed": 1},
}


def test_any_damage_of_the_record_of_a_stage_is_told_with_file_and_remedy(tmp_path: Path) -> None:
    """Law: a record is read as it was written, or not at all: any flipped bit, any cut, any other form is refused."""
    stage = StageDir(tmp_path / "01-a")
    stage.mark_done(Done.of(DONE))
    whole = stage.done_file.read_bytes()
    flipped = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    cut = [whole[:i] for i in range(len(whole) - 2)]
    hostile = [b"[]", b"3", b"null", b"\xff\xfe", b"[" * 99_999, b'{"steps": NaN}', b'{"a": "\\ud800"}']
    forms: list[dict[str, object]] = [{"steps": "3"}, {"steps": -1}, {"seconds": None}, {"identity": []}, {"stage": 1}]
    old = [json.dumps({**DONE, **form}).encode() for form in forms]
    for broken in [*flipped, *cut, *hostile, *old]:
        stage.done_file.write_bytes(broken)
        if json_object(broken) == json_object(whole):  # only white space differs
            continue
        with pytest.raises(DataError) as caught:
            stage.done()
        assert str(stage.done_file) in caught.value.where
        assert caught.value.todo
    stage.done_file.write_text(json.dumps(DONE))  # of a version without digests
    assert stage.done() == Done.of(DONE)
    stage.done_file.unlink()
    stage.done_file.mkdir()
    with pytest.raises(DataError, match="not a plain file"):
        stage.done()


def test_an_export_loads_with_plain_transformers_and_is_redone_alike(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tiny = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(tiny)
    stage = StageDir(tmp_path / "01-a")
    path = stage.sealed_export(model.save_pretrained, {"step": 3})
    first = (path / MANIFEST).read_bytes()
    _, told = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(told.values())
    # Killed before DONE was written: the stage exports again, over the export that is there.
    stage.sealed_export(model.save_pretrained, {"step": 3})
    assert (path / MANIFEST).read_bytes() == first
    assert check_seal(path)["step"] == 3
    assert [p.name for p in stage.path.iterdir()] == ["export"]


# ---- env.json, F24


def test_the_environment_is_recorded_without_secrets(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3t-marker"
    monkeypatch.setenv("HF_TOKEN", secret)
    argv = [
        f"/home/{secret}/bin/mtkd",
        "run",
        "-o",
        "stages.a.batch.tokens=4096",
        "-o",
        "tokenizer.vocab_size=512",
        f"--token={secret}",
        "--api-key",
        secret,
        "-o",
        f"hf_token={secret}",
        f"https://user:{secret}@example.org/x",
        f"hf_{secret.replace('-', '')}abc",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    run = RunDir.create(config, base=tmp_path)
    text = run.environment_file.read_text()
    assert secret not in text
    assert secret.replace("-", "") not in text
    assert socket.gethostname() not in text
    record = json.loads(text)
    assert record["argv"] == [
        "mtkd",
        "run",
        "-o",
        "stages.a.batch.tokens=4096",  # not every token is a secret
        "-o",
        "tokenizer.vocab_size=512",
        "--token=***",
        "--api-key",
        "***",
        "-o",
        "hf_token=***",
        "https://***@example.org/x",
        "***",
    ]


def test_the_versions_are_those_of_the_imported_packages() -> None:
    import pydantic
    import torch

    versions = environment([])["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__
    assert versions["pydantic"] == pydantic.VERSION
    assert {"mtkd", "transformers", "deepspeed", "datasets"} <= versions.keys()


def test_a_file_of_offloaded_weights_that_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.offload_file("teacher").write_bytes(b"weights")
    run.sweep_offloaded()
    assert list(tmp_path.iterdir()) == []


def test_a_fifo_in_place_of_the_lock_is_refused_at_once(tmp_path: Path) -> None:
    """Whoever opens a fifo waits for the other side."""
    os.mkfifo(tmp_path / "LOCK")
    with pytest.raises(DataError, match="not a plain file"), RunDir(tmp_path).lock():
        pass
    assert lock.holder(tmp_path / "LOCK") is None
