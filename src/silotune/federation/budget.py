"""What ends a run before its last round: bytes, hours, patience; and what it has spent."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from silotune.compression.changes import travels
from silotune.core.algorithm import Algorithm, broadcast_extra, expected_extra, expected_layout
from silotune.core.errors import ConfigError
from silotune.core.lora import is_beside, is_core
from silotune.core.tree import layout_bytes, size_bytes
from silotune.core.types import ServerState
from silotune.core.wording import counted
from silotune.federation.downlink import is_made_by_clients, news_bytes
from silotune.federation.metrics import Row, choosing_losses, trained
from silotune.federation.privacy_statement import num_released
from silotune.federation.run_folder import RunFolder
from silotune.federation.sampling import cohort_of
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import StopConfig


@dataclass(frozen=True)
class RoundCost:
    """Bytes of one round's messages if every client answers, known before the round."""

    down: int
    """Bytes to one client: the whole adapter, and what the algorithm sends with it."""
    news: int
    """Bytes to one client that holds the adapter of the round before."""
    up: int
    """Bytes from one client."""
    num_asked: int
    """Clients that train."""
    num_scoring: int
    """Other clients, which only score the adapter."""
    num_last: int
    """Clients that score the adapter after this round, if it is the last."""
    num_told: int
    """Of the clients that train or score, those that hold the adapter of the round before, or, in
    the first round, whose model begins with the first one."""
    num_asked_told: int
    """Of the clients that train."""
    news_last: int
    """Bytes to one client that has received the adapter of this round, for the last scoring."""
    start: int
    """Bytes of the adapter that the run started from, if it is sent along; see `num_new`."""
    num_new: int
    """Clients that receive it: they need it, and receive their first message after round 1."""
    num_asked_new: int
    """Of the clients that train."""

    @property
    def bytes_down(self) -> int:
        """To all clients, without the scoring after the last round."""
        num = self.num_asked + self.num_scoring
        whole = num - self.num_told
        return whole * self.down + self.num_told * self.news + self.num_new * self.start

    @property
    def training(self) -> int:
        """Of the messages to and from clients that train."""
        whole = self.num_asked - self.num_asked_told
        down = whole * self.down + self.num_asked_told * self.news
        return down + self.num_asked_new * self.start + self.bytes_up

    @property
    def bytes_up(self) -> int:
        """From all clients."""
        return self.num_asked * self.up

    @property
    def last_bytes(self) -> int:
        """Of the scoring after the final round."""
        told = min(self.num_last, self.num_asked + self.num_scoring)
        return (self.num_last - told) * self.down + told * self.news_last

    @property
    def size_bytes(self) -> int:
        """Of all messages if this round is the final one."""
        return self.bytes_down + self.bytes_up + self.last_bytes


def is_within(limit: int | None, spent: int, cost: RoundCost, *, first: bool) -> bool:
    """Whether a round, and the scoring of its result, fit within a run's byte budget.

    Args:
        limit: `budget.bytes`.
        spent: Bytes of the rounds before.
        cost: Of the round.
        first: Whether there is no round before it.

    Raises:
        ConfigError: Not even the first round does.
    """
    if limit is None or spent + cost.size_bytes <= limit:
        return True
    if first:
        raise ConfigError(
            f"budget.bytes = {limit}, but one round sends {cost.size_bytes} bytes.\n"
            "  Raise it, or send less: a lower adapter.rank or sampling.fraction."
        )
    return False


def has_time(hours: float | None, spent_s: float, *, round_s: float, last_s: float) -> bool:
    """Whether one more round, and the scoring of its result, fit within a run's time budget.

    Args:
        hours: `budget.hours`.
        spent_s: Seconds of the run so far.
        round_s: What the round is expected to take.
        last_s: What the scoring after it is expected to take.
    """
    return hours is None or spent_s + round_s + last_s <= 3600 * hours


def is_out_of_patience(cfg: StopConfig, losses: Mapping[int, float]) -> bool:
    """Whether the last `stop.patience` scored rounds brought no lower loss.

    The loss of the base does not count: it is no result of the run. A loss that is not a number is
    not lower.

    Args:
        cfg: The recipe's.
        losses: The losses that choose, by round.
    """
    if cfg.patience is None:
        return False
    lowest, num_worse = math.inf, 0
    for _, loss in sorted((r, loss) for r, loss in losses.items() if r > 0):
        if loss < lowest - cfg.min_delta:
            lowest, num_worse = loss, 0
        else:
            num_worse += 1
    return num_worse >= cfg.patience


