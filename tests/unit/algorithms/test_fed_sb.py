"""Fed-SB: two rounds make the frozen factors, then only the core between them is trained.

The oracles form dense products in numpy. Live models: tests/integration/models/test_beside.py.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms.fed_sb import FedSBConfig, fed_sb
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.ffa_lora import FFALoRAConfig, ffa_lora
from silotune.core.algorithm import expected_layout, starting_state
from silotune.core.errors import ConfigError
from silotune.core.lora import joined
from silotune.core.tree import layout_bytes, sha256
from silotune.core.types import ServerState, Update
from silotune.federation.aggregation_error import aggregation_error
from silotune.recipes.parse import parse
from silotune.workflows.contribution.contribution import check_possible

A, B, CORE, HEAD = "q.lora_A.weight", "q.lora_B.weight", "q.lora_core.weight", "score.weight"
SENT = {1: {B, HEAD}, 2: {A, HEAD}, 3: {CORE, HEAD}, 4: {CORE, HEAD}}
FED_SB = fed_sb(FedSBConfig())
seeds = st.integers(0, 10_000)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def normal(gen, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)


def start(seed=1, *, rank=3, d_out=7, d_in=6, dtype=torch.float64, algorithm=FED_SB):
    """As PEFT begins: A at random, B = 0."""
    gen = torch.Generator().manual_seed(seed)
    adapter = {A: normal(gen, rank, d_in), B: normal(gen, d_out, rank) * 0, HEAD: normal(gen, 2, 3)}
    return starting_state(algorithm, {n: t.to(dtype) for n, t in adapter.items()}, 3)


def answers(state, sizes, seed, *, algorithm=FED_SB):
    """Drawn changes of what is trained in the next round."""
    gen = torch.Generator().manual_seed(seed + 7 * state.round)
    layout = expected_layout(algorithm, state)
    return [
        Update(
            f"c{i}",
            state.round + 1,
            {n: normal(gen, *spec.shape, dtype=spec.dtype) for n, spec in layout.items()},
            num,
            {},
        )
        for i, num in enumerate(sizes)
    ]


def play(state, updates, algorithm=FED_SB):
    return algorithm.step(state, algorithm.combine(state, updates))


def product(adapter):
    """B R A, dense."""
    return (
        adapter[B].double().numpy() @ adapter[CORE].double().numpy() @ adapter[A].double().numpy()
    )


def mean_of_products(state, updates, algorithm=FED_SB):
    total = sum(u.num_examples for u in updates)
    found = 0.0
    for u in updates:
        own = {**state.adapter, **{n: state.adapter[n] + d for n, d in u.delta.items()}}
        found = found + u.num_examples / total * product(own)
    return found


def after_rounds(num, seed=1, **more):
    state = start(seed, **more)
    for _ in range(num):
        state = play(state, answers(state, [3, 1, 2], seed))
    return state


def near(got, expected, atol=1e-8):
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=atol)


def test_a_run_begins_with_the_identity_between_the_factors_and_the_bases_function():
    state = start()
    assert torch.equal(state.adapter[CORE], torch.eye(3, dtype=torch.float64))
    assert not product(state.adapter).any()
    assert state.extra == {}


def test_clients_send_b_then_a_then_the_core_and_always_the_head():
    state = start()
    for round_ in range(1, 5):
        assert expected_layout(FED_SB, state).keys() == SENT[round_]
        state = play(state, answers(state, [1, 2], 3))
    bias = "q.lora_B.bias"
    trained = [FED_SB.local.trains(bias, r) for r in (1, 2, 3)]
    assert trained == [True, False, False]


def test_from_the_third_round_on_the_width_of_a_module_does_not_matter():
    sent = {layout_bytes(expected_layout(FED_SB, after_rounds(2, d_in=n))) for n in (6, 60, 600)}
    assert sent == {8 * (3 * 3 + 2 * 3)}


@given(seeds, sizes, st.integers(1, 8))
def test_the_new_function_is_the_mean_of_the_clients_functions_in_every_round(seed, sizes, rank):
    state = start(seed, rank=rank)
    for _ in range(4):
        updates = answers(state, sizes, seed)
        expected = mean_of_products(state, updates)
        state = play(state, updates)
        near(product(state.adapter), expected, atol=1e-7)
        whole = joined(state.adapter)
        assert whole.keys() == {A, B, HEAD}
        near(whole[B] @ whole[A], expected, atol=1e-7)


@given(seeds)
def test_two_rounds_make_orthonormal_factors_around_the_singular_values(seed):
    first = after_rounds(1, seed).adapter
    near(first[B].T @ first[B], np.eye(3))
    near(first[CORE], np.eye(3))
    second = after_rounds(2, seed).adapter
    near(second[B].T @ second[B], np.eye(3))
    near(second[A] @ second[A].T, np.eye(3))
    values = np.linalg.svd(product(second), compute_uv=False)[:3]
    near(second[CORE], np.diag(values))


def test_after_two_rounds_the_factors_stay_bit_for_bit():
    state = after_rounds(2)
    later = play(play(state, answers(state, [1, 4], 2)), answers(state, [2, 2], 5))
    assert all(torch.equal(later.adapter[n], state.adapter[n]) for n in (A, B))
    assert not torch.equal(later.adapter[CORE], state.adapter[CORE])


def test_a_rank_above_the_module_leaves_directions_without_a_value():
    state = after_rounds(2, rank=8, d_in=5)
    assert state.adapter[A].shape == (8, 5)
    assert state.adapter[B].shape == (7, 8)
    assert state.adapter[CORE].shape == (8, 8)
    assert np.linalg.matrix_rank(product(state.adapter)) == 5
    assert not state.adapter[CORE][5:].any()


def test_the_printed_vector_of_one_client():
    """By hand: B = (3, 4) on A = (1, 0) is 5 (.6, .8) (1, 0); A then moves by (0, 2) to (5, 2).

    The product (.6, .8) (5, 2) has the singular value 29^(1/2) and the right singular vector
    (5, 2) / 29^(1/2); half of a core step of 1 adds .5.
    """
    adapter = {A: torch.tensor([[1.0, 0.0]]).double(), B: torch.zeros(2, 1).double()}
    algorithm = fed_sb(FedSBConfig(server_lr=0.5))
    state = starting_state(algorithm, adapter, 1)
    for name, delta in ((B, [[6.0], [8.0]]), (A, [[0.0, 4.0]]), (CORE, [[1.0]])):
        update = Update("c0", state.round + 1, {name: torch.tensor(delta).double()}, 1, {})
        state = play(state, [update], algorithm)
    near(state.adapter[B], [[0.6], [0.8]])
    near(state.adapter[A], [[5 / 29**0.5, 2 / 29**0.5]])
    near(state.adapter[CORE], [[29**0.5 + 0.5]])


@given(seeds, st.randoms(use_true_random=False))
def test_neither_the_order_of_arrival_nor_a_stop_changes_a_bit(seed, random):
    one = other = start(seed, dtype=torch.float32)
    for _ in range(4):
        updates = answers(one, [2, 5, 1, 3], seed)
        arrived = sorted(random.sample(updates, len(updates)), key=lambda u: u.client)
        copied = replace(other, adapter={n: t.clone() for n, t in other.adapter.items()})
        one, other = play(one, updates), play(copied, arrived)
        assert sha256(one.adapter) == sha256(other.adapter)


@given(seeds, st.integers(1, 4))
def test_identical_clients_lead_to_their_function(seed, num):
    state = start(seed)
    for _ in range(4):
        (update,) = answers(state, [1], seed)
        updates = [replace(update, client=f"c{i}", num_examples=i + 1) for i in range(num)]
        expected = mean_of_products(state, [update])
        state = play(state, updates)
        near(product(state.adapter), expected, atol=1e-7)


def test_clients_that_do_not_move_at_all_leave_the_base():
    state = start()
    for _ in range(3):
        updates = [
            replace(u, delta={n: 0 * d for n, d in u.delta.items()})
            for u in answers(state, [1, 2], 1)
        ]
        state = play(state, updates)
        assert not product(state.adapter).any()
    near(state.adapter[B].T @ state.adapter[B], np.eye(3))  # so that the core can still learn
    near(state.adapter[A] @ state.adapter[A].T, np.eye(3))


def test_a_sum_of_the_updates_is_enough():
    """Secure sums hand over the mean as one update."""
    assert FedSBConfig.facts.by_sums
    state = after_rounds(2)
    updates = answers(state, [3, 1, 2], 4)
    mean = {n: sum(u.num_examples * u.delta[n] for u in updates) / 6 for n in updates[0].delta}
    whole = replace(updates[0], delta=mean, num_examples=6)
    for name, tensor in play(state, [whole]).adapter.items():
        near(tensor, play(state, updates).adapter[name], atol=1e-12)


@pytest.mark.parametrize("num", [0, 1, 2, 3])
def test_the_measured_aggregation_error_is_zero(num):
    state = after_rounds(num)
    updates = answers(state, [1, 2, 3], 8)
    change = FED_SB.combine(state, updates)
    error = aggregation_error(FedSBConfig(), state, updates, change, seed=3)
    assert error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("e.lora_embedding_", ((4, 9), (5, 4))),
        ("conv.lora_", ((4, 3, 2, 2), (5, 4, 1, 1))),
    ],
)
def test_modules_that_are_no_linear_layers_are_refused_by_name(name, shapes):
    right, left = (torch.zeros(shape) for shape in shapes)
    adapter = {f"{name}A.weight": right, f"{name}B.weight": left}
    with pytest.raises(ConfigError, match=f"'{name}B.weight' belongs to another kind of module"):
        starting_state(FED_SB, adapter, 2)


def test_contributions_are_refused_with_the_reason(tmp_path):
    data, kept = {"path": str(tmp_path)}, {"keep_updates": True}
    recipe = {"rounds": 1, "data": data, "algorithm": {"name": "fed_sb"}, "checkpoint": kept}
    with pytest.raises(ConfigError, match="what a core means depends on the factors around it"):
        check_possible(Path("runs/one"), parse(recipe), FED_SB)


# --- the toy: factors that two rounds have learned, beside factors drawn at random

CLIENTS, ROWS, D_IN, D_OUT, RANK = 4, 60, 20, 12, 4
ROUNDS, STEPS, LR = 30, 5, 0.2


def relative_error(algorithm, *, frozen=None):
    """|B R A - W| / |W| after linear regression on W of rank 2, by plain steps at each client.

    Args:
        algorithm: fed_sb, or another one without a core.
        frozen: Factors to start the third round from, instead of those of two rounds.
    """
    gen = torch.Generator().manual_seed(2)
    target = normal(gen, D_OUT, 2) @ normal(gen, 2, D_IN) / D_IN**0.5
    rows = [normal(gen, ROWS, D_IN) for _ in range(CLIENTS)]
    state = starting_state(
        algorithm,
        {A: normal(gen, RANK, D_IN) / D_IN**0.5, B: torch.zeros(D_OUT, RANK).double()},
        CLIENTS,
    )
    if frozen is not None:
        state = ServerState(2, frozen)
    for _ in range(state.round, ROUNDS):
        trains = {n for n in state.adapter if algorithm.local.trains(n, state.round + 1)}
        updates = []
        for i, x in enumerate(rows):
            now = {n: t.clone().requires_grad_(n in trains) for n, t in state.adapter.items()}
            for _ in range(STEPS):
                core = now.get(CORE, torch.eye(RANK).double())
                miss = (now[B] @ core @ now[A] - target) @ x.T
                grads = torch.autograd.grad(
                    0.5 * miss.square().sum() / ROWS, [now[n] for n in trains]
                )
                for n, grad in zip(trains, grads, strict=True):
                    now[n] = (now[n] - LR * grad).detach().requires_grad_()
            delta = {n: now[n].detach() - state.adapter[n] for n in trains}
            updates.append(Update(f"c{i}", state.round + 1, delta, ROWS, {}))
        state = play(state, updates, algorithm)
    whole = joined(state.adapter)
    return float((whole[B] @ whole[A] - target).norm() / target.norm())


def test_a_core_between_learned_factors_learns_what_one_between_drawn_ones_cannot():
    gen = torch.Generator().manual_seed(5)
    drawn = {
        A: torch.linalg.qr(normal(gen, D_IN, RANK))[0].T,
        B: torch.linalg.qr(normal(gen, D_OUT, RANK))[0],
        CORE: torch.zeros(RANK, RANK).double(),
    }
    learned, random = relative_error(FED_SB), relative_error(FED_SB, frozen=drawn)
    half, both = relative_error(ffa_lora(FFALoRAConfig())), relative_error(fedavg(FedAvgConfig()))
    assert both < learned < 0.5 * half < half < random
