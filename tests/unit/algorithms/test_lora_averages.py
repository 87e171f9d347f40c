"""FedSVD, FlexLoRA, LoRA-FAIR and FedRot on small matrices, beside dense float64 oracles."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms import factors
from silotune.algorithms.factors import Pair, pairs_of, squared_product_distance, svd, wide
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedrot import FedRotConfig, fedrot, rotation
from silotune.algorithms.fedsvd import FedSVDConfig, fedsvd
from silotune.algorithms.flexlora import FlexLoRAConfig, flexlora
from silotune.algorithms.lora_fair import LoRAFAIRConfig, lora_fair
from silotune.algorithms.products import SumOfProducts
from silotune.algorithms.rolora import RoLoRAConfig, rolora
from silotune.core.algorithm import LocalContext
from silotune.core.tree import add, sha256, subtract
from silotune.core.types import ServerState, Update

A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
EMBEDDED = {"e.lora_embedding_A": (2, 9), "e.lora_embedding_B": (4, 2)}
seeds = st.integers(0, 10_000)


def normal(gen, *shape):
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


def a_round(seed, *, sizes=(5, 3, 2), d_out=6, d_in=5, rank=2, dtype=torch.float64):
    """A state of LoRA factors and a head, and what each client answers."""
    gen = torch.Generator().manual_seed(seed)

    def drawn():
        shapes = {A: (rank, d_in), B: (d_out, rank), HEAD: (3, d_in)}
        return {name: normal(gen, *shape).to(dtype) for name, shape in shapes.items()}

    state = ServerState(0, drawn())
    return state, [Update(f"c{i}", 1, drawn(), n, {}) for i, n in enumerate(sizes)]


def product(adapter):
    return adapter[B].double() @ adapter[A].double()


def trained(state, updates):
    """(share, the client's adapter after training)."""
    total = sum(u.num_examples for u in updates)
    return [(u.num_examples / total, add(state.adapter, u.delta)) for u in updates]


def ideal(state, updates):
    return sum(p * product(t) for p, t in trained(state, updates))


def play(algorithm, state, updates):
    state = replace(state, extra=algorithm.init(state.adapter, len(updates)))
    return algorithm.step(state, algorithm.combine(state, updates)).adapter


def turned(state, updates, seed):
    """The same clients, each with its factors turned: (B Q, Q^T A)."""
    gen = torch.Generator().manual_seed(seed)
    for update, (_, full) in zip(updates, trained(state, updates), strict=True):
        q, _ = torch.linalg.qr(normal(gen, full[A].shape[0], full[A].shape[0]))
        rotated = {**full, A: q.T @ full[A], B: full[B] @ q}
        yield replace(update, delta=subtract(rotated, state.adapter))


def error(adapter, state, updates):
    return float((product(adapter) - ideal(state, updates)).norm())


def near(got, expected, atol=1e-9):
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# --- factors


def test_factors_are_paired_by_name_and_know_their_side():
    names = [A, B, HEAD, *EMBEDDED, "lonely.lora_A.weight", "x.lora_magnitude_vector.weight"]
    linear, embedding = Pair(A, B), Pair("e.lora_embedding_B", "e.lora_embedding_A")
    assert pairs_of(names) == [embedding, linear]
    assert (linear.left, linear.right) == (B, A)
    assert (embedding.left, embedding.right) == ("e.lora_embedding_B", "e.lora_embedding_A")


@given(seeds, st.integers(1, 7))
def test_the_thin_svd_is_numpys_of_the_dense_product(seed, rank):
    gen = torch.Generator().manual_seed(seed)
    left, right = normal(gen, 6, rank), normal(gen, rank, 5)
    u, s, vh = svd(left, right)
    m = min(5, rank)
    dense = np.linalg.svd((left @ right).numpy(), compute_uv=False)[:m]
    np.testing.assert_allclose(s.numpy(), dense, rtol=1e-9, atol=1e-9)
    near(u @ torch.diag(s) @ vh, left @ right)
    near(u.T @ u, torch.eye(m, dtype=torch.float64))
    near(vh @ vh.T, torch.eye(m, dtype=torch.float64))
    assert all(row[row.abs().argmax()] > 0 for row in vh)


@pytest.mark.parametrize(("tail", "whole"), [(1e-4, False), (0.3, False), (0.999, True)])
@pytest.mark.parametrize("columns", [41, 90])
def test_the_leading_vectors_of_a_wide_stack_are_numpys(monkeypatch, tail, whole, columns):
    """Whether the values decay fast, slowly, or so slowly that the whole is decomposed."""
    gen = torch.Generator().manual_seed(columns)
    q, _ = torch.linalg.qr(normal(gen, 60, 50))
    values = torch.cat([torch.tensor([5.0, 3.0]), tail ** torch.arange(1.0, 49.0)]).double()
    dense = (q * values) @ torch.linalg.qr(normal(gen, 50, 50))[0].T
    mixed, _ = torch.linalg.qr(normal(gen, columns, columns))
    mixed = mixed[:50] if columns > 50 else mixed  # (rows, columns) with orthonormal rows
    left, right = (dense @ mixed, mixed.T) if columns > 50 else (dense[:, :41] @ mixed, mixed.T)
    called = []
    monkeypatch.setattr(factors, "svd", lambda *both: called.append(1) or svd(*both))
    u, s, vh = factors.leading(left, right, 2)
    full_u, full_s, full_vh = np.linalg.svd((left @ right).numpy())
    assert bool(called) == whole
    np.testing.assert_allclose(s.numpy(), full_s[:2], rtol=1e-9)
    best = (full_u[:, :2] * full_s[:2]) @ full_vh[:2]
    near((u * s) @ vh, torch.from_numpy(best), atol=1e-8)
    assert all(row[row.abs().argmax()] > 0 for row in vh)
    again = factors.leading(left, right, 2)
    assert all(torch.equal(one, other) for one, other in zip((u, s, vh), again, strict=True))


def test_the_leading_vectors_of_a_wide_stack_of_zeros_have_no_size():
    zeros = torch.zeros(60, 90, dtype=torch.float64)
    _, s, _ = factors.leading(zeros, zeros.T, 2)
    assert s.tolist() == [0.0, 0.0]


def test_flexlora_with_many_clients_is_the_nearest_product_too():
    state, updates = a_round(21, sizes=tuple(range(1, 31)), d_out=40, d_in=35)
    near_ones = [replace(u, delta={n: 0.01 * d for n, d in u.delta.items()}) for u in updates]
    after = play(flexlora(FlexLoRAConfig()), state, near_ones)
    values = np.linalg.svd(ideal(state, near_ones).numpy(), compute_uv=False)
    missed = error(after, state, near_ones)
    assert missed == pytest.approx(float(np.linalg.norm(values[2:])), abs=1e-9)
    assert missed > 1e-4


@given(seeds)
def test_the_distance_between_products_is_the_dense_one_and_does_not_see_rotations(seed):
    state, updates = a_round(seed)
    (_, one), (_, two), _ = trained(state, updates)
    (_, spun), *_ = trained(state, list(turned(state, updates, seed + 1)))
    pairs = pairs_of(one)
    dense = (product(one) - product(two)).square().sum() + (one[HEAD] - two[HEAD]).square().sum()
    assert squared_product_distance(one, two, pairs) == pytest.approx(float(dense), rel=1e-9)
    assert squared_product_distance(spun, two, pairs) == pytest.approx(float(dense), rel=1e-9)
    assert squared_product_distance(one, one, pairs) == 0


def test_the_distance_between_near_adapters_keeps_its_digits():
    """Squares of norms 1e3 that are subtracted would leave nothing of a difference of 1e-3."""
    state, _ = a_round(3)
    large = {n: 1e3 * t for n, t in state.adapter.items()}
    moved = {**large, B: large[B] + 1e-9}
    expected = float((torch.full_like(large[B], 1e-9) @ large[A]).square().sum())
    found = squared_product_distance(moved, large, pairs_of(large))
    assert found == pytest.approx(expected, rel=1e-4)


def stacked(clients, pair):
    """The weighted sum of the clients' products, as FLoRA forms it."""
    sums = SumOfProducts()
    for weight, state in clients:
        sums.add(pair, weight, *wide(state, pair))
    ((_, left, right),) = sums.take(1.0)
    return left, right


def test_stacked_factors_have_the_weighted_sum_of_the_products_and_one_sided_weights():
    state, updates = a_round(4)
    left, right = stacked(trained(state, updates), Pair(A, B))
    assert left.shape == (6, 6)
    near(left @ right, ideal(state, updates))


def test_peft_stacks_adapters_to_the_same_sum():
    """An independent oracle: PEFT's own `cat` of weighted adapters."""
    from peft import LoraConfig, get_peft_model
    from torch import nn

    state, updates = a_round(5, dtype=torch.float32)
    model = get_peft_model(
        nn.Sequential(nn.Linear(5, 6)),
        LoraConfig(r=2, lora_alpha=2, target_modules=["0"]),
        adapter_name="c0",
    )
    clients = trained(state, updates)
    for i, (_, full) in enumerate(clients):
        if i:
            model.add_adapter(f"c{i}", LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
        layer = model.base_model.model[0]
        layer.lora_A[f"c{i}"].weight.data.copy_(full[A])
        layer.lora_B[f"c{i}"].weight.data.copy_(full[B])
    shares = [p for p, _ in clients]
    model.add_weighted_adapter([f"c{i}" for i in range(3)], shares, "sum", "cat")
    layer = model.base_model.model[0]
    theirs = layer.lora_B["sum"].weight @ layer.lora_A["sum"].weight
    left, right = stacked(clients, Pair(A, B))
    near((left @ right).float(), theirs.detach() * float(layer.scaling["sum"]), atol=1e-5)


# --- FedSVD


def only(updates, *names):
    return [replace(u, delta={n: u.delta[n] for n in names}) for u in updates]


@given(seeds)
def test_fedsvd_keeps_the_exact_mean_and_gives_clients_orthonormal_rows(seed):
    state, updates = a_round(seed)
    updates = only(updates, B, HEAD)
    after, plain = (
        play(fedsvd(FedSVDConfig()), state, updates),
        play(fedavg(FedAvgConfig()), state, updates),
    )
    near(product(after), product(plain))
    near(after[A] @ after[A].T, torch.eye(2, dtype=torch.float64))
    assert torch.equal(after[HEAD], plain[HEAD])


def test_fedsvd_keeps_the_factors_of_a_product_of_zero():
    state, updates = a_round(1)
    state = ServerState(0, {**state.adapter, B: torch.zeros(6, 2, dtype=torch.float64)})
    still = [replace(u, delta={B: torch.zeros(6, 2, dtype=torch.float64)}) for u in updates]
    after = play(fedsvd(FedSVDConfig()), state, still)
    assert sha256(after) == sha256(state.adapter)


def test_fedsvd_renews_the_random_factor_of_an_embedding_too():
    gen = torch.Generator().manual_seed(2)
    state = ServerState(0, {name: normal(gen, *shape) for name, shape in EMBEDDED.items()})
    sent = {"e.lora_embedding_A": normal(gen, 2, 9)}
    after = play(fedsvd(FedSVDConfig()), state, [Update("c0", 1, sent, 1, {})])
    b, a = after["e.lora_embedding_B"], after["e.lora_embedding_A"]
    there = state.adapter["e.lora_embedding_A"] + sent["e.lora_embedding_A"]
    near(b @ a, state.adapter["e.lora_embedding_B"] @ there)
    near(b.T @ b, torch.eye(2, dtype=torch.float64))


# --- FlexLoRA


@given(seeds, st.sampled_from([(5, 3, 2), (1, 1), (4,)]), st.integers(1, 4))
def test_flexlora_is_the_nearest_product_of_its_rank(seed, sizes, rank):
    """Eckart and Young: the error is what the other singular values of the mean leave."""
    state, updates = a_round(seed, sizes=sizes, rank=rank)
    after = play(flexlora(FlexLoRAConfig()), state, updates)
    tail = np.linalg.svd(ideal(state, updates).numpy(), compute_uv=False)[rank:]
    assert error(after, state, updates) == pytest.approx(float(np.linalg.norm(tail)), abs=1e-8)
    plain = play(fedavg(FedAvgConfig()), state, updates)
    assert error(after, state, updates) <= error(plain, state, updates) + 1e-9
    near(after[HEAD], plain[HEAD])


def test_flexlora_of_one_client_is_that_clients_function():
    state, updates = a_round(8, sizes=(7,))
    near(product(play(flexlora(FlexLoRAConfig()), state, updates)), ideal(state, updates))


def test_flexlora_does_not_depend_on_how_clients_turn_their_factors():
    state, updates = a_round(9)
    spun = list(turned(state, updates, 1))
    one, other = (product(play(flexlora(FlexLoRAConfig()), state, u)) for u in (updates, spun))
    near(one, other)
    mean, moved = (product(play(fedavg(FedAvgConfig()), state, u)) for u in (updates, spun))
    assert float((mean - moved).norm()) > 0.1


# --- LoRA-FAIR


@given(seeds, st.floats(0, 10))
def test_lora_fair_is_never_further_from_the_mean_product_than_fedavg(seed, ridge):
    state, updates = a_round(seed)
    fair = play(lora_fair(LoRAFAIRConfig(ridge=ridge)), state, updates)
    plain = play(fedavg(FedAvgConfig()), state, updates)
    assert error(fair, state, updates) <= error(plain, state, updates) + 1e-9
    near(fair[A], plain[A])
    near(fair[HEAD], plain[HEAD])


@given(seeds)
def test_lora_fair_without_a_ridge_reaches_the_projection_bound(seed):
    state, updates = a_round(seed)
    fair = play(lora_fair(LoRAFAIRConfig(ridge=0)), state, updates)
    plain = play(fedavg(FedAvgConfig()), state, updates)
    residual, a = ideal(state, updates) - product(plain), plain[A]
    outside = torch.eye(5, dtype=torch.float64) - torch.linalg.pinv(a) @ a
    bound = float((residual @ outside).norm())
    assert error(fair, state, updates) == pytest.approx(bound, abs=1e-8)


def test_a_large_ridge_is_fedavg_and_a_small_one_is_in_between():
    state, updates = a_round(10)
    errors = [
        error(play(lora_fair(LoRAFAIRConfig(ridge=r)), state, updates), state, updates)
        for r in (0, 0.1, 1, 1e9)
    ]
    plain = error(play(fedavg(FedAvgConfig()), state, updates), state, updates)
    assert errors == sorted(errors)
    assert errors[-1] == pytest.approx(plain, rel=1e-6)


def test_lora_fair_divides_by_no_zero_where_a_has_not_moved_yet():
    state, updates = a_round(11)
    zero = {**state.adapter, A: torch.zeros(2, 5, dtype=torch.float64)}
    after = play(lora_fair(LoRAFAIRConfig(ridge=0)), ServerState(0, zero), only(updates, B, HEAD))
    assert all(bool(torch.isfinite(t).all()) for t in after.values())


# --- FedRot


def align(state, adapter, round_=1, **options):
    rule = fedrot(FedRotConfig(**options)).local.align
    return rule(adapter, LocalContext(state.adapter, {}, {}), round_)


@given(seeds, st.integers(1, 4), st.integers(1, 2), st.floats(0.01, 1))
def test_a_rotation_keeps_the_product_and_brings_a_factor_nearer(seed, rank, round_, strength):
    state, updates = a_round(seed, rank=rank)
    (_, full), *_ = trained(state, updates)
    after = align(state, full, round_, strength=strength)
    near(product(after), product(full))
    assert torch.equal(after[HEAD], full[HEAD])
    name = A if round_ == 1 else B
    before, now = (float((t[name] - state.adapter[name]).norm()) for t in (full, after))
    assert now <= before + 1e-9 or strength < 1
    near(after[A].norm(), full[A].norm())
    near(after[B].norm(), full[B].norm())


@given(seeds, st.integers(1, 5))
def test_a_planted_rotation_is_undone(seed, rank):
    state, _ = a_round(seed, rank=rank, d_in=8, d_out=8)
    gen = torch.Generator().manual_seed(seed + 1)
    q, _ = torch.linalg.qr(normal(gen, rank, rank))
    q[:, 0] *= torch.sign(torch.linalg.det(q))
    spun = {**state.adapter, A: q.T @ state.adapter[A], B: state.adapter[B] @ q}
    for round_ in (1, 2):
        after = align(state, spun, round_)
        near(after[A], state.adapter[A], atol=1e-7)
        near(after[B], state.adapter[B], atol=1e-7)


@given(seeds, st.integers(1, 6), st.floats(0, 1))
def test_what_turns_is_a_rotation(seed, rank, strength):
    overlap = normal(torch.Generator().manual_seed(seed), rank, rank)
    q = rotation(overlap, strength)
    near(q @ q.T, torch.eye(rank, dtype=torch.float64))
    assert float(torch.linalg.det(q)) == pytest.approx(1)


def test_the_rotation_is_the_best_of_many():
    overlap = normal(torch.Generator().manual_seed(5), 3, 3)
    best = float((rotation(overlap).T @ overlap).trace())
    gen = torch.Generator().manual_seed(6)
    for _ in range(300):
        q, _ = torch.linalg.qr(normal(gen, 3, 3))
        q[:, 0] *= torch.sign(torch.linalg.det(q))
        assert float((q.T @ overlap).trace()) <= best + 1e-9


def test_without_overlap_and_without_strength_nothing_turns():
    near(rotation(torch.zeros(3, 3, dtype=torch.float64)), torch.eye(3, dtype=torch.float64))
    assert fedrot(FedRotConfig(strength=0)).local.align is None


def test_aligned_clients_are_averaged_better_than_turned_ones():
    """Clients that moved little but turned: FedAvg's error is the turn, FedRot's is the move."""
    state, updates = a_round(12)
    moved = [replace(u, delta={n: 0.1 * d for n, d in u.delta.items()}) for u in updates]
    spun = list(turned(state, moved, 3))
    back = [
        replace(u, delta=subtract(align(state, full), state.adapter))
        for u, (_, full) in zip(spun, trained(state, spun), strict=True)
    ]
    plain, rotated = (play(fedavg(FedAvgConfig()), state, u) for u in (spun, back))
    assert error(rotated, state, spun) < 0.2 * error(plain, state, spun)


# --- all


@pytest.mark.parametrize(
    "algorithm",
    [
        fedsvd(FedSVDConfig()),
        flexlora(FlexLoRAConfig()),
        lora_fair(LoRAFAIRConfig(ridge=0)),
        fedrot(FedRotConfig()),
        rolora(RoLoRAConfig()),
        fedavg(FedAvgConfig()),
    ],
    ids=lambda a: a.name,
)
def test_identical_clients_move_the_server_to_their_function(algorithm):
    state, (one, *_) = a_round(13)
    sent = {n: d for n, d in one.delta.items() if algorithm.local.trains(n, 1)}
    updates = [replace(one, client=f"c{i}", num_examples=i + 1, delta=sent) for i in range(4)]
    after = play(algorithm, state, updates)
    expected = {**state.adapter, **add({n: state.adapter[n] for n in sent}, sent)}
    near(product(after), product(expected))
    near(after[HEAD], expected[HEAD])
