"""Intervals over crossed rows and seeds: against closed forms, and how often they hold the truth.

The simulation has the design of a comparison: five clients, 20 rows each, seed effects that the
clients share (a seed's first adapter) or have for themselves, and rows that may come in groups.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from silotune.core.crossed import (
    Parts,
    Scored,
    crossed_interval,
    holm,
    minus,
    parts_of_labels,
    parts_of_mean,
)
from silotune.core.stats import Labelled


def mean_parts(sums, weights=None, client="north", groups=None) -> Parts:
    sums = np.array(sums, dtype=float)
    weights = np.ones(sums.shape[1]) if weights is None else np.array(weights, dtype=float)
    return parts_of_mean(Scored(client, sums, weights), groups)


def test_the_mean_is_weighted_inside_a_client_and_even_over_clients():
    small = mean_parts([[2.0, 6.0]], weights=[1, 3])  # 8 over 4 tokens: 2.0
    large = mean_parts([[10.0] * 4], weights=[2, 2, 3, 3], client="south")  # 40 over 10: 4.0
    assert crossed_interval([small, large]).mean == 3.0


def test_with_one_seed_it_is_the_t_interval_of_the_rows():
    rows = np.random.default_rng(1).normal(size=12)
    found = crossed_interval([mean_parts([rows])])
    low, high = stats.t.interval(0.95, 11, rows.mean(), stats.sem(rows))
    assert (found.mean, found.low, found.high) == pytest.approx((rows.mean(), low, high))
    assert found.p_value == pytest.approx(stats.ttest_1samp(rows, 0).pvalue)


def test_if_only_seeds_vary_it_is_the_t_interval_of_the_seeds():
    seeds = np.array([0.3, -0.1, 0.5, 0.2])
    found = crossed_interval([mean_parts(np.repeat(seeds[:, None], 20, axis=1))])
    low, high = stats.t.interval(0.95, 3, seeds.mean(), stats.sem(seeds))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_variance_is_that_of_the_two_way_random_model():
    """The slow way: mean squares of an analysis of variance, solved for the mean's variance."""
    rng = np.random.default_rng(2)
    y = rng.normal(size=(5, 1)) + rng.normal(size=(1, 8)) + 0.3 * rng.normal(size=(5, 8))
    seeds, rows = y.mean(axis=1), y.mean(axis=0)
    residual = y - seeds[:, None] - rows + y.mean()
    ms_seeds, ms_rows = 8 * seeds.var(ddof=1), 5 * rows.var(ddof=1)
    ms_both = (residual**2).sum() / (4 * 7)
    variance = (ms_seeds + ms_rows - ms_both) / 40
    a, b = ms_seeds / 40, ms_rows / 40
    freedom = 1 / (((a / (a + b)) ** 1.25) / 4 + ((b / (a + b)) ** 1.25) / 7)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    found = crossed_interval([mean_parts(y)])
    assert (found.low, found.high) == pytest.approx((y.mean() - half, y.mean() + half))


def test_rows_of_equal_groups_count_like_one_row_each():
    groups = np.random.default_rng(3).normal(size=(3, 6))
    one = crossed_interval([mean_parts(groups)])
    rows = np.repeat(groups, 4, axis=1)
    found = crossed_interval([mean_parts(rows, groups=[f"g{i // 4}" for i in range(24)])])
    assert (found.low, found.high) == pytest.approx((one.low, one.high))
    alone = crossed_interval([mean_parts(rows)])
    assert alone.high - alone.low < found.high - found.low


def test_a_group_at_two_clients_is_one_group():
    rows = np.random.default_rng(4).normal(size=(1, 10))
    apart = crossed_interval([mean_parts(rows, client=c) for c in ("north", "south")])
    names = [f"disease {i}" for i in range(10)]
    same = crossed_interval([mean_parts(rows, client=c, groups=names) for c in ("north", "south")])
    # the same ten rows twice say no more than once
    ratio = (same.high - same.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(np.sqrt(2), rel=1e-9)


def test_a_single_group_of_rows_has_no_interval():
    found = crossed_interval([mean_parts([[1.0, 2.0]], groups=["a", "a"])])
    assert (found.mean, found.low, found.high, found.p_value) == (1.5, None, None, None)


def test_equal_rows_have_no_spread():
    found = crossed_interval([mean_parts([[1.5] * 30, [1.5] * 30])])
    assert (found.mean, found.low, found.high, found.p_value) == (1.5, 1.5, 1.5, 0.0)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(2, 30))
def test_the_unit_and_the_order_of_rows_do_not_matter(seed, num_seeds, num_rows):
    rng = np.random.default_rng(seed)
    sums, weights = rng.normal(size=(num_seeds, num_rows)), rng.uniform(1, 50, num_rows)
    order = rng.permutation(num_rows)
    one = crossed_interval([mean_parts(sums, weights)])
    other = crossed_interval([mean_parts(-3 * sums[:, order], weights[order])])
    assert other.mean == pytest.approx(-3 * one.mean)
    assert (other.low, other.high) == pytest.approx((-3 * one.high, -3 * one.low))
    assert other.p_value == pytest.approx(one.p_value)
    assert one.low <= one.mean <= one.high


