"""The statistics of a comparison: means, paired differences, verdicts. Numbers in, numbers out.

This file knows the scores of rows by arm, seed and client. It does not know how they were made. An
arm is one way to train: base (not at all), local (each client alone), federated, centralized (all
rows in one place).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from silotune.core.stats import Interval, Labelled, Scored, label_interval, mean_interval
from silotune.core.wording import counted, human_bytes, human_seconds

MIN_ROWS = 20
"""A client with fewer held-out rows gets no verdict."""
MIN_SEEDS = 5
"""With fewer seeds, a note says that the verdicts are weak."""
LOCAL = "local"
"""The arm that the others are compared with: not having joined."""
RESULT = "federated"
"""The recipe's own arm. The names of other federated arms start with it, too."""

RowScores = Sequence[Mapping[str, Any]]
"""A client's held-out rows in order, each with `loss_sum`, `num_tokens` and, if answers were
generated, the fields of `text_scores.Quality`."""
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
    """Whether it is computed from the labels of all rows of a client: `stats.label_interval`."""


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


def compare_arms(scores: Scores, *, num_train: Mapping[str, int], seed: int) -> dict[str, Any]:
    """Compute the numbers of comparison.json that follow from scored rows.

    Args:
        scores: Every arm has every seed; an arm may lack clients. All arms and seeds score the same
            rows of a client.
        num_train: Number of train rows of every client.
        seed: Seed of the bootstrap.

    Returns:
        metrics, clients, overall, worse_off, notes; see docs/compare.md.
    """
    names = sorted(num_train)
    any_row = next(iter(next(iter(scores[LOCAL].values())).values()))[0]
    metrics = [LOSS, *(m for m in ANSWERS if m.value in any_row)]
    if any_row.get("true", -1) >= 0:
        metrics = list(LABELS)
    clients: dict[str, Any] = {}
    for name in names:
        num_eval = len(next(iter(scores[LOCAL].values()))[name])
        clients[name] = {
            "num_train": num_train[name],
            "num_eval": num_eval,
            **_numbers(scores, metrics, [name], seed=seed, num_rows=num_eval),
        }
    num_rows = sum(c["num_eval"] for c in clients.values())
    seeds = len(scores[LOCAL])
    return {
        "metrics": {m.key: asdict(m) for m in metrics},
        "clients": clients,
        "overall": _numbers(scores, metrics, names, seed=seed, num_rows=num_rows),
        "worse_off": _worse_off(clients),
        "notes": _notes(clients, num_seeds=seeds),
    }


def _numbers(
    scores: Scores, metrics: Sequence[Metric], names: Sequence[str], *, seed: int, num_rows: int
) -> dict[str, Any]:
    """Means, differences from `local` and verdicts over some clients, each counting once."""
    found: dict[str, Any] = {"scores": {}, "differences": {}, "verdicts": {}, "against": {}}
    others = [arm for arm in scores if arm.startswith(f"{RESULT}: ")]
    for metric in metrics:
        interval = _label_interval if metric.labels else _mean_interval
        means, differences, verdicts = {}, {}, {}
        for arm, by_seed in scores.items():
            if any(name not in next(iter(by_seed.values())) for name in names):
                continue
            means[arm] = asdict(interval(scores, arm, names, metric, seed, minus=None))
            if arm == LOCAL:
                continue
            difference = interval(scores, arm, names, metric, seed, minus=LOCAL)
            differences[arm] = asdict(difference)
            verdicts[arm] = verdict(difference, metric, num_rows=num_rows)
        found["against"][metric.key] = {
            arm: asdict(interval(scores, RESULT, names, metric, seed, minus=arm)) for arm in others
        }
        found["scores"][metric.key] = means
        found["differences"][metric.key] = differences
        found["verdicts"][metric.key] = verdicts
    return found


