"""What a run would cost, before anything is trained: bytes, memory, seconds, and what would fit.

Bytes follow from the configuration and are exact if every client answers. Memory and seconds are
measured on one real step if the base is on this machine. Otherwise memory is estimated and no time
is given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from silotune.core.errors import DataError
from silotune.core.public_call import public
from silotune.core.wording import human_bytes, human_seconds
from silotune.data.files import locate
from silotune.federation.progress import Progress
from silotune.models.sources import check_name
from silotune.recipes.auto import resolve_auto
from silotune.recipes.parse import resolve_recipe
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.strategy import algorithm_of
from silotune.workflows.check import check, check_track, known_clients
from silotune.workflows.in_memory import from_memory
from silotune.workflows.plan.fit import Change, Limits, Prediction, find_changes
from silotune.workflows.plan.measure import Measurement, is_at_hand, measure
from silotune.workflows.plan.memory import (
    BatchShape,
    ClientMemory,
    ServerMemory,
    client_memory,
    server_memory,
    widest_batch,
)
from silotune.workflows.plan.shapes import build_shapes
from silotune.workflows.plan.times import Times, expected_times, rounds_within, too_short
from silotune.workflows.plan.traffic import Traffic, traffic

CHECKPOINTING = 1.2
"""Time of a step that recomputes activations, relative to one that does not
(docs/measurements.md)."""


@dataclass(frozen=True)
class Plan:
    """What a run would cost: sizes in bytes, times in seconds."""

    run: RunConfig
    traffic: Traffic
    client: ClientMemory | None
    """Estimated; None if the model does not show what its forward pass keeps."""
    server: ServerMemory
    batch: BatchShape
    """The forward batch that the memory figures are for."""
    measured: Measurement | None
    times: Times | None
    limits: Limits
    changes: tuple[Change, ...]
    """Changes that would fit the limits, mildest first; empty if none are needed or none fit."""
    fits: bool | None
    """Whether the recipe fits the limits as it is; None without limits."""
    notes: tuple[str, ...]
    """What is assumed, and what is missing and why."""

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory of the process that trains: measured if possible, otherwise estimated.

        It includes the server's memory if both are one process.
        """
        if self.measured is not None:
            return self.measured.peak_bytes
        return None if self.client is None else _peak(self.run, self.client, self.server)

    def numbers(self) -> dict[str, Any]:
        """Everything except the recipe, ready for JSON."""
        found = {key: value for key, value in asdict(self).items() if key != "run"}
        found["traffic"] |= {"total": self.traffic.total}
        if self.client is not None:
            found["client"]["total"] = self.client.total
        found["server"]["total"] = self.server.total
        if self.times is not None:
            found["times"]["total"] = self.times.total
        return {**found, "peak_bytes": self.peak_bytes}


