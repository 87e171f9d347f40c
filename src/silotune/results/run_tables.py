"""Tables of a run's rounds, of its rows, and of what was predicted beside what happened."""

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.wording import human_bytes, human_seconds
from silotune.federation.metrics import (
    LABEL_SCORES,
    PAIR_SCORES,
    Row,
    part_of,
    server_set,
)
from silotune.results.frames import round_numbers


def prediction_table(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: predicted cost, actual cost, and the difference in percent.

    Empty for runs of an older silotune.
    """
    if not (found := summary.get("predicted")):
        return []
    words = {
        "bytes": ("sent, both ways", human_bytes),
        "memory": ("peak memory", human_bytes),
        "seconds": ("time until the last score", human_seconds),
    }
    lines = [("cost", "predicted", "actual", "difference")]
    for key, (what, shown) in words.items():
        if (pair := found[key]) is not None:
            both = (shown(pair["predicted"]), shown(pair["actual"]))
            lines.append((what, *both, f"{100 * pair['difference']:+.1f} %"))
    return lines


def prediction_notes(summary: Mapping[str, Any]) -> list[str]:
    """Why predicted and actual costs differ or cannot be compared."""
    return list(summary.get("predicted", {}).get("notes", ()))


def round_table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Header and rows: one line per round, with losses over all clients, bytes and seconds.

    Args:
        rows: metrics.jsonl.
    """
    numbers = round_numbers(rows)
    names = {
        "train_loss": "train loss",
        "held_out_loss": f"{part_of(rows)} loss after the round",
        **LABEL_SCORES,
        **PAIR_SCORES,
        "metric": "own metric",
        "server_loss": f"loss on the {server_set(rows)}",
        "bytes": "sent",
        "seconds": "seconds",
        "aggregation_error": "aggregation error",
    }
    known = numbers[0] if numbers else ("train_loss", "held_out_loss", "bytes", "seconds")
    names = {key: name for key, name in names.items() if key in known}
    forms = {"seconds": ".1f", "aggregation_error": ".2g"}
    lines: list[tuple[str, ...]] = [("round", *names.values())]

    def shown(key: str, value: float | None) -> str:
        if value is None:
            return "-"
        return human_bytes(int(value)) if key == "bytes" else format(value, forms.get(key, ".3f"))

    for row in numbers:
        round_ = str(row["round"]) if row["round"] else "0 (base)"
        lines.append((round_, *(shown(key, row[key]) for key in names)))
    return lines


def split_table(split: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client, with its rows, lengths and most common labels.

    Args:
        split: From `data_overview.describe_split`.
    """
    has_validation = any(own.get("num_validation") for own in split.values())
    is_sample = any("num_measured" in own for own in split.values())
    header = (
        "client",
        "train rows",
        *(["validation rows"] if has_validation else []),
        "held-out rows",
        "median tokens",
        "95 %",
        "longest",
        *(["of rows"] if is_sample else []),
        "labels",
    )
    lines: list[tuple[str, ...]] = [header]
    for name, own in split.items():
        labels = [f"{label} {count}" for label, count in list(own["labels"].items())[:4]]
        more = len(own["labels"]) - len(labels)
        shown = ", ".join(labels) + (f" and {more} more" if more else "")
        tokens, keys = own["tokens"], ("p50", "p95", "max")
        lengths = [f"{tokens[key]:.0f}" if tokens else "-" for key in keys]
        if is_sample:
            lengths.append(str(own.get("num_measured", own["num_train"])))
        parts = ("num_train", *(["num_validation"] if has_validation else []), "num_eval")
        counts = (str(own[key]) for key in parts)
        lines.append((name, *counts, *lengths, shown or "-"))
    return lines
