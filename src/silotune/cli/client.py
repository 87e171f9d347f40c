"""Commands of a client: init, doctor, join, approve, status, outbound, renew."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_line, say

if TYPE_CHECKING:
    from silotune.deployment.join import Joined

Folder = Annotated[
    Path | None, typer.Option(help="The client's folder; by default named after the client.")
]
KitFile = Annotated[Path, typer.Argument(help="The kit that the server's operators sent back.")]
Data = Annotated[
    Path | None, typer.Option(help="File or folder with the rows; needed the first time.")
]
Model = Annotated[
    Path | None, typer.Option(help="Folder with this client's own copy of the base model.")
]


def init(
    name: Annotated[str, typer.Argument(help="The client's name in rounds and reports.")],
    folder: Folder = None,
) -> None:
    """Create this client's key and the request to send.

    The key never leaves this machine.
    """
    with errors_as_exit_codes():
        from silotune.deployment.join import init

        request, fingerprint = init(name, folder or Path(name))
        print_line(f"fingerprint, to compare by telephone: {fingerprint}")
        print_line(f"send to the server's operators: {request}")


def doctor(
    kit: KitFile,
    data: Data = None,
    model: Model = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Check this recipe; by default the one that the server announces."),
    ] = None,
    folder: Folder = None,
) -> None:
    """Check whether this client can take part.

    Prints one line per check. Exit code 1: it cannot.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli.results import print_finding
        from silotune.deployment.doctor import examine

        joined = _joined(kit, folder, data, model)
        failed = False
        for finding in examine(joined, silotune.load_recipe(recipe) if recipe else None):
            print_finding(finding)
            failed |= finding.verdict == "FAIL"
        raise typer.Exit(1 if failed else 0)


def join(
    kit: KitFile,
    data: Data = None,
    model: Model = None,
    folder: Folder = None,
) -> None:
    """Connect, train when asked, and stay until a signal arrives."""
    with errors_as_exit_codes():
        from silotune.deployment.join import server_fingerprint, stay_joined

        joined = _joined(kit, folder, data, model)
        say(f"{joined.kit.consortium}, fingerprint: {server_fingerprint(joined.kit)}")
        stay_joined(joined, say)


def approve(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="The run's id or its first digits; the one that waits."),
    ] = None,
    folder: Folder = None,
    yes: Annotated[bool, typer.Option("--yes", help="Agree without being asked.")] = False,
    no: Annotated[bool, typer.Option("--no", help="Decline, or withdraw an earlier yes.")] = False,
) -> None:
    """Show what a run asks for, and agree to it or decline.

    For clients with approve = "ask" under [runs] in client.toml.
    """
    with errors_as_exit_codes():
        from silotune.cli.tables import print_table
        from silotune.core.errors import ConfigError
        from silotune.deployment.approve import answer, client_folder, describe, find_request

        if yes and no:
            raise ConfigError("--yes and --no contradict each other.\n  Give one of them.")
        place = client_folder(folder)
        request = find_request(place, run)
        print_table([("this run", "asks for"), *describe(place, request)])
        agreed = yes or (not no and typer.confirm("Take part in this run?"))
        answer(place, request, approved=agreed)
        print_line(f"run {request.run[:8]}: {'approved' if agreed else 'declined'}")


def renew(folder: Annotated[Path, typer.Argument(help="The client's folder.")]) -> None:
    """Make a new key, and the request to replace the present one.

    The present key works until the new kit is here and `join` starts with it.
    """
    with errors_as_exit_codes():
        from silotune.deployment.join import renew

        request, fingerprint = renew(folder)
        print_line(f"fingerprint, to compare by telephone: {fingerprint}")
        print_line(f"send to the server's operators: {request}")


def status(
    folder: Annotated[Path, typer.Argument(help="The client's folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Show whether it is connected, what it does, and what it sent."""
    with errors_as_exit_codes():
        from silotune.cli.tables import print_table
        from silotune.deployment.client_status import client_status, status_lines, status_table

        found = client_status(folder)
        if json:
            print_json(found)
            return
        for text in status_lines(found):
            print_line(text)
        if found["runs"]:
            print_line()
            print_table(status_table(found))


def outbound(
    folder: Annotated[Path, typer.Argument(help="The client's folder.")],
    json: Annotated[bool, typer.Option("--json", help="Print every answer as JSON.")] = False,
) -> None:
    """List what has left this machine, by run.

    Every answer is one line of state/outbound.jsonl.
    """
    with errors_as_exit_codes():
        from silotune.cli.results import print_outbound
        from silotune.federation.ledger import lines
        from silotune.federation.outbound_log import record_of

        path = record_of(folder)
        if json:
            print_json(lines(path))
        else:
            print_outbound(path)


def _joined(kit: Path, folder: Path | None, data: Path | None, model: Path | None) -> "Joined":
    from silotune.deployment.consortium.kit import read_kit
    from silotune.deployment.join import take_kit

    place = folder or Path(read_kit(kit).client)
    return take_kit(kit, place, data=data, model=model)


COMMANDS = (init, doctor, join, approve, status, outbound, renew)
"""The commands of `silotune client`."""