@public
def plan(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    measured: bool = True,
    limits: Limits | None = None,
    rows: Any = None,
    model: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """Predict what a run would cost.

    Args:
        recipe: A shipped recipe's name, a TOML file, or a recipe.
        overrides: Keys to change, such as "adapter.rank=4".
        measured: Run one real step in a separate process if the base is on this machine.
        limits: Limits for the run; the plan then lists changes that would fit them.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written to a folder that is removed in the end.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.
        progress: Told what takes time; silent by default.

    Returns:
        Bytes, and, where they could be measured or estimated, memory and seconds.

    Raises:
        ConfigError, ModelError, DataError: What is wrong, where, and how to fix it.
    """
    with from_memory(rows, model, overrides) as changed:
        return _plan(
            resolve_recipe(recipe, changed),
            progress or Progress(),
            measured=measured,
            limits=limits,
        )


def _plan(run: RunConfig, progress: Progress, *, measured: bool, limits: Limits | None) -> Plan:
    run = resolve_auto(run)
    check_name(run.model.name)
    check_track(run)
    here = measured and is_at_hand(run)
    progress.doing("reading the rows")
    run, num_clients, notes = _look_at_rows(run, needed=here)
    shapes, algorithm = build_shapes(run), algorithm_of(run.algorithm)
    sent = traffic(run, shapes, algorithm, num_clients)
    notes += list(shapes.notes)
    if here:
        progress.doing(f"measuring one step of {run.model.name} in a separate process")
    outcome = measure(run.model_copy(update={"rounds": sent.rounds})) if here else None
    notes += _measurement_notes(outcome, wanted=measured)
    found = outcome if isinstance(outcome, Measurement) else None
    notes += found.surprises if found is not None else ()
    times = None if found is None else expected_times(run, sent.rounds, sent.num_asked, found)
    notes += _budget_notes(run, sent, times)
    if run.server.work != "none":
        notes.append("the numbers do not include the server's own training")
    if times is not None and run.runtime.together != 1:
        notes.append(
            "the seconds are for one client after another: runtime.together may take fewer"
        )
    if (num := run.runtime.client_processes) > 1:
        notes.append(
            f"memory and seconds are for one process: runtime.client_processes = {num} need up to "
            f"{num} times the memory, and less time"
        )
    if run.evaluate.server_path is not None:
        notes.append("the numbers do not include the server's own scores (evaluate.server_path)")
    batch = found.batch if found is not None else widest_batch(run)
    server = server_memory(run, shapes, algorithm, num_clients)
    try:
        client = client_memory(run, shapes, batch, num_asked=sent.num_asked)
    except NotImplementedError:
        notes.append(
            "memory is not estimated: this model does not show what its forward pass keeps"
        )
        client = None
    made = Plan(
        run=run,
        traffic=sent,
        client=client,
        server=server,
        batch=batch,
        measured=found,
        times=times,
        limits=limits or Limits(),
        changes=(),
        fits=None,
        notes=tuple(notes),
    )
    return made if limits is None else _fitted(made)


def _look_at_rows(run: RunConfig, *, needed: bool) -> tuple[RunConfig, int, list[str]]:
    """The recipe with all labels, the number of clients, and notes.

    A data set on the hub is read only if its rows are needed, and it may be unreachable.
    """
    known = known_clients(run)
    enough = known is not None and (run.task != "classify" or run.data.labels is not None)
    if not enough or needed or locate(run.data.path) is not None:
        try:
            checked = check(run)
            return checked.run, len(checked.rows), list(checked.warnings)
        except DataError:
            if not enough or locate(run.data.path) is not None:
                raise
    assert known is not None, "otherwise the rows were read"
    return run, known, ["the rows were not read: the number of clients is from the recipe"]


def _measurement_notes(outcome: Measurement | str | None, *, wanted: bool) -> Iterator[str]:
    """Why there is no measurement, or what was made up for it."""
    if isinstance(outcome, str):
        yield f"no step could be measured, so no time is given: {outcome}"
    elif outcome is None:
        why = "the base's weights are not on this machine" if wanted else "nothing was measured"
        yield f"memory is estimated, and no time is given: {why}"
    elif not outcome.real_rows:
        yield "the rows could not be read: measured with made-up rows of full length"


def _budget_notes(run: RunConfig, sent: Traffic, times: Times | None) -> Iterator[str]:
    """For every budget: whether the run stays within it, or the last round that does."""
    if run.stop.patience is not None:
        yield "stop.patience may end the run earlier: the numbers are for all rounds"
    limit, hours = run.budget.bytes, run.budget.hours
    if limit is not None and sent.rounds < run.rounds:
        yield f"budget.bytes ends the run after round {sent.rounds} of {run.rounds}"
    elif limit is not None:
        yield f"budget.bytes is met: {human_bytes(sent.total)} of {human_bytes(limit)}"
    if hours is None:
        return
    if times is None:
        yield "it is unknown whether budget.hours is met: no time is given"
        return
    done, total = rounds_within(run, times, sent.rounds), human_seconds(times.total)
    if done == sent.rounds:
        yield f"budget.hours is met: about {total} of {human_seconds(3600 * hours)}"
    elif done == 0:
        yield too_short(run, times)
    else:
        yield f"budget.hours ends the run after about round {done} of {run.rounds}"


# --- limits --------------------------------------------------------------------------------------


def _peak(run: RunConfig, client: ClientMemory, server: ServerMemory) -> int:
    if run.runtime.name != "in-process":
        return client.total
    return client.total + server.state + server.combining


def _fitted(made: Plan) -> Plan:
    now = _predict(made, made.run)
    if made.limits.allow(now):
        return replace(made, fits=True)
    changes = find_changes(made.run, made.limits, lambda run: _predict(made, run))
    return replace(made, fits=False, changes=tuple(changes))


def _predict(made: Plan, run: RunConfig) -> Prediction:
    """What a changed recipe needs: the measured values plus the difference of two estimates."""
    shapes, algorithm = build_shapes(run), algorithm_of(run.algorithm)
    sent = traffic(run, shapes, algorithm, made.traffic.num_clients)
    peak = made.peak_bytes
    if made.client is not None and peak is not None and run != made.run:
        share = run.train.batch_size / made.run.train.batch_size
        rows = max(1, round(made.batch.num_rows * share))
        if run.task == "prefer":
            rows = 2 * max(1, round(rows / 2))  # both answers of a pair
        trained = max(1, round(made.batch.num_trained * rows / made.batch.num_rows))
        batch = BatchShape(rows, made.batch.length, trained)
        server = server_memory(run, shapes, algorithm, made.traffic.num_clients)
        before = _peak(made.run, made.client, made.server)
        client = client_memory(run, shapes, batch, num_asked=sent.num_asked)
        peak += _peak(run, client, server) - before
    seconds = None
    if made.times is not None:
        slower = run.model.gradient_checkpointing and not made.run.model.gradient_checkpointing
        rounds = sent.rounds / made.traffic.rounds
        training = made.times.training * rounds * (CHECKPOINTING if slower else 1.0)
        seconds = made.times.start + training + made.times.scoring
    return Prediction(peak, sent.total, seconds)
