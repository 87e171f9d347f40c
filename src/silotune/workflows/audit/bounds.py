"""What an attack shows: a lower bound on epsilon, and how well losses or scores reveal members.

An attack can only show that something leaks. What it does not find may still leak, so a lower bound
of 0 guarantees nothing, and none of these numbers replaces an accountant's.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from silotune.core.stats import Interval

STEP = 1e-5
"""Precision of the lower bound, which never exceeds the exact one."""


def p_value(
    *, epsilon: float, num_guesses: int, num_correct: int, num_canaries: int, delta: float
) -> float:
    """Upper bound on the probability of this many right guesses if (epsilon, delta)-DP holds.

    Each canary is in or out by its own fair coin, and all are guessed at once. If epsilon holds, a
    guess is right with probability at most `q = 1 / (1 + exp(-epsilon))`. Then the number of right
    guesses is at most that of as many such coins, up to what delta allows:
    `P[Bin(r, q) >= v] + 2 m delta max_i P[v > Bin(r, q) >= v - i] / i`.

    Args:
        epsilon: The tested claim, >= 0.
        num_guesses: r, canaries that were guessed in or out; fixed before looking at scores.
        num_correct: v, right guesses.
        num_canaries: m, all canaries with a coin, including those without a guess.
        delta: The claim's delta.

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
    """The largest epsilon that the guesses refute; 0 if they refute none.

    With this confidence, the mechanism is not (epsilon, delta)-DP for any smaller epsilon. A
    correct mechanism's bound exceeds its true epsilon in at most `1 - confidence` of all audits.

    Args:
        num_guesses: See `p_value`, also for the next two.
        num_correct: Right guesses.
        num_canaries: All canaries with a coin.
        delta: The claim's delta; 0 tests pure epsilon-DP.
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
    """How often a member scores above another row, with ties counted half and a 95 % interval.

    Args:
        members: Scores of rows that were trained on, at least one; a higher score means member.
        others: Scores of rows that were not trained on, at least one.

    Returns:
        0.5 reveals nothing, 1 reveals everything.

    Reference:
        Newcombe 2006, "Confidence Intervals for an Effect Size Measure Based on the Mann-Whitney
        Statistic. Part 2", method 5. Its interval has a width even if the groups do not overlap.
    """
    x, y = np.asarray(members, float), np.asarray(others, float)
    ordered = np.sort(y)
    below, upto = (np.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    mean = float((below + upto).mean()) / (2 * y.size)
    ends = (_furthest(mean, end, x.size, y.size) for end in (0.0, 1.0))
    return Interval(mean, *ends)


def _furthest(mean: float, end: float, num_members: int, num_others: int) -> float:
    """The true value closest to `end` for which `mean` is still within 1.96 standard errors."""
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
    """The share of members found if at most this share of the others is taken for members.

    The threshold is the score of one of the others: as many of them as the rate allows score above
    it. A few rows that are found with certainty count more here than in `auc`.

    Args:
        members: Scores of rows that were trained on; a higher score means member.
        others: Scores of rows that were not trained on.
        false_positive_rate: Between 0 and 1.

    Returns:
        The share with its 95 % interval by Clopper and Pearson 1934 for this threshold. The
        interval ignores that the threshold is random, too. None if there are no members, or too few
        others to allow a single false positive: a rate of 1 % needs 100.

    Reference:
        Carlini et al. 2022, "Membership Inference Attacks From First Principles". arXiv:2112.03570
    """
    # 1e-9: 0.07 * 100 is 7.000000000000001 in binary, and other products may be slightly too small
    allowed = math.floor(false_positive_rate * len(others) + 1e-9)
    if allowed < 1 or not members:
        return None
    threshold = sorted(others, reverse=True)[min(allowed, len(others) - 1)]
    found = sum(score > threshold for score in members)
    test: Any = import_module("scipy.stats").binomtest(found, len(members))
    interval = test.proportion_ci(0.95, method="exact")
    return Interval(found / len(members), float(interval.low), float(interval.high))


def exposure(loss_of_secret: float, losses_of_others: Sequence[float]) -> float:
    """How many bits of a secret a model reveals: `log2(candidates) - log2(rank)`.

    Args:
        loss_of_secret: The loss of the secret in its place.
        losses_of_others: Losses of other secrets in the same place, drawn in the same way.

    Returns:
        0 if the secret is the least likely of all, `log2(candidates)` if it is the most likely. A
        secret that was never seen has 1.44 on average. In a tie, the secret comes last.

    Reference:
        Carlini et al. 2019, "The Secret Sharer", section 4.2. arXiv:1802.08232
    """
    rank = 1 + sum(loss <= loss_of_secret for loss in losses_of_others)
    return math.log2(1 + len(losses_of_others)) - math.log2(rank)
