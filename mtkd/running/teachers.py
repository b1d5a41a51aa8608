"""Open the teachers of a stage: `RunStock` gives a backend the run's models, folders and caches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mtkd.config import TeacherConfig
from mtkd.data.load import LoadedData
from mtkd.data.tokenizers import num_real_ids
from mtkd.models.classes import Meaning
from mtkd.models.folder import find_folder
from mtkd.models.request import Taught
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import compressed_teacher
from mtkd.planning.places import placed
from mtkd.pool import BACKENDS, Asked, Site, Teacher
from mtkd.pool.cache import CacheOrigin
from mtkd.pool.cache.folder import cache_folder, origin_of
from mtkd.running.calibrate import calibrate
from mtkd.running.context import RunContext
from mtkd.running.identity import teacher_digest
from mtkd.running.models import load_model, vocabulary_of


@dataclass(frozen=True)
class RunStock:
    """The stock of one teacher.

    Attributes:
        reads: its predictions that are read (`mtkd.planning.teaching`): its files must have their heads.
    """

    context: RunContext
    teacher: TeacherConfig
    data: LoadedData
    site: Site
    reads: frozenset[str]

    @property
    def asked(self) -> Asked:
        data, tokenizer = self.data, self.context.tokenizer
        token_level = data.task.token_level
        columns = num_real_ids(tokenizer) if token_level else data.num_labels
        auto_class = data.task.class_for(data.config)
        return Asked(auto_class, token_level, columns, data.label_names, data.config.max_length, tokenizer)

    def model(self, *, empty: bool) -> TappedModel:
        model, where = self.teacher.model, self.site.where
        if self.data.task.token_level and vocabulary_of(self.context, model, where) is not None:
            raise compressed_teacher(model.path or "", where)
        taught = Taught(self.reads, Meaning.of(self.teacher))
        return load_model(self.context, model, self.data, where=where, taught=taught, empty=empty)

    def folder(self) -> Path:
        model = self.teacher.model
        assert model.path is not None
        return find_folder(model.path, model.revision, self.context.resolve, weights=True)

    def cache(self) -> Path:
        ref = self.teacher.model.stage
        if ref is not None:
            return self.context.folder(ref.stage).export / ref.part
        return cache_folder(self.teacher.model.path or "", self.context.config.base, f"{self.site.where}.model")

    def cache_origin(self, recorded: CacheOrigin) -> CacheOrigin:
        config, ref, digest = self.context.config, self.teacher.model.stage, recorded.teacher
        if ref is not None:
            digest = teacher_digest(
                self.context, next(t for t in config.stages[ref.stage].teachers if t.name == ref.part)
            )
        precision = config.engine.decided_precision
        return origin_of(digest, self.data, self.context.tokenizer, recorded.model, precision)

    def confirm(self) -> None:
        ref = self.teacher.model.stage
        if ref is not None:
            self.context.export_of(ref)


def open_teacher(
    context: RunContext,
    teacher: TeacherConfig,
    data: LoadedData,
    where: str,
    reads: frozenset[str],
    *,
    stage: str,
    packing: str = "",
    compiled: bool = False,
) -> Teacher:
    """Open a teacher with the run's tokenizer, under its backend, and calibrate it; a collective.

    Its logits are in the order of the data's classes.

    Args:
        data: that it is asked about.
        where: its place in the configuration.
        reads: see `RunStock`.
        stage: that it teaches.
        packing, compiled: see `Site`.
    Raises:
        UserError: the teacher does not fit the stage, or cannot be read.
    """
    file = context.run.offload_file(teacher.name)
    site = Site(where, context.device, context.dtype, context.dist, file, packing, compiled)
    with placed(model=f"{where}.model", teacher=where):
        opened = BACKENDS[teacher.backend].open(teacher, RunStock(context, teacher, data, site, reads))
        return calibrate(context, stage, opened, teacher, where)
