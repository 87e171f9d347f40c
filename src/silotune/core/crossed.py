"""Intervals of means and paired differences over held-out rows that several seeds have scored.

All seeds score the same rows, so rows and seeds are crossed: the variance of a mean is that of the
seeds' means plus that of the rows' means, minus what both contain. Rows that belong together, such
as questions about one disease, count as one group. Numbers in, numbers out.
"""

# scipy ships no type stubs, so strict checking would report every value from it
# pyright: standard

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from silotune.core.stats import CONFIDENCE, Labelled, label_scores_of

POWER = 1.25
"""How the degrees of freedom of the two parts are combined, see `_t_interval`. Satterthwaite's 2
is too optimistic with three seeds, and 1 too careful with few groups (docs/decisions/0041)."""


@dataclass(frozen=True)
class Scored:
    """One client's held-out rows, scored once per seed."""

    client: str
    sums: np.ndarray
    """(seeds, rows): a row's loss summed over its tokens, its ROUGE, or a difference of these."""
    weights: np.ndarray
    """(rows,): a row's tokens, or 1. The client's mean is sum(sums) / sum(weights)."""


@dataclass(frozen=True)
class Parts:
    """A client's score by seed, and what each group of rows contributes to it."""

    by_seed: np.ndarray
    """(seeds,): the score."""
    deviations: np.ndarray
    """(seeds, groups): by how much each group moves the score away from what the others give. For a
    mean over groups of equal weight: (group mean - score) / groups."""
    shares: np.ndarray
    """(groups,): each group's share of the weight; sums to 1."""
    names: Sequence[Hashable]
    """(groups,): a group with the same name at another client is the same group."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval; no interval if it cannot be known."""

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    """Two-sided, against a mean of 0."""


def parts_of_mean(scored: Scored, groups: Sequence[Hashable] | None = None) -> Parts:
    """The parts of a weighted mean over rows.

    Args:
        scored: The rows.
        groups: The name of each row's group; every row is its own if absent.
    """
    names, index = _numbered(scored.client, scored.sums.shape[1], groups)
    total = scored.weights.sum()
    by_seed = scored.sums.sum(axis=1) / total
    shares = _by_group(scored.weights, index) / total
    deviations = _by_group(scored.sums.T, index).T / total - by_seed[:, None] * shares
    return Parts(by_seed, deviations, shares, names)


def parts_of_labels(
    labelled: Labelled, metric: str, groups: Sequence[Hashable] | None = None
) -> Parts:
    """The parts of a label score, which is not a mean over rows: the score without each group.

    Args:
        labelled: The rows.
        metric: A key of `stats.label_scores`.
        groups: As in `parts_of_mean`.

    Reference:
        Tukey's jackknife, with a group left out at a time: Efron and Tibshirani 1993, "An
        Introduction to the Bootstrap", section 11.
    """
    names, index = _numbered(labelled.client, labelled.given.shape[1], groups)
    counts = labelled.counts().swapaxes(0, 1)  # (rows, seeds, labels, 3)
    whole = counts.sum(axis=0)
    by_seed = label_scores_of(whole)[metric]
    shares = _by_group(np.ones(len(index)), index) / len(index)
    if len(names) == 1:
        return Parts(by_seed, np.zeros((len(by_seed), 1)), shares, names)
    left = label_scores_of(whole - _by_group(counts, index))[metric].T  # (seeds, groups)
    deviations = (left.mean(axis=1, keepdims=True) - left) * (len(names) - 1) / len(names)
    return Parts(by_seed, deviations, shares, names)


def minus(one: Parts, other: Parts) -> Parts:
    """The paired difference of two scores on the same rows, or of one score for all seeds."""
    return Parts(
        one.by_seed - other.by_seed, one.deviations - other.deviations, one.shares, one.names
    )


