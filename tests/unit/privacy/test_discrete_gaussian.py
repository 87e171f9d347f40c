"""Noise in whole numbers: its probabilities against the formula, and those of the slow path."""

import itertools
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from silotune.privacy import discrete_gaussian as module
from silotune.privacy.discrete_gaussian import (
    MARGIN,
    discrete_gaussian,
    secure_words,
    seeded_words,
)


def exact(variance):
    """All integers that matter, and their probabilities, summed up from the formula."""
    numbers = np.arange(-200, 201)
    weights = np.exp(-(numbers.astype(float) ** 2) / (2 * variance))
    return numbers, weights / weights.sum()


def fits(found, variance):
    """The p-value of a chi-square test, with rare numbers taken together."""
    numbers, chance = exact(variance)
    common = chance * len(found) >= 5
    seen = np.array([np.count_nonzero(found == k) for k in numbers[common]])
    expected = chance[common] * len(found)
    rest = len(found) - seen.sum(), len(found) - expected.sum()
    return stats.chisquare([*seen, rest[0]], [*expected, rest[1]], sum_check=False).pvalue


@pytest.mark.parametrize("variance", [1, 2, 9, 300])
def test_each_number_comes_as_often_as_the_formula_says(variance):
    found = discrete_gaussian(200_000, variance=variance, draw=secure_words)
    assert fits(found, variance) > 1e-6


@pytest.mark.parametrize("wrong", [1.05, 0.95])
def test_the_check_above_would_notice_a_wrong_variance(wrong):
    found = discrete_gaussian(200_000, variance=300, draw=secure_words)
    assert fits(found, 300 * wrong) < 1e-6


def test_decisions_of_any_precision_give_the_same_distribution():
    """A margin so large that nothing is decided in floating point."""
    found = discrete_gaussian(2000, variance=2, draw=secure_words, margin=2.0)
    assert fits(found, 2) > 1e-6


def test_both_ways_to_decide_agree_where_floating_point_may_decide():
    """The same words; with a margin of 2^-8 some thousand of them are decided the slow way."""
    made = [
        discrete_gaussian(
            20_000,
            variance=10**6,
            draw=seeded_words(torch.Generator().manual_seed(5)),
            margin=margin,
        )
        for margin in (MARGIN, 2.0**-18)
    ]
    assert np.array_equal(*made)


def test_at_the_variance_of_an_adapter_moments_and_shape_are_right():
    """With 2e7 steps to a standard deviation, a discrete and a rounded Gaussian look the same."""
    found = discrete_gaussian(300_000, variance=4 * 10**14, draw=secure_words) / 2e7
    assert stats.kstest(found, "norm").pvalue > 1e-6
    assert len(np.unique(found)) > 295_000
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.01


def test_no_variance_is_no_noise_and_no_words():
    def never(count):
        raise AssertionError(count)

    assert discrete_gaussian(3, variance=0, draw=never).tolist() == [0, 0, 0]


@pytest.mark.parametrize("word", [0, 1, 2**63, 2**64 - 1])
def test_words_that_do_not_settle_a_number_are_followed_by_more(word):
    """The exact floor of -s ln u for u between two words, by another computation."""
    more = itertools.cycle([np.uint64(2**63 + 12345)])
    found = module._floor_of_log(word, 10**6, lambda _: np.array([next(more)]))
    with localcontext() as context:
        context.prec = 120
        bits = (word << 64) + 2**63 + 12345
        by_hand = -(Decimal(bits) / Decimal(2**128)).ln() * 10**6
    assert found == int(by_hand)


def test_a_comparison_that_begins_alike_is_settled_by_later_bits():
    """exp(-1) to 63 bits is equal to the word: the next word decides, both ways."""
    with localcontext() as context:
        context.prec = 80
        first = int(Decimal(-1).exp() * 2**63)
        then = int((Decimal(-1).exp() * 2**63 - first) * 2**64)
    for next_, said in ((then - 1, True), (then + 1, False)):
        draw = iter([next_])
        found = module._is_below(first, 63, Fraction(1), lambda _, d=draw: np.array([next(d)]))
        assert found is said
        assert next(draw, None) is None, "the word was needed"
