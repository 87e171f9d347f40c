"""The command before a run that says what it would cost: plan."""

from typing import TYPE_CHECKING, Annotated

import typer

from silotune.cli.frame import errors_as_exit_codes, print_json, print_table
from silotune.cli.run import Overrides, Recipe

if TYPE_CHECKING:
    from silotune.workflows.plan.fit import Limits, Prediction
    from silotune.workflows.plan.plan import Plan


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(plan)


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="GB", min=0, help="Say what fits so much memory for one client."),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--bytes", metavar="N", min=0, help="Say what fits so many bytes in all."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(min=0, help="Say what fits so much time on this machine.")
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Run one real step, where the base model is at hand.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the numbers.")] = False,
) -> None:
    """Say what a run would cost before it begins: bytes, memory, time, and what would fit."""
    with errors_as_exit_codes():
        import silotune

        limits = _limits(memory, size, hours)
        found = silotune.plan(recipe, overrides or (), measured=measure, limits=limits)
        if json:
            print_json(found.numbers())
            return
        _print_bytes(found)
        _print_memory(found)
        _print_times(found)
        _print_changes(found)
        typer.echo()
        for text in found.notes:
            typer.echo(f"note: {text}")


def _limits(memory: float | None, size: int | None, hours: float | None) -> "Limits | None":
    from silotune.workflows.plan.fit import Limits

    if memory is None and size is None and hours is None:
        return None
    return Limits(
        memory_bytes=None if memory is None else round(memory * 1e9),
        size_bytes=size,
        seconds=None if hours is None else hours * 3600,
    )


def _print_bytes(found: "Plan") -> None:
    from silotune.core.wording import human_bytes

    sent = found.traffic
    lines: list[tuple[str, int]] = [
        ("to a client, in a round", sent.down),
        ("from a client, in a round", sent.up),
        (f"a round, {sent.num_asked} of {sent.num_clients} client(s)", sent.per_round),
        (f"{sent.rounds} round(s) of training", sent.training),
        ("messages for scores alone", sent.scoring),
        ("in all", sent.total),
    ]
    if sent.head_down:
        lines.insert(2, ("of these the head: to a client", sent.head_down))
        lines.insert(3, ("of these the head: from a client", sent.head_up))
    if sent.kept:
        lines.insert(2, ("learned and never sent", sent.kept))
    typer.echo(f"messages, {sent.num_values:,} trained numbers\n")
    body = [(what, f"{size:,}", human_bytes(size)) for what, size in lines]
    print_table([("what", "bytes", ""), *body])
    typer.echo(f"as FlowerTune's tracker counts: {sent.tracker_mib:.2f} MiB")


def _print_memory(found: "Plan") -> None:
    from silotune.core.wording import human_bytes

    batch = found.batch
    typer.echo(
        f"\nmemory, estimated for {batch.num_rows} row(s) of {batch.length} tokens, "
        f"{batch.num_trained} of them learned\n"
    )
    lines: list[tuple[str, ...]] = [("part", "a client", "the server")]
    client = {} if found.client is None else vars(found.client)
    server = vars(found.server)
    for part in (*client, *(part for part in server if part not in client)):
        own = (human_bytes(held[part]) if part in held else "-" for held in (client, server))
        lines.append((part, *own))
    total = "-" if found.client is None else human_bytes(found.client.total)
    lines.append(("at its peak", total, human_bytes(found.server.total)))
    print_table(lines)
    if found.measured is not None:
        typer.echo(f"measured on {found.measured.device}: {human_bytes(found.measured.peak_bytes)}")


def _print_times(found: "Plan") -> None:
    from silotune.core.wording import human_seconds

    if found.times is None:
        return
    typer.echo("\ntime on this machine, clients one after the other\n")
    words = {
        "start": "until the first round",
        "client": "a client, in a round",
        "round": "a round",
        "training": f"{found.traffic.rounds} round(s) of training",
        "scoring": "scores",
    }
    body = [(what, human_seconds(getattr(found.times, key))) for key, what in words.items()]
    print_table([("what", "time"), *body, ("in all", human_seconds(found.times.total))])


def _print_changes(found: "Plan") -> None:
    if found.fits is None:
        return
    if found.fits:
        typer.echo("\nit fits")
        return
    if not found.changes:
        typer.echo("\nit does not fit, nor does any change that was tried")
        return
    typer.echo("\nit does not fit; each of these lines would, the cheapest first\n")
    body = [
        (" ".join(f"{k}={_as_text(v)}" for k, v in own.overrides.items()), *_needs(own.needed))
        for own in found.changes
    ]
    print_table([("change", "memory", "bytes", "time"), *body])


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _needs(needed: "Prediction") -> tuple[str, ...]:
    from silotune.core.wording import human_bytes, human_seconds

    peak, seconds = needed.peak_bytes, needed.seconds
    return (
        "-" if peak is None else human_bytes(peak),
        human_bytes(needed.size_bytes),
        "-" if seconds is None else human_seconds(seconds),
    )
