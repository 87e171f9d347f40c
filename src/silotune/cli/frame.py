"""What every command shares: errors and signals become exit codes, results go to stdout."""

import contextlib
import json
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

import typer

from silotune.core.errors import SilotuneError

_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, places
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\)"  # titles, links, the clipboard
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They show letters in another order than that in which they stand."""


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that nothing mistakes it for one."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """0 done, 1 the run failed, 2 a mistake in recipe or arguments, 128 + n ended by signal n."""

    def stop(signum: int, _: Any) -> None:
        raise Stopped(signum)

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SilotuneError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        typer.echo(f"stopped by {signal.Signals(stopped.signum).name}", err=True)
        raise typer.Exit(128 + stopped.signum) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Header and rows, numbers aligned, on stdout."""
    from rich.console import Console
    from rich.table import Table

    header, *body = rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
    for row in body:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 240  # a pipe has no edge at which to fold
    Console(highlight=False, markup=False, width=wide).print(table)


def say(text: str) -> None:
    """A line on stderr with its time, for commands that go on for days."""
    typer.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {plain(text)}", err=True)


def plain(text: str) -> str:
    """A text without what steers a terminal: escape sequences, control characters, reordering.

    Line breaks and tabs stay. What a model says, or somebody pastes, is shown and never obeyed.
    """
    text = _SEQUENCES.sub("", text.replace("\r\n", "\n"))
    return "".join(
        c
        for c in text
        if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _REORDERING)
    )
