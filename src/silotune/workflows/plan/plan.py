"""What a run would cost, before anything is trained: bytes, memory, seconds, and what would fit.

Bytes follow from the configuration and are exact if every client answers. Memory and seconds are
measured on one real step where the base is at hand; else memory is estimated, and no time is given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from silotune.core.algorithm import Algorithm, expected_layout, keep_local
from silotune.core.errors import DataError
from silotune.core.tree import layout_bytes, size_bytes
from silotune.core.types import ServerState
from silotune.core.wording import human_bytes, human_seconds
from silotune.data.files import locate
from silotune.federation.budget import RoundCost, has_time, is_within, round_cost
from silotune.models.sources import check_name
from silotune.recipes.parse import load_recipe
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.strategy import algorithm_of
from silotune.workflows.check import check, check_track
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
from silotune.workflows.plan.shapes import Shapes, build_shapes, first_state

HEADER_BYTES = 128
"""What FlowerTune's tracker adds to every tensor: the header of a .npy file."""
CHECKPOINTING = 1.2
"""A step with recomputed activations, against one without (docs/performance.md)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of the messages with tensors, as metrics.jsonl counts them, if every client answers."""

    down: int
    """To a client in a training message of the first round."""
    up: int
    """From a client in that round."""
    head_down: int
    """Of these, the classification head's."""
    head_up: int
    kept: int
    """Of the tensors that are learned and never sent."""
    num_values: int
    """Numbers that are trained."""
    num_clients: int
    num_asked: int
    """Clients that train in a round."""
    rounds: int
    """That are done: fewer than the recipe's where budget.bytes ends the run before."""
    training: int
    """Of all training messages, both ways."""
    scoring: int
    """Of the messages that only ask for a score."""
    bytes_down: int
    """Of all messages, as in summary.json."""
    bytes_up: int
    tracker_mib: float
    """As FlowerTune's tracker counts: training messages only, 4 bytes per number and 128 per
    tensor, in MiB."""

    @property
    def per_round(self) -> int:
        """Bytes of the first round's training messages."""
        return self.num_asked * (self.down + self.up)

    @property
    def total(self) -> int:
        """All bytes, both ways."""
        return self.bytes_down + self.bytes_up


@dataclass(frozen=True)
class Times:
    """Seconds of a run on this machine, its clients one after the other."""

    start: float
    """Libraries, model, rows as tokens."""
    client: float
    """One client in one round: its steps, on average over all."""
    round: float
    """One round's steps, on average."""
    training: float
    """The steps of all rounds."""
    score: float
    """All clients' held-out rows, once."""
    scoring: float
    """Held-out rows, as often as `evaluate.every` says."""

    @property
    def total(self) -> float:
        """Until the last score; without the server's own training, and without sample answers."""
        return self.start + self.training + self.scoring


@dataclass(frozen=True)
class Plan:
    """What a run would cost."""

    run: RunConfig
    traffic: Traffic
    client: ClientMemory | None
    """Estimated; None where the model does not show what its forward pass keeps."""
    server: ServerMemory
    batch: BatchShape
    """The forward batch that memory is given for."""
    measured: Measurement | None
    times: Times | None
    limits: Limits
    changes: tuple[Change, ...]
    """What would fit the limits, the mildest first; empty where the recipe does, or nothing."""
    fits: bool | None
    """Whether the recipe fits the limits as it is; None without limits."""
    notes: tuple[str, ...]
    """What is assumed, or missing and why."""

    @property
    def peak_bytes(self) -> int | None:
        """Of the process that trains: measured, else estimated.

        With what the server holds, where both are one process.
        """
        if self.measured is not None:
            return self.measured.peak_bytes
        return None if self.client is None else _peak(self.run, self.client, self.server)

    def numbers(self) -> dict[str, Any]:
        """Everything but the recipe, ready for JSON."""
        found = {key: value for key, value in asdict(self).items() if key != "run"}
        found["traffic"] |= {"per_round": self.traffic.per_round, "total": self.traffic.total}
        if self.client is not None:
            found["client"]["total"] = self.client.total
        found["server"]["total"] = self.server.total
        if self.times is not None:
            found["times"]["total"] = self.times.total
        return {**found, "peak_bytes": self.peak_bytes}


