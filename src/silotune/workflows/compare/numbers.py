"""A comparison for other programs: rows of numbers, and its tables by name."""

from collections.abc import Mapping
from typing import Any

from silotune.workflows.compare import statistics

EVERYBODY = "mean over clients"


def score_numbers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Scores and differences from training alone, unrounded.

    Args:
        result: comparison.json.

    Returns:
        client, metric, arm; mean, low and high of the score; difference, difference_low and
        difference_high, from the arm of lone clients; verdict. None: unknown, such as an interval
        from too few rows or seeds. The means over clients come last.
    """
    groups = {**result["clients"], EVERYBODY: result["overall"]}
    return [
        {
            "client": name,
            "metric": metric,
            "arm": arm,
            **{key: score.get(key) for key in ("mean", "low", "high")},
            **_difference(own["differences"].get(metric, {}).get(arm) or {}),
            "verdict": own["verdicts"].get(metric, {}).get(arm),
        }
        for name, own in groups.items()
        for metric, scores in own["scores"].items()
        for arm, score in scores.items()
        if score is not None
    ]


def _difference(found: Mapping[str, Any]) -> dict[str, Any]:
    names = {"difference": "mean", "difference_low": "low", "difference_high": "high"}
    return {name: found.get(key) for name, key in names.items()}


def cost_numbers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per arm: tokens, examples, steps, seconds and bytes over all seeds."""
    return [{"arm": arm, **cost} for arm, cost in result["arms"].items()]


def text_tables(result: Mapping[str, Any]) -> dict[str, list[tuple[str, ...]]]:
    """The tables as people read them, by name."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for metric in result["metrics"].values():
        key = metric["key"]
        found[f"{key}-scores"] = statistics.score_table(result, key)
        found[f"{key}-differences"] = statistics.difference_table(result, key)
        found[f"{key}-against"] = statistics.against_table(result, key)
    return {**found, "costs": statistics.cost_table(result)}
