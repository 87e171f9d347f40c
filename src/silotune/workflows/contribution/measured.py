"""From differences of single rows to each client's numbers, their intervals, and what they say."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from silotune.core.crossed import Scored, crossed_interval, holm, parts_of_mean

FEWEST_ROWS = 20
"""With fewer held-out rows of the others, an interval is too unreliable to be read."""
MAX_P = 0.05
"""A verdict's p-value is below it, corrected for all clients."""
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


def client_numbers(
    differences: Mapping[str, Mapping[str, RowDifferences]],
) -> dict[str, dict[str, Any]]:
    """Each client's numbers; positive: its updates lowered the loss of the others.

    Args:
        differences: By client, then by client whose rows they are; never a client's own.

    Returns:
        By client: num_rows; each of `ESTIMATES`, the mean over the other clients with two rows or
        more, each counting once, with its interval over rows and a verdict that is corrected for
        asking about several clients; and both means for each of the others.
    """
    found = {name: _numbers(others) for name, others in differences.items()}
    for estimate in ESTIMATES:
        corrected = holm(
            {
                name: own[estimate]["p_value"]
                for name, own in found.items()
                if own[estimate]["p_value"] is not None and own["num_rows"] >= FEWEST_ROWS
            }
        )
        for name, own in found.items():
            own[estimate]["verdict"] = verdict(own[estimate]["mean"], corrected.get(name))
    return found


def _numbers(others: Mapping[str, RowDifferences]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_rows": sum(len(rows.num_targets) for rows in others.values())}
    for name in ESTIMATES:
        parts = [
            parts_of_mean(Scored(client, getattr(rows, name)[None], rows.num_targets))
            for client, rows in others.items()
            if len(rows.num_targets) > 1 or len(others) == 1  # one row shows no variance
        ]
        found[name] = asdict(crossed_interval(parts))
    found["others"] = {
        client: {
            "num_rows": len(rows.num_targets),
            **{n: float(getattr(rows, n).sum() / rows.num_targets.sum()) for n in ESTIMATES},
        }
        for client, rows in others.items()
    }
    return found


def verdict(mean: float, corrected_p_value: float | None) -> Verdict:
    """What an estimate says about the others; see docs/contribution.md.

    Args:
        mean: The estimate.
        corrected_p_value: Against 0, corrected for all clients; None with too few rows.
    """
    if corrected_p_value is None:
        return "too few rows"
    if corrected_p_value >= MAX_P:
        return "noise"
    return "helped" if mean > 0 else "hurt"


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
    if own["low"] is None:  # one of the others has a single row
        return f"{own['mean']:+.4f}"
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
            "effect could be chance (p of 5 % or more, corrected for all clients), or the others "
            f"have fewer than {FEWEST_ROWS} held-out rows"
        )
    return lines