def crossed_interval(clients: Sequence[Parts]) -> Estimate:
    """The mean over clients, each counting once, with its interval.

    Args:
        clients: Their parts, with the same seeds. With one seed, the interval is about rows only.

    Returns:
        Without an interval if a client has a single group of rows, or if nothing varies but there
        is one row.

    Reference:
        Variance: the two-way random model, Searle, Casella and McCulloch 1992, "Variance
        Components", section 4.3. Groups of unequal weight: as for one cluster-robust mean.
    """
    by_seed = np.mean([c.by_seed for c in clients], axis=0)
    mean, num_seeds = float(by_seed.mean()), len(by_seed)
    if any(len(c.names) < 2 for c in clients):
        return Estimate(mean, None, None, None)
    of_seeds = float(by_seed.var(ddof=1)) / num_seeds if num_seeds > 1 else 0.0
    summed = _summed(clients)  # (seeds, groups of all clients)
    over_seeds = summed.mean(axis=0)
    of_rows = float(np.square(over_seeds).sum())
    of_both = 0.0
    if num_seeds > 1:
        of_both = float(np.square(summed - over_seeds).sum()) / num_seeds / (num_seeds - 1)
    # both other parts contain it; neither can be larger than the whole
    variance = max(of_seeds + of_rows - of_both, of_seeds, of_rows)
    return _t_interval(mean, variance, of_seeds, of_rows, num_seeds, _freedom_of_rows(clients))


def _t_interval(
    mean: float,
    variance: float,
    of_seeds: float,
    of_rows: float,
    num_seeds: int,
    freedom_of_rows: float,
) -> Estimate:
    """A t interval whose degrees of freedom lie between those of the seeds and of the rows.

    Satterthwaite 1946 weights 1 / freedom with the square of each part's share of the variance.
    Three seeds hardly show their own share, so a smaller power is used; see `POWER`.
    """
    from scipy.special import stdtr, stdtrit  # Student's t, without the cost of scipy.stats

    if variance <= 0:
        return Estimate(mean, mean, mean, float(mean == 0))
    shares = np.array([of_seeds, of_rows]) / (of_seeds + of_rows)
    freedoms = np.array([max(1, num_seeds - 1), freedom_of_rows])
    freedom = 1 / float((shares**POWER / freedoms).sum())
    error = float(np.sqrt(variance))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    return Estimate(mean, mean - half, mean + half, float(2 * stdtr(freedom, -abs(mean) / error)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values of several questions, corrected so that all answers together err rarely.

    If each is compared with 5 %, at least one of those that are 0 in truth looks different in at
    most 5 of 100 cases.

    Reference:
        Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    found: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        found[name] = highest
    return found


def _numbered(
    client: str, num_rows: int, groups: Sequence[Hashable] | None
) -> tuple[list[Hashable], np.ndarray]:
    """The names of the groups, and the number of each row's group, (rows,)."""
    given = [(client, row) for row in range(num_rows)] if groups is None else list(groups)
    names = list(dict.fromkeys(given))
    at = {name: i for i, name in enumerate(names)}
    return names, np.array([at[name] for name in given])


def _by_group(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Add up the rows of each group: (rows, ...) -> (groups, ...)."""
    found = np.zeros((int(index.max()) + 1, *values.shape[1:]))
    np.add.at(found, index, values)
    return found


def _lost(shares: np.ndarray) -> float:
    """By which factor squared deviations are too small, because they are taken from their own mean.

    For G groups of equal weight 1 - 1 / G, as in a sample's variance. For unequal ones, exact if
    what rows of a group share is all that varies, and a little too wide otherwise.
    """
    square = float(np.square(shares).sum())
    return 1 - 2 * float((shares**3).sum()) / square + square


def _summed(clients: Sequence[Parts]) -> np.ndarray:
    """The deviations of the mean over clients, (seeds, groups): equal names are added up."""
    names = list(dict.fromkeys(name for c in clients for name in c.names))
    at = {name: i for i, name in enumerate(names)}
    summed = np.zeros((len(clients[0].by_seed), len(names)))
    for c in clients:
        summed[:, [at[n] for n in c.names]] += c.deviations / np.sqrt(_lost(c.shares))
    return summed / len(clients)


def _freedom_of_rows(clients: Sequence[Parts]) -> float:
    """Degrees of freedom of the rows' part: like as many groups of equal weight, less one each."""
    own, freedoms = [], []
    for c in clients:
        own.append(float(np.square(c.deviations.mean(axis=0)).sum()) / _lost(c.shares))
        square = np.square(c.shares)
        freedoms.append(max(1.0, float(square.sum() ** 2 / np.square(square).sum()) - 1))
    total = sum(own)
    if total <= 0:
        return min(freedoms)
    return total**2 / sum(v**2 / f for v, f in zip(own, freedoms, strict=True))
