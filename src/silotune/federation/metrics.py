"""Rows of metrics.jsonl, and sums over them.

One row per event: a client trained, a client's held-out rows were scored, a round ended, the server
trained, the server's test set was scored. A row about scores has `part = "validation"` if the
scored rows are there to choose by.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from silotune.core.stats import label_scores
from silotune.training.scoring import add_label_counts

Row = dict[str, Any]

SERVER_TEST = "server-test"
"""The event of the server's test set; its row belongs to the round that produced the adapter."""


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


def own_metrics(rows: Sequence[Row]) -> dict[int, float]:
    """The recipe's own metric, by the round that produced the adapter: weighted by rows."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row["event"] == "evaluate" and "metric" in row:
            found.setdefault(row["round"], []).append(row)
    return {
        round_: sum(r["metric"] * r["num_examples"] for r in scored)
        / sum(r["num_examples"] for r in scored)
        for round_, scored in sorted(found.items())
    }


def server_losses(rows: Iterable[Row]) -> dict[int, float]:
    """Loss on the server's test set, by the round that produced the adapter."""
    scored = (row for row in rows if row["event"] == SERVER_TEST and row["status"] == "ok")
    return {row["round"]: row["loss"] for row in scored}


def server_set(rows: Iterable[Row]) -> str:
    """What the server's test set is called: rows that choose are no test."""
    chooses = any("part" in row for row in rows if row["event"] == SERVER_TEST)
    return f"server's {'validation' if chooses else 'test'} set"


def choosing_losses(rows: Sequence[Row], by: str) -> dict[int, float]:
    """The losses that choose a round, by `evaluate.choose_by`."""
    return server_losses(rows) if by == "server" else held_out_losses(rows)


def part_of(rows: Iterable[Row]) -> str:
    """Which of the clients' rows were scored: "validation" or "held-out"."""
    scored = (row for row in rows if row["event"] == "evaluate" and row["status"] == "ok")
    return next((str(row["part"]) for row in scored if "part" in row), "held-out")


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


PAIR_SCORES = {
    "preference_accuracy": "preference accuracy",
    "reward_margin": "reward margin",
    "win_rate": "win rate",
}
"""Scores of the task prefer beside the loss, and what people call them."""
LABEL_SCORES = {"accuracy": "accuracy", "macro_f1": "macro F1", "mcc": "Matthews"}
"""The same of the task classify."""


def overall_scores(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Scores beside the loss over all rows, by the round that produced the adapter.

    With classify accuracy, macro F1 and Matthews correlation; with prefer `PAIR_SCORES`, of which
    the reference itself has no accuracy. Empty for other tasks.
    """
    found: dict[int, list[list[list[int]]]] = {}
    if any("win_rate" in row for row in rows):
        return _pair_scores(rows)
    for row in rows:
        if row["event"] == "evaluate" and "label_counts" in row:
            found.setdefault(row["round"], []).append(row["label_counts"])
    return {
        round_: label_scores(add_label_counts(counts)) for round_, counts in sorted(found.items())
    }


def _pair_scores(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
    """Shares and means over all pairs of all clients."""
    by_round: dict[int, list[Row]] = {}
    for row in rows:
        if row["event"] == "evaluate" and "win_rate" in row:
            by_round.setdefault(row["round"], []).append(row)
    found: dict[int, dict[str, float]] = {}
    for round_, own in sorted(by_round.items()):
        total = sum(row["num_tokens"] for row in own)
        # a client whose margins are all 0 prefers nothing
        sums = {key: sum(r.get(key, 0.0) * r["num_tokens"] for r in own) for key in PAIR_SCORES}
        if not any("preference_accuracy" in row for row in own):
            sums.pop("preference_accuracy")
        found[round_] = {key: value / total for key, value in sums.items()}
    return found
