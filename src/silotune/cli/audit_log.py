"""Commands about the logs of what operators did."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_line


def verify(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER", help="operators.jsonl, or a consortium's or client's folder."
        ),
    ],
    seen: Annotated[
        str | None,
        typer.Option(metavar="HASH", help="A hash that this command showed earlier."),
    ] = None,
) -> None:
    """Check that no line was changed, moved, added or removed.

    Exit code 2: something was, and the text says where.
    """
    with errors_as_exit_codes():
        from silotune.core.wording import counted
        from silotune.deployment.audit_log import check_log

        found = check_log(path, seen=seen)
        print_line(f"{counted(found.lines, 'line')}, {found.first} to {found.last}: as written")
        for shown in found.fingerprints:
            print_line(f"signed by {shown}")
        if not found.is_own:
            print_line("compare the last one with the fingerprint that its operators tell you")
        print_line(f"hash of the last line, to note elsewhere: {found.head}")


COMMANDS = (verify,)
"""The commands of `silotune audit-log`."""
