"""The command audit: attack one of your own runs, and compare the result with what it claims."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json
from silotune.cli.options import Overrides


def audit(
    target: Annotated[
        str, typer.Argument(metavar="RUN|RECIPE", help="A finished run's folder, or a recipe.")
    ],
    overrides: Overrides = None,
    canaries: Annotated[
        int | None, typer.Option(metavar="N", help="Canaries in a recipe; by default 100.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder to create for a recipe; by default runs/<time>-<recipe>-audit.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print audit.json.")] = False,
) -> None:
    """Test a privacy claim by attacking a run or a recipe.

    A finished run is attacked through its rows, a recipe through canaries. Exit code 1: the claim
    is refuted.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import pick_progress

        found = silotune.audit(
            target, overrides or (), canaries=canaries, out=out, progress=pick_progress()
        )
        if json:
            print_json(found.result)
        else:
            results.print_audit(found)
        raise typer.Exit(1 if found.is_refuted else 0)
