"""Commands after a run: ask."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(ask)


def ask(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    question: Annotated[str, typer.Argument(help="What to ask.")],
    base: Annotated[bool, typer.Option("--base", help="Let the untouched base answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 128,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Answer a question with the trained adapter, or with the base."""
    with errors_as_exit_codes():
        import silotune

        text = silotune.Run(run).ask(question, base=base, max_new_tokens=max_new_tokens)
        if json:
            print_json({"question": question, "answer": text, "base": base})
        else:
            typer.echo(text)
