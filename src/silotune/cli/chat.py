"""The command chat: talk with a finished run, in the terminal or in the browser."""

import contextlib
import io
import re
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from silotune.cli.frame import ended_by_ctrl_c, errors_as_exit_codes
from silotune.cli.options import MaxNewTokens, OfClient, RunFolder
from silotune.core.safe_text import plain

if TYPE_CHECKING:
    import silotune
    from silotune.results.chat import Chat

HINT = "/reset starts a new conversation, /quit ends the chat"
COLUMNS_FROM = 80
"""Minimum width of a terminal, in characters, for two answers side by side."""


def chat(
    run: RunFolder,
    only: Annotated[
        Literal["base", "federated"] | None, typer.Option(help="Talk with one of them only.")
    ] = None,
    client: OfClient = None,
    max_new_tokens: MaxNewTokens = 128,
    web: Annotated[
        bool, typer.Option("--web", help="Use a page in the browser instead of the terminal.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="With --web: address of the page; only on this machine.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="With --web: port of the page; 0 picks a free one."),
    ] = 7860,
) -> None:
    """Chat with a run and its base, side by side."""
    with errors_as_exit_codes(), contextlib.ExitStack() as stack:
        import silotune
        from silotune.federation.progress import pick_progress
        from silotune.results.chat_page import WHY, build_app
        from silotune.results.loopback import address_of, new_token, server_of, take_port

        taken = None
        if web:
            taken = stack.enter_context(take_port(host, port, why=WHY, what="--web"))
        finished = silotune.Run(run)
        pick_progress().note(f"loading {finished.config.model.name}")
        talk = finished.chat(only=only, client=client, max_new_tokens=max_new_tokens)
        stack.enter_context(ended_by_ctrl_c())
        if taken is None:
            _converse(talk)
        else:
            token, title = new_token(), _title(finished)
            page = build_app(talk.speakers, token, title=title, run=finished.path.name)
            typer.echo(address_of(taken, token))
            typer.echo("press Ctrl-C to stop", err=True)
            server_of(page).run(sockets=[taken])


def _title(run: "silotune.Run") -> str:
    """What the page is about."""
    from silotune.core.wording import counted
    from silotune.models.base_files import public_name

    clients = counted(len(run.summary["clients"]), "client")
    return f"{public_name(run.config.model.name)}, fine-tuned by {clients}"


def _converse(talk: "Chat") -> None:
    """Read messages from stdin and print the answers, until stdin ends or /quit."""
    from silotune.core.errors import ConfigError
    from silotune.results.chat import NO_HEAD

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a stray byte does not end the conversation
    if talk.speakers.run.task == "classify":
        typer.echo(f"each text is classified separately; {NO_HEAD}", err=True)
    typer.echo(HINT, err=True)
    while (line := _read()) is not None:
        text = plain(line).strip()
        if text == "/quit":
            return
        if text == "/reset":
            talk.reset()
            typer.echo("new conversation", err=True)
        elif re.fullmatch(r"/\w+", text):
            typer.echo(f"unknown command {text}: {HINT}", err=True)
        elif text:
            try:
                answers = talk.say(text)
            except ConfigError as error:  # too long; the conversation continues
                typer.echo(plain(str(error)), err=True)
                continue
            _show({name: plain(said) for name, said in answers.items()})
            for note in talk.notes:
                typer.echo(note, err=True)


def _read() -> str | None:
    """Read the next line of stdin, with a prompt if a person types it; None at the end."""
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
    """Print answers side by side if the terminal is wide enough, otherwise one below the other."""
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
