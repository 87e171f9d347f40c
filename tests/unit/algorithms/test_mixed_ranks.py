"""Clients of several ranks: what they receive, what comes back, and what is made of it.

The oracles form dense products in numpy, in float64, from the factors alone.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.flexlora import FlexLoRAConfig, flexlora
from silotune.algorithms.flora import FLoRAConfig, flora, fresh_factors
from silotune.algorithms.hetlora import HetLoRAConfig, hetlora
from silotune.algorithms.products import SumOfProducts, compressed
from silotune.core.algorithm import expected_layout, messages_for, with_ranks
from silotune.core.lora import Pair, at_rank, is_beside, joined
from silotune.core.tree import layout_of, sha256, subtract
from silotune.core.types import ServerState, Update

A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
LEFT, RIGHT = "q.residual_B.weight", "q.residual_A.weight"
PAIR = Pair(A, B)
seeds = st.integers(0, 10_000)
ranks_of_clients = st.lists(st.integers(1, 4), min_size=1, max_size=4)
RANK, D_OUT, D_IN = 4, 7, 6


def normal(gen, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def start(seed, *, zero=False, dtype=torch.float64):
    """The server's adapter; with `zero`, as LoRA begins."""
    gen = torch.Generator().manual_seed(seed)
    adapter = {A: normal(gen, RANK, D_IN), B: normal(gen, D_OUT, RANK), HEAD: normal(gen, 3, D_IN)}
    if zero:
        adapter[B] = torch.zeros_like(adapter[B])
    return ServerState(0, {n: t.to(dtype) for n, t in adapter.items()})


def answers(state, ranks, seed, *, dtype=torch.float64):
    """One update per rank, with unequal weights."""
    gen = torch.Generator().manual_seed(seed + 1)
    updates = []
    for i, rank in enumerate(ranks):
        received = at_rank(state.adapter, rank)
        own = {n: t.double() + normal(gen, *t.shape) for n, t in received.items() if n != LEFT}
        own = {n: t.to(dtype) for n, t in own.items() if not is_beside(n)}
        delta = subtract(own, {n: received[n] for n in own})
        updates.append(Update(f"c{i}", state.round + 1, delta, i + 2, {}))
    return updates


def products(state, updates):
    """(weight, dense product after training) of every client, in numpy."""
    found = []
    for update in updates:
        rank = len(update.delta[A])
        left = state.adapter[B].numpy()[:, :rank] + update.delta[B].numpy()
        right = state.adapter[A].numpy()[:rank] + update.delta[A].numpy()
        found.append((update.num_examples, left @ right))
    return found


def mean_product(state, updates):
    found = products(state, updates)
    return sum(n * p for n, p in found) / sum(n for n, _ in found)


def function(adapter):
    whole = joined(adapter)
    return (whole[B].double() @ whole[A].double()).numpy()


def play(algorithm, state, updates):
    return algorithm.step(state, algorithm.combine(state, updates))


def near(got, expected, atol=1e-9):
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def turned(state, updates, seed):
    """The same clients, each with its factors turned: (B Q, Q^T A)."""
    gen = torch.Generator().manual_seed(seed)
    spun = []
    for update in updates:
        rank = len(update.delta[A])
        received = at_rank(state.adapter, rank)
        left, right = (received[n] + update.delta[n] for n in (B, A))
        q, _ = torch.linalg.qr(normal(gen, rank, rank))
        delta = {**update.delta, B: left @ q - received[B], A: q.T @ right - received[A]}
        spun.append(replace(update, delta=delta))
    return spun


# --- what a client receives and returns


def test_a_client_receives_the_first_columns_and_rows_and_everything_else():
    state = start(1)
    adapter = {**state.adapter, LEFT: torch.ones(D_OUT, 5), RIGHT: torch.ones(5, D_IN)}
    cut = at_rank(adapter, 2)
    assert torch.equal(cut[B], adapter[B][:, :2])
    assert torch.equal(cut[A], adapter[A][:2])
    assert all(torch.equal(cut[n], adapter[n]) for n in (HEAD, LEFT, RIGHT))
    assert sha256(at_rank(adapter, RANK)) == sha256(at_rank(adapter, 99)) == sha256(adapter)


def test_messages_and_expected_updates_follow_each_clients_rank():
    ranks = {"low": 1, "middle": 3}
    algorithm = with_ranks(flora(FLoRAConfig()), ranks.get)
    state = start(2)
    sent = messages_for(["high", "low", "middle"], algorithm, state, score=True)
    shapes = {name: tuple(message.adapter[A].shape) for name, message in sent.items()}
    assert shapes == {"high": (4, D_IN), "low": (1, D_IN), "middle": (3, D_IN)}
    assert sent["high"].adapter is state.adapter  # so that a runtime encodes it once
    for client, message in sent.items():
        assert expected_layout(algorithm, state, client) == layout_of(message.adapter)
    assert expected_layout(algorithm, state) == layout_of(state.adapter)


