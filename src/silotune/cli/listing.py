"""Commands that list: the shipped recipes, and what is in a folder of runs. Neither loads torch."""

import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.completion import recipe_names
from silotune.cli.frame import errors_as_exit_codes, print_json, print_line

Name = Annotated[
    str | None,
    typer.Argument(help="Print this recipe.", autocompletion=recipe_names, metavar="[NAME]"),
]
Place = Annotated[Path, typer.Argument(help="The folder that holds them.")]


def recipes(
    name: Name = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the shipped recipes, or print one.

    Each can be changed: silotune run NAME key=value. To start from a copy: silotune recipes NAME >
    my.toml
    """
    with errors_as_exit_codes():
        from silotune.recipes.shipped import shipped_recipe, shipped_recipes

        if name is not None:
            found = shipped_recipe(name)
            if json:
                print_json(found._asdict())
            else:
                print_line(found.text.rstrip("\n"))
            return
        every = [shipped_recipe(own) for own in shipped_recipes()]
        if json:
            print_json([own._asdict() for own in every])
            return
        width = max(len(own.name) for own in every) + 2
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
        for own in every:
            text = f"{own.what} From: {own.source}"
            lines = textwrap.wrap(text, max(20, columns - width), break_on_hyphens=False)
            for n, line in enumerate(lines):
                print_line(f"{own.name if n == 0 else '':<{width}}{line}")


def runs(
    folder: Place = Path("runs"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs, comparisons and sweeps in a folder.

    The loss of a sweep or a comparison is that of its best run.
    """
    with errors_as_exit_codes():
        from silotune.cli.tables import print_table
        from silotune.results.listing import runs as listed

        found = listed(folder)
        if json:
            print_json([own._asdict() for own in found])
            return
        if not found:
            print_line(f"there is no run, comparison or sweep in {folder}")
            return
        header = ("name", "kind", "state", "held-out loss", "best", "began")
        body = [
            (
                own.name,
                own.kind,
                own.state,
                "-" if own.loss is None else f"{own.loss:.3f}",
                own.best or "-",
                own.began,
            )
            for own in found
        ]
        print_table([header, *body])
