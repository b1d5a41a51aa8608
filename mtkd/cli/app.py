"""The `mtkd` command. No logic here: each command reads its arguments, calls the library and prints."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from mtkd import __version__
from mtkd.cli.generate import generate
from mtkd.cli.show import console, print_json, print_tables, run_folder
from mtkd.engine.disk import full_disk, refused
from mtkd.engine.stopping import end_on_signals
from mtkd.errors import EXIT_DATA, EXIT_INTERNAL, EXIT_USAGE, Stopped, UserError, nearest, tell

if TYPE_CHECKING:
    from mtkd.config import RunConfig
    from mtkd.engine.launch import Started

app = typer.Typer(
    name="mtkd",
    help="Distil one small language model from several teachers. Start with: mtkd run configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

cache = typer.Typer(help="Teacher caches.", no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(cache, name="cache")
app.command()(generate)

File = Annotated[Path, typer.Argument(help="the run's YAML file", metavar="FILE")]
Run = Annotated[Path, typer.Argument(help="a run folder, e.g. runs/quickstart", metavar="RUN")]
Override = Annotated[
    list[str] | None, typer.Option("-o", "--override", help="dotted override, e.g. -o stages.student.steps=200")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]

Redo = Annotated[
    list[str] | None,
    typer.Option("--redo", help="make this stage again, and all that depend on it", metavar="STAGE"),
]

NoSsh = Annotated[
    bool, typer.Option("--no_ssh", "--no-ssh", help="start the ranks of this node only; call it on every node")
]
NodeRank = Annotated[
    int | None,
    typer.Option("--node_rank", "--node-rank", help="with --no_ssh: line of this node in the hostfile, from 0"),
]
MasterAddr = Annotated[
    str | None, typer.Option("--master_addr", "--master-addr", help="address of the first node (default: its name)")
]
MasterPort = Annotated[
    int | None, typer.Option("--master_port", "--master-port", help="a port of it that is free (default: 29500)")
]

LISTS = ("methods", "losses", "weightings", "teachers", "tasks", "sources", "transforms")


@app.command()
def run(
    file: File,
    override: Override = None,
    redo: Redo = None,
    as_json: Json = False,
    no_ssh: NoSsh = False,
    node_rank: NodeRank = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
) -> None:
    """Run every stage of FILE that is not done yet, then evaluate and write the report."""
    from mtkd.config.read import load_config
    from mtkd.engine.launch import Started

    _run(load_config(file, override or ()), redo, as_json, Started(no_ssh, node_rank, master_addr, master_port))


@app.command()
def resume(
    folder: Run,
    redo: Redo = None,
    as_json: Json = False,
    no_ssh: NoSsh = False,
    node_rank: NodeRank = None,
    master_addr: MasterAddr = None,
    master_port: MasterPort = None,
) -> None:
    """Go on with a run that was stopped, from its own copy of the configuration."""
    from mtkd.engine.launch import Started
    from mtkd.running.remember import reopen

    _run(reopen(folder), redo, as_json, Started(no_ssh, node_rank, master_addr, master_port))


@app.command()
def plan(
    file: File,
    override: Override = None,
    as_json: Json = False,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="also run the teachers that are here: how far do they agree?")
    ] = False,
) -> None:
    """Resolve and check everything; show stages, models, steps, tokens and memory; train nothing."""
    from mtkd.config.read import load_config

    config = load_config(file, override or ())  # before the imports, 5 s: a mistake in the file is answered at once
    from mtkd.planning.data import DataReader
    from mtkd.planning.plan import plan as make_plan

    reader = DataReader(config.base)  # one reading of the data for both
    planned = make_plan(config, memory=True, reader=reader)
    found: dict[str, str] = {}
    if agreement:
        from mtkd.running.foretell import agreements

        found = agreements(config, reader)
    if as_json:
        print_json({**planned.as_dict(), **({"agreement": found} if agreement else {})})
        return
    print_tables(planned.tables())
    for stage, text in found.items():
        typer.echo(f"stage {stage}: {text}")


@app.command()
def validate(file: File, override: Override = None) -> None:
    """Check FILE, its plug-ins, and every name and option in it; load no model and no data."""
    from mtkd.config.read import load_config

    read = load_config(file, override or ())  # before the imports, as in `plan`
    from mtkd.planning.checks import check
    from mtkd.planning.plan import resolve

    config = resolve(read)
    check(config)
    typer.echo(f"{file}: valid; {len(config.stages)} stages: {', '.join(config.stages)}")


@app.command()
def report(folder: Run, as_json: Json = False) -> None:
    """Write report.html of a run (finished or not) and print its tables."""
    from mtkd.evaluate.report import check_whole, write_report

    check_whole(run_folder(folder))
    write_report(folder)
    _finish(folder, as_json)


@app.command()
def status(folder: Run, as_json: Json = False) -> None:
    """Show which stages are done, where the others stand, and which process holds the run."""
    from mtkd.running.status import status as read_status

    facts = read_status(run_folder(folder))
    if as_json:
        print_json(facts)
        return
    table = Table(
        "stage", "state", "step", "seconds", "checkpoint", title=f"{facts['run']}  held by: {facts['held_by']}"
    )
    for row in facts["stages"]:
        table.add_row(*(str(row[key]) for key in ("stage", "state", "step", "seconds", "checkpoint")))
    print_tables([table])


@app.command("ls")
def list_names(
    what: Annotated[str, typer.Argument(help=" | ".join(LISTS))],
    plugin: Annotated[list[str] | None, typer.Option("--plugin", help="a plug-in file to load first")] = None,
    as_json: Json = False,
) -> None:
    """List what a configuration can name, and where each name comes from."""
    from mtkd.cli.listing import listing, tables

    if what not in LISTS:
        raise UserError("nothing to list under this name", found=what, allowed=LISTS, todo=nearest(what, LISTS))
    rows = listing(what, tuple(plugin or ()))
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(f"no {what} are registered; they come from plug-ins: --plugin FILE")
        return
    print_tables(tables(what, rows, console().width))


@app.command("check")
def check_laws(
    file: Annotated[Path, typer.Argument(help="a plug-in, e.g. configs/custom_weighting.py", metavar="PLUGIN")],
    as_json: Json = False,
) -> None:
    """Run the laws over every loss, weighting and method that a plug-in file registers."""
    from mtkd.cli.check import check_plugin

    families = []
    for family in check_plugin(file):
        families.append(family.as_dict())
        if not as_json:
            typer.echo(str(family))
    if as_json:
        print_json(families)


@cache.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a teacher's cache: stages/NN-NAME/export/TEACHER", metavar="FOLDER")],
    as_json: Json = False,
) -> None:
    """Check every digest and every position of a teacher cache; exit code 3 when something is wrong."""
    from mtkd.pool.cache import verify as verify_cache

    check = verify_cache(folder)
    if as_json:
        print_json({"folder": str(folder), "fine": check.fine, "facts": check.facts, "problems": check.problems})
    else:
        for problem in check.problems:
            typer.echo(problem)
        for name, value in check.facts.items():
            typer.echo(f"{name}: {value:,.6g}" if isinstance(value, float) else f"{name}: {value:,}")
        typer.echo(f"{folder}: {'whole' if check.fine else 'broken'}")
    if not check.fine:
        sys.exit(EXIT_DATA)


@app.command("convert-glm")
def convert_glm(
    source: Annotated[
        Path, typer.Argument(help="a published GLM checkpoint: its folder, or its only file", metavar="SOURCE")
    ],
    out: Annotated[Path, typer.Argument(help="the model folder to write", metavar="OUT")],
    heads: Annotated[
        int | None, typer.Option("--heads", help="attention heads, where neither a config.json nor a card says")
    ] = None,
    hidden_act: Annotated[
        str | None,
        typer.Option(
            "--hidden-act", help="gelu_pytorch_tanh (the original's checkpoints) or gelu (the hub port's) instead"
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            "--vocabulary", help="folder with GPT-2's vocab.json and merges.txt, or BERT's vocab.txt; default: SOURCE"
        ),
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="do not convert the vocabulary next to SOURCE: it is not a plain one")
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert a published GLM (2022) checkpoint to a model folder; no code in it is run."""
    from mtkd.models.glm import convert_checkpoint

    model = convert_checkpoint(
        source, out, heads=heads, hidden_act=hidden_act, vocabulary=vocabulary, with_tokenizer=not no_tokenizer
    )
    if as_json:
        print_json({"folder": str(model.folder), "parameters": model.parameters, "config": model.config.to_dict()})
        return
    shape = f"{model.config.num_hidden_layers} layers, width {model.config.hidden_size}"
    shape += f", {model.config.num_attention_heads} heads, {model.config.hidden_act}"
    typer.echo(f"{model.folder}: {model.parameters:,} parameters, {shape}; {model.num_files} files of weights")


