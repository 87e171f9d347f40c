"""The result of a run or a comparison in one sentence, and numbers in words.

A verdict compares an arm with training alone ("local"), and is one of the keys of `PHRASES`.
"""

import math
from collections.abc import Mapping
from typing import Any

from silotune.core.wording import counted
from silotune.results.summary import loss_name, unit_of, worse_off

PHRASES = {
    "gained": "gained",
    "lost": "lost",
    "no clear difference": "shows no clear difference",
    "too few rows": "has too few rows for a verdict",
    "one seed: no verdict": "has no verdict from one seed",
    "two seeds: no verdict": "has no verdict from two seeds",
}
COUNTED = {
    "gained": "gained",
    "lost": "lost",
    "no clear difference": "with no clear difference",
    "too few rows": "with too few rows",
    "one seed: no verdict": "without a verdict, because there is one seed",
    "two seeds: no verdict": "without a verdict, because there are two seeds",
}


def run_verdict(summary: Mapping[str, Any]) -> str:
    """One plain sentence: how many clients do better than with the base, and by how much."""
    scored = [
        c for c in summary["clients"].values() if None not in (c["base_loss"], c["federated_loss"])
    ]
    before, after = summary["overall"]["base_loss"], summary["overall"]["federated_loss"]
    if not scored or before is None or after is None:
        if summary.get("is_withheld"):
            return f"{loss_name(summary).capitalize()}es have no noise, so they are not shown here."
        return "Held-out loss was not measured, so this run cannot say whether it helped."
    num_better = len(scored) - len(worse_off(summary))
    if after == before:
        change = f"it stayed at {before:.3f}"
    else:
        share = number(100 * (after - before) / before if before else None, "+.1f") + "\u00a0%"
        way = "fell" if after < before else "rose"
        change = f"it {way} from {before:.3f} to {after:.3f} {unit_of(summary)} ({share})"
    verb = "has" if num_better == 1 else "have"
    missing = len(summary["clients"]) - len(scored)
    unknown = f" No held-out score for {counted(missing, 'client')}." if missing else ""
    return (
        f"{num_better} of {counted(len(scored), 'client')} {verb} a lower {loss_name(summary)} "
        f"than with the base; overall, weighted by {unit_of(summary).rsplit(' ', 1)[1]}s, "
        f"{change}.{unknown}"
    )


def gain(group: Mapping[str, Any], key: str, comparison: Mapping[str, Any]) -> str:
    """What the result changes for one client, or for the mean over clients, in one metric."""
    metric, result = comparison["metrics"][key], comparison["result"]
    verdict = group["verdicts"].get(key, {}).get(result)
    difference = group["differences"].get(key, {}).get(result)
    said = f"{PHRASES.get(verdict, 'has no verdict')}: {metric['label']}"
    if not difference:
        return said
    return f"{said} {interval(difference, signed(metric))} {metric['unit']}"


def signed(metric: Mapping[str, Any]) -> str:
    """The format of a difference in this metric."""
    return f"+.{metric['digits']}f"


def interval(given: Mapping[str, float | None] | None, form: str) -> str:
    """'2.200 [2.000, 2.400]', or the mean alone; a line may break before the bracket.

    Args:
        given: mean, low and high.
        form: The format of each number, for example ".3f".
    """
    mean, low, high = (number((given or {}).get(key), form) for key in ("mean", "low", "high"))
    return mean if "–" in (mean, low, high) else f"{mean} [{low},\u00a0{high}]"


def number(x: float | None, form: str) -> str:
    """A number with a real minus sign, or a dash if there is no number."""
    return "–" if x is None or not math.isfinite(x) else format(x, form).replace("-", "−")
