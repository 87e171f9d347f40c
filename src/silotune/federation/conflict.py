"""Clients whose changes point against each other, as opposed preferences make them.

If half of the clients prefer what the others reject, every client learns and their mean does not:
the changes cancel, and no single client is an outlier. What shows it is the cosine between the
changes of two clients, far below 0. The updates are compared by sketches of a few thousand numbers,
so that one of them is in memory at a time: Charikar, Chen and Farach-Colton 2002, "Finding Frequent
Items in Data Streams" (count sketch). A cosine of sketches has a standard error below 0.02.

Does not know what a row says. An opposed client need not be wrong, and noise hides the opposition.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from silotune.core.seeds import generator
from silotune.core.types import AdapterState, Updates
from silotune.federation.metrics import Row
from silotune.recipes.schema import RunConfig

LIMIT = -0.1
"""Below this cosine, two changes oppose each other; chance stays within five standard errors."""
BUCKETS = 4096


def opposed_pairs(run: RunConfig, updates: Updates) -> list[tuple[str, str, float]]:
    """The pairs of clients whose changes of a round oppose each other, with their cosine.

    Args:
        run: The recipe; only preferences are compared, and only where single updates may be seen.
        updates: What the clients sent.
    """
    if run.task != "prefer" or run.secure_sum.is_on or run.privacy.clips_at_server:
        return []
    names, rows = list[str](), list[Tensor]()
    for update in updates:
        names.append(update.client)
        rows.append(sketch(update.delta, run.seed))
    if len(rows) < 2:
        return []
    found = torch.stack(rows)
    found /= found.norm(dim=1, keepdim=True).clamp(min=1e-300)
    cosines = (found @ found.T).tolist()
    return [
        (one, other, cosines[i][j])
        for i, one in enumerate(names)
        for j, other in enumerate(names)
        if i < j and cosines[i][j] < LIMIT
    ]


def sketch(delta: AdapterState, seed: int) -> Tensor:
    """A change as `BUCKETS` numbers, float64, that keep its cosines with others nearly.

    Args:
        delta: Tensors of any shape. Not modified.
        seed: The same for all changes that are compared.
    """
    found = torch.zeros(BUCKETS, dtype=torch.float64)
    for name in sorted(delta):
        flat = delta[name].detach().cpu().double().flatten()
        rng = generator(seed, "sketch", name)
        places = torch.randint(0, BUCKETS, (flat.numel(),), generator=rng)
        signs = torch.randint(0, 2, (flat.numel(),), generator=rng).double() * 2 - 1
        found.index_add_(0, places, flat * signs)
    return found


def conflict_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Two sides of clients that opposed each other in most rounds; None if there are none.

    Args:
        rows: metrics.jsonl.

    Returns:
        `sides`, the larger one first, and `cosine`, the mean over opposed pairs.
    """
    rounds = [row for row in rows if row["event"] == "round"]
    trained: dict[int, set[str]] = {}
    for row in rows:
        if row["event"] == "train" and "num_steps" in row:
            trained.setdefault(row["round"], set()).add(row["client"])
    seen: dict[tuple[str, str], list[float]] = {}
    for row in rounds:
        for one, other, cosine in row.get("opposed", ()):
            seen.setdefault((one, other), []).append(cosine)
    lasting: dict[tuple[str, str], float] = {}
    for pair, cosines in seen.items():
        together = sum({*pair} <= names for names in trained.values())
        if 2 * len(cosines) > together:
            lasting[pair] = float(np.mean(cosines))
    if not lasting:
        return None
    return {"sides": _sides(lasting), "cosine": float(np.mean(list(lasting.values())))}


def _sides(opposed: Mapping[tuple[str, str], float]) -> list[list[str]]:
    """Two groups that most opposed pairs lie between: by the signs of the leading eigenvector."""
    names = sorted({name for pair in opposed for name in pair})
    matrix = np.zeros((len(names), len(names)))
    for (one, other), cosine in opposed.items():
        i, j = names.index(one), names.index(other)
        matrix[i, j] = matrix[j, i] = cosine
    _, vectors = np.linalg.eigh(matrix)
    leading = vectors[:, -1]
    sides = [[n for n, v in zip(names, leading, strict=True) if (v > 0) == up] for up in (1, 0)]
    return sorted(sides, key=lambda side: (-len(side), side))
