"""What a card or a page of a private run may show: no number from rows that has no noise.

metrics.jsonl and summary.json keep all numbers: they are for whoever ran the simulation, who holds
the rows anyway. Cards and pages are made to be handed on.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from silotune.federation.metrics import SERVER_TEST, Row
from silotune.results.summary import is_scored

KEPT = (
    *("event", "round", "client", "status", "num_examples", "bytes_down", "bytes_up", "num_asked"),
    *("lr", "num_steps", "noise_multiplier", "sampling_rate", "num_lots"),
)
"""The columns of metrics.jsonl that follow from the recipe, the numbers of rows, and messages."""


WITHHELD = ("scores", "metric", "predicted", "finish")
"""Parts of a summary that are about rows, without noise."""


class Published(NamedTuple):
    """The results of a run as others may see them."""

    summary: Mapping[str, Any]
    rows: Sequence[Row]
    split: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]


def published(
    summary: Mapping[str, Any],
    rows: Sequence[Row] = (),
    split: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
) -> Published:
    """Leave out what [privacy] does not cover; everything stays if the run is not private.

    Args:
        summary: summary.json.
        rows: metrics.jsonl.
        split: Rows, lengths and labels of each client.
        samples: Questions with their answers.

    Returns:
        Without losses, scores, norms, numbers of tokens, lengths and labels of rows, rows, times
        of training and memory, which depends on the longest rows.
    """
    if "privacy" not in summary:
        return Published(summary, rows, split or {}, samples)
    clients = {name: _without_losses(own) for name, own in summary["clients"].items()}
    safe = {key: value for key, value in summary.items() if key not in WITHHELD}
    safe |= {"clients": clients, "overall": _without_losses(summary["overall"])}
    safe["is_withheld"] = is_scored(summary)  # real clients send no score in the first place
    safe |= dict.fromkeys(("tokens_trained", "seconds_training", "peak_memory_bytes"))
    # the server's test set belongs to no client, and the adapters that it scores have noise
    kept = [
        row
        if row["event"] == SERVER_TEST
        else {key: value for key, value in row.items() if key in KEPT}
        for row in rows
        if row["event"] in ("train", "round", SERVER_TEST)
    ]
    return Published(safe, kept, {}, ())


def _without_losses(scored: Mapping[str, Any]) -> dict[str, Any]:
    return {**scored, "base_loss": None, "federated_loss": None}
