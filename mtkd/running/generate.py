"""Run a generate stage: its teachers write texts to the prompts of the train split, and all of them score every text.

Prompts are cut into parts of `_PART`. What a teacher writes to a part, and what a teacher says of it, are files of
their own: a run that was stopped goes on with the next one. A text is a function of prompt, seed, writer and draw, and
of the texts in its part by rounding at most, so it is the same on any number of ranks.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtkd.config import TEXTS, GenerateConfig
from mtkd.config.read import differences
from mtkd.data.completions import Completion, completed
from mtkd.data.encode import PART
from mtkd.data.load import LoadedData
from mtkd.data.mixed import plain_rows
from mtkd.data.progress import say
from mtkd.data.split import Split
from mtkd.data.stagedata import answered_turns
from mtkd.engine.dist import alive, on_main
from mtkd.engine.folder import StageDir
from mtkd.engine.jsonlines import to_json
from mtkd.engine.manifest import MANIFEST, read_manifest
from mtkd.engine.notes import Identity
from mtkd.engine.record import read_record, write_atomic, write_record
from mtkd.engine.seal import fault_point, remove
from mtkd.errors import DataError
from mtkd.evaluate.answers import make_extractor
from mtkd.evaluate.keep import choose
from mtkd.evaluate.score import Scorer
from mtkd.models.classes import Meaning
from mtkd.models.forward import LOGITS
from mtkd.models.generate import check_writing, write
from mtkd.models.request import Taught
from mtkd.models.sampling import Sampling
from mtkd.models.taps import TappedModel
from mtkd.planning.exports import manifests
from mtkd.planning.spec import StageSpec, TeacherSpec
from mtkd.planning.stages import redo_command
from mtkd.running.build import tile_of
from mtkd.running.console import StageProgress
from mtkd.running.context import RunContext
from mtkd.running.models import load_model
from mtkd.running.questions import reference_of
from mtkd.running.rollout import sampling_of

ENSEMBLE = "ensemble"
"""The writer of texts that several teachers write together."""

_PART = 64  # prompts of a file: seconds to minutes of work that a stop may lose
_IDENTITY = "identity.json"


@dataclass
class _Job:
    """What the writers and scorers of a stage share."""

    context: RunContext
    spec: StageSpec
    data: LoadedData
    folder: StageDir
    sampling: Sampling
    begun: float = field(default_factory=time.monotonic)

    @property
    def split(self) -> Split:
        return self.data.splits["train"]

    @property
    def asked(self) -> GenerateConfig:
        assert self.spec.stage.write is not None
        return self.spec.stage.write

    @property
    def writers(self) -> dict[str, list[TeacherSpec]]:
        """Who writes: a teacher each, or all together."""
        names = self.asked.writers or tuple(t.name for t in self.spec.teachers)
        teachers = [teacher for teacher in self.spec.teachers if teacher.name in names]
        return {ENSEMBLE: teachers} if self.asked.ensemble else {teacher.name: [teacher] for teacher in teachers}

    @property
    def parts(self) -> list[range]:
        """The examples of each file."""
        every = len(self.split)
        return [range(begin, min(begin + _PART, every)) for begin in range(0, every, _PART)]

    def file(self, what: str, who: int, part: int) -> Path:
        return self.folder.partial / f"{what}-{who:03d}-{part:06d}.jsonl"


def generate(context: RunContext, spec: StageSpec, identity: dict[str, Any]) -> dict[str, Any]:
    """Write, score, choose and seal the texts of a stage, going on where an earlier session stopped.

    Returns:
        Facts for the stage's DONE record.
    Raises:
        DataError: the begun texts are others, or none is kept.
        UserError: a `stop` text that is not one token, or a teacher that cannot write.
    """
    data, folder, asked = context.data(spec.data.name), context.folder(spec.name), spec.stage.write
    assert asked is not None, "a generate stage"
    config = data.config
    sampling = sampling_of(asked, context.tokenizer, config.max_length, f"{spec.where}.write", chat=config.templated)
    job = _Job(context, spec, data, folder, sampling)
    if not on_main(context.dist, lambda: _begun(job, identity)):
        # every text is written by one, and scored by all
        work = len(job.split) * (len(job.writers) + len(spec.teachers) * len(job.writers))
        with StageProgress(spec.name, work, 0, context.dist.is_main, "prompt") as progress:
            for number, (name, teachers) in enumerate(job.writers.items()):
                _write(job, number, name, teachers, progress)
            for number, teacher in enumerate(spec.teachers):
                _score(job, number, teacher, progress)
        on_main(context.dist, lambda: _seal(job, identity))
    context.dist.barrier()
    facts = dict(read_manifest(folder.export)["facts"])
    say(f"  {spec.name}: {facts['kept']:,} of {facts['written']:,} texts kept", main=context.dist.is_main)
    return {
        "stage": spec.name,
        "kind": spec.stage.kind,
        "parameters": sum(teacher.numbers.parameters for teacher in spec.teachers),
        "teachers": [teacher.name for teacher in spec.teachers],
        "steps": len(job.parts) * len(job.writers),
        "seconds": facts["seconds"],
        "tokens": facts["tokens"],
        "texts": facts,
        "manifests": on_main(context.dist, lambda: manifests(folder.export, [""])),
    }


def _begun(job: _Job, identity: dict[str, Any]) -> bool:
    """Whether an earlier session sealed all texts; otherwise make the working folder, unless it is there."""
    if (job.folder.export / MANIFEST).is_file():
        found = read_manifest(job.folder.export).get("identity")
        if found == json.loads(json.dumps(identity)):
            return True
    note = job.folder.partial / _IDENTITY
    if note.is_file():
        todo = f"begin this stage again: {redo_command([job.spec.name])}"
        changed = differences(read_record(note, Identity, todo), json.loads(json.dumps(identity)))
        if changed:
            raise DataError(
                "the texts begun here are of another configuration, teacher, data set or tokenizer",
                where=job.spec.where,
                found="\n           ".join(changed),
                todo=f"undo the change, give the run another name, or {todo}",
            )
        return False
    job.folder.partial.mkdir(parents=True, exist_ok=True)
    write_record(note, identity)
    return False


def _load(job: _Job, teacher: TeacherSpec, *, writes: bool) -> TappedModel:
    taught = Taught(LOGITS, Meaning.of(teacher.config))
    model = load_model(job.context, teacher.config.model, job.data, where=teacher.place, taught=taught)
    model = model.to(job.context.device).eval()
    if writes:
        check_writing(model, teacher.place, todo="take another writer: write.writers")
    return model


def _missing(job: _Job, what: str, who: Sequence[int]) -> list[tuple[int, int]]:
    """The files that are not there: (writer, part). All ranks share one list."""
    parts = range(len(job.parts))
    return on_main(
        job.context.dist,
        lambda: [(each, part) for each in who for part in parts if not job.file(what, each, part).is_file()],
    )


def _mine(job: _Job, missing: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return missing[job.context.dist.rank :: job.context.dist.world_size]


def _write(job: _Job, number: int, name: str, teachers: Sequence[TeacherSpec], progress: StageProgress) -> None:
    """Write the missing texts of one writer."""
    missing = _missing(job, "write", [number])
    done = number * len(job.split)
    if missing:
        models = [_load(job, teacher, writes=True) for teacher in teachers]
        for _, part in _mine(job, missing):
            texts = _texts_of(job, number, models, job.parts[part])
            write_atomic(job.file("write", number, part), "".join(to_json(text) + "\n" for text in texts))
            fault_point("after-text", part)
            progress.update(done + job.parts[part].stop, None, note=f"{name} writes")
            alive()
        del models
        gc.collect()
    job.context.dist.barrier()


def _texts_of(job: _Job, number: int, models: Sequence[TappedModel], examples: range) -> list[dict[str, Any]]:
    """The texts of one writer to some prompts, as ids."""
    asked, prompts = job.asked, job.split.prompted
    assert prompts is not None, "the data have prompts"
    places = [(example, draw) for example in examples for draw in range(asked.per_prompt)]
    size = job.spec.stage.batch.sequences or len(places)
    texts = []
    for begin in range(0, len(places), size):
        rows = places[begin : begin + size]
        draws = [number * asked.per_prompt + draw for _, draw in rows]
        noise = job.sampling.noise(job.spec.seed, 0, [e for e, _ in rows], draws)
        ids = [prompts.prompt(example).tolist() for example, _ in rows]
        written = write(models, ids, job.sampling, noise, job.context.dtype)
        for row, (example, draw) in enumerate(rows):
            texts.append({"example": example, "draw": draw, "ids": written.of(row), "cut": bool(written.cut[row])})
    return texts


def _read(job: _Job, what: str, who: int, part: int) -> list[Any]:
    return [json.loads(line) for line in job.file(what, who, part).read_text().splitlines()]


def _score(job: _Job, number: int, teacher: TeacherSpec, progress: StageProgress) -> None:
    """The missing scores of one teacher: of every writer's texts the mean log-probability per token."""
    writers = len(job.writers)
    who = [number * writers + writer for writer in range(writers)]
    missing = _missing(job, "score", who)
    if missing:
        model = _load(job, teacher, writes=False)
        tile = tile_of(job.context, [model])
        scorer = Scorer(job.context.device, job.context.dtype, job.context.dist, tile)
        for each, part in _mine(job, missing):
            scores = _scores_of(job, scorer, model, _read(job, "write", each % writers, part))
            write_atomic(job.file("score", each, part), "".join(to_json(score) + "\n" for score in scores))
            done = (writers + each) * len(job.split) + job.parts[part].stop
            progress.update(done, None, note=f"{teacher.name} scores")
            alive()
        del model
        gc.collect()
    job.context.dist.barrier()


