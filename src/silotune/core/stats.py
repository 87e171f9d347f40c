"""Intervals: how certain a share or a paired difference is. Knows nothing of models or clients."""

# scipy ships no type stubs, so strict checking would report every value from it
# pyright: standard

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from silotune.core.seeds import derive

REPLICATES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it excludes 0."""
        return self.low > 0 or self.high < 0


def wilson(successes: int, total: int) -> Interval:
    """A share with its 95 % score interval.

    Args:
        successes: 0 to `total`.
        total: At least 1.

    Reference:
        Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".

    Example:
        >>> share = wilson(8, 10)
        >>> round(share.low, 3), round(share.high, 3)
        (0.49, 0.943)
    """
    from scipy.stats import binomtest

    found = binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(successes / total, float(found.low), float(found.high))


def label_scores(counts: Sequence[Sequence[float]]) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation, from counts that add up over clients.

    Macro F1 is the mean over the labels that some row has or was given, as in scikit-learn. If all
    rows have the same label, or were all given the same one, the correlation is undefined and set
    to 0.

    Args:
        counts: For each label: right, given, true, as in `types.LabelCounts`. At least one row.

    Reference:
        Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
        coefficient", Computational Biology and Chemistry 28. For two labels it is Matthews'.

    Example:
        >>> found = label_scores([(2, 3, 2), (1, 1, 2)])
        >>> {name: round(value, 3) for name, value in found.items()}
        {'accuracy': 0.75, 'macro_f1': 0.733, 'mcc': 0.577}
    """
    return {name: float(value) for name, value in _label_scores(np.asarray(counts, float)).items()}


def _label_scores(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The same for many tables at once: (..., labels, 3) -> (...)."""
    right, given, true = np.moveaxis(counts, -1, 0)  # each (..., labels)
    total = true.sum(-1)
    seen = given + true  # where this is 0, right is too
    f1 = 2 * right / np.maximum(seen, 1)
    spread = (total**2 - (given**2).sum(-1)) * (total**2 - (true**2).sum(-1))
    together = right.sum(-1) * total - (given * true).sum(-1)
    return {
        "accuracy": right.sum(-1) / total,
        "macro_f1": f1.sum(-1) / (seen > 0).sum(-1),
        "mcc": np.where(spread > 0, together / np.sqrt(np.maximum(spread, 1)), 0.0),
    }


@dataclass(frozen=True)
class Scored:
    """One client's held-out rows, scored once per seed."""

    client: str
    sums: np.ndarray
    """(seeds, rows): a row's loss summed over its tokens, its ROUGE, or a difference of these."""
    weights: np.ndarray
    """(rows,): a row's tokens, or 1. The client's mean is sum(sums) / sum(weights)."""


def client_means(scored: Scored, *, seed: int, replicates: int = REPLICATES) -> np.ndarray:
    """Bootstrap replicates of one client's mean, (replicates,).

    Both seeds and rows are drawn with replacement. Every seed scores the same rows, so one draw of
    rows serves all drawn seeds: redrawing the rows for each seed would treat the same question,
    asked three times, as three questions, and the interval would be too narrow by up to the square
    root of the number of seeds (docs/decisions/0013).

    Args:
        scored: The client's rows.
        seed: Fixes the draws, together with the client's name, so that two arms are compared on the
            same draws.
        replicates: Number of replicates.

    Reference:
        Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2). arXiv:0712.1111
    """
    rows, drawn = _draws(scored.client, scored.sums.shape, seed, replicates)
    per_seed = (rows @ scored.sums.T) / (rows @ scored.weights)[:, None]  # (replicates, seeds)
    return (per_seed * drawn).sum(axis=1) / len(scored.sums)


def _draws(
    client: str, shape: tuple[int, ...], seed: int, replicates: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each row, and each seed, is drawn: (replicates, rows), (replicates, seeds)."""
    num_seeds, num_rows = shape[:2]
    rng = np.random.default_rng(derive(seed, "bootstrap", client))
    rows = rng.multinomial(num_rows, _even(num_rows), size=replicates)
    # the same seeds for every client, because clients share a seed's first adapter
    rng = np.random.default_rng(derive(seed, "bootstrap", "seeds"))
    return rows, rng.multinomial(num_seeds, _even(num_seeds), size=replicates)


def _even(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


def mean_interval(
    clients: Sequence[Scored], *, seed: int, replicates: int = REPLICATES
) -> Interval:
    """The mean over clients, each counting once, with its bootstrap percentile interval."""
    estimate = np.mean([c.sums.sum(axis=1).mean() / c.weights.sum() for c in clients])
    drawn = np.mean([client_means(c, seed=seed, replicates=replicates) for c in clients], axis=0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


@dataclass(frozen=True)
class Labelled:
    """One client's held-out rows, given a label once per seed."""

    client: str
    given: np.ndarray
    """(seeds, rows): label indices, int."""
    true: np.ndarray
    """(rows,): the correct label indices."""
    num_labels: int

    def counts(self) -> np.ndarray:
        """Each row's contribution to `types.LabelCounts`, (seeds, rows, labels, 3)."""
        one_of = np.eye(self.num_labels)
        given = one_of[self.given]
        true = np.broadcast_to(one_of[self.true], given.shape)
        return np.stack([given * true, given, true], axis=-1)


def label_interval(
    clients: Sequence[Labelled],
    metric: str,
    *,
    minus: Sequence[Labelled] | None = None,
    seed: int,
    replicates: int = REPLICATES,
) -> Interval:
    """A label score, averaged over clients and seeds, with its bootstrap percentile interval.

    It is not a mean over rows, so every replicate rescores entire clients; the draws are those of
    `mean_interval`.

    Args:
        clients: Scored rows.
        metric: A key of `label_scores`.
        minus: The same clients under another arm, whose score is subtracted: a paired difference.
        seed: Seed of the draws.
        replicates: Number of replicates.
    """
    estimate, drawn = _label_replicates(clients, metric, seed, replicates)
    if minus is not None:
        other, others = _label_replicates(minus, metric, seed, replicates)
        estimate, drawn = estimate - other, drawn - others
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high))


def _label_replicates(
    clients: Sequence[Labelled], metric: str, seed: int, replicates: int
) -> tuple[float, np.ndarray]:
    """The estimate, and its replicates, (replicates,)."""
    estimates, drawn = [], []
    for client in clients:
        counts = client.counts()
        estimates.append(_label_scores(counts.sum(axis=1))[metric].mean())
        rows, seeds = _draws(client.client, counts.shape, seed, replicates)
        flat = counts.reshape(*counts.shape[:2], -1)  # (seeds, rows, labels * 3)
        tables = np.stack([rows @ own for own in flat], axis=1)  # (replicates, seeds, labels * 3)
        per_seed = _label_scores(tables.reshape(*tables.shape[:2], client.num_labels, 3))[metric]
        drawn.append((per_seed * seeds).sum(axis=1) / len(flat))
    return float(np.mean(estimates)), np.mean(drawn, axis=0)
