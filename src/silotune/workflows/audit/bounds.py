"""What an attack shows: a lower bound on epsilon, and how well losses or scores tell members.

An attack can only show that something leaks. What it does not find may leak all the same, so a
lower bound of 0 is no promise, and none of these numbers stands in for an accountant's.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from silotune.core.stats import Interval

STEP = 1e-5
"""To how much the lower bound is found; it is never more than the exact one."""


def p_value(
    *, epsilon: float, num_guesses: int, num_correct: int, num_canaries: int, delta: float
) -> float:
    """How likely so many right guesses are, at most, where (epsilon, delta)-DP holds.

    Each canary is in or out by its own fair coin, and all are guessed at once. Where epsilon holds,
    a guess is right with probability `q = 1 / (1 + exp(-epsilon))` at most, and the number of right
    ones is below that of as many such coins, up to what delta allows:
    `P[Bin(r, q) >= v] + 2 m delta max_i P[v > Bin(r, q) >= v - i] / i`.

    Args:
        epsilon: The claim that is tested, >= 0.
        num_guesses: r, canaries that were guessed in or out; decided before looking.
        num_correct: v, guesses that are right.
        num_canaries: m, all that had a coin, those without a guess included.
        delta: Of the claim.

    Raises:
        ValueError: Not `0 <= num_correct <= num_guesses <= num_canaries`, or no such epsilon or
            delta.

    Reference:
        Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run", Theorem 5.2
        and Appendix D. arXiv:2305.08846
    """
    binom: Any = import_module("scipy.stats").binom
    r, v, m = num_guesses, num_correct, num_canaries
    if not (0 <= v <= r <= m and epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"{v} right of {r} guesses, {m} canaries, ({epsilon:g}, {delta:g})-DP")
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(v - 1, r, q))
    if delta == 0 or v == 0:
        return tail
    below = binom.pmf(np.arange(v - 1, -1, -1), r, q)  # P[Bin = v - 1], P[Bin = v - 2], ...
    most = float(np.max(np.cumsum(below) / np.arange(1, v + 1)))
    return min(1.0, tail + 2 * m * delta * most)


def epsilon_lower_bound(
    *,
    num_guesses: int,
    num_correct: int,
    num_canaries: int,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """The largest epsilon that the guesses refute; 0 where they refute none.

    With so much confidence the mechanism is not (epsilon, delta)-DP for any smaller epsilon. A
    correct mechanism's bound exceeds its true epsilon in at most `1 - confidence` of all audits.

    Args:
        num_guesses: As in `p_value`, also below.
        num_correct: Of these.
        num_canaries: All that had a coin.
        delta: Of the claim; 0 tests pure epsilon-DP.
        confidence: Below 1.

    Raises:
        ValueError: See `p_value`.

    Example:
        >>> found = epsilon_lower_bound(num_guesses=100, num_correct=75, num_canaries=100, delta=0)
        >>> round(found, 4)
        0.7022
    """

    def refuted(epsilon: float) -> bool:
        p = p_value(
            epsilon=epsilon,
            num_guesses=num_guesses,
            num_correct=num_correct,
            num_canaries=num_canaries,
            delta=delta,
        )
        return p <= 1 - confidence

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def auc(members: Sequence[float], others: Sequence[float]) -> Interval:
    """How often a member scores above another row, ties counted half, with a 95 % interval.

    Args:
        members: Scores of rows that were trained on, at least one; higher says member.
        others: Scores of rows that were not, at least one.

    Returns:
        0.5 tells nothing, 1 tells all.

    Reference:
        Newcombe 2006, "Confidence Intervals for an Effect Size Measure Based on the Mann-Whitney
        Statistic. Part 2", method 5, which has a width also where members and others part cleanly.
    """
    x, y = np.asarray(members, float), np.asarray(others, float)
    ordered = np.sort(y)
    below, upto = (np.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    mean = float((below + upto).mean()) / (2 * y.size)
    ends = (_furthest(mean, end, x.size, y.size) for end in (0.0, 1.0))
    return Interval(mean, *ends)


def _furthest(mean: float, end: float, num_members: int, num_others: int) -> float:
    """The truth closest to `end` of which `mean` is still within 1.96 standard errors."""
    near, far, spare = mean, end, (num_members + num_others) / 2 - 1
    for _ in range(50):
        truth = (near + far) / 2
        shape = (1 - truth) / (2 - truth) + truth / (1 + truth)
        variance = truth * (1 - truth) * (1 + spare * shape) / (num_members * num_others)
        if abs(truth - mean) < 1.96 * math.sqrt(variance):
            near = truth
        else:
            far = truth
    return near


def true_positive_rate(
    members: Sequence[float], others: Sequence[float], *, false_positive_rate: float
) -> Interval | None:
    """The share of members found where at most so many others are taken for members.

    The threshold is the score of an other: as many others as the rate allows lie above it. So few
    rows that are found for certain count more here than in `auc`.

    Args:
        members: Scores of rows that were trained on; higher says member.
        others: Scores of rows that were not.
        false_positive_rate: Between 0 and 1.

    Returns:
        The share with its 95 % interval by Clopper and Pearson 1934, for this threshold; that
        the threshold was drawn too is not in it. None where there are no members, or too few others
        to allow a single one: a rate of 1 % needs 100.

    Reference:
        Carlini et al. 2022, "Membership Inference Attacks From First Principles". arXiv:2112.03570
    """
    # 1e-9: 0.07 * 100 is 7.000000000000001 in binary, and others may miss by as little
    allowed = math.floor(false_positive_rate * len(others) + 1e-9)
    if allowed < 1 or not members:
        return None
    threshold = sorted(others, reverse=True)[min(allowed, len(others) - 1)]
    found = sum(score > threshold for score in members)
    test: Any = import_module("scipy.stats").binomtest(found, len(members))
    interval = test.proportion_ci(0.95, method="exact")
    return Interval(found / len(members), float(interval.low), float(interval.high))


def exposure(loss_of_secret: float, losses_of_others: Sequence[float]) -> float:
    """How many bits of a secret a model gives away: `log2(candidates) - log2(rank)`.

    Args:
        loss_of_secret: Of the secret in its place.
        losses_of_others: Of other secrets in the same place that were drawn in the same way.

    Returns:
        0 where the secret is the least likely of all; `log2(candidates)` where it is the most
        likely. One that was never seen has 1.44 on average. Of equal losses the secret comes last.

    Reference:
        Carlini et al. 2019, "The Secret Sharer", section 4.2. arXiv:1802.08232
    """
    rank = 1 + sum(loss <= loss_of_secret for loss in losses_of_others)
    return math.log2(1 + len(losses_of_others)) - math.log2(rank)
