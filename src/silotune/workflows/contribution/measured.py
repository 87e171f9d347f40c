"""From differences of single rows to each client's numbers, their intervals, and what they say."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from silotune.core.stats import Interval, Scored, mean_interval

FEWEST_ROWS = 20
"""With fewer held-out rows of the others, an interval is too unreliable to be read."""
Verdict = Literal["helped", "hurt", "noise", "too few rows"]
ESTIMATES = ("leave_one_out", "gradient")


@dataclass(frozen=True)
class RowDifferences:
    """What one client's updates did to the held-out rows of another."""

    num_targets: np.ndarray
    """(rows,): a row's targets: tokens, or 1 with the task classify."""
    leave_one_out: np.ndarray
    """(rows,): loss without the client's updates minus loss with them, summed over targets."""
    gradient: np.ndarray
    """(rows,): the first-order estimates, summed over the rounds and over targets."""


def client_numbers(others: Mapping[str, RowDifferences], *, seed: int) -> dict[str, Any]:
    """One client's numbers; positive: its updates lowered the loss of the others.

    Args:
        others: By client whose rows they are; without the client itself.
        seed: Seed of the bootstrap.

    Returns:
        num_rows; each of `ESTIMATES`, the mean over the other clients, each counting once, with its
        interval over rows and a verdict; and both means for each of the others.
    """
    num_rows = sum(len(rows.num_targets) for rows in others.values())
    found: dict[str, Any] = {"num_rows": num_rows}
    for name in ESTIMATES:
        scored = [
            Scored(client, getattr(rows, name)[None], rows.num_targets)
            for client, rows in others.items()
        ]
        interval = mean_interval(scored, seed=seed)
        found[name] = {**asdict(interval), "verdict": verdict(interval, num_rows)}
    found["others"] = {
        client: {
            "num_rows": len(rows.num_targets),
            **{n: float(getattr(rows, n).sum() / rows.num_targets.sum()) for n in ESTIMATES},
        }
        for client, rows in others.items()
    }
    return found


def verdict(interval: Interval, num_rows: int) -> Verdict:
    """What an estimate says about the others; see docs/contribution.md."""
    if num_rows < FEWEST_ROWS:
        return "too few rows"
    if not interval.is_clear:
        return "noise"
    return "helped" if interval.mean > 0 else "hurt"


def contribution_table(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client.

    Args:
        found: contribution.json.
    """
    lines: list[tuple[str, ...]] = [
        ("client", "rounds", "rows of the others", "leave one out", "says", "gradient", "says")
    ]
    for name, own in found["clients"].items():
        cells = [cell for key in ESTIMATES for cell in (_shown(own[key]), own[key]["verdict"])]
        lines.append((name, str(own["num_rounds"]), str(own["num_rows"]), *cells))
    return lines


def _shown(own: Mapping[str, Any]) -> str:
    return f"{own['mean']:+.4f} [{own['low']:+.4f}, {own['high']:+.4f}]"


def contribution_lines(found: Mapping[str, Any]) -> list[str]:
    """What the table's numbers are, what they cost, and which of them are noise.

    Args:
        found: contribution.json.
    """
    cost = found["cost"]
    unclear = [
        f"'{name}'"
        for name, own in found["clients"].items()
        if own["leave_one_out"]["verdict"] in ("noise", "too few rows")
    ]
    lines = [
        f"in {found['unit']}, held-out loss of the other clients; above 0: the client's updates "
        "lowered it",
        f"cost: {cost['replays']} replays, {cost['rows_forward']} rows forward, "
        f"{cost['rows_backward']} rows forward and backward",
        *(f"note: {text}" for text in found["notes"]),
    ]
    if unclear:
        lines.append(
            f"warning: nothing can be concluded from leave one out about {', '.join(unclear)}: the "
            f"95 % interval includes 0, or the others have fewer than {FEWEST_ROWS} held-out rows"
        )
    return lines
