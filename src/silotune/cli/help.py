"""How Typer and Click show help and mistakes, where their defaults are not good enough."""

from typing import Any

import click
import typer.core

from silotune.core.wording import did_you_mean


class _Formatter(click.HelpFormatter):
    """Typer 0.20 escapes brackets for Rich, even if Rich does not format the help."""

    def write_dl(self, rows: Any, *args: Any, **kwargs: Any) -> None:
        plain = [(name, text.replace("\\[", "[")) for name, text in rows]
        super().write_dl(plain, *args, **kwargs)


class _Context(click.Context):
    formatter_class = _Formatter


class Command(typer.core.TyperCommand):
    """A command whose help has no stray backslashes."""

    context_class = _Context


class Group(typer.core.TyperGroup):
    """A group that suggests a command for a mistyped one, once: Typer and Click both do."""

    context_class = _Context

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first word names."""
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            ctx.fail(f"No such command '{name}'.{did_you_mean(name, self.commands)}")
        return super().resolve_command(ctx, args)
