"""Commands before and during a run: demo, run, check."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_table
from silotune.errors import ConfigError

if TYPE_CHECKING:
    from silotune.launch import Run

Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name, or a TOML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys to change, for instance train.lr=5e-4", metavar="[KEY=VALUE]..."),
]
Out = Annotated[
    Path | None, typer.Option(help="Run folder to create; by default runs/<time>-<recipe>.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print summary.json instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(demo)
    app.command()(run)
    app.command()(check)


def demo(overrides: Overrides = None, out: Out = None, json: AsJson = False) -> None:
    """Five hospitals fine-tune one small chat model together, on this machine's processor."""
    with errors_as_exit_codes():
        import silotune
        from silotune.progress import pick_progress

        done = silotune.run(
            "hospitals", overrides or (), out=out, progress=pick_progress(), keep_model=True
        )
        if json:
            print_json(done.summary)
            return
        _print_result(done)
        _print_answers(done)


def run(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe's name, or a TOML file.")
    ] = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to go on with; its own recipe counts.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Run a recipe, or go on with an interrupted run."""
    with errors_as_exit_codes():
        import silotune
        from silotune.progress import pick_progress

        if recipe is not None and "=" in recipe and not Path(recipe).is_file():
            overrides, recipe = [recipe, *(overrides or ())], None  # the first word is no recipe
        if recipe is None and resume is None:
            shipped = ", ".join(silotune.shipped_recipes())
            raise ConfigError(f"give a recipe (shipped: {shipped}), or --resume FOLDER.")
        done = silotune.run(
            recipe, overrides or (), out=out, resume=resume, progress=pick_progress()
        )
        if json:
            print_json(done.summary)
        else:
            _print_result(done)


def check(recipe: Recipe, overrides: Overrides = None, json: AsJson = False) -> None:
    """Find every mistake in a recipe and its data, without loading a model."""
    with errors_as_exit_codes():
        import silotune

        checked = silotune.check(recipe, overrides or ())
        counts = [(name, len(c.train), len(c.evaluation)) for name, c in checked.rows.items()]
        if json:
            print_json({name: {"num_train": t, "num_eval": e} for name, t, e in counts})
            return
        body = [(name, str(t), str(e)) for name, t, e in counts]
        print_table([("client", "train rows", "held-out rows"), *body])
        for text in checked.warnings:
            typer.echo(f"warning: {text}")
        typer.echo("no mistakes found")


def _print_result(done: "Run") -> None:
    from silotune.report import cost_lines, loss_table, worse_off

    summary: dict[str, Any] = done.summary
    typer.echo("\nheld-out loss (nats per token, lower is better)\n")
    print_table(loss_table(summary))
    if lost := worse_off(summary):
        typer.echo(f"\nnot better than the base for: {', '.join(lost)}")
    typer.echo()
    for line in cost_lines(summary):
        typer.echo(line)
    typer.echo(f"adapter: {done.path / 'adapter'}")


def _print_answers(done: "Run") -> None:
    """One held-out question, answered before and after, by the model that is still loaded."""
    from silotune.launch import check

    rows = check(done.config).rows
    first = next(iter(rows.values())).evaluation[0]
    question = next(m["content"] for m in first if m["role"] == "user")
    typer.echo(f"\nquestion   {question}")
    typer.echo(f"base       {done.ask(question, base=True, max_new_tokens=64)}")
    typer.echo(f"federated  {done.ask(question, max_new_tokens=64)}")
    typer.echo(f'\nask it yourself: silotune ask {done.path} "your question"')
