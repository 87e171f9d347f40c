"""Commands before and during a run: demo, run, check, compare, pretrain-teacher."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from silotune.cli.frame import errors_as_exit_codes, plain, print_json, print_table
from silotune.core.errors import ConfigError

if TYPE_CHECKING:
    from silotune.results.run import Run
    from silotune.workflows.compare.compare import Comparison

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
    app.command()(compare)
    app.command(name="pretrain-teacher")(pretrain_teacher)


def demo(overrides: Overrides = None, out: Out = None, json: AsJson = False) -> None:
    """Five hospitals fine-tune one small chat model together, on this machine's processor."""
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress

        done = silotune.run("hospitals", overrides or (), out=out, progress=pick_progress())
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
        from silotune.federation.progress import pick_progress

        recipe, changed = _recipe_and_overrides(recipe, overrides, resume)
        done = silotune.run(recipe, changed, out=out, resume=resume, progress=pick_progress())
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
        if checked.promise is not None:
            from silotune.federation.privacy_statement import check_lines

            for text in check_lines(checked.promise):
                typer.echo(text)
        for text in checked.warnings:
            typer.echo(f"warning: {text}")
        typer.echo("no mistakes found")


def compare(
    recipe: Annotated[
        str | None, typer.Argument(help="A shipped recipe's name, or a TOML file.")
    ] = None,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds per arm; the recipe says, else 3.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to create; by default runs/<time>-<recipe>.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Comparison to go on with; its own recipe counts.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print comparison.json.")] = False,
) -> None:
    """Was it worth joining? Base, each client alone, federated, centralized: on the same rows."""
    with errors_as_exit_codes():
        import silotune
        from silotune.federation.progress import pick_progress

        recipe, changed = _recipe_and_overrides(recipe, overrides, resume)
        if seeds is not None:
            changed.append(f"compare.seeds={seeds}")
        done = silotune.compare(recipe, changed, out=out, resume=resume, progress=pick_progress())
        if json:
            print_json(done.result)
        else:
            _print_comparison(done)


def pretrain_teacher(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Model folder to create; by default runs/<time>-<recipe>-teacher."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print teacher.json.")] = False,
) -> None:
    """Let a recipe's teacher learn on the server's own rows; later runs take the folder."""
    with errors_as_exit_codes():
        import json as json_

        import silotune
        from silotune.federation.progress import pick_progress

        place = silotune.pretrain_teacher(
            recipe, overrides or (), out=out, progress=pick_progress()
        )
        record = json_.loads((place / "teacher.json").read_text(encoding="utf-8"))
        if json:
            print_json(record)
            return
        scores = {k: v for k, v in record["held_out"].items() if isinstance(v, float)}
        typer.echo("held out: " + ", ".join(f"{key} {value:.3f}" for key, value in scores.items()))
        typer.echo(f"teacher: {place}")
        typer.echo(f"use it: silotune run {recipe} distill.teacher={place}")


def _recipe_and_overrides(
    recipe: str | None, overrides: list[str] | None, resume: Path | None
) -> tuple[str | None, list[str]]:
    """What the words of a command are: with --resume the first one may be no recipe."""
    import silotune

    changed = list(overrides or ())
    if recipe is not None and "=" in recipe and not Path(recipe).is_file():
        recipe, changed = None, [recipe, *changed]
    if recipe is None and resume is None:
        shipped = ", ".join(silotune.shipped_recipes())
        raise ConfigError(f"give a recipe (shipped: {shipped}), or --resume FOLDER.")
    return recipe, changed


def _print_comparison(done: "Comparison") -> None:
    from silotune.workflows.compare.statistics import (
        AGAINST,
        against_table,
        cost_table,
        difference_table,
        score_table,
    )
    from silotune.workflows.compare.verdicts import comparison_verdict, worse_off_warnings

    result = done.result
    for metric in result["metrics"].values():
        better = "lower" if metric["lower_is_better"] else "higher"
        typer.echo(f"\n{metric['label']} ({metric['unit']}, {better} is better)\n")
        print_table(score_table(result, metric["key"]))
        typer.echo("\ndifference to training alone, with its 95 % interval\n")
        print_table(difference_table(result, metric["key"]))
        if against := against_table(result, metric["key"]):
            typer.echo(f"\n{AGAINST[0].lower()}{AGAINST[1:]}\n")
            print_table(against)
    typer.echo(f"\ncost over {len(result['seeds'])} seed(s)\n")
    print_table(cost_table(result))
    typer.echo()
    for line in [*comparison_verdict(result), *worse_off_warnings(result), *result["notes"]]:
        typer.echo(line)
    typer.echo(f"report: {done.path / 'report.html'}")


def _print_result(done: "Run") -> None:
    from silotune.results.summary import (
        budget_lines,
        budget_warnings,
        cost_lines,
        is_scored,
        label_table,
        loss_table,
        prediction_notes,
        prediction_table,
        unit_of,
        worse_off,
    )

    summary: dict[str, Any] = done.summary
    if is_scored(summary):
        typer.echo(f"\nheld-out loss ({unit_of(summary)}, lower is better)\n")
    else:
        typer.echo("\nrows (held-out loss was not measured)\n")
    print_table(loss_table(summary))
    if labels := label_table(summary):
        typer.echo("\nheld-out labels (higher is better)\n")
        print_table(labels)
    if lost := worse_off(summary):
        typer.echo(f"\nnot better than the base for: {', '.join(lost)}")
    for text in budget_warnings(summary):
        typer.echo(f"\n{text}")
    typer.echo()
    if done.config.report.note:
        typer.echo(done.config.report.note)
    for line in [*budget_lines(summary), *cost_lines(summary)]:
        typer.echo(line)
    if "privacy" in summary:
        from silotune.federation.privacy_statement import privacy_lines

        typer.echo(f"privacy: {privacy_lines(summary['privacy'])[0]}")
    if predicted := prediction_table(summary):
        typer.echo()
        print_table(predicted)
        for note in prediction_notes(summary):
            typer.echo(f"note: {note}")
        typer.echo()
    typer.echo(f"adapter: {done.path / 'adapter'}")
    if done.config.report.page:
        typer.echo(f"report: {done.path / 'report.html'}")


def _print_answers(done: "Run") -> None:
    """One held-out question, answered before and after."""
    for sample in done.samples[:1]:
        typer.echo(f"\nquestion   {plain(sample['question'])}")
        for arm, text in sample["answers"].items():
            typer.echo(f"{arm:<10} {plain(text)}")
    typer.echo(f'\nask it yourself: silotune ask {done.path} "your question"')
