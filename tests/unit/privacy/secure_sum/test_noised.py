"""Changes as whole numbers with noise: norms that hold exactly, and what a sum of them is."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from silotune.core.errors import UpdateError
from silotune.privacy.discrete_gaussian import secure_words
from silotune.privacy.secure_sum.noised import (
    TAIL,
    encode_noised,
    has_room,
    round_within,
    squared_norm,
)
from silotune.privacy.secure_sum.ring import Ring

CHANCE = np.random.default_rng(3)


def as_integers(words):
    return words.view(np.int32).astype(np.int64)


@given(
    st.integers(1, 3000),
    st.floats(1e-3, 1e3),
    st.floats(0, 3),
    st.sampled_from(["random", "lowest", "highest"]),
)
@settings(deadline=None, max_examples=60)
def test_no_rounded_change_is_longer_than_the_norm(count, size, fineness, chances):
    """Whatever the chances are: also those that lengthen it most."""
    norm = Fraction(math.sqrt(count) * 10**fineness * 8 + 60)
    chance = {
        "random": CHANCE.random,
        "lowest": np.zeros,
        "highest": lambda n: np.full(n, 1 - 1e-12),
    }[chances]
    values = CHANCE.standard_normal(count) * size * float(norm) / math.sqrt(count)
    rounded = round_within(values, norm=norm, uniform=chance)
    assert sum(int(k) ** 2 for k in rounded) <= norm**2


@given(st.lists(st.integers(-(2**40), 2**40), max_size=30))
def test_the_squared_norm_is_exact(values):
    assert squared_norm(np.array(values, dtype=np.int64)) == sum(k * k for k in values)


def test_rounding_has_no_bias_and_scales_by_next_to_nothing():
    values = np.full(10_000, 0.3)
    means = np.mean(
        [round_within(values, norm=Fraction(10**6), uniform=CHANCE.random) for _ in range(20)]
    )
    assert means == pytest.approx(0.3, abs=5 * 0.46 / math.sqrt(200_000))
    long = CHANCE.standard_normal(10_000) * 1e4
    rounded = round_within(long, norm=Fraction(10**5), uniform=CHANCE.random)
    assert 1e5 * (1 - 1e-4) < math.sqrt(squared_norm(rounded)) <= 1e5


def test_a_norm_of_fewer_steps_than_rounding_moves_a_change_is_an_error():
    with pytest.raises(UpdateError, match=r"steps that are too coarse: rounding 10,000 numbers"):
        round_within(np.zeros(10_000), norm=Fraction(40), uniform=CHANCE.random)


def test_the_sum_of_several_clients_has_the_noise_of_all_and_their_changes():
    """Chi-square against the exact probabilities of a sum, by convolution; each sees its own."""
    ring, num, count = Ring(2.0**20, 4), 4, 40_000  # steps of 1/256
    step, clip = ring.step, 800 * ring.step
    values = np.zeros(count)
    words = [
        encode_noised(
            values,
            ring,
            clip_norm=clip,
            noise_multiplier=3 / 800,
            uniform=np.zeros,
            draw=secure_words,
        )[0]
        for _ in range(num)
    ]
    assert step == 2.0**-8
    total = as_integers(np.sum(words, axis=0, dtype=np.uint32))
    numbers = np.arange(-60, 61)
    one = np.exp(-(numbers.astype(float) ** 2) / (2 * 9))
    chance = one / one.sum()
    for _ in range(num - 1):
        chance = np.convolve(chance, one / one.sum())
    wide = np.arange(-60 * num, 60 * num + 1)
    common = chance * count >= 5
    seen = np.array([np.count_nonzero(total == k) for k in wide[common]])
    expected = chance[common] * count
    rest = (count - seen.sum(), count - expected.sum())
    test = stats.chisquare([*seen, rest[0]], [*expected, rest[1]], sum_check=False)
    assert test.pvalue > 1e-6
    assert total.var() == pytest.approx(num * 9, rel=0.05)


def test_the_noise_is_at_least_that_of_the_multiplier_after_rounding_to_whole_steps():
    ring = Ring(1.0, 3)
    change = np.zeros(50_000)
    words, cut = encode_noised(
        change,
        ring,
        clip_norm=0.1,
        noise_multiplier=0.5,
        uniform=CHANCE.random,
        draw=secure_words,
    )
    assert cut == 0
    assert ring.decode(words).std() == pytest.approx(0.05, rel=0.03)


def test_without_noise_the_change_is_only_clipped():
    ring = Ring(1.0, 3)
    change = np.linspace(-0.4, 0.4, 101)
    words, _ = encode_noised(
        change,
        ring,
        clip_norm=0.5,
        noise_multiplier=0,
        uniform=CHANCE.random,
        draw=secure_words,
    )
    found = ring.decode(words)
    assert np.linalg.norm(found) <= 0.5
    assert found == pytest.approx(change * 0.5 / np.linalg.norm(change), abs=1e-6)


def test_noise_is_cut_only_where_the_range_has_no_room_for_it():
    """With room, the sum has all of the noise: a cut number would not be Gaussian any more."""
    wide, narrow = Ring(1.0, 3), Ring(0.11, 3)
    options = {
        "clip_norm": 0.1,
        "noise_multiplier": 1.0,
        "uniform": CHANCE.random,
        "draw": secure_words,
    }
    _, none = encode_noised(np.zeros(10_000), wide, **options)
    words, cut = encode_noised(np.zeros(10_000), narrow, **options)
    assert none == 0
    assert cut == np.count_nonzero(np.abs(as_integers(words)) == 2**narrow.bits) > 0
    assert has_room(0.1 + TAIL * 0.1, clip_norm=0.1, std=0.1)
    assert not has_room(0.1 + TAIL * 0.1 - 1e-9, clip_norm=0.1, std=0.1)
