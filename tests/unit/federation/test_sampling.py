"""Cohorts: which clients are asked, how many, and how many must deliver."""

from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.core.errors import ConfigError
from silotune.core.seeds import generator
from silotune.federation.sampling import cohort_size, num_needed, sample
from silotune.recipes.sections import SamplingConfig

names = st.lists(st.text("abcdefgh0123", min_size=1, max_size=6), min_size=1, unique=True)


@given(names, st.floats(0.01, 1), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_a_cohort_is_sorted_without_repeats_and_independent_of_the_order_of_names(
    names, fraction, seed, random
):
    cfg = SamplingConfig(fraction=fraction)
    cohort = sample(names, cfg, generator(seed, "sampling", 1))
    shuffled = random.sample(names, len(names))
    assert cohort == sorted(set(cohort))
    assert set(cohort) <= set(names)
    assert len(cohort) == cohort_size(cfg, len(names))
    assert cohort == sample(shuffled, cfg, generator(seed, "sampling", 1))


def test_every_client_takes_part_by_default():
    assert sample(["c", "a", "b"], SamplingConfig(), generator(0)) == ["a", "b", "c"]


def test_the_names_given_are_not_reordered():
    given_names = ["c", "a", "b"]
    sample(given_names, SamplingConfig(), generator(0))
    assert given_names == ["c", "a", "b"]


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sample(["a", "b", "c"], SamplingConfig(num_clients=2), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def chi_square(counts, expected):
    return sum((n - expected) ** 2 / expected for n in counts)


def test_clients_and_pairs_of_clients_are_drawn_evenly():
    names, cfg = list("abcdef"), SamplingConfig(num_clients=2)
    cohorts = [tuple(sample(names, cfg, generator(17, "sampling", r))) for r in range(3000)]
    clients, pairs = Counter(n for c in cohorts for n in c), Counter(cohorts)
    # 99.9 % quantiles of chi-square with 5 and 14 degrees of freedom
    assert chi_square([clients[n] for n in names], 3000 * 2 / 6) < 20.5
    assert chi_square([pairs[p] for p in combinations(names, 2)], 3000 / 15) < 36.1


@pytest.mark.parametrize(
    ("fraction", "num_clients", "expected"),
    [
        (0.29, 100, 29),  # 28.999999999999996 in binary
        (0.15, 20, 3),
        (0.7, 10, 7),
        (0.58, 100, 58),  # 57.99999999999999
        (0.5, 5, 2),
        (0.999, 1000, 999),
        (0.99, 10, 9),
        (1.0, 7, 7),
        (0.01, 3, 1),  # at least one
    ],
)
def test_a_fraction_is_rounded_down_as_people_write_it(fraction, num_clients, expected):
    assert cohort_size(SamplingConfig(fraction=fraction), num_clients) == expected


@pytest.mark.parametrize(("asked", "existing"), [(1, 1), (3, 3), (2, 9)])
def test_a_number_of_clients_is_taken_as_given(asked, existing):
    assert cohort_size(SamplingConfig(num_clients=asked), existing) == asked


def test_more_clients_than_exist_are_refused_with_the_number_that_works():
    with pytest.raises(ConfigError) as error:
        sample(["a", "b", "c"], SamplingConfig(num_clients=5), generator(0))
    assert str(error.value) == (
        "sampling.num_clients = 5, but the data has only 3 clients.\n"
        "  Set sampling.num_clients to 3 or less, or split the data into more clients."
    )


@pytest.mark.parametrize("cfg", [SamplingConfig(), SamplingConfig(num_clients=1)])
def test_a_round_without_any_clients_is_refused(cfg):
    # Bug: a fraction of no clients gave an empty cohort, and the round only failed at its quorum;
    # the message about num_clients suggested 0, which is not a legal value.
    with pytest.raises(ConfigError) as error:
        sample([], cfg, generator(0))
    assert str(error.value) == "there are no clients to ask.\n  Check the data and the partition."


@pytest.mark.parametrize(
    ("quorum", "cohort", "expected"),
    [
        (0.5, 1, 1),
        (0.5, 2, 1),
        (0.5, 3, 2),
        (0.5, 4, 2),
        (0.5, 5, 3),
        (0.3, 10, 3),
        (0.07, 100, 7),  # 7.000000000000001 in binary
        (0.55, 100, 55),  # 55.00000000000001
        (0.001, 10, 1),
        (0.91, 10, 10),
        (1.0, 10, 10),
    ],
)
def test_a_quorum_is_rounded_up_as_people_write_it(quorum, cohort, expected):
    assert num_needed(SamplingConfig(quorum=quorum), cohort) == expected


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_fraction_and_num_clients_contradict_each_other(fraction):
    with pytest.raises(ValidationError, match="give num_clients or fraction, not both"):
        SamplingConfig(fraction=fraction, num_clients=2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fraction": 0.0},
        {"fraction": 1.1},
        {"num_clients": 0},
        {"quorum": 0.0},
        {"quorum": 1.1},
        {"timeout_s": 0.0},
        {"share": 0.5},
    ],
)
def test_values_out_of_range_and_unknown_keys_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        SamplingConfig(**wrong)
