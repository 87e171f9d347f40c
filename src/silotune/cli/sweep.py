"""The command that trains one recipe many times: sweep."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_table

if TYPE_CHECKING:
    from silotune.workflows.sweep.sweep import Sweep


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(sweep)


def sweep(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe's name, or a TOML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys with their values, for instance train.lr=1e-4,1e-3; a key with one value "
            "holds for all runs.",
            metavar="[KEY=VALUE,VALUE]...",
        ),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option(
            "--list",
            metavar="FILE",
            help="Not all combinations: the file's lines, a run's keys each.",
        ),
    ] = None,
    search: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Train N runs whose values Optuna chooses; keys may have ranges then, as in "
            "train.lr=1e-5..1e-3,log.",
        ),
    ] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at the same time; by default what fits this machine."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to create; by default runs/<time>-<recipe>-sweep.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Sweep to go on with; its own recipe and keys count.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print sweep.json.")] = False,
) -> None:
    """Train a recipe with every combination of some keys' values, and rank what comes out."""
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress

        if recipe is not None and "=" in recipe and not Path(recipe).is_file():
            recipe, overrides = None, [recipe, *(overrides or ())]
        done = silotune.sweep(
            recipe,
            overrides or (),
            runs=_lines(listed),
            search=search,
            jobs=jobs,
            out=out,
            resume=resume,
            progress=pick_progress(),
        )
        if json:
            print_json(done.result)
        else:
            _print_sweep(done)
        if any(run["failed"] is not None for run in done.result["runs"]):
            raise typer.Exit(1)


def _lines(listed: Path | None) -> list[str]:
    from silotune.core.errors import ConfigError

    if listed is None:
        return []
    try:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--list {listed}: cannot be read ({error}).") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(
            f"--list {listed}: holds no run.\n"
            "  Write a run a line, with its keys: train.lr=1e-3 adapter.rank=8"
        )
    return found


def _print_sweep(done: "Sweep") -> None:
    from silotune.workflows.sweep.ranking import sweep_table, verdict

    result = done.result
    typer.echo()
    print_table(sweep_table(result))
    typer.echo(f"\n{verdict(result)}")
    for run in result["runs"]:
        if run["failed"] is not None:
            typer.echo(f"run {run['number']:03d} failed: {run['failed']}")
    for note in result["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f"runs: {done.path / 'runs'}")
    if (done.path / "report.html").is_file():
        typer.echo(f"report: {done.path / 'report.html'}")
