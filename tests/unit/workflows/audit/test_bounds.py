"""Lower bounds on epsilon, rates of membership inference, exposure."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from silotune.workflows.audit.bounds import (
    auc,
    epsilon_lower_bound,
    exposure,
    p_value,
    true_positive_rate,
)
from silotune.workflows.audit.canary_clients import guess, num_guesses, toss


def bound(r: int, v: int, *, m: int | None = None, delta: float = 0.0, confidence: float = 0.95):
    return epsilon_lower_bound(
        num_guesses=r, num_correct=v, num_canaries=m or r, delta=delta, confidence=confidence
    )


# --- epsilon --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("r", "v", "epsilon"),
    [
        (100, 50, 0.0),
        (100, 60, 0.0519),
        (100, 75, 0.7022),
        (100, 90, 1.6308),
        (100, 100, 3.4930),
        (500, 300, 0.2517),
        (1000, 600, 0.2975),
    ],
)
def test_the_lower_bound_is_the_published_one(r, v, epsilon):
    assert bound(r, v) == pytest.approx(epsilon, abs=1e-3)


@pytest.mark.parametrize("r", [20, 50, 100, 500])
def test_even_if_every_guess_is_right_their_number_limits_the_bound(r):
    share = 0.05 ** (1 / r)
    assert bound(r, r) == pytest.approx(math.log(share / (1 - share)), abs=1e-3)


def exact_p(q: Fraction, r: int, v: int, m: int, delta: Fraction) -> Fraction:
    """Theorem 5.2 in exact arithmetic: probabilities are fractions, sums are written out."""

    probability = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    tail = sum(probability[v:], Fraction(0))
    shares = [sum(probability[v - i : v], Fraction(0)) / i for i in range(1, v + 1)]
    return tail + 2 * m * delta * max(shares, default=Fraction(0))


@pytest.mark.parametrize(
    ("r", "v", "m", "delta"),
    [
        (20, 20, 20, "0"),
        (20, 17, 40, "0"),
        (20, 17, 40, "0.0001"),
        (30, 24, 60, "0.001"),
        (12, 11, 200, "0.00003"),
        (20, 10, 20, "0.001"),
    ],
)
def test_the_lower_bound_is_that_of_a_slow_search_in_fractions(r, v, m, delta):
    grid, found = 200, 0.0
    for step in range(5 * grid):  # the first epsilon that is not refuted
        epsilon = step / grid
        q = Fraction(1 / (1 + math.exp(-epsilon))).limit_denominator(10**4)
        if exact_p(q, r, v, m, Fraction(delta)) > Fraction(5, 100):
            break
        found = epsilon
    assert found <= bound(r, v, m=m, delta=float(delta)) + 1e-4
    assert bound(r, v, m=m, delta=float(delta)) <= found + 1 / grid + 1e-4


@given(r=st.integers(1, 200), data=st.data(), delta=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]))
def test_the_bound_rises_with_right_guesses_and_falls_with_confidence_and_delta(r, data, delta):
    v = data.draw(st.integers(0, r))
    here = bound(r, v, delta=delta)
    assert here <= bound(r, v, delta=0.0) + 2e-5
    assert here <= bound(r, v, delta=delta, confidence=0.9) + 2e-5
    assert bound(r, v, m=2 * r, delta=delta) <= here + 2e-5
    if v < r:
        assert here <= bound(r, v + 1, delta=delta) + 2e-5


@given(r=st.integers(1, 100), data=st.data(), delta=st.sampled_from([0.0, 1e-5, 1e-3]))
def test_an_epsilon_below_the_bound_is_refuted_and_one_above_is_not(r, data, delta):
    v = data.draw(st.integers(0, r))
    lower = bound(r, v, delta=delta)
    for epsilon in np.linspace(0, lower + 3, 12):
        p = p_value(
            epsilon=float(epsilon), num_guesses=r, num_correct=v, num_canaries=r, delta=delta
        )
        if abs(epsilon - lower) > 2e-5:
            assert (p <= 0.05) == (epsilon < lower), epsilon


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_randomised_response_exceeds_its_own_epsilon_in_one_audit_of_twenty_at_most(epsilon):
    """The mechanism for which the bound is tight: each guess is right with the same chance."""
    rng = np.random.default_rng(3)
    right = rng.binomial(200, 1 / (1 + math.exp(-epsilon)), size=2000)
    counts, times = np.unique(right, return_counts=True)
    above = np.array([bound(200, int(v)) > epsilon for v in counts])
    exceeded = np.average(above, weights=times)
    assert exceeded <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    assert exceeded > 0.01, "a bound that is never reached is too low"


@pytest.mark.parametrize(("r", "v", "m"), [(10, 11, 20), (10, -1, 20), (30, 5, 20)])
def test_impossible_counts_are_refused(r, v, m):
    with pytest.raises(ValueError, match="guesses"):
        bound(r, v, m=m)


# --- guesses --------------------------------------------------------------------------------------


def test_the_highest_scores_are_guessed_in_the_lowest_out_and_the_middle_is_left_alone():
    coins = (True, False, True, False, True, False)
    found = guess(coins, [9.0, 1.0, -5.0, 2.0, 8.0, -1.0], 4)
    assert found.said == (True, None, False, None, True, False)
    assert (found.num_guesses, found.num_correct) == (4, 3)


@given(st.integers(1, 5000))
def test_the_number_of_guesses_is_even_and_no_more_than_there_are(m):
    assert num_guesses(m) % 2 == 0
    assert 0 <= num_guesses(m) <= m


def test_the_number_of_guesses_is_the_documented_one():
    assert [num_guesses(m) for m in (100, 400, 1000, 2000)] == [50, 100, 158, 222]


def test_coins_are_fair_and_another_seed_tosses_others():
    assert 400 < sum(toss(1000, 3)) < 600
    assert toss(1000, 3) == toss(1000, 3) != toss(1000, 4)


# --- membership -----------------------------------------------------------------------------------

scores = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


@given(members=scores, others=scores)
def test_auc_is_the_share_of_pairs_that_a_member_wins(members, others):
    wins = [(a > b) + 0.5 * (a == b) for a in members for b in others]
    found = auc(members, others)
    assert found.mean == pytest.approx(float(np.mean(wins)))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert auc(others, members).mean == pytest.approx(1 - found.mean)


def test_the_interval_of_auc_covers_the_truth_as_often_as_it_says():
    rng, truth = np.random.default_rng(1), 0.7602499389065234  # Phi(1 / sqrt(2))
    inside = 0
    for _ in range(500):
        found = auc(rng.normal(1, 1, 60).tolist(), rng.normal(0, 1, 40).tolist())
        inside += found.low <= truth <= found.high
    assert 0.91 < inside / 500 < 0.98


@given(members=scores, others=scores, rate=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
def test_the_true_positive_rate_is_the_best_of_thresholds_that_keep_the_rate(members, others, rate):
    found = true_positive_rate(members, others, false_positive_rate=rate)
    allowed = math.floor(rate * len(others) + 1e-9)
    if allowed == 0:
        assert found is None
        return
    assert found is not None
    thresholds = [t for t in others if sum(o > t for o in others) <= allowed]
    best = max(sum(m > t for m in members) for t in thresholds) / len(members)
    assert found.mean == best
    assert found.low <= found.mean <= found.high


def test_a_rate_of_one_percent_needs_a_hundred_others():
    members, others = [1.0] * 10, [float(n) / 100 for n in range(99)]
    assert true_positive_rate(members, others, false_positive_rate=0.01) is None
    found = true_positive_rate(members, [*others, 0.0], false_positive_rate=0.01)
    assert found is not None
    assert found.mean == 1.0
    assert found.low == pytest.approx(0.025**0.1)  # Clopper and Pearson, all of ten


# --- exposure -------------------------------------------------------------------------------------


def test_exposure_is_the_rank_among_all_candidates_in_bits():
    others = [float(n) for n in range(1, 256)]
    assert exposure(0.5, others) == 8.0
    assert exposure(1.5, others) == 7.0
    assert exposure(300.0, others) == 0.0
    assert exposure(1.0, others) == 7.0, "in a tie, the secret comes last"


def test_a_secret_that_was_never_seen_has_an_exposure_of_one_and_a_half_bits():
    rng = np.random.default_rng(0)
    found = [exposure(float(rng.random()), rng.random(200).tolist()) for _ in range(3000)]
    assert np.mean(found) == pytest.approx(1 / math.log(2), abs=0.1)
