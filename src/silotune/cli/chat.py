"""The command chat: a conversation with a finished run, in the terminal or in the browser."""

import contextlib
import io
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from silotune.cli.frame import Stopped, errors_as_exit_codes, plain

if TYPE_CHECKING:
    from silotune.results.chat import Chat

COMMANDS = "/reset begins anew, /quit ends"
COLUMNS_FROM = 80
"""Width of a terminal in characters from which two answers stand side by side."""


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(chat)


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    only: Annotated[
        Literal["base", "federated"] | None, typer.Option(help="Leave the other one out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser instead.")] = False,
    host: Annotated[
        str, typer.Option(help="With --web: where it listens; this machine only.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="With --web; 0 takes a free one.")
    ] = 7860,
) -> None:
    """Talk with a run: its base and the federated model answer side by side."""
    with errors_as_exit_codes(), contextlib.ExitStack() as stack:
        from silotune.federation.progress import pick_progress
        from silotune.results.chat_page import address_of, build_page, serve, take_port
        from silotune.results.run import Run

        taken = stack.enter_context(take_port(host, port)) if web else None
        pick_progress().note(f"loading {Run(run).config.model.name}")
        talk = Run(run).chat(only=only, max_new_tokens=max_new_tokens)
        stack.enter_context(_ended_by_ctrl_c())
        if taken is None:
            _converse(talk)
        else:
            page = build_page(talk.speakers)
            typer.echo(address_of(taken))
            typer.echo("Ctrl-C ends it", err=True)
            serve(page, taken)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C is a way to end a conversation, and no failure."""
    try:
        yield
    except Stopped as stopped:
        if stopped.signum != signal.SIGINT:
            raise
        typer.echo(err=True)


def _converse(talk: "Chat") -> None:
    """Read messages from stdin and print answers, until it ends or is told to."""
    from silotune.core.errors import ConfigError
    from silotune.results.chat import NO_HEAD

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte ends no conversation
    if talk.speakers.run.task == "classify":
        typer.echo(f"each text is judged by itself; {NO_HEAD}", err=True)
    typer.echo(COMMANDS, err=True)
    while (line := _read()) is not None:
        text = plain(line).strip()
        if text == "/quit":
            return
        if text == "/reset":
            talk.reset()
            typer.echo("forgotten", err=True)
        elif re.fullmatch(r"/\w+", text):
            typer.echo(f"there is no {text}: {COMMANDS}", err=True)
        elif text:
            try:
                answers = talk.say(text)
            except ConfigError as error:  # too long; the conversation goes on
                typer.echo(str(error), err=True)
                continue
            _show({name: plain(said) for name, said in answers.items()})
            for note in talk.notes:
                typer.echo(note, err=True)


def _read() -> str | None:
    """The next line of stdin, with a prompt for people; None at its end."""
    if not sys.stdin.isatty():
        return sys.stdin.readline() or None
    try:
        if sys.stdout.isatty():
            import readline  # noqa: F401  input() then edits lines and remembers them

            return input("> ")
        typer.echo("> ", nl=False, err=True)
        return input()
    except EOFError:
        typer.echo(err=True)
        return None


def _show(answers: dict[str, str]) -> None:
    """Side by side in a terminal that is wide enough, else one below the other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    if len(answers) > 1 and console.is_terminal and console.width >= COLUMNS_FROM:
        table = Table(box=None, pad_edge=False, expand=True, header_style="bold")
        for name in answers:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(said) for said in answers.values()))
        console.print(table)
    else:
        for name, said in answers.items():
            typer.echo(f"{name:<10} " + said.replace("\n", "\n" + " " * 11))
    typer.echo()