def test_an_update_never_contains_what_stands_beside_the_adapter():
    algorithm, state = flora(FLoRAConfig()), start(3)
    after = play(algorithm, state, answers(state, [4, 2], 3))
    assert {LEFT, RIGHT} <= after.adapter.keys()
    assert not {LEFT, RIGHT} & expected_layout(algorithm, after).keys()
    assert set(messages_for(["c0"], algorithm, after, score=True)["c0"].adapter) >= {LEFT, RIGHT}


# --- sums of products


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_stack_that_is_rewritten_is_still_the_sum(seed, ranks):
    gen = torch.Generator().manual_seed(seed)
    terms = [(normal(gen, D_OUT, r), normal(gen, r, D_IN)) for r in ranks]
    sums = SumOfProducts()
    for term in terms:
        sums.add(PAIR, 2.0, *term)
    ((_, left, right),) = sums.take(-0.25)
    assert not list(sums.take(1.0))  # taken is forgotten
    assert left.shape[1] <= 2 * D_IN
    near((left @ right).numpy(), -0.5 * sum((b @ a).numpy() for b, a in terms), atol=1e-8)


@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_compressed_factors_are_the_nearest_product_of_their_rank(seed, columns, rank):
    gen = torch.Generator().manual_seed(seed)
    left, right = normal(gen, D_OUT, columns), normal(gen, columns, D_IN)
    dense = (left @ right).numpy()
    found = compressed(left, right, rank=rank)
    assert found[0].shape[1] == min(rank, columns, D_IN)
    tail = np.linalg.svd(dense, compute_uv=False)[rank:]
    missed = np.linalg.norm(dense - (found[0] @ found[1]).numpy())
    assert missed == pytest.approx(float(np.linalg.norm(tail)), abs=1e-8)


def test_compressed_factors_drop_directions_that_are_rounding():
    gen = torch.Generator().manual_seed(4)
    left, right = normal(gen, D_OUT, 2), normal(gen, 2, D_IN)
    doubled = compressed(torch.cat([left, left], 1), torch.cat([right, -0.5 * right]))
    assert doubled[0].shape == (D_OUT, 2)
    near((doubled[0] @ doubled[1]).numpy(), (0.5 * left @ right).numpy())
    assert compressed(torch.cat([left, left], 1), torch.cat([right, -right]))[0].shape[1] == 0
    largest = float(np.linalg.svd((left @ right).numpy(), compute_uv=False)[0])
    assert compressed(left, right, floor=0.999 * largest)[0].shape[1] == 1
    assert compressed(0 * left, right)[0].shape == (D_OUT, 0)


# --- FlexLoRA


@given(seeds, ranks_of_clients)
def test_flexlora_gives_every_rank_the_nearest_product_of_that_rank(seed, ranks):
    state = start(seed)
    updates = answers(state, ranks, seed)
    after = play(flexlora(FlexLoRAConfig()), state, updates)
    target = mean_product(state, updates)
    values = np.linalg.svd(target, compute_uv=False)
    missed = []
    for rank in range(1, RANK + 1):
        missed.append(np.linalg.norm(function(at_rank(after.adapter, rank)) - target))
        assert missed[-1] == pytest.approx(float(np.linalg.norm(values[rank:])), abs=1e-8)
    assert missed == sorted(missed, reverse=True)


def test_flexlora_keeps_the_function_of_one_client_of_a_low_rank():
    state = start(5)
    updates = answers(state, [2], 5)
    after = play(flexlora(FlexLoRAConfig()), state, updates)
    near(function(after.adapter), mean_product(state, updates))
    near(function(at_rank(after.adapter, 2)), mean_product(state, updates))


# --- HetLoRA


def by_hand(state, updates, *, by_norm, weights):
    """Zero-padded factors, weighted by the norms of dense products."""
    shares = []
    for num, dense in products(state, updates):
        norm = np.linalg.norm(dense) if by_norm else 1.0
        shares.append(norm * (num if weights == "examples" else 1))
    total, found = sum(shares), dict.fromkeys((A, B, HEAD), 0.0)
    for share, update in zip(shares, updates, strict=True):
        rank = len(update.delta[A])
        left, right = np.zeros((D_OUT, RANK)), np.zeros((RANK, D_IN))
        left[:, :rank] = state.adapter[B].numpy()[:, :rank] + update.delta[B].numpy()
        right[:rank] = state.adapter[A].numpy()[:rank] + update.delta[A].numpy()
        head = state.adapter[HEAD].numpy() + update.delta[HEAD].numpy()
        for name, value in ((A, right), (B, left), (HEAD, head)):
            found[name] = found[name] + share / total * value
    return found