def plan(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    measured: bool = True,
    limits: Limits | None = None,
) -> Plan:
    """Say what a run would cost.

    Args:
        recipe: A shipped recipe's name, a TOML file, or a recipe.
        overrides: Keys to change, as "adapter.rank=4".
        measured: Run one real step in a process of its own, where the base is at hand.
        limits: What the run should stay within; then the plan says what would have to change.

    Raises:
        ConfigError, ModelError, DataError: With what is wrong, where, and how to mend it.
    """
    run = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, overrides)
    check_name(run.model.name)
    check_track(run)
    here = measured and is_at_hand(run)
    run, num_clients, notes = _look_at_rows(run, needed=here)
    shapes, algorithm = build_shapes(run), algorithm_of(run.algorithm)
    sent = traffic(run, shapes, algorithm, num_clients)
    notes += list(shapes.notes)
    found = measure(run.model_copy(update={"rounds": sent.rounds})) if here else None
    if isinstance(found, str):
        notes.append(f"no step could be measured, so no time is given: {found}")
        found = None
    elif found is None:
        why = "the base's weights are not on this machine" if measured else "nothing was measured"
        notes.append(f"memory is estimated, and no time is given: {why}")
    elif not found.real_rows:
        notes.append("the rows could not be read: measured with made-up ones of full length")
    times = None if found is None else expected_times(run, sent.rounds, sent.num_asked, found)
    notes += _budget_notes(run, sent, times)
    if run.server.work != "none":
        notes.append("the server's own training is in none of the numbers")
    batch = found.batch if found is not None else widest_batch(run)
    server = server_memory(run, shapes, algorithm, num_clients)
    try:
        client = client_memory(run, shapes, batch)
    except NotImplementedError:
        notes.append("this model does not show what its forward pass keeps: no estimate of memory")
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
    """The recipe with all labels, how many clients there are, and notes.

    A data set on the hub is read only where its rows are needed, and may be out of reach.
    """
    known = run.partition.num_clients if run.partition is not None else None
    enough = known is not None and (run.task != "classify" or run.data.labels is not None)
    if not enough or needed or locate(run.data.path) is not None:
        try:
            checked = check(run)
            return checked.run, len(checked.rows), list(checked.warnings)
        except DataError:
            if not enough or locate(run.data.path) is not None:
                raise
    assert known is not None, "otherwise the rows were read"
    return run, known, ["the rows were not read: the number of clients is the recipe's"]


# --- bytes ----------------------------------------------------------------------------------------


def traffic(run: RunConfig, shapes: Shapes, algorithm: Algorithm, num_clients: int) -> Traffic:
    """What a run sends, to the byte: the sums of `rounds.round_cost`, which the run itself uses.

    Raises:
        ConfigError: Not even one round fits below budget.bytes.
    """
    algorithm = keep_local(
        algorithm, shapes.head if run.adapter.head == "local" else frozenset[str]()
    )
    state = first_state(shapes, algorithm, num_clients)
    costs = list(expected_rounds(run, state, algorithm, num_clients))
    sent = expected_layout(algorithm, state)
    head = {n: t for n, t in state.adapter.items() if n in shapes.head}
    own = {n: t for n, t in state.adapter.items() if algorithm.local.personal(n)}
    last = costs[-1].last_bytes
    down = sum(cost.bytes_down for cost in costs) + last
    up = sum(cost.bytes_up for cost in costs)
    training = sum(cost.num_asked * (cost.down + cost.up) for cost in costs)
    num_down = len(state.adapter) + sum(len(state.extra[key]) for key in algorithm.broadcasts)
    one_each = costs[0].down + costs[0].up + HEADER_BYTES * (num_down + len(sent))
    return Traffic(
        down=costs[0].down,
        up=costs[0].up,
        head_down=size_bytes(head),
        head_up=layout_bytes({n: spec for n, spec in sent.items() if n in head}),
        kept=size_bytes(own),
        num_values=sum(t.numel() for t in state.adapter.values()),
        num_clients=num_clients,
        num_asked=costs[0].num_asked,
        rounds=len(costs),
        training=training,
        scoring=down + up - training,
        bytes_down=down,
        bytes_up=up,
        tracker_mib=len(costs) * costs[0].num_asked * one_each / 2**20,
    )


