"""The command line: parse, call one public function, print. Heavy imports happen inside."""

from importlib.metadata import version
from typing import Annotated

import typer

from silotune.cli import (
    after,
    algorithms,
    audit,
    audit_log,
    chat,
    client,
    data,
    listing,
    plan,
    privacy,
    run,
    server,
    sweep,
    watch,
)
from silotune.cli.help import Command, Group

COMMANDS = (
    *(run.demo, run.run, run.check, run.compare, run.pretrain_teacher),
    algorithms.algorithms,
    *(data.new, data.data, plan.plan, sweep.sweep, privacy.privacy, audit.audit),
    *(after.ask, after.evaluate, after.contribution, after.export, after.report),
    *(chat.chat, watch.watch, listing.recipes, listing.runs),
    *(server.rehearse, server.export_app),
)
"""In the order of `silotune --help`. The function's name is the command's name."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"silotune {version('silotune')}")
        raise typer.Exit


def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Accept the options that need no command."""


def _group(name: str, text: str, *, completes: bool = False) -> typer.Typer:
    return typer.Typer(
        name=name,
        cls=Group,
        help=text,
        no_args_is_help=True,
        add_completion=completes,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _build() -> typer.Typer:
    top = _group(
        "silotune",
        "Fine-tune one language model across many data holders whose rows never leave them.",
        completes=True,
    )
    top.callback()(_options)
    for command in COMMANDS:
        top.command(cls=Command)(command)
    for name, text, commands in (
        ("server", "Run the server of a consortium.", server.COMMANDS),
        ("client", "Run one client of a consortium.", client.COMMANDS),
        ("audit-log", "Check the logs of what operators did.", audit_log.COMMANDS),
    ):
        group = _group(name, text)
        for command in commands:
            group.command(cls=Command)(command)
        top.add_typer(group)
    return top


app = _build()
