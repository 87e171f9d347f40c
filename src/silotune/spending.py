"""What a run has spent of its hours, kept in its folder so that a resumed run counts it too.

The rounds may go on in another process than the one that began the run, on the same machine; there
`time.perf_counter` counts the same. Bytes need no such file: they are in metrics.jsonl.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from silotune.disk import write_json
from silotune.store import Row, RunFolder, trained

Clock = Callable[[], float]
"""Seconds of which only differences count, the same in all processes of this machine."""
FILE = "budget.json"
"""earlier: seconds of the parts before this one; began: when this one did, by the clock; seconds:
of all parts, when it was last written; ended_by: the ceiling that ends the run, or null."""


def begin_part(folder: RunFolder, began: float) -> None:
    """Note that a run begins, or goes on.

    Args:
        folder: The run's.
        began: When, by the clock.
    """
    before = read_spent(folder)
    earlier = 0.0 if before is None else before["seconds"]
    _write(folder, earlier=earlier, began=began, seconds=earlier, ended_by=None)


def read_spent(folder: RunFolder) -> dict[str, Any] | None:
    """What is written down, see `FILE`; None for a run without a budget."""
    return folder.read_json(FILE)


def seconds_spent(folder: RunFolder, clock: Clock) -> float:
    """Seconds of all parts of a run until now, the time between them left out."""
    known = read_spent(folder)
    return 0.0 if known is None else known["earlier"] + clock() - known["began"]


def write_spent(folder: RunFolder, clock: Clock, *, ended_by: str | None) -> None:
    """Write down what is spent until now: a kill after this line loses none of it.

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
    """Bring the seconds up to date, where they are counted, and leave the rest as it is."""
    if (known := read_spent(folder)) is not None:
        write_spent(folder, clock, ended_by=known["ended_by"])


def _write(
    folder: RunFolder, *, earlier: float, began: float, seconds: float, ended_by: str | None
) -> None:
    known = {"earlier": earlier, "began": began, "seconds": seconds, "ended_by": ended_by}
    write_json(folder.path / FILE, known)


def expected_seconds(rows: Sequence[Row]) -> tuple[float, float]:
    """What the next round, and the scoring after the last one, will take by what was seen so far.

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
    """Seconds in which all clients scored the adapter that a round began with.

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