def test_accuracy_is_a_mean_over_rows_so_leaving_groups_out_gives_the_same_interval():
    rng = np.random.default_rng(5)
    given_, true = rng.integers(0, 3, (4, 25)), rng.integers(0, 3, 25)
    other = rng.integers(0, 3, (4, 25))
    one, two = (Labelled("north", g, true, 3) for g in (given_, other))
    names = [i // 2 for i in range(25)]
    found = minus(parts_of_labels(one, "accuracy"), parts_of_labels(two, "accuracy"))
    right = [(g == true).astype(float) for g in (given_, other)]
    assert crossed_interval([found]) == pytest.approx(
        crossed_interval([mean_parts(right[0] - right[1])])
    )
    grouped = parts_of_labels(one, "accuracy", names)
    assert grouped.shares == pytest.approx(mean_parts(right[0], groups=names).shares)


# --- Holm -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(values):
    corrected = holm({str(i): p for i, p in enumerate(values)})
    order = sorted(range(len(values)), key=lambda i: values[i])
    for rank, i in enumerate(order):
        if values[i] * (len(values) - rank) >= 0.05:
            rejected = order[:rank]
            break
    else:
        rejected = order
    assert {i for i in range(len(values)) if corrected[str(i)] < 0.05} == set(rejected)
    assert all(corrected[str(i)] >= p for i, p in enumerate(values))


# --- how often the truth is inside ----------------------------------------------------------------

CLIENTS, ROWS = 5, 20
EFFECTS = {
    "no effect": (0.0, 0.0),
    "a small one": (0.01, 0.01),
    "shared and own": (0.02, 0.02),
    "shared": (0.05, 0.0),
    "own": (0.0, 0.05),
    "a large one": (0.2, 0.2),
}
"""Standard deviations of the seeds' effects, shared by the clients and each one's own; that of rows
is 0.07, and what is left varies by 0.03."""


def comparisons(rng, *, seeds: int, shared: float, own: float, grouped: bool):
    """Differences of one comparison whose truth is 0: (clients, seeds, rows)."""
    if grouped:  # five groups of four, which have half of the variance in common
        rows = 0.05 * np.repeat(rng.normal(size=(CLIENTS, 1, 5)), 4, axis=2)
        rows = rows + 0.05 * rng.normal(size=(CLIENTS, 1, ROWS))
    else:
        rows = 0.07 * rng.normal(size=(CLIENTS, 1, ROWS))
    return (
        shared * rng.normal(size=(1, seeds, 1))
        + own * rng.normal(size=(CLIENTS, seeds, 1))
        + rows
        + 0.03 * rng.normal(size=(CLIENTS, seeds, ROWS))
    )


def coverage(effect: str, *, seeds: int, grouped: bool, repeats: int):
    """How often a client's interval and that of the mean hold 0, and how often a verdict is wrong.

    Returns:
        The shares of intervals, and of comparisons with at least one wrong verdict.
    """
    rng = np.random.default_rng(7)
    shared, own = EFFECTS[effect]
    groups = [i // 4 for i in range(ROWS)] if grouped else None
    of_client, of_mean, wrong = [], 0, 0
    for _ in range(repeats):
        given_ = comparisons(rng, seeds=seeds, shared=shared, own=own, grouped=grouped)
        named = [
            groups and [(c, g) for g in groups] for c in range(CLIENTS)
        ]  # other groups at each client
        parts = [mean_parts(given_[c], client=str(c), groups=named[c]) for c in range(CLIENTS)]
        each = [crossed_interval([p]) for p in parts]
        of_client += [e.low <= 0 <= e.high for e in each]
        whole = crossed_interval(parts)
        of_mean += whole.low <= 0 <= whole.high
        wrong += min(holm({str(i): e.p_value for i, e in enumerate(each)}).values()) < 0.05
    return np.mean(of_client), of_mean / repeats, wrong / repeats


@pytest.mark.parametrize(
    ("effect", "seeds", "grouped"),
    [("no effect", 3, False), ("shared", 3, False), ("own", 5, True)],
)
def test_intervals_hold_the_truth_about_as_often_as_they_claim(effect, seeds, grouped):
    clients, mean, wrong = coverage(effect, seeds=seeds, grouped=grouped, repeats=200)
    # the percentile bootstrap of before: 0.83 and 0.75 for "shared" with three seeds
    assert 0.91 <= clients <= 0.99
    assert 0.90 <= mean <= 1.0
    assert wrong <= 0.09


@pytest.mark.slow
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("effect", EFFECTS)
def test_intervals_hold_the_truth_in_93_to_97_of_100_cases(effect, seeds, grouped):
    clients, mean, wrong = coverage(effect, seeds=seeds, grouped=grouped, repeats=2000)
    # 2,000 repeats: one standard error of the mean's coverage is half a hundredth
    assert 0.93 <= clients <= 0.975
    assert 0.93 - 0.01 <= mean <= 0.97 + 0.01
    # without Holm about 0.3, whatever the seeds do
    assert wrong <= 0.09
