"""What each client should take, and what everyone gains if each takes its best.

A client chooses by its own validation rows, seed by seed, as it would after a single run. Its
choice is then scored on held-out rows, which had no part in it. Numbers in, numbers out.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.workflows.compare.names import INTERPOLATION, LOCAL, OWN_STEPS, RESULT, extension
from silotune.workflows.compare.statistics import (
    RowScores,
    Scores,
    compare_arms,
    lines_of,
    with_interval,
)

BEST = "best"
"""The arm that consists of every client's choice."""
BEST_TITLE = (
    "If each client takes what its validation rows prefer: minus the best that it could do alone"
)
DIFFERENCE = "arm minus local"
DIFFERENCE_EXTENDED = (
    f"{DIFFERENCE} (“federated + ...” minus “local + ...”, which goes on in the same way)"
)
EXTENSION_TITLE = "Federated minus local, both with the same steps of the client's own afterwards"


def choose_best(
    scores: Scores,
    losses: Mapping[str, Mapping[int, Mapping[str, float]]],
    *,
    num_train: Mapping[str, int],
) -> dict[str, Any]:
    """Let every client choose, and compare its choice with the best that it could do alone.

    Args:
        scores: As in `compare_arms`.
        losses: On validation rows: arm -> seed -> client. Of equal arms, the first is chosen, so a
            client stays alone in doubt.
        num_train: Number of train rows of every client.

    Returns:
        alone and takes: client -> the arm that it chooses, by seed, among those that need nobody
        else and among all; clients and overall: scores, differences from the former, intervals
        and verdicts as in `compare_arms`, under the name "best".
    """
    lone = [arm for arm in losses if arm.startswith(LOCAL)]
    alone = {client: _choices(losses, lone, client) for client in sorted(num_train)}
    takes = {client: _choices(losses, list(losses), client) for client in sorted(num_train)}
    found = compare_arms(
        {LOCAL: _rows_of(scores, alone), BEST: _rows_of(scores, takes)}, num_train=num_train
    )
    return {
        "alone": {client: list(by_seed.values()) for client, by_seed in alone.items()},
        "takes": {client: list(by_seed.values()) for client, by_seed in takes.items()},
        "clients": found["clients"],
        "overall": found["overall"],
    }


def _choices(
    losses: Mapping[str, Mapping[int, Mapping[str, float]]], arms: Sequence[str], client: str
) -> dict[int, str]:
    """Seed -> the arm with the lowest validation loss."""
    return {
        seed: min(arms, key=lambda arm: losses[arm][seed].get(client, math.inf))
        for seed in losses[LOCAL]
    }


def _rows_of(
    scores: Scores, chosen: Mapping[str, Mapping[int, str]]
) -> dict[int, dict[str, RowScores]]:
    """Seed -> client -> the held-out rows under the arm that it has chosen."""
    return {
        seed: {client: scores[by_seed[seed]][seed][client] for client, by_seed in chosen.items()}
        for seed in scores[LOCAL]
    }


# --- in words -------------------------------------------------------------------------------------


def best_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: what each client takes, and what it gains over the best alone.

    Empty if nobody could choose.
    """
    if not (best := comparison.get("best")):
        return []
    lines = [("client", "takes", "minus best alone", "verdict")]
    for name, numbers in lines_of(best):
        takes = _in_words(best["takes"][name]) if numbers is not best["overall"] else ""
        gap = with_interval(numbers["differences"][metric][BEST], signed=True)
        lines.append((name, takes, gap, numbers["verdicts"][metric][BEST]))
    return lines


def difference_of(comparison: Mapping[str, Any]) -> str:
    """What a difference in this comparison is, in words."""
    extended = extension(RESULT, OWN_STEPS) in comparison["arms"]
    return DIFFERENCE_EXTENDED if extended else DIFFERENCE


def choice_tables(
    comparison: Mapping[str, Any], metric: str
) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Title and table, where there are any: the arms of [finish], and what each client takes."""
    found = [
        (EXTENSION_TITLE, extension_table(comparison, metric)),
        (BEST_TITLE, best_table(comparison, metric)),
    ]
    return [(title, table) for title, table in found if table]


def extension_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: federated minus local after own steps, and with a share of them.

    Empty without [finish].
    """
    ways = [w for w in (OWN_STEPS, INTERPOLATION) if extension(RESULT, w) in comparison["arms"]]
    if not ways:
        return []
    header = ["client"]
    for way in ways:
        header += [f"+ {way}", "verdict"]
    lines = [tuple(header)]
    for name, numbers in lines_of(comparison):
        cells = [name]
        for arm in (extension(RESULT, way) for way in ways):
            cells.append(with_interval(numbers["differences"][metric][arm], signed=True))
            cells.append(numbers["verdicts"][metric][arm])
        lines.append(tuple(cells))
    return lines


def _in_words(by_seed: Sequence[str]) -> str:
    """For example "federated", or "federated (2 of 3 seeds), local (1)"."""
    counts = Counter(by_seed).most_common()
    if len(counts) == 1:
        return counts[0][0]
    (first, most), *rest = counts
    said = [f"{first} ({most} of {len(by_seed)} seeds)"]
    return ", ".join([*said, *(f"{arm} ({num})" for arm, num in rest)])
