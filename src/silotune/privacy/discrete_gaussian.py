"""Exact noise in whole numbers: the discrete Gaussian, with the probabilities of its formula.

A continuous Gaussian has to be rounded before numbers can be summed in a ring, and a sum of rounded
ones has no distribution that a guarantee knows. Whole numbers are added as they are.

Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", Algorithm 3.
arXiv:2004.00010. Differs from the paper: their algorithm compares rational numbers, one at a time.
Here a million are drawn at once. Floating point decides where its error cannot matter, and the few
that are closer to a border than `MARGIN` allows are decided by arithmetic of any precision, with
more random bits where the drawn ones do not settle it. So the distribution is exact all the same.
How long this takes depends on what is drawn.
"""

import os
from collections.abc import Callable
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

Words64 = Callable[[int], NDArray[np.uint64]]
"""count -> that many words of 64 bits, all equally likely."""
Integers = NDArray[np.int64]

MARGIN = 2.0**-44
"""Far above the error of float64 in what is compared below, relative to what it multiplies."""


def secure_words(count: int) -> NDArray[np.uint64]:
    """Words from the system's cryptographic source; no seed, no state."""
    return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


def seeded_words(generator: torch.Generator) -> Words64:
    """The same words for the same generator: for simulations only."""

    def draw(count: int) -> NDArray[np.uint64]:
        halves = torch.randint(2**32, (2 * count,), generator=generator)
        return halves.numpy().astype(np.uint32).view(np.uint64)

    return draw


def discrete_gaussian(
    count: int, *, variance: int, draw: Words64, margin: float = MARGIN
) -> Integers:
    """Independent integers k, each with a probability in proportion to exp(-k^2 / (2 variance)).

    Args:
        count: How many.
        variance: sigma^2, from 0 (no noise) to 2^60.
        draw: Where chance comes from.
        margin: A larger one sends more of the decisions to exact arithmetic; for tests.
    """
    assert 0 <= variance <= 2**60
    found = [np.zeros(0 if variance else count, dtype=np.int64)]
    missing = count if variance else 0
    while missing > 0:
        some = _accepted(missing + missing // 2 + 16, variance, draw, margin)[:missing]
        found.append(some)
        missing -= len(some)
    return np.concatenate(found)


def _accepted(count: int, variance: int, draw: Words64, margin: float) -> Integers:
    """One round of rejection: discrete Laplace numbers, thinned out to a Gaussian's shape."""
    scale = int(np.sqrt(variance)) + 1  # any scale is correct; this one rejects a quarter
    size = _geometric(count, scale, draw, margin)
    words = draw(count)
    negative, chance = (words & np.uint64(1)).astype(bool), words >> np.uint64(1)  # 63 bits
    std, center = float(np.sqrt(variance)), variance / scale
    likely = np.exp(-0.5 * ((size - center) / std) ** 2)
    apart = chance.astype(np.float64) * 2.0**-63 - likely
    accepted = apart < 0
    for at in np.flatnonzero(np.abs(apart) <= margin):
        exact = (Fraction(int(size[at])) - Fraction(variance, scale)) ** 2 / (2 * variance)
        accepted[at] = _is_below(int(chance[at]), 63, exact, draw)
    accepted &= ~(negative & (size == 0))  # else 0 would come twice as often
    return np.where(negative, -size, size)[accepted]


def _geometric(count: int, scale: int, draw: Words64, margin: float) -> Integers:
    """Integers k >= 0 with probability (1 - exp(-1/scale)) exp(-k/scale): floor(-scale ln u)."""
    words = draw(count)
    middle = words.astype(np.float64) + 0.5
    exponential = -scale * (np.log(middle) - 64 * np.log(2.0))
    # what is not known of u: the bits that were not drawn
    doubt = scale * (margin + 1 / middle)
    found = np.floor(exponential)
    unsure = (np.floor(exponential - doubt) != found) | (np.floor(exponential + doubt) != found)
    size = found.astype(np.int64)
    for at in np.flatnonzero(unsure):
        size[at] = _floor_of_log(int(words[at]), scale, draw)
    return size


# --- decisions of any precision -------------------------------------------------------------------


def _floor_of_log(word: int, scale: int, draw: Words64) -> int:
    """floor(-scale ln u) of the u that begins with the 64 bits of a word, and goes on by chance."""
    bits = 64
    while True:
        exact = Context(prec=2 * bits + 40)  # holds a multiple of 2^-bits without rounding
        unit = Decimal(1 << bits)
        low, high = exact.divide(Decimal(word), unit), exact.divide(Decimal(word + 1), unit)
        if word > 0:
            # not by operators: those would round to the digits of a global context
            most = exact.multiply(exact.next_plus(exact.ln(low).copy_negate()), Decimal(scale))
            least = exact.multiply(exact.next_minus(exact.ln(high).copy_negate()), Decimal(scale))
            if int(most) == int(max(least, Decimal(0))):
                return int(most)
        word, bits = (word << 64) | int(draw(1)[0]), bits + 64


def _is_below(word: int, bits: int, exponent: Fraction, draw: Words64) -> bool:
    """Whether the u that begins with these bits, and goes on by chance, is below exp(-exponent)."""
    while True:
        digits = 2 * bits + 40
        nearest = Context(prec=digits)
        terms = Decimal(exponent.numerator), Decimal(exponent.denominator)
        above = Context(prec=digits, rounding=ROUND_CEILING).divide(*terms)
        below = Context(prec=digits, rounding=ROUND_FLOOR).divide(*terms)
        least = nearest.next_minus(nearest.exp(above.copy_negate()))
        most = nearest.next_plus(nearest.exp(below.copy_negate()))
        unit = Decimal(1 << bits)
        if nearest.divide(Decimal(word + 1), unit) <= least:
            return True
        if nearest.divide(Decimal(word), unit) >= most:
            return False
        word, bits = (word << 64) | int(draw(1)[0]), bits + 64
