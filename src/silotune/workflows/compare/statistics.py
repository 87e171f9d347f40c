"""The statistics of a comparison: means, paired differences, verdicts. Numbers in, numbers out.

This file knows the scores of rows by arm, seed and client. It does not know how they were made. An
arm is one way to train: base (not at all), local (each client alone), federated, centralized (all
rows in one place).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from silotune.core.crossed import (
    Parts,
    Scored,
    crossed_interval,
    holm,
    minus,
    parts_of_labels,
    parts_of_mean,
)
from silotune.core.stats import Labelled
from silotune.core.wording import human_bytes, human_seconds
from silotune.recipes.tuning import words
from silotune.workflows.compare.names import BASE, LOCAL, RESULT, builds_on, counterpart

MIN_ROWS = 20
"""A client with fewer held-out rows gets no verdict."""
MIN_SEEDS = 3
"""With fewer seeds, there is no verdict: nobody knows what another seed would change."""
MAX_P = 0.05
"""A verdict's p-value is below it, corrected for all clients."""
FEW_SEEDS = {1: "one seed: no verdict", 2: "two seeds: no verdict"}
NOT_TUNED = "not tuned"
RowScores = Sequence[Mapping[str, Any]]
"""A client's held-out rows in order, each with `loss_sum`, `num_tokens` and, if answers were
generated, the fields of `text_scores.Quality`. `group` names the rows that belong together."""
Scores = Mapping[str, Mapping[int, Mapping[str, RowScores]]]
"""Arm -> seed -> client -> its rows."""


@dataclass(frozen=True)
class Metric:
    """A number per row, and how to read it."""

    key: str
    label: str
    unit: str
    lower_is_better: bool
    value: str
    """The field of a row that is summed."""
    weight: str | None = None
    """The field that the sum is divided by; 1 per row if absent."""
    digits: int = 3
    labels: bool = False
    """Whether it is computed from the labels of all rows of a client: `parts_of_labels`."""
    of_base: bool = True
    """Whether the base has one, too."""


LOSS = Metric("loss", "held-out loss", "nats per token", True, "loss_sum", "num_tokens")
ANSWERS = (
    Metric("rougeL", "ROUGE-L", "mean F", False, "rougeL"),
    Metric("rouge1", "ROUGE-1", "mean F", False, "rouge1"),
    Metric("rouge2", "ROUGE-2", "mean F", False, "rouge2"),
    Metric("exact", "exact match", "share of answers", False, "exact"),
)
"""Metrics of generated answers."""
LABELS = (
    replace(LOSS, unit="nats per row"),
    Metric("accuracy", "accuracy", "share of rows", False, "given", labels=True),
    Metric("macro_f1", "macro F1", "of 1", False, "given", labels=True),
    Metric("mcc", "Matthews correlation", "of 1", False, "given", labels=True),
)
"""Metrics of the task classify."""

PAIRS = (
    replace(LOSS, unit="nats per pair"),
    Metric(
        *("preference_accuracy", "preference accuracy", "share of pairs", False, "preferred"),
        of_base=False,  # it is the reference, whose margins are 0 by definition
    ),
    Metric("reward_margin", "reward margin", "nats", False, "margin"),
    Metric("win_rate", "win rate", "share of pairs", False, "likelier"),
)
"""Metrics of the task prefer."""