def has_ceiling(run: RunConfig) -> bool:
    """Whether anything may end the run early that `FILE` records."""
    limits = (run.budget.bytes, run.budget.hours, run.stop.patience)
    return any(limit is not None for limit in limits)


def end_note(key: str, round_: str, stop: StopConfig, *, ends: str = "ends") -> str:
    """What ends a run and why, in one line.

    Args:
        key: The ceiling.
        round_: After which round, for example "3 of 10".
        stop: The recipe's.
        ends: The verb.
    """
    why = ""
    if key == "stop.patience" and stop.patience is not None:
        by = f" (by more than {stop.min_delta:g})" if stop.min_delta > 0 else ""
        rounds = counted(stop.patience, "scored round")
        why = f": {rounds} in a row without a lower validation loss{by}"
    return f"{key} {ends} the run after round {round_}{why}"


Clock = Callable[[], float]
"""A clock in seconds, shared by all processes of this machine; only differences matter."""

FILE = "budget.json"
"""earlier: seconds of the parts before this one; began: when this one did, by the clock; seconds:
of all parts, when it was last written; ended_by: the ceiling that ends the run, or null."""


def begin_part(folder: RunFolder, began: float) -> None:
    """Record that a run begins or resumes.

    Args:
        folder: The run's.
        began: When, by the clock.
    """
    before = read_spent(folder)
    earlier = 0.0 if before is None else before["seconds"]
    _write(folder, earlier=earlier, began=began, seconds=earlier, ended_by=None)


def read_spent(folder: RunFolder) -> dict[str, Any] | None:
    """The contents of `FILE`; None for a run without a budget."""
    return folder.read_json(FILE)


def seconds_spent(folder: RunFolder, clock: Clock) -> float:
    """Seconds of all parts of a run so far, without the time between them."""
    known = read_spent(folder)
    return 0.0 if known is None else known["earlier"] + clock() - known["began"]


def write_spent(folder: RunFolder, clock: Clock, *, ended_by: str | None) -> None:
    """Record what has been spent so far: a kill after this line loses none of it.

    Args:
        folder: The run's.
        clock: The one that the part began by.
        ended_by: The ceiling that ends the run, if one does.
    """
    if (known := read_spent(folder)) is None:
        known = {"earlier": 0.0, "began": clock()}
    seconds = known["earlier"] + clock() - known["began"]
    _write(
        folder, earlier=known["earlier"], began=known["began"], seconds=seconds, ended_by=ended_by
    )


def keep_spent(folder: RunFolder, clock: Clock) -> None:
    """Update the seconds if they are counted, and leave the rest unchanged."""
    if (known := read_spent(folder)) is not None:
        write_spent(folder, clock, ended_by=known["ended_by"])


def _write(
    folder: RunFolder, *, earlier: float, began: float, seconds: float, ended_by: str | None
) -> None:
    known = {"earlier": earlier, "began": began, "seconds": seconds, "ended_by": ended_by}
    folder.write_json(FILE, known)


def expected_seconds(rows: Sequence[Row]) -> tuple[float, float]:
    """Estimate the next round, and the scoring after the final one, from the rounds so far.

    Args:
        rows: metrics.jsonl.

    Returns:
        Seconds of the longest round; and of the longest scoring over all clients, 0 where nothing
        is scored.
    """
    scored: dict[int, dict[str, int]] = {}
    for row in rows:
        if row["event"] == "evaluate" and row["status"] == "ok":
            scored.setdefault(row["round"] + 1, {})[row["client"]] = row["num_examples"]
    beside: dict[int, dict[str, float]] = {}
    for row in trained(rows):
        seconds = row["seconds"] - row["seconds_training"]
        beside.setdefault(row["round"], {})[row["client"]] = seconds
    rounds = {row["round"]: row["seconds"] for row in rows if row["event"] == "round"}
    scoring = (
        _scoring(scored.get(r, {}), beside.get(r, {}), round_s=seconds)
        for r, seconds in rounds.items()
    )
    return max(rounds.values(), default=0.0), max(scoring, default=0.0)


def _scoring(scored: Mapping[str, int], beside: Mapping[str, float], *, round_s: float) -> float:
    """Seconds that all clients took to score the adapter a round began with.

    Args:
        scored: Held-out rows by client.
        beside: For each client that trained, its seconds besides its steps, nearly all of its
            score. Others score in a message of their own, whose seconds nobody takes, so they count
            by their rows.
        round_s: Of the round. Clients that score side by side are done sooner than one after the
            other, and the round held all of that and the training.
    """
    own = [client for client in beside if client in scored]
    if not own:
        return 0.0
    per_row = sum(beside[client] for client in own) / sum(scored[client] for client in own)
    return min(per_row * sum(scored.values()), round_s)


