"""The command privacy: what a run promises, and what it has spent."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(privacy)


def privacy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    json: Annotated[bool, typer.Option("--json", help="Print all, with every release.")] = False,
) -> None:
    """State a run's privacy so that others can compute it anew: mechanism, releases, epsilon."""
    with errors_as_exit_codes():
        from silotune.federation.privacy_statement import privacy_lines
        from silotune.results.run import Run

        found = Run(run).privacy
        if json:
            print_json(found)
        elif found is None:
            typer.echo("no differential privacy: the recipe has no [privacy] with a unit")
        else:
            for line in privacy_lines(found):
                typer.echo(line)
