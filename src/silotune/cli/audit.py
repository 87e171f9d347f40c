"""The command audit: an attack on one's own run, beside what the run claims."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_table
from silotune.cli.run import Overrides


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(audit)


def audit(
    target: Annotated[
        str, typer.Argument(metavar="RUN|RECIPE", help="A finished run's folder, or a recipe.")
    ],
    overrides: Overrides = None,
    canaries: Annotated[
        int | None, typer.Option(metavar="N", help="Canaries in a recipe; 100 unless told.")
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
    """Attack a run by its rows, or a recipe by canaries. Exit code 1: its claim is refuted."""
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress
        from silotune.workflows.audit.membership import membership_table
        from silotune.workflows.audit.result import audit_lines

        found = silotune.audit(
            target, overrides or (), canaries=canaries, out=out, progress=pick_progress()
        )
        if json:
            print_json(found.result)
        else:
            if "clients" in found.result:
                print_table(membership_table(found.result))
            for line in audit_lines(found.result):
                typer.echo(line)
            typer.echo(f"all numbers: {found.path}")
        raise typer.Exit(1 if found.is_refuted else 0)
