"""The results of a comparison in sentences."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from silotune.core.wording import counted
from silotune.recipes.schema import RunConfig
from silotune.recipes.tuning import words
from silotune.results.verdicts import COUNTED, gain
from silotune.workflows.compare.best import BEST
from silotune.workflows.compare.names import (
    LOCAL,
    OWN_STEPS,
    RESULT,
    builds_on,
    counterpart,
    extension,
)
from silotune.workflows.compare.statistics import LOSS, MIN_ROWS, NOT_TUNED


def comparison_verdict(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence per metric: the mean over clients, and how many gained and lost."""
    return [
        f"With “{comparison['result']}” instead of training alone, the mean over clients "
        f"{gain(comparison['overall'], key, comparison)}. {_each(comparison, key)}"
        for key in comparison["metrics"]
    ]


def _each(comparison: Mapping[str, Any], key: str) -> str:
    """How many clients gained and lost."""
    result = comparison["result"]
    given = [c["verdicts"].get(key, {}).get(result) for c in comparison["clients"].values()]
    counts = [f"{n} {COUNTED[v]}" for v in COUNTED if (n := given.count(v))]
    return f"Of {counted(len(given), 'client')}, {', '.join(counts) or 'none could be compared'}."


def best_verdict(comparison: Mapping[str, Any]) -> list[str]:
    """What everyone gains if each client takes its best; nothing if nobody could choose."""
    if not (best := comparison.get("best")):
        return []
    found = {**comparison, **best, "result": BEST}
    taken = Counter(arm for by_seed in best["takes"].values() for arm in by_seed)
    num_choices = sum(taken.values())
    shares = ", ".join(f"{arm} {num}" for arm, num in taken.most_common())
    return [
        "If each client takes what its validation rows prefer, instead of the best that it could "
        f"do alone, the mean over clients {gain(best['overall'], LOSS.key, found)}. "
        f"{_each(found, LOSS.key)} Chosen, of {counted(num_choices, 'choice')}: {shares}."
    ]


def choice_notes(numbers: Mapping[str, Any], run: RunConfig) -> list[str]:
    """What the arms were trained with, and what chose it."""
    ignored: list[str] = []
    if run.stop.patience is not None:
        ignored = ["stop.patience is ignored: every arm trains all rounds, on equal examples"]
    if run.evaluate.server_path is not None:
        ignored.append("evaluate.server_path is ignored: arms are scored on the clients' rows")
    if run.checkpoint.keep == "best" and not numbers["rounds"]:
        ignored.append('checkpoint.keep = "best" is ignored: the last round of every arm counts')
    if not numbers["tuned"]:
        rounds = ", but each arm's best round by validation counts" if numbers["rounds"] else ""
        return [f"{NOT_TUNED}: every arm was trained as the recipe says{rounds}", *ignored]
    trials = {arm: num for arm, num in numbers["num_trials"].items() if builds_on(arm) is None}
    most = max(trials.values())
    notes = [
        f"tuned: every arm chose from {counted(most, 'trial')} on validation rows, with a seed "
        "that is not compared; "
        + "; ".join(f"{arm}: {words(numbers['chosen'][arm])}" for arm in trials if arm != LOCAL)
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


def finish_notes(numbers: Mapping[str, Any], run: RunConfig) -> list[str]:
    """What the arms that go on from others have had in addition; nothing without [finish]."""
    if not (steps := run.finish.local_steps):
        return []
    rows = steps * run.train.batch_size * run.train.accumulation
    notes = [
        f"“+ own steps”: up to {counted(steps, 'step')} more at each client, of {rows} rows, after "
        "the federation and after training alone. Such an arm is compared with “local” that "
        "has gone on in the same way, and has seen more rows than the arms without"
    ]
    if num := numbers["num_trials"].get(extension(RESULT, OWN_STEPS)):
        notes[0] += f"; each client chose from {counted(num, 'more trial')} by its validation rows"
    if run.finish.interpolate:
        notes.append(
            "“+ interpolation”: the share of these steps with the lowest validation loss, "
            f"of {', '.join(f'{share:g}' for share in run.finish.interpolate)}"
        )
    if not any(numbers["num_validation"].values()):
        notes.append("without validation rows, no client can choose what is best for it")
    return notes


def worse_off_warnings(comparison: Mapping[str, Any]) -> list[str]:
    """One sentence per federated arm with clients of a higher loss than alone; the result first.

    Whether that is clear is the verdict's to say: one seed, for example, never is.
    """
    worse = sorted(comparison["worse_off"].items(), key=lambda arm: arm[0] != comparison["result"])
    found: list[str] = []
    for arm, names in worse:
        verdicts = {name: comparison["clients"][name]["verdicts"][LOSS.key][arm] for name in names}
        clear = [name for name, verdict in verdicts.items() if verdict == "lost"]
        how = f"clearly: {', '.join(clear)}" if clear else "none of them clearly"
        if names:
            found.append(
                f"With “{arm}”, a higher mean loss than {_alone(arm)}: {', '.join(names)} ({how})."
            )
    return found


def _alone(arm: str) -> str:
    return "alone" if counterpart(arm) == LOCAL else f"with “{counterpart(arm)}”"