@given(seeds, ranks_of_clients, st.booleans(), st.sampled_from(["examples", "uniform"]))
def test_hetlora_is_the_weighted_mean_of_padded_factors(seed, ranks, by_norm, weights):
    state = start(seed)
    updates = answers(state, ranks, seed)
    algorithm = hetlora(HetLoRAConfig(by_norm=by_norm, weights=weights))
    after = play(algorithm, state, updates)
    for name, expected in by_hand(state, updates, by_norm=by_norm, weights=weights).items():
        near(after.adapter[name].numpy(), expected)


@given(seeds, st.lists(st.just(RANK), min_size=1, max_size=4))
def test_hetlora_with_equal_ranks_and_no_norms_is_fedavg(seed, ranks):
    state = start(seed)
    updates = answers(state, ranks, seed)
    algorithm = hetlora(HetLoRAConfig(by_norm=False, weights="examples"))
    one, other = (play(a, state, updates).adapter for a in (algorithm, fedavg(FedAvgConfig())))
    for name in one:
        near(one[name].numpy(), other[name].numpy())


def test_hetlora_counts_clients_by_the_norm_of_what_they_have_learned():
    """A client whose product is 0 has no say where another one has learned something."""
    state = start(6, zero=True)
    still, moved = answers(state, [RANK, RANK], 6)
    still = replace(still, delta={n: 0 * d for n, d in still.delta.items()})
    after = play(hetlora(HetLoRAConfig()), state, [still, moved])
    near(function(after.adapter), products(state, [moved])[0][1])


def test_hetlora_averages_without_norms_while_all_products_are_zero():
    state = start(7, zero=True)
    updates = [
        replace(u, delta={**{n: 0 * d for n, d in u.delta.items()}, HEAD: u.delta[HEAD]})
        for u in answers(state, [RANK, RANK], 7)
    ]
    after = play(hetlora(HetLoRAConfig(weights="uniform")), state, updates)
    mean = sum(u.delta[HEAD] for u in updates) / 2
    near((after.adapter[HEAD] - state.adapter[HEAD]).numpy(), mean.numpy())
    near(after.adapter[A].numpy(), state.adapter[A].numpy())


def test_a_column_that_few_clients_have_shrinks_by_the_others_share():
    """The price of padding with zeros, as docs/papers.md says."""
    state = start(8)
    updates = [
        replace(u, delta={n: 0 * d for n, d in u.delta.items()}) for u in answers(state, [4, 2], 8)
    ]
    even = HetLoRAConfig(by_norm=False, weights="uniform")
    after = play(hetlora(even), state, updates).adapter
    near(after[B][:, :2].numpy(), state.adapter[B][:, :2].numpy())
    near(after[B][:, 2:].numpy(), state.adapter[B][:, 2:].numpy() / 2)


# --- FLoRA


@given(seeds, ranks_of_clients)
def test_flora_adds_the_products_of_clients_of_any_rank_without_an_error(seed, ranks):
    state = start(seed, zero=True)
    algorithm, target = flora(FLoRAConfig()), 0.0
    for round_ in range(3):
        updates = answers(state, ranks, seed + 10 * round_)
        target = target + mean_product(state, updates)
        heads = [(u.num_examples, u.delta[HEAD].numpy()) for u in updates]
        head = sum(n * d for n, d in heads) / sum(n for n, _ in heads)
        before, state = state, play(algorithm, state, updates)
        near(function(state.adapter), target, atol=1e-8)
        near((state.adapter[HEAD] - before.adapter[HEAD]).numpy(), head)
        assert not state.adapter[B].any()
        columns = state.adapter[LEFT].shape[1]
        assert columns <= min(D_OUT, D_IN, sum(ranks) * (round_ + 1))


def test_what_flora_keeps_is_as_narrow_as_the_clients_ranks_together():
    state = start(9, zero=True)
    after = play(flora(FLoRAConfig()), state, answers(state, [1, 2], 9))
    assert tuple(after.adapter[LEFT].shape) == (D_OUT, 3)
    assert tuple(after.adapter[RIGHT].shape) == (3, D_IN)


