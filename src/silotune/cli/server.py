"""Commands of a consortium's server, rehearse, and export-app."""

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_line, say
from silotune.cli.options import AsSummary, Overrides, Recipe
from silotune.core.safe_text import plain

Folder = Annotated[Path, typer.Option(help="The consortium's folder.")]
HERE = Path("consortium")
AnyRun = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="A run's name or a part of it; by default the latest."),
]


def init(
    name: Annotated[str, typer.Argument(help="The consortium's name.")],
    address: Annotated[str, typer.Option(help="How clients reach this server: HOST or HOST:PORT.")],
    folder: Folder = HERE,
    listen: Annotated[
        str | None,
        typer.Option(help="HOST, :PORT or HOST:PORT to listen on; by default every interface."),
    ] = None,
) -> None:
    """Create a consortium: its folder, its certificates.

    It gets its own certificate authority.
    """
    with errors_as_exit_codes():
        from silotune.deployment.consortium.folder import Consortium

        Consortium.create(folder, name=name, address=address, listen=listen)
        print_line(f"created {folder}")
        print_line(f"fingerprint: {Consortium.open(folder).fingerprint()}")
        print_line(f"next: silotune server up --folder {folder}")


def up(
    folder: Folder = HERE,
    page: Annotated[
        bool, typer.Option("--page", help="Also serve the live page of `silotune watch`.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --page: its port; 0 picks a free one.")
    ] = 7861,
) -> None:
    """Start the server, and keep it running until a signal arrives."""
    with errors_as_exit_codes():
        from silotune.deployment.serve import serve
        from silotune.deployment.watch import page_in_background

        with page_in_background(folder, port, say) if page else contextlib.nullcontext():
            serve(folder, say)


def approve(
    request: Annotated[Path, typer.Argument(help="The request that a client's operators sent.")],
    folder: Folder = HERE,
    again: Annotated[
        bool, typer.Option("--again", help="Let in a key that was revoked before.")
    ] = False,
) -> None:
    """Let a client in, and write the kit to send back.

    Other clients are not affected.
    """
    with errors_as_exit_codes():
        from silotune.deployment.consortium.folder import Consortium

        kit, fingerprint = Consortium.open(folder).approve(request, again=again)
        print_line(f"fingerprint, to compare by telephone: {fingerprint}")
        print_line(f"send back: {kit}")


def revoke(
    client: Annotated[str, typer.Argument(help="The client's name.")], folder: Folder = HERE
) -> None:
    """Shut a client out immediately.

    Other clients are not affected.
    """
    with errors_as_exit_codes():
        from silotune.deployment.consortium.folder import Consortium

        Consortium.open(folder).revoke(client)
        print_line(f"{client} is revoked")


def renew(
    folder: Folder = HERE,
    authority: Annotated[
        bool,
        typer.Option("--authority", help="Replace the authority's key; every client needs a kit."),
    ] = False,
) -> None:
    """Replace the key that the server shows to its clients.

    They notice nothing: the consortium's authority signs the new one.
    """
    with errors_as_exit_codes():
        from silotune.core.errors import ConfigError
        from silotune.deployment.consortium.folder import Consortium
        from silotune.deployment.status import is_up

        consortium = Consortium.open(folder)
        if is_up(folder):
            raise ConfigError(
                "the server is up and uses its present key.\n"
                "  Stop `silotune server up`, renew, and start it again; runs resume."
            )
        if not authority:
            print_line(f"the server's new key: {consortium.renew_server_key()}")
            return
        fingerprint, kits = consortium.renew_authority()
        print_line(f"new fingerprint, to compare by telephone: {fingerprint}")
        for kit in kits:
            print_line(f"send: {kit}")
        print_line("until a client has joined with its new kit, it is not let in")


def status(
    folder: Folder = HERE,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show clients and runs, and who each run is waiting for."""
    with errors_as_exit_codes():
        from silotune.cli.results import print_status
        from silotune.deployment.status import status as status_of

        now = status_of(folder)
        if json:
            print_json(now)
        else:
            print_status(now)


def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    folder: Folder = HERE,
    again: Annotated[
        bool, typer.Option("--again", help="RECIPE is a run that was stopped or failed: resume it.")
    ] = False,
    clients: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Only these clients: north,south; others are not told."),
    ] = None,
) -> None:
    """Queue a recipe for the consortium's clients."""
    with errors_as_exit_codes():
        from silotune.core.errors import ConfigError
        from silotune.deployment.queue import recipe_sha256, resubmit, submit
        from silotune.deployment.status import is_up

        if again and clients:
            raise ConfigError("--again keeps the clients of the run.\n  Leave out --clients.")
        names = [name.strip() for name in clients.split(",")] if clients else None
        made = (
            resubmit(folder, recipe)
            if again
            else submit(folder, recipe, overrides or (), clients=names)
        )
        print_line(f"run folder: {made}")
        typer.echo(f"clients know the recipe by its SHA-256: {recipe_sha256(made)}", err=True)
        if not is_up(folder):
            typer.echo("the server is not up; the run waits for: silotune server up", err=True)


def log(
    run: AnyRun = None,
    folder: Folder = HERE,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Keep printing until the run has ended.")
    ] = False,
) -> None:
    """Print the output of a run."""
    with errors_as_exit_codes():
        from silotune.deployment.orders import RUNNING, WAITING, find_run, state_of
        from silotune.deployment.queue import LOG

        path, at = find_run(folder, run), 0
        while True:
            ended = state_of(path)["state"] not in (RUNNING, WAITING)  # before the last look
            if (path / LOG).is_file():
                with (path / LOG).open(encoding="utf-8", errors="replace") as file:
                    file.seek(at)
                    typer.echo(plain(file.read()), nl=False)
                    at = file.tell()
            if not follow or ended:
                if not at:
                    typer.echo(f"{path.name} has printed nothing yet", err=True)
                return
            time.sleep(0.5)


def stop(run: AnyRun = None, folder: Folder = HERE) -> None:
    """Stop a run, and keep what it has finished.

    `submit --again` resumes it.
    """
    with errors_as_exit_codes():
        from silotune.deployment.orders import find_run
        from silotune.deployment.queue import stop

        name = stop(folder, find_run(folder, run).name).name
        print_line(f"stopping {name}; resume it with: silotune server submit --again {name}")


def rehearse(
    recipe: Recipe,
    overrides: Overrides = None,
    clients: Annotated[int, typer.Option(min=1, help="Number of clients that take part.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to create; by default runs/<time>-<recipe>-rehearsal."),
    ] = None,
    json: AsSummary = False,
) -> None:
    """Run a whole consortium on this machine, as a test.

    It has the processes, keys and certificates of a real one.
    """
    with errors_as_exit_codes():
        from silotune.deployment.rehearse import rehearse
        from silotune.federation.progress import shown

        with shown() as progress:
            done = rehearse(
                recipe, overrides or (), num_clients=clients, out=out, progress=progress
            )
        if json:
            print_json(done.summary)
        else:
            print_line(f"adapter: {done.path / 'adapter'}")


def export_app(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to create.")],
    recipe: Recipe,
    overrides: Overrides = None,
) -> None:
    """Write a run as a Flower app, for `flwr run`.

    The app runs in Flower's simulation.
    """
    with errors_as_exit_codes():
        from silotune.deployment.app_folder import export_app

        command = export_app(folder, recipe, overrides or ())
        print_line(f"run it: {command}")


COMMANDS = (init, up, approve, revoke, status, submit, log, stop, renew)
"""The commands of `silotune server`."""
