"""FedEx-LoRA: the mean factors and their residual are exactly the mean of the products."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedex import FedExConfig, drift_warning, fedex
from silotune.core.algorithm import messages_for
from silotune.core.errors import ConfigError
from silotune.core.lora import joined
from silotune.core.tree import add, sha256
from silotune.recipes.parse import parse
from tests.unit.algorithms.test_lora_averages import HEAD, A, B, a_round, ideal, near, turned

LEFT, RIGHT = "q.residual_B.weight", "q.residual_A.weight"
seeds = st.integers(0, 10_000)
FEDEX = fedex(FedExConfig())


def function(adapter):
    whole = joined(adapter)
    return whole[B].double() @ whole[A].double()


def residual(adapter):
    if LEFT not in adapter:
        return torch.zeros(len(adapter[B]), adapter[A].shape[1], dtype=torch.float64)
    return adapter[LEFT].double() @ adapter[RIGHT].double()


def play(algorithm, state, updates):
    return algorithm.step(state, algorithm.combine(state, updates))


def answers_to(state, updates):
    """The same deltas in the round after `state`, of the trained tensors only."""
    return [replace(u, round=state.round + 1) for u in updates]


@given(seeds, st.sampled_from([(5, 3, 2), (1, 1), (4,), (1, 2, 3, 4, 5, 6)]), st.integers(1, 4))
def test_factors_and_residual_are_the_mean_of_the_products_in_every_round(seed, sizes, rank):
    state, updates = a_round(seed, sizes=sizes, rank=rank)
    there = 0.0
    for _ in range(3):
        alone = replace(state, adapter={n: state.adapter[n] for n in (A, B, HEAD)})
        target = ideal(alone, updates) + there
        plain = play(fedavg(FedAvgConfig()), alone, updates)
        state = play(FEDEX, state, answers_to(state, updates))
        near(function(state.adapter), target, atol=1e-8)
        for name in (A, B, HEAD):
            near(state.adapter[name], plain.adapter[name])
        there = residual(state.adapter)


@given(seeds)
def test_the_residual_is_the_covariance_of_the_factors(seed):
    """Of rank (clients - 1) r, here (3 - 1) 2 for the shares .5, .3 and .2."""
    state, updates = a_round(seed)
    after = play(FEDEX, state, updates)
    shares = np.array([0.5, 0.3, 0.2])
    lefts = np.stack([(state.adapter[B] + u.delta[B]).numpy() for u in updates])
    rights = np.stack([(state.adapter[A] + u.delta[A]).numpy() for u in updates])
    left, right = (np.einsum("i,ijk->jk", shares, t) for t in (lefts, rights))
    covariance = sum(
        p * (b - left) @ (a - right) for p, b, a in zip(shares, lefts, rights, strict=True)
    )
    near(residual(after.adapter), torch.from_numpy(covariance))
    assert after.adapter[LEFT].shape == (6, 4)
    assert after.adapter[RIGHT].shape == (4, 5)


def test_there_is_no_residual_where_one_factor_is_common_or_one_client_is_alone():
    for name in (A, B):
        state, updates = a_round(3)
        same = [replace(u, delta={**u.delta, name: updates[0].delta[name]}) for u in updates]
        assert LEFT not in play(FEDEX, state, same).adapter
    state, updates = a_round(3, sizes=(4,))
    assert LEFT not in play(FEDEX, state, updates).adapter


@given(seeds, st.integers(2, 5))
def test_identical_clients_are_a_fixed_point_without_a_residual(seed, num):
    state, (one, *_) = a_round(seed, dtype=torch.float32)
    updates = [replace(one, client=f"c{i}", num_examples=i + 1) for i in range(num)]
    after = play(FEDEX, state, updates)
    assert LEFT not in after.adapter
    torch.testing.assert_close(dict(after.adapter), add(state.adapter, one.delta))


def test_how_clients_turn_their_factors_does_not_change_the_function():
    state, updates = a_round(9)
    spun = list(turned(state, updates, 1))
    one, other = (function(play(FEDEX, state, u).adapter) for u in (updates, spun))
    near(one, other)
    assert (
        float(
            (
                residual(play(FEDEX, state, spun).adapter)
                - residual(play(FEDEX, state, updates).adapter)
            ).norm()
        )
        > 0.1
    )  # what moves between factors and residual is theirs alone


@given(seeds, st.integers(1, 5))
def test_a_bounded_residual_is_the_nearest_of_its_rank(seed, rank):
    state, updates = a_round(seed, sizes=(1, 2, 3, 4))
    whole = residual(play(FEDEX, state, updates).adapter).numpy()
    cut = residual(play(fedex(FedExConfig(residual_rank=rank)), state, updates).adapter).numpy()
    tail = np.linalg.svd(whole, compute_uv=False)[rank:]
    assert np.linalg.norm(whole - cut) == pytest.approx(float(np.linalg.norm(tail)), abs=1e-8)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_old_residuals_fade_by_the_decay(decay):
    algorithm = fedex(FedExConfig(residual_decay=decay))
    state, updates = a_round(10)
    first = play(algorithm, state, updates)
    alone = {n: first.adapter[n] for n in (A, B, HEAD)}
    new = residual(play(algorithm, replace(first, adapter=alone), updates).adapter)
    second = play(algorithm, first, answers_to(first, updates))
    near(residual(second.adapter), decay * residual(first.adapter) + new)


def test_the_residual_never_grows_wider_than_the_module():
    state, updates = a_round(11, sizes=(1, 2, 3, 4), rank=3)
    for seed in range(6):
        _, updates = a_round(seed, sizes=(1, 2, 3, 4), rank=3)
        state = play(FEDEX, state, answers_to(state, updates))
    assert state.adapter[LEFT].shape == (6, 5)


def test_each_round_reports_how_large_the_residual_is_beside_the_adapter():
    state, updates = a_round(12)
    change = FEDEX.combine(state, updates)
    after = FEDEX.step(state, change).adapter
    report = FEDEX.report(state, change)
    own, beside = float((after[B] @ after[A]).norm()), float(residual(after).norm())
    assert report["residual_rank"] == 4
    assert report["residual_norm"] == pytest.approx(beside)
    assert report["residual_ratio"] == pytest.approx(beside / own)
    assert beside > 0.1


@given(seeds, st.randoms(use_true_random=False))
def test_the_order_of_arrival_and_a_copied_state_change_no_bit(seed, random):
    state, updates = a_round(seed, dtype=torch.float32)
    arrived = sorted(random.sample(updates, len(updates)), key=lambda u: u.client)
    one, other = (play(FEDEX, state, u) for u in (updates, arrived))
    assert sha256(one.adapter) == sha256(other.adapter)
    copied = replace(other, adapter={n: t.clone() for n, t in other.adapter.items()})
    again = [play(FEDEX, s, answers_to(s, updates)) for s in (one, copied)]
    assert sha256(again[0].adapter) == sha256(again[1].adapter)


# --- the residual in the result only


@given(seeds, st.sampled_from([(5, 3, 2), (1, 1), (4,)]))
def test_exported_residuals_leave_every_round_to_fedavg_and_the_result_exact(seed, sizes):
    algorithm = fedex(FedExConfig(residual="export"))
    state, updates = a_round(seed, sizes=sizes)
    plain = state
    for _ in range(3):
        target = ideal(state, updates)
        state, plain = (
            play(a, s, answers_to(s, updates))
            for a, s in ((algorithm, state), (fedavg(FedAvgConfig()), plain))
        )
        assert sha256(state.adapter) == sha256(plain.adapter)
        near(function(algorithm.result(state)), target, atol=1e-8)
        (message,) = messages_for(["c0"], algorithm, state, score=True).values()
        assert message.adapter is state.adapter
        assert not message.extra


def test_an_exported_residual_is_the_last_rounds_and_is_reported():
    algorithm = fedex(FedExConfig(residual="export", residual_rank=1))
    state, updates = a_round(14)
    state = play(algorithm, state, updates)
    change = algorithm.combine(state, later := answers_to(state, updates[:2]))
    after = algorithm.step(state, change)
    plain = play(fedex(FedExConfig(residual_rank=1)), state, later).adapter
    assert sha256(algorithm.result(after)) == sha256(plain)
    report = algorithm.report(state, change)
    assert report["residual_rank"] == 1
    assert report["residual_norm"] == pytest.approx(float(residual(plain).norm()))


def test_what_an_exported_residual_cannot_be_used_with_is_refused():
    recipe = {"rounds": 1, "data": {"path": "rows.jsonl"}}
    exported = {"name": "fedex", "residual": "export"}
    with pytest.raises(ConfigError, match="residual_decay only has an effect with residual = 'tr"):
        parse({**recipe, "algorithm": {**exported, "residual_decay": 0.5}})
    best = {"checkpoint": {"keep": "best"}}
    with pytest.raises(ConfigError, match="no round's score is that of the result"):
        parse({**recipe, **best, "algorithm": exported})
    parse({**recipe, **best, "algorithm": {"name": "fedex"}})


def test_the_warning_of_drift_needs_size_and_growth():
    assert "to 0.30 of the adapter's size from 0.20 at half" in drift_warning([0.1, 0.2, 0.25, 0.3])
    assert not drift_warning([0.02, 0.05, 0.1, 0.2])
    assert not drift_warning([0.3, 0.5, 0.52, 0.55])
    assert not drift_warning([0.9])
    assert not drift_warning([])
