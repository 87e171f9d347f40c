"""The estimate of the aggregation error beside the dense one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.fedopt import FedAdamConfig, fedadam
from silotune.core.types import Change, ServerState
from silotune.federation.aggregation_error import aggregation_error, measure
from silotune.recipes.parse import parse
from tests.unit.algorithms.test_lora_averages import B, a_round, ideal, only, product


def after(state, change):
    return {**state.adapter, **{n: state.adapter[n] + d for n, d in change.delta.items()}}


def of(name, state, updates, *, seed=17, **options):
    cfg, build = ALGORITHMS[name]
    made = cfg(**options)
    change = build(made).combine(state, updates)
    return aggregation_error(made, state, updates, change, seed=seed), change


@given(st.integers(0, 10_000))
def test_the_estimate_is_near_the_dense_error(seed):
    state, updates = a_round(seed, d_in=40)
    estimates = [of("fedavg", state, updates, seed=s)[0] for s in range(8)]
    change = of("fedavg", state, updates)[1]
    target = ideal(state, updates)
    dense = (product(after(state, change)) - target).norm() / (
        target - product(state.adapter)
    ).norm()
    found = sum(estimates) / len(estimates)
    assert found == pytest.approx(float(dense), rel=0.35)


@pytest.mark.parametrize("name", ["ffa_lora", "rolora", "fedsvd"])
def test_what_is_called_exact_has_no_error(name):
    state, updates = a_round(3)
    error, _ = of(name, state, only(updates, B))
    assert error == pytest.approx(0, abs=1e-12)


def test_what_is_called_nearer_has_a_smaller_error():
    state, updates = a_round(4)
    plain, _ = of("fedavg", state, updates)
    for name in ("flexlora", "lora_fair"):
        error, _ = of(name, state, updates)
        assert 0 < error < plain


def test_the_estimate_is_the_same_for_the_same_seed_and_round():
    state, updates = a_round(5)
    assert of("fedavg", state, updates)[0] == of("fedavg", state, updates)[0]
    assert of("fedavg", state, updates)[0] != of("fedavg", state, updates, seed=18)[0]


def test_without_factors_or_without_a_move_there_is_no_error():
    state, updates = a_round(6)
    still = [u.__class__(u.client, 1, {B: torch.zeros_like(u.delta[B])}, 1, {}) for u in updates]
    assert of("fedavg", state, still)[0] is None
    bare = ServerState(0, {"bias": torch.zeros(2)})
    sent = [u.__class__(u.client, 1, {"bias": torch.ones(2)}, 1, {}) for u in updates]
    assert of("fedavg", bare, sent)[0] is None


def recipe(**more):
    return parse({"rounds": 1, "data": {"path": "medquad_mini"}, **more})


def test_under_privacy_at_the_server_nothing_is_measured():
    state, updates = a_round(7)
    change = Change(updates[0].delta)
    algorithm = fedadam(FedAdamConfig())
    started = ServerState(0, state.adapter, algorithm.init(state.adapter, 3))
    open_ = measure(recipe(), algorithm, started, updates, change)
    assert open_.keys() == {"aggregation_error", "share_below_tau"}
    private = recipe(
        privacy={"unit": "client", "delta": 0.1, "noise_multiplier": 1.0},
        algorithm={"weights": "uniform"},
    )
    assert measure(private, algorithm, started, updates, change) == {}


@pytest.mark.parametrize(("size", "share"), [(1e-6, 1.0), (1e-2, 0.0)])
def test_fedadam_says_how_many_changes_are_below_tau(size, share):
    adapter = {"x": torch.zeros(50)}
    algorithm = fedadam(FedAdamConfig(tau=1e-4))
    state = ServerState(0, adapter, algorithm.init(adapter, 3))
    assert algorithm.report is not None
    found = algorithm.report(state, Change({"x": torch.full((50,), size)}))
    assert found == {"share_below_tau": share}
