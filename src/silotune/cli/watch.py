"""The command watch: a live page of a run, a consortium or a client."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import ended_by_ctrl_c, errors_as_exit_codes, print_line

Place = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="Folder of a run, a consortium or a client.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the page; 0 picks a free one.")]


def watch(folder: Place, port: Port = 7861) -> None:
    """Show what is going on, on a page that updates itself.

    Only on this machine, at an address that contains a secret. It reads and changes nothing.
    """
    with errors_as_exit_codes():
        from silotune.deployment.watch import served_page

        with served_page(folder, port) as page:
            print_line(page.address)
            typer.echo("press Ctrl-C to stop", err=True)
            with ended_by_ctrl_c():
                page.run()
