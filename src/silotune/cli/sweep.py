"""The command that trains one recipe many times: sweep."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.completion import key_names
from silotune.cli.frame import errors_as_exit_codes, print_json
from silotune.cli.options import OptionalRecipe, recipe_and_overrides

Values = Annotated[
    list[str] | None,
    typer.Argument(
        help="Keys with their values, such as train.lr=1e-4,1e-3; a key with one value applies to "
        "all runs.",
        metavar="[KEY=VALUE,VALUE]...",
        autocompletion=key_names,
    ),
]
Listed = Annotated[
    Path | None,
    typer.Option(
        "--list",
        metavar="FILE",
        help="Instead of all combinations: a file with one run per line, given by its keys.",
    ),
]
NumSearched = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="Train N runs with values that Optuna chooses; keys may then have ranges, such as "
        "train.lr=1e-5..1e-3,log.",
    ),
]
NumJobs = Annotated[
    int | None,
    typer.Option(min=1, help="Concurrent runs; by default as many as fit this machine."),
]
Out = Annotated[
    Path | None, typer.Option(help="Folder to create; by default runs/<time>-<recipe>-sweep.")
]
Resume = Annotated[Path | None, typer.Option(help="Sweep to resume, with its own recipe and keys.")]


def sweep(
    recipe: OptionalRecipe = None,
    overrides: Values = None,
    listed: Listed = None,
    search: NumSearched = 0,
    jobs: NumJobs = None,
    out: Out = None,
    resume: Resume = None,
    json: Annotated[bool, typer.Option("--json", help="Print sweep.json.")] = False,
) -> None:
    """Train a recipe many times with different values.

    By default, every combination of the values is trained. The runs are ranked by held-out loss.
    Exit code 1: a run failed.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import pick_progress

        recipe, changed = recipe_and_overrides(recipe, overrides, resume)
        done = silotune.sweep(
            recipe,
            changed,
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
            results.print_sweep(done)
        if any(run["failed"] is not None for run in done.result["runs"]):
            raise typer.Exit(1)


def _lines(listed: Path | None) -> list[str]:
    from silotune.core.errors import ConfigError

    if listed is None:
        return []
    example = "\n  Write one run per line, with its keys: train.lr=1e-3 adapter.rank=8"
    try:
        lines = [line.strip() for line in listed.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--list {listed}: cannot be read ({error}).{example}") from error
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"--list {listed}: contains no runs.{example}")
    return found
