"""The command privacy: what a run guarantees, and what it has spent."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json


def privacy(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not.")],
    json: Annotated[
        bool, typer.Option("--json", help="Print everything, including every release, as JSON.")
    ] = False,
) -> None:
    """State a run's privacy: mechanism, releases, and epsilon.

    Others can recompute epsilon from this statement.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results

        found = silotune.Run(run).privacy
        if json:
            print_json(found)
        else:
            results.print_privacy(found)