def compare_arms(scores: Scores, *, num_train: Mapping[str, int]) -> dict[str, Any]:
    """Compute the numbers of comparison.json that follow from scored rows.

    Args:
        scores: Every arm has every seed; an arm may lack clients. All arms and seeds score the same
            rows of a client.
        num_train: Number of train rows of every client.

    Returns:
        metrics, clients, overall, worse_off, notes; see docs/compare.md. Where the base has no such
        metric, its score and its difference are None.
    """
    names = sorted(num_train)
    any_row = next(iter(next(iter(scores[LOCAL].values())).values()))[0]
    metrics = [LOSS, *(m for m in ANSWERS if m.value in any_row)]
    if any_row.get("true", -1) >= 0:
        metrics = list(LABELS)
    if "margin" in any_row:
        metrics = list(PAIRS)
    clients: dict[str, Any] = {}
    for name in names:
        rows = next(iter(scores[LOCAL].values()))[name]
        clients[name] = {
            "num_train": num_train[name],
            "num_eval": len(rows),
            **({"num_groups": len({r["group"] for r in rows})} if "group" in any_row else {}),
            **_numbers(scores, metrics, [name]),
        }
    overall = _numbers(scores, metrics, names)
    num_seeds = len(scores[LOCAL])
    _give_verdicts(clients, metrics, num_seeds=num_seeds)
    num_rows = sum(c["num_eval"] for c in clients.values())
    whole = {"all": {"num_eval": num_rows, **overall}}
    _give_verdicts(whole, metrics, num_seeds=num_seeds)
    return {
        "metrics": {m.key: asdict(m) for m in metrics},
        "clients": clients,
        "overall": {key: value for key, value in whole["all"].items() if key != "num_eval"},
        "worse_off": _worse_off(clients),
        "notes": _notes(clients, num_seeds=num_seeds),
    }


def _numbers(scores: Scores, metrics: Sequence[Metric], names: Sequence[str]) -> dict[str, Any]:
    """Means and differences from training alone over some clients, each counting once."""
    found: dict[str, Any] = {"scores": {}, "differences": {}, "against": {}}
    others = [arm for arm in scores if arm.startswith(f"{RESULT}: ")]
    for metric in metrics:
        there = {
            arm: _parts(scores, arm, names, metric)
            for arm, by_seed in scores.items()
            if all(name in next(iter(by_seed.values())) for name in names)
        }
        unknown: dict[str, None] = {}
        if not metric.of_base and there.pop(BASE, None):
            unknown = {BASE: None}
        found["scores"][metric.key] = unknown | {
            arm: asdict(crossed_interval(parts)) for arm, parts in there.items()
        }
        found["differences"][metric.key] = unknown | {
            arm: _paired(parts, there[counterpart(arm)])
            for arm, parts in there.items()
            if arm != LOCAL
        }
        found["against"][metric.key] = {arm: _paired(there[RESULT], there[arm]) for arm in others}
    return found


def _paired(one: Sequence[Parts], other: Sequence[Parts]) -> dict[str, Any]:
    """The paired difference of two arms over the same clients."""
    return asdict(crossed_interval([minus(a, b) for a, b in zip(one, other, strict=True)]))


def _parts(scores: Scores, arm: str, names: Sequence[str], metric: Metric) -> list[Parts]:
    """What the rows of each client say about one arm."""
    num_seeds, found = len(scores[LOCAL]), list[Parts]()
    for name in names:
        rows = next(iter(scores[arm].values()))[name]
        groups = [row["group"] for row in rows] if "group" in rows[0] else None
        if metric.labels:
            labelled = _labelled(scores[arm], name, num_seeds)
            found.append(parts_of_labels(labelled, metric.key, groups))
        else:
            found.append(parts_of_mean(_scored(scores[arm], name, metric, num_seeds), groups))
    return found


def _labelled(
    by_seed: Mapping[int, Mapping[str, RowScores]], client: str, num_seeds: int
) -> Labelled:
    given = np.array([[row["given"] for row in rows[client]] for rows in by_seed.values()])
    if len(given) == 1:
        given = np.repeat(given, num_seeds, axis=0)
    true = np.array([row["true"] for row in next(iter(by_seed.values()))[client]])
    # larger label numbers do not occur, so they do not count
    return Labelled(client, given, true, 1 + max(int(given.max()), int(true.max())))


