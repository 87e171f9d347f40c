"""Shares and label scores. The intervals of means and differences are in crossed.py."""

# scipy ships no type stubs, so strict checking would report every value from it
# pyright: standard

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float


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


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """The mean of a few values, such as those of several seeds, and its 95 % t interval.

    Args:
        values: At least one.

    Returns:
        mean, low, high; low and high are None for a single value.

    Reference:
        Student 1908, "The Probable Error of a Mean".

    Example:
        >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    from scipy.special import stdtrit  # Student's t, without the cost of scipy.stats

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, None, None
    error = float(np.std(values, ddof=1)) / count**0.5
    half = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * error
    return mean, mean - half, mean + half


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
    return {
        name: float(value) for name, value in label_scores_of(np.asarray(counts, float)).items()
    }


def label_scores_of(counts: np.ndarray) -> dict[str, np.ndarray]:
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