def _mean_interval(
    scores: Scores, arm: str, names: Sequence[str], metric: Metric, seed: int, *, minus: str | None
) -> Interval:
    """A mean over rows, or the paired difference of two arms."""
    num_seeds = len(scores[LOCAL])
    own = [_scored(scores[arm], name, metric, num_seeds) for name in names]
    if minus is None:
        return mean_interval(own, seed=seed)
    others = [_scored(scores[minus], name, metric, num_seeds) for name in names]
    paired = [
        Scored(a.client, a.sums - b.sums, a.weights) for a, b in zip(own, others, strict=True)
    ]
    return mean_interval(paired, seed=seed)


def _label_interval(
    scores: Scores, arm: str, names: Sequence[str], metric: Metric, seed: int, *, minus: str | None
) -> Interval:
    """A score of all labels of a client, or the paired difference of two arms."""
    num_seeds = len(scores[LOCAL])
    own, others = (
        None if one is None else [_labelled(scores[one], n, num_seeds) for n in names]
        for one in (arm, minus)
    )
    assert own is not None
    return label_interval(own, metric.key, minus=others, seed=seed)


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


def verdict(difference: Interval, metric: Metric, *, num_rows: int) -> str:
    """One of "gained", "lost", "no clear difference" and "too few rows"."""
    if num_rows < MIN_ROWS:
        return "too few rows"
    if not difference.is_clear:
        return "no clear difference"
    return "gained" if (difference.mean < 0) == metric.lower_is_better else "lost"


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
            f"{counted(num_seeds, 'seed')}: fewer than {MIN_SEEDS} say little about how the same "
            "training would end with another seed"
        )
    few = [name for name, c in clients.items() if c["num_eval"] < MIN_ROWS]
    if few:
        notes.append(f"fewer than {MIN_ROWS} held-out rows, so no verdict: {', '.join(few)}")
    return notes


# --- in words -------------------------------------------------------------------------------------


def federated_arms(comparison: Mapping[str, Any]) -> list[str]:
    """The federated arms, the recipe's own algorithm first."""
    return [arm for arm in comparison["arms"] if arm.startswith("federated")]


def score_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: one line per client, with its mean under every arm."""
    arms = list(comparison["arms"])
    lines = [("client", "train rows", "held-out rows", *arms)]
    for name, numbers in _lines(comparison):
        counts = (str(numbers.get("num_train", "")), str(numbers.get("num_eval", "")))
        means = numbers["scores"][metric]
        digits = comparison["metrics"][metric]["digits"]
        lines.append(
            (
                name,
                *counts,
                *(f"{means[a]['mean']:.{digits}f}" if a in means else "-" for a in arms),
            )
        )
    return lines


def difference_table(comparison: Mapping[str, Any], metric: str) -> list[tuple[str, ...]]:
    """Header and rows: one line per client; federated minus local, its interval, and a verdict."""
    arms = federated_arms(comparison)
    header = ["client"]
    for arm in arms:
        header += [f"{arm} - local", "verdict"]
    lines = [tuple(header)]
    for name, numbers in _lines(comparison):
        cells = [name]
        for arm in arms:
            cells.append(_with_interval(numbers["differences"][metric][arm], signed=True))
            cells.append(numbers["verdicts"][metric][arm])
        lines.append(tuple(cells))
    return lines


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
    for name, numbers in _lines(comparison):
        found = numbers["against"][metric]
        lines.append((name, *(_with_interval(found[arm], signed=True) for arm in arms)))
    return lines


def cost_table(comparison: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and rows: one line per arm, summed over all seeds."""
    costs = comparison["arms"].values()
    extra = {key: name for key, name in MORE.items() if any(cost.get(key) for cost in costs)}
    more = tuple(extra.values())
    lines: list[tuple[str, ...]] = [
        ("arm", "tokens", "examples", "steps", "training", "sent up", "sent down", *more)
    ]
    for arm, cost in comparison["arms"].items():
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


def _lines(comparison: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [*comparison["clients"].items(), ("mean over clients", comparison["overall"])]


def _with_interval(number: Mapping[str, float], *, signed: bool, digits: int = 3) -> str:
    sign = "+" if signed else ""
    mean, low, high = (f"{number[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"
