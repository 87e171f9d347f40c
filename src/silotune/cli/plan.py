"""The command before a run that predicts what it would cost: plan."""

from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json
from silotune.cli.options import Overrides, Recipe

if TYPE_CHECKING:
    from silotune.workflows.plan.fit import Limits


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", min=0, help="Limit on memory, for one client.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--bytes", metavar="N", min=0, help="Limit on all messages together."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Limit on the time on this machine.")
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Measure one real step if the base model is on this machine.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Predict what a run would cost: bytes, memory, and time.

    With limits, this also lists changes to the recipe that would fit them.
    """
    with errors_as_exit_codes():
        import silotune
        from silotune.cli import previews
        from silotune.federation.progress import shown

        limits = _limits(memory, size, hours)
        with shown() as progress:
            found = silotune.plan(
                recipe, overrides or (), measured=measure, limits=limits, progress=progress
            )
        if json:
            print_json(found.numbers())
        else:
            previews.print_plan(found)


def _limits(memory: float | None, size: int | None, hours: float | None) -> "Limits | None":
    from silotune.workflows.plan.fit import Limits

    if memory is None and size is None and hours is None:
        return None
    return Limits(
        memory_bytes=None if memory is None else round(memory * 1e9),
        size_bytes=size,
        seconds=None if hours is None else hours * 3600,
    )