def _scored(
    by_seed: Mapping[int, Mapping[str, RowScores]],
    client: str,
    metric: Metric,
    num_seeds: int,
) -> Scored:
    """One client's rows under one arm, (seeds, rows). The base has no seed: it is repeated."""
    sums = np.array([[row[metric.value] for row in rows[client]] for rows in by_seed.values()])
    if len(sums) == 1:
        sums = np.repeat(sums, num_seeds, axis=0)
    first = next(iter(by_seed.values()))[client]
    weights = [row[metric.weight] if metric.weight else 1 for row in first]
    return Scored(client, sums, np.array(weights, dtype=float))


def _give_verdicts(
    clients: Mapping[str, dict[str, Any]], metrics: Sequence[Metric], *, num_seeds: int
) -> None:
    """Add verdicts: per metric and arm, corrected for asking about several clients."""
    for c in clients.values():
        c["verdicts"] = {metric.key: {} for metric in metrics}
    for metric in metrics:
        for arm in dict.fromkeys(a for c in clients.values() for a in c["differences"][metric.key]):
            asked = {
                name: c["differences"][metric.key][arm]
                for name, c in clients.items()
                if c["differences"][metric.key].get(arm)
            }
            corrected = holm(
                {
                    name: given["p_value"]
                    for name, given in asked.items()
                    if given["p_value"] is not None and clients[name]["num_eval"] >= MIN_ROWS
                }
            )
            for name, given in asked.items():
                given["corrected_p_value"] = corrected.get(name)
                clients[name]["verdicts"][metric.key][arm] = verdict(
                    given, metric, num_seeds=num_seeds
                )


def verdict(difference: Mapping[str, Any], metric: Metric, *, num_seeds: int) -> str:
    """In words: "gained", "lost", "no clear difference", or why there is no verdict.

    Args:
        difference: mean, and the p-value that is corrected for all clients; None if they have too
            few rows.
        metric: Says what is better.
        num_seeds: Seeds that were compared.
    """
    if num_seeds < MIN_SEEDS:
        return FEW_SEEDS[num_seeds]
    if (p_value := difference["corrected_p_value"]) is None:
        return "too few rows"
    if p_value >= MAX_P:
        return "no clear difference"
    return "gained" if (difference["mean"] < 0) == metric.lower_is_better else "lost"


def _worse_off(clients: Mapping[str, Any]) -> dict[str, list[str]]:
    """By arm, the clients whose mean loss is higher than alone, whether clearly or not."""
    found: dict[str, list[str]] = {}
    for name, client in clients.items():
        for arm, difference in client["differences"][LOSS.key].items():
            if arm.startswith("federated") and difference["mean"] > 0:
                found.setdefault(arm, []).append(name)
    return found


def _notes(clients: Mapping[str, Any], *, num_seeds: int) -> list[str]:
    notes: list[str] = []
    if num_seeds < MIN_SEEDS:
        notes.append(
            f"{FEW_SEEDS[num_seeds]}, because fewer than {MIN_SEEDS} say too little about how the "
            "same training would end with another seed"
            + ("; the intervals are about rows only" if num_seeds == 1 else "")
        )
    few = [name for name, c in clients.items() if c["num_eval"] < MIN_ROWS]
    if few:
        notes.append(f"fewer than {MIN_ROWS} held-out rows, so no verdict: {', '.join(few)}")
    return notes


# --- in words -------------------------------------------------------------------------------------


def federated_arms(comparison: Mapping[str, Any]) -> list[str]:
    """The federated arms, the recipe's own algorithm first; without what [finish] makes of it."""
    arms = [arm for arm in comparison["arms"] if arm.startswith(RESULT)]
    return [arm for arm in arms if builds_on(arm) is None]