def test_flora_starts_each_round_from_other_factors_of_the_same_kind():
    gen = torch.Generator().manual_seed(3)
    rows, _ = torch.linalg.qr(normal(gen, D_IN, RANK))
    adapter = {A: rows.T.contiguous(), B: normal(gen, D_OUT, RANK)}
    first, again, second = (fresh_factors(adapter, round_) for round_ in (0, 0, 1))
    assert torch.equal(first[A], again[A])
    assert not torch.equal(first[A], second[A])
    assert not first[B].any()
    near((first[A] @ first[A].T).numpy(), np.eye(RANK))
    near(np.sort(np.abs(first[A].numpy()).ravel()), np.sort(np.abs(adapter[A].numpy()).ravel()))
    embedded = {
        "e.lora_embedding_A": normal(gen, RANK, 9),
        "e.lora_embedding_B": normal(gen, 5, RANK),
    }
    new = fresh_factors(embedded, 0)
    assert not new["e.lora_embedding_A"].any()
    assert not torch.equal(new["e.lora_embedding_B"], embedded["e.lora_embedding_B"])


def test_flora_reports_how_large_the_sum_beside_the_adapter_is():
    state = start(10, zero=True)
    algorithm = flora(FLoRAConfig())
    change = algorithm.combine(state, updates := answers(state, [1, 2], 10))
    report = algorithm.report(state, change)
    assert report["residual_rank"] == 3
    assert report["residual_norm"] == pytest.approx(np.linalg.norm(mean_product(state, updates)))
    assert "residual_ratio" not in report  # the adapter itself starts again from 0


def test_flora_with_weights_on_both_sides_would_be_wrong():
    """The bug that the paper warns of: what its product would miss is no rounding."""
    state = start(11, zero=True)
    updates = answers(state, [1, 2, 3], 11)
    found = products(state, updates)
    total = sum(n for n, _ in found)
    both = sum((n / total) ** 2 * p for n, p in found)
    after = function(play(flora(FLoRAConfig()), state, updates).adapter)
    assert np.linalg.norm(both - after) > 0.3 * np.linalg.norm(after)


# --- all that accept mixed ranks

MIXED = {
    "flexlora": flexlora(FlexLoRAConfig()),
    "hetlora": hetlora(HetLoRAConfig()),
    "flora": flora(FLoRAConfig()),
}
each = pytest.mark.parametrize("name", MIXED)


@each
@given(seeds, ranks_of_clients, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_no_bit(name, seed, ranks, random):
    state = start(seed, dtype=torch.float32)
    updates = answers(state, ranks, seed, dtype=torch.float32)
    arrived = sorted(random.sample(updates, len(updates)), key=lambda u: u.client)
    one, other = (play(MIXED[name], state, u) for u in (updates, arrived))
    assert sha256(one.adapter) == sha256(other.adapter)


@each
@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_clients_that_agree_lead_to_their_function(name, seed, rank, num):
    state = start(seed)
    (one,) = answers(state, [rank], seed)
    updates = [replace(one, client=f"c{i}", num_examples=i + 1) for i in range(num)]
    after = play(MIXED[name], state, updates)
    near(function(after.adapter), mean_product(state, [one]), atol=1e-8)


@pytest.mark.parametrize("name", ["flexlora", "flora"])
@given(seeds, ranks_of_clients)
def test_what_is_exact_does_not_see_how_clients_turn_their_factors(name, seed, ranks):
    state = start(seed)
    updates = answers(state, ranks, seed)
    one, other = (
        function(play(MIXED[name], state, u).adapter)
        for u in (updates, turned(state, updates, seed))
    )
    near(one, other, atol=1e-7)


def test_hetloras_mean_of_factors_does_see_it():
    state = start(12)
    updates = answers(state, [4, 3, 2], 12)
    one, other = (
        function(play(MIXED["hetlora"], state, u).adapter)
        for u in (updates, turned(state, updates, 1))
    )
    assert np.linalg.norm(one - other) > 0.1


@each
@given(seeds, ranks_of_clients)
def test_inputs_stay_untouched_and_a_copied_state_goes_on_alike(name, seed, ranks):
    algorithm, state = MIXED[name], start(seed, dtype=torch.float32)
    updates = answers(state, ranks, seed, dtype=torch.float32)
    before, sent = sha256(state.adapter), [sha256(u.delta) for u in updates]
    after = play(algorithm, state, updates)
    assert sha256(state.adapter) == before
    assert [sha256(u.delta) for u in updates] == sent
    copied = replace(after, adapter={n: t.clone() for n, t in after.adapter.items()})
    later = answers(after, ranks, seed + 7, dtype=torch.float32)
    one, other = (play(algorithm, s, later) for s in (after, copied))
    assert sha256(one.adapter) == sha256(other.adapter)
