"""Commands of a consortium's server, the rehearsal of one, and a run as an app of Flower's."""

import time
from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, plain, print_json, print_table, say
from silotune.cli.run import AsJson, Overrides, Recipe

Folder = Annotated[Path, typer.Option(help="The consortium's folder.")]
HERE = Path("consortium")
AnyRun = Annotated[
    str | None, typer.Argument(metavar="RUN", help="A run's name or a part of it; the latest.")
]


def register(app: typer.Typer) -> None:
    """Add the group of this file, and its two commands."""
    app.command()(rehearse)
    app.command()(export_app)
    group = typer.Typer(help="A consortium's server.", no_args_is_help=True, rich_markup_mode=None)
    for command in (init, up, approve, revoke, status, submit, log, stop):
        group.command()(command)
    app.add_typer(group, name="server")


def init(
    name: Annotated[str, typer.Argument(help="What the consortium is called.")],
    address: Annotated[
        str, typer.Option(help="How clients reach this server: host, or host:port.")
    ],
    folder: Folder = HERE,
    listen: Annotated[
        str | None, typer.Option(help="Where to listen; by default every interface.")
    ] = None,
) -> None:
    """Make a consortium: its folder, its own certificate authority, the server's certificate."""
    with errors_as_exit_codes():
        from silotune.deployment.consortium.folder import Consortium

        Consortium.create(folder, name=name, address=address, listen=listen)
        typer.echo(f"made {folder}")
        typer.echo(f"fingerprint: {Consortium.open(folder).fingerprint()}")
        typer.echo(f"next: silotune server up --folder {folder}")


def up(folder: Folder = HERE) -> None:
    """Start everything the server needs, and keep it running until a signal."""
    with errors_as_exit_codes():
        from silotune.deployment.serve import serve

        serve(folder, say)


def approve(
    request: Annotated[Path, typer.Argument(help="The file a client's people sent.")],
    folder: Folder = HERE,
) -> None:
    """Let a client in, and write the kit to send back. Nobody else is touched."""
    with errors_as_exit_codes():
        from silotune.deployment.consortium.folder import Consortium

        kit, fingerprint = Consortium.open(folder).approve(request)
        typer.echo(f"fingerprint, to be compared by telephone: {fingerprint}")
        typer.echo(f"send back: {kit}")


def revoke(
    client: Annotated[str, typer.Argument(help="The client's name.")], folder: Folder = HERE
) -> None:
    """Put a client out, at once. Nobody else is touched."""
    with errors_as_exit_codes():
        from silotune.deployment.consortium.folder import Consortium

        Consortium.open(folder).revoke(client)
        typer.echo(f"{client} is out")


def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    folder: Folder = HERE,
    again: Annotated[
        bool, typer.Option("--again", help="RECIPE is a run that was stopped or failed: go on.")
    ] = False,
) -> None:
    """Queue a recipe for the consortium's clients."""
    with errors_as_exit_codes():
        from silotune.deployment.queue import resubmit, submit

        made = resubmit(folder, recipe) if again else submit(folder, recipe, overrides or ())
        typer.echo(f"run folder: {made}")


def status(
    folder: Folder = HERE,
    json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Show clients, runs, rounds, bytes, and who is waited for."""
    with errors_as_exit_codes():
        from silotune.deployment.status import status as found
        from silotune.deployment.status import status_tables

        now = found(folder)
        if json:
            print_json(now)
            return
        typer.echo(f"{now['name']}: {'up' if now['up'] else 'not up'}")
        for table in status_tables(now):
            print_table(table)


def log(
    run: AnyRun = None,
    folder: Folder = HERE,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run has ended.")
    ] = False,
) -> None:
    """Print what a run has said."""
    with errors_as_exit_codes():
        from silotune.deployment.queue import LOG, RUNNING, WAITING, find_run, state_of

        path, at = find_run(folder, run), 0
        while True:
            ended = state_of(path)["state"] not in (RUNNING, WAITING)  # before the last look
            if (path / LOG).is_file():
                with (path / LOG).open(encoding="utf-8", errors="replace") as file:
                    file.seek(at)
                    typer.echo(plain(file.read()), nl=False)
                    at = file.tell()
            if not follow or ended:
                return
            time.sleep(0.5)


def stop(run: AnyRun = None, folder: Folder = HERE) -> None:
    """Stop a run; what it finished is kept, and `submit --again` goes on."""
    with errors_as_exit_codes():
        from silotune.deployment.queue import find_run, stop

        path = stop(folder, find_run(folder, run).name)
        typer.echo(f"{path.name} stops; go on with: silotune server submit --again {path.name}")


def rehearse(
    recipe: Recipe,
    overrides: Overrides = None,
    clients: Annotated[int, typer.Option(min=1, help="So many of its clients take part.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to create; by default runs/<time>-<recipe>-rehearsal."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Start a whole consortium on this machine, with processes, keys and certificates, and run."""
    with errors_as_exit_codes():
        from silotune.deployment.rehearse import rehearse

        done = rehearse(recipe, overrides or (), num_clients=clients, out=out, note=say)
        if json:
            print_json(done.summary)
        else:
            typer.echo(f"adapter: {done.path / 'adapter'}")


def export_app(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")],
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Write a run as a Flower app, for `flwr run` in Flower's simulation."""
    with errors_as_exit_codes():
        from silotune.deployment.app_folder import export_app

        command = export_app(folder, recipe, overrides or ())
        typer.echo(f"run it: {command}")
