"""Commands before and during a run: demo, run, check, compare, pretrain-teacher."""

from pathlib import Path
from typing import Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json
from silotune.cli.options import (
    AsSummary,
    OptionalRecipe,
    Out,
    Overrides,
    Recipe,
    recipe_and_overrides,
)


def demo(overrides: Overrides = None, out: Out = None, json: AsSummary = False) -> None:
    """Fine-tune a small chat model across five hospitals.

    Everything runs on this machine's processor.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import shown

        with shown() as progress:
            done = silotune.run("hospitals", overrides or (), out=out, progress=progress)
        if json:
            print_json(done.summary)
        else:
            results.print_run(done)
            results.print_answers(done)


def run(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(help="Run folder to resume or extend, with its own recipe.")
    ] = None,
    json: AsSummary = False,
) -> None:
    """Run a recipe, resume an interrupted run, or extend a run.

    --resume FOLDER continues an interrupted run; with rounds=N, a finished one too.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import shown

        recipe, changed = recipe_and_overrides(recipe, overrides, resume)
        with shown() as progress:
            done = silotune.run(recipe, changed, out=out, resume=resume, progress=progress)
        if json:
            print_json(done.summary)
        else:
            results.print_run(done)


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the numbers of rows as JSON.")
    ] = False,
) -> None:
    """Find every mistake in a recipe and its data.

    No model is loaded. Without a network, everything except rows on the hub is checked.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results

        checked = silotune.check(recipe, overrides or (), offline=not json)
        if json:
            print_json(
                {
                    name: {"num_train": len(own.train), "num_eval": len(own.evaluation)}
                    for name, own in checked.rows.items()
                }
            )
        else:
            results.print_checked(checked)


def compare(
    recipe: OptionalRecipe = None,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds per arm; overrides compare.seeds.")
    ] = None,
    out: Out = None,
    resume: Annotated[
        Path | None, typer.Option(help="Comparison to resume, with its own recipe.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print comparison.json.")] = False,
) -> None:
    """Compare federated training with training alone.

    All arms are scored on the same held-out rows: the base, each client alone, federated,
    centralized.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.federation.progress import shown

        recipe, changed = recipe_and_overrides(recipe, overrides, resume)
        if seeds is not None:
            changed.append(f"compare.seeds={seeds}")
        with shown() as progress:
            done = silotune.compare(recipe, changed, out=out, resume=resume, progress=progress)
        if json:
            print_json(done.result)
        else:
            results.print_comparison(done)


def pretrain_teacher(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Model folder to create; by default runs/<time>-<recipe>-teacher."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print teacher.json.")] = False,
) -> None:
    """Train a recipe's teacher on the server's own rows.

    Later runs can use the model folder as distill.teacher.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import results
        from silotune.core.reading_back import read_object
        from silotune.federation.progress import shown

        with shown() as progress:
            place = silotune.pretrain_teacher(recipe, overrides or (), out=out, progress=progress)
        record = read_object(place / "teacher.json", fix="Train the teacher again.")
        if json:
            print_json(record)
        else:
            results.print_teacher(place, record, recipe)