def score_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: one line per client, with its mean under every arm."""
    arms = list(comparison["arms"])
    lines = [("client", "train rows", "held-out rows", *arms)]
    for name, numbers in lines_of(comparison):
        counts = (str(numbers.get("num_train", "")), str(numbers.get("num_eval", "")))
        means = numbers["scores"][metric]
        digits = comparison["metrics"][metric]["digits"]
        lines.append(
            (
                name,
                *counts,
                *(f"{means[a]['mean']:.{digits}f}" if means.get(a) else "-" for a in arms),
            )
        )
    return lines


def difference_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: one line per client; federated minus local, its interval, and a verdict.

    The last column is what the lone client was trained with.
    """
    arms = federated_arms(comparison)
    header = ["client"]
    for arm in arms:
        header += [f"{arm} - local", "verdict"]
    lines = [(*header, "local with")]
    for name, numbers in lines_of(comparison):
        cells = [name]
        for arm in arms:
            cells.append(with_interval(numbers["differences"][metric][arm], signed=True))
            cells.append(numbers["verdicts"][metric][arm])
        lines.append((*cells, tuned_to(comparison, name) if "num_train" in numbers else ""))
    return lines


def tuned_to(comparison: Mapping[str, Any], client: str) -> str:
    """What a lone client was trained with, in words; "not tuned" if nothing was chosen."""
    values = comparison.get("chosen", {}).get(LOCAL, {}).get(client)
    return words(values) if values else NOT_TUNED


MORE = {
    "head_bytes_up": "head up",
    "head_bytes_down": "head down",
    "tokens_server": "server tokens",
    "seconds_server": "server training",
}
"""Costs that only some comparisons have."""


AGAINST = "The recipe's own arm minus each other federated arm, with 95 % intervals"


def against_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: one line per client; the recipe's own arm minus every other federated one.

    Empty if there is no other.
    """
    arms = federated_arms(comparison)[1:]
    if not arms or "against" not in comparison["overall"]:  # an older silotune wrote none
        return []
    lines = [("client", *(f"minus {arm.removeprefix(f'{RESULT}: ')}" for arm in arms))]
    for name, numbers in lines_of(comparison):
        found = numbers["against"][metric]
        lines.append((name, *(with_interval(found[arm], signed=True) for arm in arms)))
    return lines


def cost_table(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per arm, summed over all seeds."""
    costs = _all_costs(comparison).values()
    extra = {key: name for key, name in MORE.items() if any(cost.get(key) for cost in costs)}
    more = tuple(extra.values())
    lines: list[tuple[str, ...]] = [
        ("arm", "tokens", "examples", "steps", "training", "sent up", "sent down", *more)
    ]
    for arm, cost in _all_costs(comparison).items():
        if arm.startswith("only "):
            continue  # a part of the arm of lone clients
        counts = (f"{cost[key]:,}" for key in ("tokens", "examples", "steps"))
        sent = (human_bytes(cost[key]) for key in ("bytes_up", "bytes_down"))
        said = (
            human_seconds(cost.get(key, 0))
            if key == "seconds_server"
            else f"{cost.get(key, 0):,}"
            if key == "tokens_server"
            else human_bytes(cost.get(key, 0))
            for key in extra
        )
        lines.append((arm, *counts, human_seconds(cost["seconds"]), *sent, *said))
    return lines


def _all_costs(comparison: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The cost of each arm, and that of tuning it."""
    tuning = comparison.get("tuning_costs", {})
    return {**comparison["arms"], **{f"tuning {arm}": cost for arm, cost in tuning.items()}}


def lines_of(comparison: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The numbers of every client, and of the mean over them, with their names."""
    return [*comparison["clients"].items(), ("mean over clients", comparison["overall"])]


def with_interval(number: Mapping[str, float | None], *, signed: bool, digits: int = 3) -> str:
    """A mean or a difference, with its interval if it has one."""
    sign = "+" if signed else ""
    mean = f"{number['mean']:{sign}.{digits}f}"
    if number["low"] is None or number["high"] is None:
        return mean
    return f"{mean} [{number['low']:{sign}.{digits}f}, {number['high']:{sign}.{digits}f}]"
