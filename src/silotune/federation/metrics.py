"""Rows of metrics.jsonl, and sums over them.

One row per event: a client trained, a client's held-out rows were scored, a round ended.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from silotune.core.stats import label_scores
from silotune.training.scoring import add_label_counts

Row = dict[str, Any]


def held_out_losses(rows: Sequence[Row]) -> dict[int, float]:
    """Overall held-out loss, weighted by tokens, by the round that produced the adapter.

    Among three or more clients, none counts for more than all the others together: a client says
    itself how many rows it has.
    """
    found: dict[int, list[tuple[float, int]]] = {}
    for row in rows:
        if row["event"] == "evaluate" and row["status"] == "ok":
            found.setdefault(row["round"], []).append((row["loss"], row["num_tokens"]))
    return {round_: _mean_loss(scores) for round_, scores in sorted(found.items())}


def _mean_loss(scores: Sequence[tuple[float, int]]) -> float:
    total = sum(tokens for _, tokens in scores)
    if len(scores) > 2:
        scores = [(loss, min(tokens, total - tokens)) for loss, tokens in scores]
        total = sum(tokens for _, tokens in scores)
    return sum(loss * tokens for loss, tokens in scores) / total


def trained(rows: Iterable[Row]) -> list[Row]:
    """The rows of clients that trained; the row of a client that failed only has a reason."""
    return [row for row in rows if row["event"] == "train" and "train_loss" in row]


def train_loss(rows: Iterable[Row]) -> float:
    """Training loss over all targets of these rows' clients; 0 if none trained."""
    own = trained(rows)
    # rows from older versions of silotune have no num_targets
    weights = [row.get("num_targets", row["num_tokens"]) for row in own]
    total = sum(row["train_loss"] * weight for row, weight in zip(own, weights, strict=True))
    return total / max(1, sum(weights))


def overall_scores(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Overall accuracy, macro F1 and Matthews correlation, by the round that produced the adapter.

    Empty for tasks other than classify.
    """
    found: dict[int, list[list[list[int]]]] = {}
    for row in rows:
        if row["event"] == "evaluate" and "label_counts" in row:
            found.setdefault(row["round"], []).append(row["label_counts"])
    return {
        round_: label_scores(add_label_counts(counts)) for round_, counts in sorted(found.items())
    }
