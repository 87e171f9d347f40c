"""The results of a comparison in sentences."""

from collections.abc import Mapping
from typing import Any

from silotune.core.wording import counted
from silotune.results.verdicts import COUNTED, gain


def comparison_verdict(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence per metric: the mean over clients, and how many gained and lost."""
    result, said = comparison["result"], []
    for key in comparison["metrics"]:
        given = [c["verdicts"].get(key, {}).get(result) for c in comparison["clients"].values()]
        counts = [f"{n} {COUNTED[v]}" for v in COUNTED if (n := given.count(v))]
        said.append(
            f"With “{result}” instead of training alone, the mean over clients "
            f"{gain(comparison['overall'], key, comparison)}. "
            f"Of {counted(len(given), 'client')}, {', '.join(counts) or 'none could be compared'}."
        )
    return said


def worse_off_warnings(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence per federated arm that leaves clients worse off than alone; the result first."""
    worse = sorted(comparison["worse_off"].items(), key=lambda arm: arm[0] != comparison["result"])
    return [
        f"With “{arm}”, worse off than alone: {', '.join(names)}." for arm, names in worse if names
    ]