@app.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from mtkd.config import RunConfig

    print_json(RunConfig.model_json_schema())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, compiler, DeepSpeed and disk: what a bug report should contain."""
    from mtkd.cli.doctor import examine

    facts = examine()
    if as_json:
        print_json(facts)
        return
    table = Table("what", "found", title="mtkd doctor")
    for name, value in facts.items():
        table.add_row(name, str(value))
    print_tables([table])


def _version(value: bool) -> None:
    if value:
        typer.echo(f"mtkd {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True, help="given by the DeepSpeed launcher")] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def _run(config: RunConfig, redo: list[str] | None, as_json: bool, started: Started) -> None:
    """Run it here, or start the processes that do."""
    from mtkd.engine.launch import launch, needs_launcher, started_wrongly

    if needs_launcher(config.engine):
        from mtkd.planning.checks import check
        from mtkd.planning.plan import resolve
        from mtkd.running.status import is_finished, mark_of

        config = resolve(config)
        check(config)  # before any process is started
        before = mark_of(config)
        sys.exit(launch(config.engine, sys.argv[1:], started, config.folder, lambda: is_finished(config, before)))
    started_wrongly(config.engine, started)
    from mtkd.running.run import run as run_stages

    _finish(run_stages(config, redo or ()).folder, as_json)


def _finish(folder: Path, as_json: bool) -> None:
    """Tables of a run whose report is written; only the main rank of several speaks."""
    if os.environ.get("RANK", "0") != "0":
        return
    from mtkd.evaluate.report import summary, terminal_tables

    if as_json:
        print_json(summary(folder))
        return
    print_tables(terminal_tables(folder))
    typer.echo(f"report: {folder / 'report.html'}")


def main() -> None:
    """Entry point: ends the process with one of the exit codes of `mtkd.errors`."""
    end_on_signals()
    if "RANK" in os.environ:
        from mtkd.engine.orphans import leave_shelter, stop_without_launcher

        leave_shelter()
        stop_without_launcher()
    code = _exit_code()
    if "torch" in sys.modules:  # a light command stays light
        from mtkd.engine.dist import leave

        leave(code)
    sys.exit(code)


def _exit_code() -> int:
    """Run the command and return its exit code; errors become a line on the error stream."""
    from mtkd.running.blame import plugin_errors

    try:
        with plugin_errors():
            app()
    except SystemExit as end:  # how typer returns
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UserError as error:
        if not error.shared or os.environ.get("LOCAL_RANK", "0") == "0":
            tell(f"mtkd: {error}")
        return error.exit_code
    except Stopped as error:
        tell(f"mtkd: {error}; what was saved is whole: run it again to go on")
        return error.exit_code
    except KeyboardInterrupt:
        tell("mtkd: interrupted")
        return 130
    except OSError as error:  # the disk's, or its rights; a program's own error never is one
        tell(f"mtkd: {refused(error)}")
        return EXIT_USAGE
    except Exception as error:
        if (full := full_disk(error)) is not None:  # a compiler's, or a library's
            tell(f"mtkd: {full}")
            return full.exit_code
        tell(
            traceback.format_exc()
            + "mtkd: this is a bug in mtkd; please report it with the text above and `mtkd doctor`"
        )
        return EXIT_INTERNAL
    return 0


if __name__ == "__main__":
    main()