def next_ceiling(
    run: RunConfig,
    state: ServerState,
    algorithm: Algorithm,
    names: Sequence[str],
    folder: RunFolder,
    clock: Clock,
) -> str | None:
    """The limit that the next round, including the scoring of its result, would exceed.

    What was spent, and the answer, are written to the run folder.

    Returns:
        Its key, or None where there is no such ceiling, or no next round.

    Raises:
        ConfigError: Not even the first round fits below budget.bytes. That it does not fit below
            budget.hours shows only when it is done.
    """
    found, limit, hours = None, run.budget.bytes, run.budget.hours
    if run.privacy.unit != "none" and not run.privacy.is_at_client and state.round < run.rounds:
        # a round that a crash repeated was a release too
        found = "privacy" if num_released(folder) >= run.rounds else None
    if not has_ceiling(run):
        return found
    if found is None and state.round < run.rounds:
        rows, spent_s = folder.metrics(), seconds_spent(folder, clock)
        sent = sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in rows)
        cost = round_cost(run, state, algorithm, len(names))
        round_s, last_s = expected_seconds(rows) if hours is not None else (0.0, 0.0)
        if not is_within(limit, sent, cost, first=state.round == 0):
            found = "budget.bytes"
        elif state.round > 0 and not has_time(hours, spent_s, round_s=round_s, last_s=last_s):
            found = "budget.hours"
        elif is_out_of_patience(run.stop, choosing_losses(rows, run.evaluate.choose_by)):
            found = "stop.patience"
    write_spent(folder, clock, ended_by=found)
    return found


def round_cost(
    run: RunConfig, state: ServerState, algorithm: Algorithm, num_clients: int
) -> RoundCost:
    """What the round after `state` sends. Only the sizes of tensors are read."""
    names = [f"{n:09d}" for n in range(num_clients)]  # only their order matters to sampling
    cohort, received = _asked(run, names, state.round), _receive(run, names, state.round)
    before = _hold(run, algorithm, names, state.round - 1)
    beside = sum(map(size_bytes, broadcast_extra(state, algorithm).values()))
    extra = expected_extra(algorithm, state).values()
    new = _without_start(run, names, state.round) & received
    return RoundCost(
        down=size_bytes(state.adapter) + beside,
        news=news_bytes(run, algorithm, state, state.round) + beside,
        up=sum(map(layout_bytes, (travels(run.wire, expected_layout(algorithm, state)), *extra))),
        num_asked=len(cohort),
        num_scoring=len(received) - len(cohort),
        num_last=num_clients * (run.evaluate.every > 0),
        num_told=len(received & before),
        num_asked_told=len(cohort & before),
        news_last=news_bytes(run, algorithm, state, state.round + 1) + beside,
        start=size_bytes({n: t for n, t in state.adapter.items() if not _is_added(n)}),
        num_new=len(new),
        num_asked_new=len(cohort & new),
    )


def _is_added(name: str) -> bool:
    return is_beside(name) or is_core(name)


def _without_start(run: RunConfig, names: Sequence[str], done: int) -> set[str]:
    """Who needs the adapter that the run started from, and has not received it in a round before.

    In the first round it is the adapter that all receive.
    """
    if done == 0 or run.task != "prefer" or run.adapter.start is None:
        return set()
    left = set(names)
    for earlier in range(done):
        left -= _receive(run, names, earlier)
        if not left:
            break
    return left


def _asked(run: RunConfig, names: Sequence[str], done: int) -> set[str]:
    return set(cohort_of(run, names, done + 1))


def _hold(run: RunConfig, algorithm: Algorithm, names: Sequence[str], done: int) -> set[str]:
    """Who holds the adapter of `done` rounds, or of the next one: whoever received or made it."""
    if done <= 0 and is_made_by_clients(run, algorithm):
        return set(names)
    return set[str]() if done < 0 else _receive(run, names, done)


def _receive(run: RunConfig, names: Sequence[str], done: int) -> set[str]:
    """Who receives the adapter of `done` rounds before the next one: whoever trains or scores."""
    is_scored = run.evaluate.due(done, run.rounds)
    return set(names) if is_scored else _asked(run, names, done)