def expected_rounds(
    run: RunConfig, state: ServerState, algorithm: Algorithm, num_clients: int
) -> Iterator[RoundCost]:
    """The rounds that budget.bytes allows, with what each sends if every client answers.

    Args:
        run: The recipe.
        state: Any of the run's; only the sizes of its tensors are looked at.
        algorithm: With the tensors that stay at the clients.
        num_clients: How many there are.

    Raises:
        ConfigError: Not even one round fits below budget.bytes.
    """
    spent = 0
    for done in range(run.rounds):
        cost = round_cost(run, replace(state, round=done), algorithm, num_clients)
        if not is_within(run.budget.bytes, spent, cost, first=done == 0):
            return
        spent += cost.bytes_down + cost.bytes_up
        yield cost


# --- seconds --------------------------------------------------------------------------------------


def expected_times(run: RunConfig, rounds: int, num_asked: int, found: Measurement) -> Times:
    """Seconds of a run's first `rounds` rounds, by one that was measured.

    Args:
        run: The recipe.
        rounds: That are done: fewer than the recipe's where budget.bytes ends the run before.
        num_asked: Clients that train in a round.
        found: Made for this recipe, with at least so many rounds.
    """
    share = rounds / len(found.train_tokens)
    steps = sum(found.train_tokens[:rounds]) * found.seconds_per_token
    training = steps + share * found.seconds_building
    scored = [r for r in range(rounds) if run.evaluate.due(r, run.rounds)]
    once = sum(found.scored_tokens.values()) * found.seconds_per_scored_token
    return Times(
        start=found.seconds_start,
        client=training / rounds / num_asked,
        round=training / rounds,
        training=training,
        score=once,
        scoring=(len(scored) + 1) * once,  # the last adapter too
    )


def rounds_within(run: RunConfig, times: Times, rounds: int) -> int:
    """After how many of `rounds` rounds budget.hours ends the run, by the rule of the run itself.

    But for the first, which a run does even if it takes too long: here it may come out as 0.
    """
    spent, longest = times.start, 0.0
    for done in range(rounds):
        this = times.round + times.score * run.evaluate.due(done, run.rounds)
        longest = max(longest, this)
        if not has_time(run.budget.hours, spent, round_s=longest, last_s=times.score):
            return done
        spent += this
    return rounds


def _budget_notes(run: RunConfig, sent: Traffic, times: Times | None) -> Iterator[str]:
    """For every ceiling whether it is met, or which round is the last below it."""
    limit, hours = run.budget.bytes, run.budget.hours
    if limit is not None and sent.rounds < run.rounds:
        yield f"budget.bytes ends the run after round {sent.rounds} of {run.rounds}"
    elif limit is not None:
        yield f"budget.bytes is met: {human_bytes(sent.total)} of {human_bytes(limit)}"
    if hours is None:
        return
    if times is None:
        yield "whether budget.hours is met is not known: no time is given"
        return
    done, whole = rounds_within(run, times, sent.rounds), human_seconds(times.total)
    if done == sent.rounds:
        yield f"budget.hours is met: about {whole} of {human_seconds(3600 * hours)}"
    elif done == 0:
        yield too_short(run, times)
    else:
        yield f"budget.hours ends the run after about round {done} of {run.rounds}"


def too_short(run: RunConfig, times: Times) -> str:
    """That not even one round fits below budget.hours, and how long it takes with its scores."""
    first = times.start + times.round + 2 * times.score  # of the base, and of the result
    return (
        f"budget.hours = {run.budget.hours:g}, but one round takes about {human_seconds(first)}, "
        "loading and scores included"
    )


# --- what fits ------------------------------------------------------------------------------------


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
    """What a changed recipe needs: what was measured, and the difference of two estimates."""
    shapes, algorithm = build_shapes(run), algorithm_of(run.algorithm)
    sent = traffic(run, shapes, algorithm, made.traffic.num_clients)
    peak = made.peak_bytes
    if made.client is not None and peak is not None and run != made.run:
        share = run.train.batch_size / made.run.train.batch_size
        rows = max(1, round(made.batch.num_rows * share))
        trained = max(1, round(made.batch.num_trained * rows / made.batch.num_rows))
        batch = BatchShape(rows, made.batch.length, trained)
        server = server_memory(run, shapes, algorithm, made.traffic.num_clients)
        before = _peak(made.run, made.client, made.server)
        peak += _peak(run, client_memory(run, shapes, batch), server) - before
    seconds = None
    if made.times is not None:
        slower = run.model.gradient_checkpointing and not made.run.model.gradient_checkpointing
        rounds = sent.rounds / made.traffic.rounds
        training = made.times.training * rounds * (CHECKPOINTING if slower else 1.0)
        seconds = made.times.start + training + made.times.scoring
    return Prediction(peak, sent.total, seconds)
