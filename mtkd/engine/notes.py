"""What a run writes down about itself, each a record of a known form: DONE, env.json, results.json and others."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mtkd.config.read import fingerprint
from mtkd.engine.record import Checked, plain_bytes, read_record, write_record
from mtkd.errors import DataError

Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0)]


class Done(Checked):
    """The record of a finished stage.

    Attributes:
        steps: optimizer steps; of a cache stage its shards. seconds: of training, or that teachers ran.
        tokens: targets that were learned; of a cache stage positions. parameters: of all exported models.
        fingerprint: digest of `identity`, which is everything that determines what the stage made.
        members: parameters of each of several models. caches: what each cache says of itself, by teacher.
        exported_step: whose model was exported. ended: why training ended.
        agreement: of its teachers, an `Agreement`, or {}.
        manifests: digest of the manifest of what it made: of the export under "", of each cache under its teacher.
    """

    stage: str
    kind: str
    steps: Count
    seconds: Seconds
    tokens: Count
    parameters: Count
    fingerprint: str
    identity: dict[str, Any]
    teachers: list[str] = Field(default_factory=list)
    members: dict[str, Count] = Field(default_factory=dict)
    caches: dict[str, dict[str, int | float | str]] = Field(default_factory=dict)
    manifests: dict[str, str] = Field(default_factory=dict)
    exported_step: Count = 0
    ended: str = ""
    agreement: dict[str, Any] = Field(default_factory=dict)
    peak_memory_bytes: Count = 0

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Done:
        """The record of some facts, as it will be read again.

        Raises:
            ValueError: a number among them is not finite, or they are of another form.
        """
        return cls.model_validate(json.loads(json.dumps(dict(values), allow_nan=False)))

    @property
    def parts(self) -> list[str]:
        """The folders below its export: one for each cache, else the export itself."""
        return list(self.caches) or [""]

    def values(self) -> dict[str, Any]:
        """What was recorded, as plain values; what an older version did not write stays away."""
        return self.model_dump(exclude_unset=True)


class Environment(Checked):
    """Where a run was made, in env.json; `streams` are the commits of the data sets that it streams."""

    versions: dict[str, str]
    platform: str = ""
    cpus: Count | None = None
    argv: list[str] = Field(default_factory=list)
    configuration_folder: str | None = None
    run_id: str | None = None
    streams: dict[str, dict[str, str]] = Field(default_factory=dict)


class Results(Checked):
    """What a run came to, in results.json.

    Attributes:
        inputs: what it was computed from.
    """

    task: str
    split: str
    data: str
    models: dict[str, dict[str, Any]]
    comparisons: list[dict[str, Any]]
    inputs: str


class ScoresNote(Checked):
    """Next to a file of scores: what they were computed from, and the digest of the file."""

    key: str
    scores: str


class Calibrations(Checked):
    """How the teachers of a stage were calibrated, by name; see `mtkd.running.calibrate`."""

    teachers: dict[str, Calibrated]


class Calibrated(Checked):
    """What was fitted for a teacher.

    Attributes:
        key: what it was computed from.
        bias: nats per class; [] for none.
        labels: number that it was fitted on; `data`, `split`: where they are.
        before, after: see `mtkd.evaluate.calibration.quality`.
    """

    key: str
    temperature: Annotated[float, Field(gt=0)]
    bias: list[float]
    labels: Count
    data: str
    split: str
    before: dict[str, Any]
    after: dict[str, Any]


class Agreement(Checked):
    """How far the teachers of a stage agree, on some train texts; see `mtkd.evaluate.consensus`.

    Attributes:
        cases: examples, or target positions. same: share of them in which all choose the same.
        divergence: Jensen-Shannon, nats, by "one, other".
    """

    teachers: list[str]
    cases: Count
    same: Annotated[float, Field(ge=0, le=1)]
    divergence: dict[str, float]


class Identity(Checked):
    """What a cache was begun as; see `mtkd.planning.stages.identity`."""

    stage: dict[str, Any]
    models: dict[str, str]


def read_done(path: Path) -> Done | None:
    """The record of a finished stage, None when there is none.

    Raises:
        DataError: it is not what a stage writes.
    """
    todo = "remove the file and run it again: the stage goes on from the newest of what it kept, or redo the stage"
    try:
        record = Done.model_validate(read_record(path, Done, todo))
    except FileNotFoundError:
        return None
    if _fingerprint(record.identity) != record.fingerprint:
        raise DataError("the file is damaged: its fingerprint is not that of its identity", where=str(path), todo=todo)
    return record


def read_scores_note(path: Path) -> dict[str, Any] | None:
    """Key and digest of a file of scores; None where there is nothing to go by: the scores are computed again."""
    try:
        return read_record(path, ScoresNote, old=False)
    except (FileNotFoundError, DataError):
        return None


def write_scores_note(path: Path, key: str, scores: Path) -> None:
    """Note what a file of scores was computed from, and what it holds."""
    write_record(path, {"key": key, "scores": file_digest(scores)})


def file_digest(path: Path) -> str:
    """sha256 of a file; empty when it cannot be read."""
    try:
        return hashlib.sha256(plain_bytes(path)).hexdigest()
    except (OSError, DataError):
        return ""


def read_seconds(path: Path, todo: str) -> float:
    """The seconds that the teachers of a cache ran; earlier versions wrote a bare number.

    Raises:
        DataError: it is damaged.
    """
    try:
        bare = json.loads(plain_bytes(path, todo))
    except (ValueError, RecursionError):
        bare = None
    if isinstance(bare, float) and math.isfinite(bare) and bare >= 0:
        return bare
    return float(read_record(path, _Seconds, todo, old=False)["seconds"])


def write_seconds(path: Path, seconds: float) -> None:
    write_record(path, {"seconds": seconds})


class _Seconds(Checked):
    seconds: Seconds


def _fingerprint(identity: dict[str, Any]) -> str:
    try:
        return fingerprint(identity)
    except ValueError:  # NaN
        return ""
