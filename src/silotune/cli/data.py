"""Commands before a run that look at rows: new, data."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json
from silotune.cli.options import Overrides, Recipe


def new(
    rows: Annotated[Path, typer.Argument(metavar="FILE", help="A file or a folder of rows.")],
    out: Annotated[
        Path | None, typer.Option(help="Recipe to create; by default beside the rows.")
    ] = None,
) -> None:
    """Write a recipe for a file of rows.

    Every guess is marked. Shows three rows as the model will read them, and the next command.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import previews

        previews.print_new(silotune.new(rows, out=out))


def data(
    recipe: Recipe,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=0, help="Train rows to show as text.")] = 1,
    client: Annotated[
        str | None, typer.Option(help="The client whose rows to show; by default the first.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the numbers as JSON, without any row.")
    ] = False,
) -> None:
    """Show a recipe's rows as the model reads them.

    Prints the split, lengths, truncation, duplicates, and rows as text.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import previews

        found = silotune.preview(recipe, overrides or (), num_samples=rows, client=client)
        if json:
            print_json(found.numbers())
        else:
            previews.print_preview(found)
