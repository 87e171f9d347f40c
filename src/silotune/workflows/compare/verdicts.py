"""The results of a comparison in sentences."""

from collections.abc import Mapping
from typing import Any

from silotune.core.wording import counted
from silotune.recipes.schema import RunConfig
from silotune.recipes.tuning import words
from silotune.results.verdicts import COUNTED, gain
from silotune.workflows.compare.statistics import LOCAL, MIN_ROWS, NOT_TUNED


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


def choice_notes(numbers: Mapping[str, Any], run: RunConfig) -> list[str]:
    """What the arms were trained with, and what chose it."""
    ignored: list[str] = []
    if run.stop.patience is not None:
        ignored = ["stop.patience is ignored: every arm trains all rounds, on equal examples"]
    if run.evaluate.server_path is not None:
        ignored.append("evaluate.server_path is ignored: arms are scored on the clients' rows")
    if not numbers["tuned"]:
        rounds = ", but each arm's best round by validation counts" if numbers["rounds"] else ""
        return [f"{NOT_TUNED}: every arm was trained as the recipe says{rounds}", *ignored]
    trials = numbers["num_trials"]
    most = max(trials.values())
    notes = [
        f"tuned: every arm chose from {counted(most, 'trial')} on validation rows, with a seed "
        "that is not compared; "
        + "; ".join(f"{arm}: {words(numbers['chosen'][arm])}" for arm in _shared(numbers))
        + "; local: by client, see the table",
        *ignored,
    ]
    notes += [
        f"{arm} has only {counted(num, 'trial')}: its algorithm has no server_lr"
        for arm, num in trials.items()
        if num < most
    ]
    if edge := numbers["at_edge"]:
        notes.append(
            "the chosen learning rate is the lowest or the highest that was tried, so others "
            f"might be better (compare.tune.lr): {', '.join(edge)}"
        )
    if not numbers["rounds"]:
        notes.append("the last round of every arm counts, not the best one by validation")
    if run.privacy.unit != "none":
        notes.append(
            "no guarantee covers the choices on validation rows: their losses have no noise"
        )
    few = [name for name, num in numbers["num_validation"].items() if num < MIN_ROWS]
    if few:
        notes.append(
            f"fewer than {MIN_ROWS} validation rows, so a lone client's choice is uncertain: "
            f"{', '.join(few)}"
        )
    return notes


def tuning_line(comparison: Mapping[str, Any]) -> str:
    """What stands beside every figure: what the recipe's own arm was trained with."""
    values = comparison.get("chosen", {}).get(comparison["result"])
    if not values:
        return f"{NOT_TUNED.capitalize()}."
    return f"Tuned; “{comparison['result']}” with {words(values)}."


def _shared(numbers: Mapping[str, Any]) -> list[str]:
    """The arms that choose once for all clients."""
    return [arm for arm in numbers["num_trials"] if arm != LOCAL]


def worse_off_warnings(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence per federated arm that leaves clients worse off than alone; the result first."""
    worse = sorted(comparison["worse_off"].items(), key=lambda arm: arm[0] != comparison["result"])
    return [
        f"With “{arm}”, worse off than alone: {', '.join(names)}." for arm, names in worse if names
    ]
