"""Commands of a client: init, join."""

import time
from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, plain

Folder = Annotated[
    Path | None, typer.Option(help="The client's own folder; by default one of its name.")
]


def register(app: typer.Typer) -> None:
    """Add the group of this file."""
    group = typer.Typer(
        help="One client of a consortium.", no_args_is_help=True, rich_markup_mode=None
    )
    for command in (init, join):
        group.command()(command)
    app.add_typer(group, name="client")


def init(
    name: Annotated[str, typer.Argument(help="How the client is called in rounds and reports.")],
    folder: Folder = None,
) -> None:
    """Make this client's key, which never leaves this machine, and the request to send."""
    with errors_as_exit_codes():
        from silotune.deployment.joining import init

        request, fingerprint = init(name, folder or Path(name))
        typer.echo(f"fingerprint, to be compared by telephone: {fingerprint}")
        typer.echo(f"send to the server's people: {request}")


def join(
    kit: Annotated[Path, typer.Argument(help="The file that the server's people sent back.")],
    data: Annotated[Path | None, typer.Option(help="The rows; needed the first time.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of this client's own copy of the base model.")
    ] = None,
    folder: Folder = None,
) -> None:
    """Connect, train when asked, and stay until a signal."""
    with errors_as_exit_codes():
        from silotune.consortium.kit import read_kit
        from silotune.deployment.joining import server_fingerprint, stay_joined, take_kit

        place = folder or Path(read_kit(kit).client)
        joined = take_kit(kit, place, data=data, model=model)
        _say(f"{joined.kit.consortium}, fingerprint: {server_fingerprint(joined.kit)}")
        stay_joined(joined, _say)


def _say(text: str) -> None:
    typer.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {plain(text)}", err=True)
