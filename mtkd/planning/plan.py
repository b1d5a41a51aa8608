"""`mtkd.plan`: resolve and check a run without training and without loading weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from mtkd.config import RunConfig, StageConfig
from mtkd.config.ablation import ablated_stages, cache_name, uses_cache
from mtkd.data.domains import Domains
from mtkd.data.everyrow import check_domains, check_routes
from mtkd.engine.folder import RunDir
from mtkd.engine.launch import num_processes, shown_command
from mtkd.engine.precision import choose, decided, device_of, warning, with_precision
from mtkd.errors import UserError
from mtkd.planning.answers import check_writers
from mtkd.planning.budget import find_limits, stage_memory
from mtkd.planning.checks import check, check_credentials
from mtkd.planning.data import DataReader
from mtkd.planning.dataview import PlannedData, view
from mtkd.planning.defaults import with_weightings
from mtkd.planning.labels import check_labelled, with_teachers_classes
from mtkd.planning.ladder import complete
from mtkd.planning.locate import missing_models
from mtkd.planning.places import in_file
from mtkd.planning.spec import StageSpec
from mtkd.planning.specify import Specifier
from mtkd.planning.stages import stage_values
from mtkd.planning.streams import pinned
from mtkd.planning.table import SKIPPED, Plan, PlannedStage, planned_stage, with_consequences
from mtkd.planning.teachers import check_backends
from mtkd.pool import BACKENDS
from mtkd.registry import load_plugins
from mtkd.weightings.make import stage_reads


@dataclass(frozen=True)
class Specified:
    """A run with the specs of its stages.

    Attributes:
        config: resolved.
        stages: the spec of each, in order.
        missing: models and data that are not here, each with the way to get it.
        data: the data entries that the stages will see.
    """

    config: RunConfig
    stages: Mapping[str, StageSpec]
    missing: tuple[str, ...]
    data: tuple[PlannedData, ...]


def resolve(config: RunConfig) -> RunConfig:
    """The run with every stage of its chain, a decided precision, and the weightings of stages that name none.

    Shapes that depend on other models are derived.

    Raises:
        UserError: a shape cannot be derived, or the stages that result are not valid.
    """
    with in_file(config):
        check_credentials(config)
        config = with_precision(config)
        load_plugins(config.plugins, config.base)
        check_backends(config)
        return with_weightings(complete(config, lambda stand_in: Specifier(stand_in).look()))


def plan(
    config: RunConfig, *, memory: bool = False, reader: DataReader | None = None, redo: Collection[str] = ()
) -> Plan:
    """Resolve and check a run: the configurations of models, the rows of objectives, tokenizers, data.

    Args:
        memory: also count memory and disk of each stage. This takes a second or so per stage, for models of 10B up to
            a minute: every change that might help is planned too.
        reader: of the data entries; the run can use it afterwards.
        redo: stages that will be made again.
    Raises:
        UserError: the run would fail later for a reason that can be known now.
    """
    with in_file(config):
        precision = choose(config, planned=memory)
        config = resolve(decided(config, precision.precision))
        check(config)
        config = pinned(config)
        reader = reader or DataReader(config.base)
        run = specify(with_teachers_classes(config, reader), reader)
        stages = with_consequences(_planned(run, redo, memory=memory))
        return _table(run, stages, [str(precision), warning(config.engine), _few_resamples(config), _ablation(config)])


def specify(config: RunConfig, reader: DataReader) -> Specified:
    """The specs of all stages of a run that is resolved and checked.

    Args:
        reader: of the data entries; the run uses it afterwards.
    Raises:
        UserError: the run would fail later for a reason that can be known now.
    """
    with in_file(config):
        specifier = Specifier(config, reader)
        models = specifier.models
        facts = {name: models.facts(data) for name, data in config.data.items()}
        models.tokens.check_chats()
        models.tokens.check_commands()
        stages = {name: specifier.stage(name) for name in config.stages}
        models.check_scored()
        check_writers(config, stages)
        check_labelled(config, facts)
        _check_routes(stages, reader)
        missing = (*missing_models(config), *(each.not_here for each in facts.values() if each.not_here))
        tokenizer = None if models.tokens.stands_in else models.tokens.tokenizer
        data = [
            view(name, data, facts[name], None if facts[name].not_here else reader.raw(data), tokenizer)
            for name, data in config.data.items()
        ]
        return Specified(config, stages, missing, tuple(data))


def specs_of(config: RunConfig, reader: DataReader) -> Mapping[str, StageSpec]:
    """The specs of a run that another process has specified already.

    Args:
        reader: with that process's facts, so that rows are not checked again.
    Raises:
        UserError: a model or file that the other process found is not here, or is another one.
    """
    with in_file(config):
        specifier = Specifier(config, reader)
        return {name: specifier.stage(name) for name in config.stages}


def _check_routes(stages: Mapping[str, StageSpec], reader: DataReader) -> None:
    """Refuse rows that no teacher of the stage teaches, where a row names its teacher or domain."""
    for spec in stages.values():
        reads = stage_reads(spec.stage, spec.where, token_level=spec.token_level)
        domains = Domains.of([teacher.config for teacher in spec.teachers])
        if domains is not None and "route" in reads.names:
            raise UserError(
                "a teacher has a domain, and the weighting reads the teacher that a row names: one of them decides",
                where=f"{spec.where}.weighting",
                todo="choose another weighting, e.g. uniform: it weighs the teachers of a domain; or drop `domain`",
            )
        if spec.data.facts.not_here:
            continue
        if domains is not None:
            raw = reader.raw(spec.data.config)
            check_domains(raw, spec.data.config, domains, f"{spec.where}.teachers")
        if "route" in reads.names:
            raw, teachers = reader.raw(spec.data.config), tuple(teacher.name for teacher in spec.teachers)
            check_routes(
                raw.splits["train"], raw.origin("train"), spec.data.config, teachers, f"{spec.where}.weighting"
            )


def _planned(run: Specified, redo: Collection[str], *, memory: bool) -> list[PlannedStage]:
    """The stages of the table.

    Args:
        memory: also count the memory and disk that each stage needs.
    """
    stages = [
        planned_stage(spec, _state(run.config, number, spec.stage, spec.name, redo))
        for number, spec in enumerate(run.stages.values(), 1)
    ]
    if not memory:
        return stages
    engine = run.config.engine
    # a configuration that names the size of a GPU is planned for it, also on a machine without one
    on_gpu = device_of(engine) == "cuda" or (engine.device == "auto" and engine.gpu_memory_gb is not None)
    limits = find_limits(engine, run.config.folder, on_gpu=on_gpu)
    return [
        replace(stage, memory=stage_memory(run.stages[stage.name], engine, limits, on_gpu=on_gpu)) for stage in stages
    ]


def _state(config: RunConfig, number: int, stage: StageConfig, name: str, redo: Collection[str]) -> str:
    """Whether a stage is done with its present configuration.

    Args:
        number: of its folder.
        redo: stages to be made again.
    """
    if name in redo or not (config.folder / "run.yaml").is_file():
        return "to do"
    record = RunDir.open(config.folder).stage(number, name).done()
    if record is None:
        return "to do"
    return SKIPPED if record.identity.get("stage") == stage_values(stage) else "done, but differs"


def _table(run: Specified, stages: list[PlannedStage], notes: list[str]) -> Plan:
    engine = run.config.engine
    kind = f"{engine.kind}, {num_processes(engine)} process(es), {engine.decided_precision}"
    if engine.kind == "deepspeed":
        kind += f", ZeRO {engine.zero_stage}"
    return Plan(
        run.config.name,
        str(run.config.folder),
        kind,
        " ".join(shown_command(engine)),
        stages,
        list(run.missing),
        [note for note in notes if note],
        list(run.data),
    )


def _ablation(config: RunConfig) -> str:
    """A note of what `evaluate.ablate` adds."""
    ablation = config.evaluate.ablate
    if ablation is None:
        return ""
    stage = config.stages[ablation.stage]
    students = ablated_stages(ablation, [teacher.name for teacher in stage.teachers])
    if cache_name(ablation) in config.stages and uses_cache(ablation, stage, classes=True):
        source = f"from the cache of stage {cache_name(ablation)}"
    elif any(BACKENDS[teacher.backend].stored for teacher in stage.teachers):
        source = "from the caches that the stage reads"
    else:
        source = "with live teachers: no cache would give all that the stage reads"
    return f"evaluate.ablate: {len(students)} more students like {ablation.stage}, {source}"


def _few_resamples(config: RunConfig) -> str:
    """A note when no comparison could reach a verdict with the configured resamples."""
    settings = config.evaluate
    needed = settings.enough_resamples(len(settings.comparisons))
    if needed == settings.resamples:
        return ""
    few = f"evaluate.resamples: {settings.resamples:,} are too few for {len(settings.comparisons)} comparisons"
    return f"{few}: {needed:,} are taken, more with domains"
