"""What every command shares: errors and signals become exit codes, and text is made safe."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import typer

from silotune.core.errors import SilotuneError
from silotune.core.safe_text import one_line, plain


class Stopped(BaseException):
    """SIGINT, SIGTERM or SIGHUP. Not an Exception, so that no `except Exception` catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


_ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
"""Signals that end a command; one that is ignored, as under nohup, stays ignored."""


@contextlib.contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """0: success. 1: the run failed. 2: mistake in recipe or arguments. 128 + n: signal n."""

    def stop(signum: int, _: Any) -> None:
        raise Stopped(signum)

    before = {s: signal.signal(s, stop) for s in _ENDING if signal.getsignal(s) != signal.SIG_IGN}
    try:
        yield
    except SilotuneError as error:
        typer.echo(plain(f"{type(error).__name__}: {error}"), err=True)
        raise typer.Exit(error.exit_code) from None
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # after SIGHUP, the terminal may be gone
            typer.echo(f"stopped by {signal.Signals(stopped.signum).name}", err=True)
        raise typer.Exit(128 + stopped.signum) from None
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C is a normal way to end what was meant to go on, not a failure."""
    try:
        yield
    except Stopped as stopped:
        if stopped.signum != signal.SIGINT:
            raise
        typer.echo(err=True)


def print_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_line(text: str = "") -> None:
    """Print a line on stdout; names and texts in it cannot act on the terminal."""
    typer.echo(plain(text))


def say(text: str) -> None:
    """Print a line with the time on stderr, for commands that run for days."""
    typer.echo(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {one_line(text)}", err=True)
