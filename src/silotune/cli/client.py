"""Commands of a client: init, doctor, join, outbound."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, plain, print_json, print_table, say

if TYPE_CHECKING:
    from silotune.deployment.join import Joined

Folder = Annotated[
    Path | None, typer.Option(help="The client's own folder; by default one of its name.")
]

KitFile = Annotated[Path, typer.Argument(help="The file that the server's people sent back.")]
Data = Annotated[Path | None, typer.Option(help="The rows; needed the first time.")]
Model = Annotated[
    Path | None, typer.Option(help="Folder of this client's own copy of the base model.")
]


def register(app: typer.Typer) -> None:
    """Add the group of this file."""
    group = typer.Typer(
        help="One client of a consortium.", no_args_is_help=True, rich_markup_mode=None
    )
    for command in (init, doctor, join, outbound):
        group.command()(command)
    app.add_typer(group, name="client")


def init(
    name: Annotated[str, typer.Argument(help="How the client is called in rounds and reports.")],
    folder: Folder = None,
) -> None:
    """Make this client's key, which never leaves this machine, and the request to send."""
    with errors_as_exit_codes():
        from silotune.deployment.join import init

        request, fingerprint = init(name, folder or Path(name))
        typer.echo(f"fingerprint, to be compared by telephone: {fingerprint}")
        typer.echo(f"send to the server's people: {request}")


def doctor(
    kit: KitFile,
    data: Data = None,
    model: Model = None,
    recipe: Annotated[
        str | None, typer.Option(help="Try this one; by default what the server has queued.")
    ] = None,
    folder: Folder = None,
) -> None:
    """Look whether this client could take part, line by line. Exit code 1: it could not."""
    with errors_as_exit_codes():
        from silotune.deployment.doctor import examine
        from silotune.recipes.parse import load_recipe

        joined = _joined(kit, folder, data, model)
        failed = False
        for finding in examine(joined, load_recipe(recipe) if recipe is not None else None):
            failed |= finding.verdict == "FAIL"
            typer.echo(f"{finding.verdict:<5} {finding.what:<9} {plain(finding.text)}")
            if finding.mend:
                typer.echo(f"{'':<16}{plain(finding.mend)}")
        raise typer.Exit(1 if failed else 0)


def outbound(
    folder: Annotated[Path, typer.Argument(help="The client's own folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print every line.")] = False,
) -> None:
    """Show what has left this machine, by run; every answer is a line of state/outbound.jsonl."""
    with errors_as_exit_codes():
        from silotune.core.wording import human_bytes
        from silotune.deployment.join import OWN
        from silotune.federation.client_config import load_client_config
        from silotune.federation.ledger import lines
        from silotune.federation.outbound_log import FILE, sent_by_run

        path = Path(load_client_config(folder / OWN).state) / FILE
        if json:
            print_json(lines(path))
            return
        body = [
            (
                own["run"],
                own["first"],
                own["last"],
                str(own["answers"]),
                str(own["updates"]),
                human_bytes(own["bytes"]),
            )
            for own in sent_by_run(path)
        ]
        print_table([("run", "first", "last", "answers", "updates", "sent"), *body])


def join(
    kit: KitFile,
    data: Data = None,
    model: Model = None,
    folder: Folder = None,
) -> None:
    """Connect, train when asked, and stay until a signal."""
    with errors_as_exit_codes():
        from silotune.deployment.join import server_fingerprint, stay_joined

        joined = _joined(kit, folder, data, model)
        say(f"{joined.kit.consortium}, fingerprint: {server_fingerprint(joined.kit)}")
        stay_joined(joined, say)


def _joined(kit: Path, folder: Path | None, data: Path | None, model: Path | None) -> "Joined":
    from silotune.deployment.consortium.kit import read_kit
    from silotune.deployment.join import take_kit

    place = folder or Path(read_kit(kit).client)
    return take_kit(kit, place, data=data, model=model)
