"""Tables of a run's rounds, of its rows, and of what was predicted beside what happened."""

from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.wording import human_bytes, human_seconds
from silotune.federation.metrics import (
    Row,
    held_out_losses,
    overall_scores,
    part_of,
    server_losses,
    server_set,
    train_loss,
    trained,
)


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
    held_out, labels = held_out_losses(rows), overall_scores(rows)
    more = ("accuracy", "macro F1", "Matthews") if labels else ()
    server = server_losses(rows)
    own = (f"loss on the {server_set(rows)}",) if server else ()
    scored = f"{part_of(rows)} loss after the round"
    ends = [row for row in rows if row["event"] == "round"]
    error = ("aggregation error",) if any("aggregation_error" in row for row in ends) else ()
    head = ("round", "train loss", scored, *more, *own, "sent", "seconds")
    lines: list[tuple[str, ...]] = [(*head, *error)]

    def at_server(round_: int) -> tuple[str, ...]:
        return (f"{server[round_]:.3f}" if round_ in server else "-",) * len(own)

    def scores(round_: int) -> tuple[str, ...]:
        found = labels.get(round_)
        return tuple(f"{n:.3f}" for n in found.values()) if found else ("-",) * len(more)

    if 0 in held_out or 0 in server:
        base = f"{held_out[0]:.3f}" if 0 in held_out else "-"
        none = ("-",) * len(error)
        lines.append(("0 (base)", "-", base, *scores(0), *at_server(0), "-", "-", *none))
    for last in ends:
        clients = [r for r in rows if r["event"] == "train" and r["round"] == last["round"]]
        after = held_out.get(last["round"])
        sent = sum(row.get("bytes_up", 0) + row.get("bytes_down", 0) for row in clients)
        lines.append(
            (
                str(last["round"]),
                f"{train_loss(clients):.3f}" if trained(clients) else "-",
                "-" if after is None else f"{after:.3f}",
                *scores(last["round"]),
                *at_server(last["round"]),
                human_bytes(sent),
                f"{last['seconds']:.1f}" if "seconds" in last else "-",
                *(
                    f"{last[key]:.2g}" if (key := "aggregation_error") in last else "-"
                    for _ in error
                ),
            )
        )
    return lines


def split_table(split: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per client, with its rows, lengths and most common labels.

    Args:
        split: From `data_overview.describe_split`.
    """
    has_validation = any(own.get("num_validation") for own in split.values())
    header = (
        "client",
        "train rows",
        *(["validation rows"] if has_validation else []),
        "held-out rows",
        "median tokens",
        "95 %",
        "longest",
        "labels",
    )
    lines: list[tuple[str, ...]] = [header]
    for name, own in split.items():
        labels = [f"{label} {count}" for label, count in list(own["labels"].items())[:4]]
        more = len(own["labels"]) - len(labels)
        shown = ", ".join(labels) + (f" and {more} more" if more else "")
        lengths = (f"{own['tokens'][key]:.0f}" for key in ("p50", "p95", "max"))
        parts = ("num_train", *(["num_validation"] if has_validation else []), "num_eval")
        counts = (str(own[key]) for key in parts)
        lines.append((name, *counts, *lengths, shown or "-"))
    return lines
