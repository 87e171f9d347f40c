"""DoRA under averaging: what is exact, and what is not. The claims of docs/papers.md.

W' = m (W0 + B A) / |W0 + B A|, with one norm and one magnitude m per output, as in PEFT.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.tree import sha256, subtract
from silotune.core.types import ServerState, Update

A, B, M = "q.lora_A.weight", "q.lora_B.weight", "q.lora_magnitude_vector.weight"
FEDAVG = fedavg(FedAvgConfig())
PROPERTY = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10_000)
D_OUT, D_IN, RANK = 5, 4, 2


def normal(seed, *shape):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def weight(base, adapter):
    """The layer's weight, (d_out, d_in)."""
    direction = base + adapter[B] @ adapter[A]
    return adapter[M][:, None] * direction / direction.norm(dim=1, keepdim=True)


def start(seed):
    """A base, and a fresh adapter whose magnitudes are the base's norms."""
    base = normal(seed, D_OUT, D_IN)
    zero = torch.zeros(D_OUT, RANK, dtype=torch.float64)
    return base, {A: normal(seed + 1, RANK, D_IN), B: zero, M: base.norm(dim=1)}


def averaged(received, clients, sizes=(3, 1)):
    updates = [
        Update(f"c{i}", 1, subtract(own, received), n, {})
        for i, (own, n) in enumerate(zip(clients, sizes, strict=True))
    ]
    state = ServerState(0, received)
    return FEDAVG.step(state, FEDAVG.combine(state, updates)).adapter


def moved(adapter, seed, *names):
    return {n: t + normal(seed, *t.shape) if n in names else t for n, t in adapter.items()}


def mean_weight(base, clients):
    return 0.75 * weight(base, clients[0]) + 0.25 * weight(base, clients[1])


@PROPERTY
@given(seeds)
def test_a_fresh_adapter_is_the_base_and_outputs_have_the_norms_m(seed):
    base, first = start(seed)
    torch.testing.assert_close(weight(base, first), base)
    other = moved(first, seed + 2, A, B, M)
    torch.testing.assert_close(weight(base, other).norm(dim=1), other[M].abs())


@PROPERTY
@given(seeds)
def test_clients_that_agree_are_a_fixed_point(seed):
    _, first = start(seed)
    same = moved(first, seed + 2, A, B, M)
    still = {n: torch.zeros_like(t) for n, t in same.items()}
    updates = [Update(f"c{i}", 1, still, n, {}) for i, n in enumerate((3, 1))]
    state = ServerState(0, same)
    assert sha256(FEDAVG.step(state, FEDAVG.combine(state, updates)).adapter) == sha256(same)
    there = averaged(first, [same, same])
    for name, t in same.items():
        torch.testing.assert_close(there[name], t, rtol=1e-12, atol=1e-12)


@PROPERTY
@given(seeds)
def test_the_mean_of_magnitudes_is_exact_while_the_direction_is_shared(seed):
    base, first = start(seed)
    shared = moved(first, seed + 2, A, B)
    clients = [moved(shared, seed + 3 + i, M) for i in range(2)]
    there = averaged(shared, clients)
    torch.testing.assert_close(weight(base, there), mean_weight(base, clients))


def test_the_mean_of_b_is_not_exact_even_with_a_frozen_and_equal_magnitudes():
    base, first = start(3)
    clients = [moved(first, 4 + i, B) for i in range(2)]
    there = averaged(first, clients)
    plain = 0.75 * clients[0][B] @ first[A] + 0.25 * clients[1][B] @ first[A]
    torch.testing.assert_close(there[B] @ there[A], plain)  # what LoRA would use is exact
    gap = (weight(base, there) - mean_weight(base, clients)).norm()
    assert gap > 0.05 * base.norm()
    # the mean of directions of one length is shorter than they are, and m cannot say so
    assert bool((mean_weight(base, clients).norm(dim=1) < there[M]).all())


def test_algorithms_that_promise_something_about_products_refuse_dora():
    exact = {name for name, (cfg, _) in ALGORITHMS.items() if cfg.facts.exact != "no"}
    needs = {name for name, (cfg, _) in ALGORITHMS.items() if cfg.facts.needs_lora}
    assert exact <= needs, "check refuses adapter.dora by this fact"