def _scores_of(job: _Job, scorer: Scorer, model: TappedModel, texts: Sequence[dict[str, Any]]) -> list[float | None]:
    """Mean log-probability per token of each text, nats; None for an empty one."""
    prompts, scores = job.split.prompted, list[float | None]()
    assert prompts is not None
    size = job.spec.stage.batch.sequences or len(texts)
    for begin in range(0, len(texts), size):
        rows = texts[begin : begin + size]
        full = [row for row in rows if row["ids"]]
        means = iter(())
        if full:
            batch = job.split.collate([row["example"] for row in full])
            every = [
                Completion(i, prompts.prompt(row["example"]).tolist(), row["ids"], torch.zeros(len(row["ids"])))
                for i, row in enumerate(full)
            ]
            batch = completed(batch, [], every, job.split.pad_id).to(job.context.device)
            sums, targets = np.zeros(len(full)), batch.targets.reshape(-1)
            for positions, logs in scorer.log_probs([model], batch):
                values = logs.gather(-1, targets[positions][:, None]).squeeze(-1).double().cpu().numpy()
                np.add.at(sums, (positions // batch.targets.shape[1]).cpu().numpy(), values)
            means = iter((sums / [len(row["ids"]) for row in full]).tolist())
        scores += [next(means) if row["ids"] else None for row in rows]
    return scores


def _seal(job: _Job, identity: dict[str, Any]) -> None:
    """Choose the texts and put them in place, with all others next to them."""
    every, keep = _every_text(job), job.asked.keep
    kept = choose(every, keep.by, keep.best)
    if not kept:
        raise DataError(
            "no text is kept: all are cut, blank, doubles, or not the data's answer",
            where=f"{job.spec.where}.write",
            found=f"{len(every):,} texts, {sum(text['cut'] for text in every):,} of them cut",
            todo="set more max_new_tokens, other writers or another keep, and begin the stage again: "
            + redo_command([job.spec.name]),
        )
    facts = {
        "written": len(every),
        "kept": len(kept),
        "tokens": sum(text["length"] for text in every),
        "cut": sum(bool(text["cut"]) for text in every),
        "seconds": time.monotonic() - job.begun,
    }

    def export(path: Path) -> None:
        for name, texts in ((TEXTS, kept), ("all.jsonl", every)):
            (path / name).write_text("".join(to_json(dict(text)) + "\n" for text in texts))

    plain = json.loads(json.dumps(identity))
    job.folder.sealed_export(export, {"stage": job.spec.name, "identity": plain, "facts": facts})
    remove(job.folder.partial)


def _every_text(job: _Job) -> list[dict[str, Any]]:
    """All texts with their prompt, writer and scores, in the order of prompts."""
    name, config, tokenizer = job.data.name, job.data.config, job.context.tokenizer
    raw = job.context.raw(name)
    rows = plain_rows(name, config, raw, "train")
    named = bool(config.domain or raw.domains)  # names are unique within a domain
    place = {(rows["domain"][row] if named else "", key): row for row, key in enumerate(rows["name"])}
    keep, extract = job.asked.keep, None
    if keep.extract is not None:
        extract = make_extractor(keep.extract, job.context.config.base, f"{job.spec.where}.write.keep.extract")
    every = []
    for writer, who in enumerate(job.writers):
        for part in range(len(job.parts)):
            scores = [
                _read(job, "score", number * len(job.writers) + writer, part)
                for number in range(len(job.spec.teachers))
            ]
            for i, text in enumerate(_read(job, "write", writer, part)):
                example, document = text["example"], int(job.split.documents[text["example"]])
                domain = job.split.document_domains[document] if named else ""
                row = place[domain, f"{name}/{job.split.document_names[document]}"]
                answer = str(tokenizer.decode(text["ids"], skip_special_tokens=True))
                record = {
                    "name": f"{rows['name'][row]}#{who}.{text['draw']}",
                    "domain": rows["domain"][row],
                    PART: rows[PART][row],
                    "example": example,
                    "text": answer,
                    "writer": who,
                    "draw": text["draw"],
                    "cut": text["cut"],
                    "length": len(text["ids"]),
                    "log_probs": {teacher.name: of[i] for teacher, of in zip(job.spec.teachers, scores, strict=True)},
                }
                if extract is not None:
                    expected = extract(reference_of(job.split, example, tokenizer)[1])
                    record["matches"] = expected is not None and extract(answer) == expected
                every.append(record | {"row": row})
    return [_with_prompt(text, rows) for text in sorted(every, key=lambda text: text["example"])]


def _with_prompt(text: dict[str, Any], rows: dict[str, list[str]]) -> dict[str, Any]:
    row = text.pop("row")
    if "messages" in rows:
        return {**text, "messages": answered_turns(json.loads(rows["messages"][row]), text["text"])}
    return {**text, "prompt": rows["prompt"][row]}
