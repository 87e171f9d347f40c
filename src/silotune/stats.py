"""How sure a number is: intervals of shares and of paired differences. Knows no model or client."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from silotune.seeds import derive

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
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def wilson(successes: int, total: int) -> Interval:
    """A share and its 95 % score interval.

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


@dataclass(frozen=True)
class Scored:
    """One client's held-out rows, scored once per seed."""

    client: str
    sums: np.ndarray
    """(seeds, rows): a row's loss summed over its tokens, or its ROUGE, or a difference of such."""
    weights: np.ndarray
    """(rows,): a row's tokens, or 1. The client's mean is sum(sums) / sum(weights)."""


def client_means(scored: Scored, *, seed: int, replicates: int = REPLICATES) -> np.ndarray:
    """Bootstrap replicates of one client's mean, (replicates,).

    Seeds are drawn with replacement and rows are drawn with replacement. Every seed scores the same
    rows, so one draw of rows counts for all drawn seeds: rows drawn anew inside each seed would
    treat the same question, asked three times, as three questions, and the interval would be too
    narrow by up to the root of the number of seeds (docs/decisions/0013).

    Args:
        scored: The client's rows.
        seed: Together with the client's name it fixes the draws, so that two arms are compared on
            the same ones.
        replicates: How many.

    Reference:
        Owen 2007, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2). arXiv:0712.1111
    """
    rng = np.random.default_rng(derive(seed, "bootstrap", scored.client))
    rows = rng.multinomial(len(scored.weights), _even(len(scored.weights)), size=replicates)
    # the same seeds for every client, as a seed's first adapter is
    rng = np.random.default_rng(derive(seed, "bootstrap", "seeds"))
    drawn = rng.multinomial(len(scored.sums), _even(len(scored.sums)), size=replicates)
    per_seed = (rows @ scored.sums.T) / (rows @ scored.weights)[:, None]  # (replicates, seeds)
    return (per_seed * drawn).sum(axis=1) / len(scored.sums)


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
