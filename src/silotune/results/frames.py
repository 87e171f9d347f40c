"""Results as numbers for a notebook: lists of rows, and data frames made of them.

Tables for people are text and live beside what they show; these are the same numbers, unrounded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from silotune.core.reading_back import parse_toml
from silotune.federation.metrics import (
    Row,
    held_out_losses,
    overall_scores,
    own_metrics,
    server_losses,
    train_loss,
    trained,
)

if TYPE_CHECKING:
    from pandas import DataFrame

Rows = list[dict[str, Any]]


def frame(rows: Iterable[Mapping[str, Any]]) -> "DataFrame":
    """A data frame with one line per row; what a row lacks, or has as None, is NaN."""
    import pandas as pd

    return pd.DataFrame(
        [{key: math.nan if v is None else v for key, v in row.items()} for row in rows]
    )


def round_numbers(rows: Sequence[Row]) -> Rows:
    """One row per round, round 0 being the base.

    Args:
        rows: metrics.jsonl.

    Returns:
        round, train_loss, held_out_loss (both over all clients; of validation rows where a run
        scores those), with the task classify accuracy, macro_f1 and mcc, with prefer
        preference_accuracy, reward_margin and win_rate, with
        evaluate.metric metric, with a test set at the
        server server_loss, bytes (both ways), seconds, and with LoRA's factors aggregation_error.
        None: not measured.
    """
    held_out, labels, server = held_out_losses(rows), overall_scores(rows), server_losses(rows)
    own = own_metrics(rows)
    # the base has no preference accuracy
    names = list(dict.fromkeys(name for found in labels.values() for name in found))
    names += ["metric"] if own else []
    ends = [row for row in rows if row["event"] == "round"]
    found: Rows = []
    if 0 in held_out or 0 in server:
        found.append({"round": 0})
    for last in ends:
        trains = [r for r in rows if r["event"] == "train" and r["round"] == last["round"]]
        found.append(
            {
                "round": last["round"],
                "train_loss": train_loss(trains) if trained(trains) else None,
                "bytes": sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in trains),
                "seconds": last.get("seconds"),
                "aggregation_error": last.get("aggregation_error"),
            }
        )
    for row in found:
        scored = {**labels.get(row["round"], {}), "metric": own.get(row["round"])}
        row |= {name: scored.get(name) for name in names}
        row["held_out_loss"] = held_out.get(row["round"])
        row["server_loss"] = server.get(row["round"])
    at_server = ["server_loss"] if server else []
    error = ["aggregation_error"] if any("aggregation_error" in row for row in ends) else []
    order = ("round", "train_loss", "held_out_loss", *names, *at_server, "bytes", "seconds", *error)
    return [{name: row.get(name) for name in order} for row in found]


def client_numbers(summary: Mapping[str, Any]) -> Rows:
    """One row per client: client, num_train, num_eval, base_loss, federated_loss, change.

    Args:
        summary: summary.json.
    """
    names = ("num_train", "num_eval", "base_loss", "federated_loss")
    found = [
        {"client": name, **{key: own[key] for key in names}}
        for name, own in summary["clients"].items()
    ]
    for row in found:
        losses = (row["federated_loss"], row["base_loss"])
        row["change"] = None if None in losses else losses[0] - losses[1]
    return found


def value_of(text: str) -> Any:
    """The value of an override, as a number where it is one.

    >>> value_of("1e-3"), value_of("8"), value_of("bfloat16"), value_of("[1, 2]")
    (0.001, 8, 'bfloat16', '[1, 2]')
    """
    try:
        found = parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
    if isinstance(found, float) and not math.isfinite(found):
        return text
    return found if isinstance(found, int | float | str) else text
