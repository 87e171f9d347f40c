"""What `Algorithm` and `LocalRule` can express, shown by small algorithms on solved toys.

`train_at_client` is the slow, obvious oracle of a client: plain gradient steps that read every
field of the `LocalRule`. The algorithms of this file are not the product's; they show that the
interface needs no change when those are added, and which invariants they must keep.
"""

import dataclasses
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from silotune.algorithms.base import AlgorithmConfig, mean_delta, weight_of
from silotune.algorithms.fedavg import FedAvgConfig, fedavg, move
from silotune.algorithms.fedopt import FedAvgMConfig, fedavgm
from silotune.algorithms.fedprox import FedProxConfig, fedprox
from silotune.algorithms.rolora import RoLoRAConfig, rolora
from silotune.algorithms.scaffold import ScaffoldConfig, scaffold
from silotune.core.algorithm import (
    Algorithm,
    LocalContext,
    LocalOutcome,
    LocalRule,
    expected_extra,
    expected_layout,
)
from silotune.core.errors import UpdateError
from silotune.core.seeds import generator
from silotune.core.tree import (
    add,
    check_same_layout,
    layout_of,
    sha256,
    weighted_mean,
)
from silotune.core.types import Broadcast, Change, ServerState, TensorSpec, Update
from silotune.federation.sampling import sample
from silotune.recipes.sections import SamplingConfig

X, A, B = "x", "layers.0.lora_A", "layers.0.lora_B"
FEDAVG = fedavg(FedAvgConfig())


# --- the toy: a client, a round, a run


def broadcast(algorithm, state):
    extra = {name: state.extra[name] for name in algorithm.broadcasts}
    return Broadcast(state.round + 1, state.adapter, extra)


def train_at_client(name, loss, rule, sent, memory, *, lr, steps, num_examples=1):
    """One client's round of plain gradient descent; returns its update and what it remembers."""
    begin = {**sent.adapter, **memory.get("personal", {})}
    context = LocalContext(begin, sent.extra, memory)
    learns = {n: t.clone().requires_grad_() for n, t in begin.items() if rule.trains(n, sent.round)}
    for _ in range(steps):
        total = loss({**begin, **learns}, sent.extra)
        if rule.penalty is not None:
            total = total + rule.penalty(learns, context)
        gradients = torch.autograd.grad(total, list(learns.values()))
        with torch.no_grad():
            for (n, t), gradient in zip(learns.items(), gradients, strict=True):
                t -= lr * (rule.correct(n, gradient, context) if rule.correct else gradient)
    after = {n: t.detach() for n, t in learns.items()}
    if rule.align is not None:
        after = rule.align(after, context, sent.round)
    delta = {n: t - begin[n] for n, t in after.items()}
    outcome = rule.finish(delta, lr * steps, context) if rule.finish else LocalOutcome()
    sent_up = {n: d for n, d in delta.items() if not rule.personal(n)}
    personal = {n: t for n, t in after.items() if rule.personal(n)}
    kept = {**outcome.memory, **({"personal": personal} if personal else {})}
    update = Update(
        name, sent.round, sent_up, num_examples, {}, settings=rule.settings, extra=outcome.extra
    )
    return update, kept


def start(algorithm, adapter, *, num_clients=3):
    return ServerState(0, adapter, algorithm.init(adapter, num_clients))


def check(update, algorithm, state):
    """What `acceptance.check_update` requires of the tensors of an update."""
    check_same_layout(update.delta, expected_layout(algorithm, state), who=update.client)
    extra = expected_extra(algorithm, state)
    assert update.extra.keys() == extra.keys()
    for purpose, layout in extra.items():
        check_same_layout(update.extra[purpose], layout, who=f"{update.client}, {purpose}")


def play_round(algorithm, state, losses, memories, cohort=None, *, sizes=None, lr=0.05, steps=20):
    """One round in process; `memories` belongs to the clients and changes, like their disks."""
    sent, updates = broadcast(algorithm, state), []
    for name in sorted(losses if cohort is None else cohort):
        update, memories[name] = train_at_client(
            name,
            losses[name],
            algorithm.local,
            sent,
            memories.get(name, {}),
            lr=lr,
            steps=steps,
            num_examples=(sizes or {}).get(name, 1),
        )
        check(update, algorithm, state)
        updates.append(update)
    return algorithm.step(state, algorithm.combine(state, updates)), updates


def run(algorithm, losses, adapter, *, rounds, **how):
    state, memories = start(algorithm, adapter, num_clients=len(losses)), {}
    for _ in range(rounds):
        state, _ = play_round(algorithm, state, losses, memories, **how)
    return state


# --- T5: three quadratics a_i / 2 (x - b_i)^2


QUADRATICS = {"c0": (1.0, 0.0), "c1": (4.0, 1.0), "c2": (0.5, -3.0)}
LOSSES = {
    name: lambda adapter, extra, a=a, b=b: (0.5 * a * (adapter[X] - b).square()).sum()
    for name, (a, b) in QUADRATICS.items()
}
OPTIMUM = sum(a * b for a, b in QUADRATICS.values()) / sum(a for a, _ in QUADRATICS.values())


def at(*values):
    return {X: torch.tensor(values, dtype=torch.float64)}


def closed_form(mu=0.0, *, lr=0.05, steps=20, sizes=None):
    """The fixed point of rounds of local descent on the quadratics, derived by hand.

    With rate k_i = 1 - (1 - lr (a_i + mu))^steps, client i goes the share k_i of the way from x to
    (a_i b_i + mu x) / (a_i + mu), so it moves by k_i a_i / (a_i + mu) (b_i - x).
    """
    pulls = {
        name: (1 - (1 - lr * (a + mu)) ** steps) * a / (a + mu) * (sizes or {}).get(name, 1)
        for name, (a, _) in QUADRATICS.items()
    }
    return sum(pulls[n] * b for n, (_, b) in QUADRATICS.items()) / sum(pulls.values())


def test_the_closed_form_and_the_optimum_are_the_printed_ones():
    assert pytest.approx(0.4545455, abs=5.1e-8) == OPTIMUM
    assert closed_form() == pytest.approx(-0.1003633, abs=5.1e-8)
    assert closed_form(1.0) == pytest.approx(0.0051742, abs=5.1e-8)
    # T5 prints .3399788; the seventh digit of the exact value .33997873 is a 7
    assert closed_form(10.0, lr=0.02) == pytest.approx(0.3399788, abs=1e-7)


@pytest.mark.parametrize("first", [0.0, 5.0])
def test_fedavg_stops_where_the_closed_form_says_not_at_the_optimum(first):
    end = run(FEDAVG, LOSSES, at(first), rounds=17).adapter[X].item()
    assert end == pytest.approx(closed_form(), abs=1e-7)
    assert end == pytest.approx(-0.1003633, abs=1e-6)


def test_fedavg_in_float32_reaches_the_same_point():
    end = run(FEDAVG, LOSSES, {X: torch.tensor([0.0])}, rounds=15).adapter[X]
    assert end.dtype == torch.float32
    assert end.item() == pytest.approx(-0.1003633, abs=1e-6)


def test_unequal_clients_move_the_fixed_point_as_the_closed_form_says():
    sizes = {"c0": 1, "c1": 2, "c2": 5}
    end = run(FEDAVG, LOSSES, at(0.0), rounds=18, sizes=sizes).adapter[X].item()
    assert end == pytest.approx(closed_form(sizes=sizes), abs=1e-6)


@pytest.mark.parametrize(
    ("mu", "lr", "rounds", "printed"), [(1.0, 0.05, 22, 0.0051742), (10.0, 0.02, 90, 0.3399788)]
)
def test_fedprox_stops_nearer_to_the_optimum_the_stronger_it_pulls(mu, lr, rounds, printed):
    algorithm = fedprox(FedProxConfig(mu=mu))
    end = run(algorithm, LOSSES, at(0.0), rounds=rounds, lr=lr).adapter[X].item()
    assert end == pytest.approx(closed_form(mu, lr=lr), abs=1e-6)
    assert end == pytest.approx(printed, abs=1e-6)


def test_fedavgm_has_the_fixed_point_of_fedavg():
    algorithm = fedavgm(FedAvgMConfig(momentum=0.3))
    end = run(algorithm, LOSSES, at(2.0), rounds=25).adapter[X].item()
    assert end == pytest.approx(closed_form(), abs=1e-6)


# --- FedProx at the client


def prox_update(mu, *, name="c1", steps=20, lr=0.05):
    algorithm = fedprox(FedProxConfig(mu=mu))
    sent = broadcast(algorithm, start(algorithm, at(2.0, -1.0)))
    return train_at_client(name, LOSSES[name], algorithm.local, sent, {}, lr=lr, steps=steps)[0]


def test_fedprox_with_mu_zero_trains_as_fedavg_bit_for_bit():
    sent = broadcast(FEDAVG, start(FEDAVG, at(2.0, -1.0)))
    plain, _ = train_at_client("c1", LOSSES["c1"], FEDAVG.local, sent, {}, lr=0.05, steps=20)
    assert sha256(prox_update(0.0).delta) == sha256(plain.delta)


@pytest.mark.parametrize("mu", [0.01, 1.0, 10.0])
def test_one_local_step_is_the_same_for_every_mu(mu):
    assert torch.equal(prox_update(mu, steps=1).delta[X], prox_update(0.0, steps=1).delta[X])


def test_clients_stay_nearer_the_stronger_fedprox_pulls_and_echo_its_mu():
    updates = [prox_update(mu) for mu in (0.0, 0.01, 0.1, 1.0, 10.0)]
    moved = [float(u.delta[X].norm()) for u in updates]
    assert all(near < far for far, near in pairwise(moved))
    assert [u.settings["mu"] for u in updates] == [0.0, 0.01, 0.1, 1.0, 10.0]


def test_a_converged_fedprox_client_is_between_its_optimum_and_what_it_received():
    (a, b), mu = QUADRATICS["c1"], 2.0
    end = prox_update(mu, steps=400).delta[X] + at(2.0, -1.0)[X]
    expected = [(a * b + mu * x) / (a + mu) for x in (2.0, -1.0)]
    assert end.tolist() == pytest.approx(expected, abs=1e-9)


# --- SCAFFOLD: correct, finish, extra, extra_layout, broadcasts, memory, the number of clients


SCAFFOLD = scaffold(ScaffoldConfig())


def mean_control(memories):
    zero = {"control": at(0.0)}
    return sum(memories.get(n, zero)["control"][X] for n in LOSSES) / len(LOSSES)


def test_scaffold_reaches_the_optimum_with_c_the_mean_of_the_clients_in_every_round():
    state, memories = start(SCAFFOLD, at(0.0)), {}
    for _ in range(40):
        state, _ = play_round(SCAFFOLD, state, LOSSES, memories)
        torch.testing.assert_close(
            state.extra["control"][X], mean_control(memories), rtol=0, atol=1e-12
        )
    assert state.adapter[X].item() == pytest.approx(OPTIMUM, abs=1e-6)
    assert state.adapter[X].item() == pytest.approx(0.4545455, abs=1e-6)


def test_scaffolds_c_is_the_mean_of_all_clients_also_when_few_take_part():
    state, memories = start(SCAFFOLD, at(0.0)), {}
    for r in range(1, 13):
        cohort = sample(list(LOSSES), SamplingConfig(num_clients=2), generator(5, "sampling", r))
        state, _ = play_round(SCAFFOLD, state, LOSSES, memories, cohort)
        torch.testing.assert_close(
            state.extra["control"][X], mean_control(memories), rtol=0, atol=1e-12
        )


def test_scaffold_learns_the_number_of_all_clients_from_init():
    small, large = (
        play_round(SCAFFOLD, start(SCAFFOLD, at(2.0), num_clients=n), LOSSES, {})[0] for n in (3, 6)
    )
    assert torch.equal(small.adapter[X], large.adapter[X])
    assert small.extra["control"][X].item() == pytest.approx(2 * large.extra["control"][X].item())
    assert small.extra["control"][X].item() != 0.0


def test_scaffold_expects_control_variates_as_wide_as_the_adapter_and_fedavg_expects_none():
    state = start(SCAFFOLD, at(0.0, 0.0))
    extra = expected_extra(SCAFFOLD, state)
    assert extra == {"control": layout_of(state.adapter)}
    assert expected_extra(FEDAVG, start(FEDAVG, at(0.0, 0.0))) == {}
    with pytest.raises(UpdateError, match=r"'x' has shape \(1,\), the server expects \(2,\)"):
        check_same_layout(at(0.0), extra["control"], who="client 'c0', round 1, control")


def test_the_sums_of_control_variates_travel_with_the_delta_and_n_stays_at_the_server():
    state = start(SCAFFOLD, at(3.0))
    after, updates = play_round(SCAFFOLD, state, LOSSES, {})
    change = SCAFFOLD.combine(state, updates)
    assert change.delta.keys() == change.extra["control"].keys() == {X}
    assert broadcast(SCAFFOLD, state).extra.keys() == {"control"}
    assert after.extra["clients"]["number"].item() == 3


def test_scaffold_starts_as_fedavg():
    plain = run(FEDAVG, LOSSES, at(3.0), rounds=1)
    assert torch.equal(run(SCAFFOLD, LOSSES, at(3.0), rounds=1).adapter[X], plain.adapter[X])


def test_scaffold_with_equal_clients_is_fedavg_forever():
    equal = dict.fromkeys(LOSSES, LOSSES["c1"])
    plain, state = (run(a, equal, at(3.0), rounds=5).adapter[X] for a in (FEDAVG, SCAFFOLD))
    torch.testing.assert_close(state, plain, rtol=0, atol=1e-12)


# --- toys of low rank: |B A - T_i|^2 / 2 with client-specific targets T_i


def matrices(*shapes, seed=3, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=gen, dtype=torch.float64).to(dtype) for s in shapes]


def product(factors):
    return factors[B] @ factors[A]  # (d_out, d_in)


def low_rank_losses(*, num=3, d_out=6, d_in=5, dtype=torch.float64):
    targets = matrices(*[(d_out, d_in)] * num, seed=9, dtype=dtype)
    return {
        f"c{i}": lambda adapter, extra, t=t: 0.5 * (product(adapter) - t).square().sum()
        for i, t in enumerate(targets)
    }


def first_adapter(*, rank=2, d_out=6, d_in=5, dtype=torch.float64):
    (a,) = matrices((rank, d_in), dtype=dtype)
    return {A: a, B: torch.zeros(d_out, rank, dtype=dtype)}


SIZES = {"c0": 5, "c1": 3, "c2": 2}  # p = (.5, .3, .2)


# --- FFA-LoRA and RoLoRA: trains


FFA = replace(
    fedavg(FedAvgConfig()),
    name="ffa_lora",
    local=LocalRule(trains=lambda name, round_: "lora_A" not in name),
)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_ffa_lora_averages_products_exactly_and_never_sends_or_moves_a(dtype, atol):
    losses, memories = low_rank_losses(dtype=dtype), {}
    state = start(FFA, first_adapter(dtype=dtype))
    frozen = sha256({A: state.adapter[A]})
    for _ in range(3):
        before = state
        state, updates = play_round(FFA, state, losses, memories, sizes=SIZES, lr=0.02, steps=3)
        assert all(u.delta.keys() == {B} for u in updates)
        assert sha256({A: state.adapter[A]}) == frozen
        mean = sum(
            SIZES[u.client] / 10 * (before.adapter[B] + u.delta[B]) @ state.adapter[A]
            for u in updates
        )
        torch.testing.assert_close(product(state.adapter), mean, rtol=0, atol=atol)


def test_ffa_lora_refuses_a_client_that_sends_a_frozen_factor():
    state = start(FFA, first_adapter())
    assert expected_layout(FFA, state).keys() == {B}
    with pytest.raises(UpdateError, match=f"'{A}' is unknown to the server"):
        check_same_layout(state.adapter, expected_layout(FFA, state), who="client 'c0', round 1")


def test_rolora_alternates_by_round_and_the_layout_follows():
    algorithm = rolora(RoLoRAConfig())
    losses, memories, state = low_rank_losses(), {}, start(algorithm, first_adapter())
    for sent in (B, A, B, A):
        before = state
        state, updates = play_round(algorithm, state, losses, memories, lr=0.02, steps=3)
        assert all(u.delta.keys() == {sent} for u in updates)
        moved = {n for n in (A, B) if not torch.equal(state.adapter[n], before.adapter[n])}
        assert moved == {sent}


# --- FedSA-LoRA: personal


FEDSA = replace(
    fedavg(FedAvgConfig()),
    name="fedsa_lora",
    local=LocalRule(personal=lambda name: "lora_B" in name),
)


def test_personal_tensors_learn_at_the_client_and_are_not_expected_or_sent():
    losses, memories = low_rank_losses(), {}
    state = start(FEDSA, first_adapter())
    assert expected_layout(FEDSA, state) == layout_of({A: state.adapter[A]})
    for _ in range(2):
        state, updates = play_round(FEDSA, state, losses, memories, lr=0.02, steps=3)
        assert all(u.delta.keys() == {A} for u in updates)
    assert not torch.equal(state.adapter[A], first_adapter()[A])
    assert torch.equal(state.adapter[B], first_adapter()[B])
    kept = [memories[n]["personal"][B] for n in losses]
    assert not torch.equal(kept[0], kept[1])
    assert all(float(b.norm()) > 0 for b in kept)


def test_one_fedsa_client_alone_is_local_training():
    losses = {"c0": low_rank_losses()["c0"]}
    memories, state = {}, start(FEDSA, first_adapter())
    for _ in range(3):
        state, _ = play_round(FEDSA, state, losses, memories, lr=0.02, steps=4)
    alone = run(FEDAVG, losses, first_adapter(), rounds=1, lr=0.02, steps=12).adapter
    torch.testing.assert_close(state.adapter[A], alone[A], rtol=0, atol=1e-12)
    torch.testing.assert_close(memories["c0"]["personal"][B], alone[B], rtol=0, atol=1e-12)


# --- the median: several passes over the updates, not linear


def median():
    def combine(state, updates):
        names = expected_layout(algorithm, state)
        # one pass per tensor: memory holds one tensor of all clients, never all tensors of one
        return Change(
            {n: torch.stack([u.delta[n] for u in updates]).median(dim=0).values for n in names}
        )

    def step(state, change):
        return move(state, change.delta)

    algorithm = Algorithm(name="median", combine=combine, step=step, linear=False)
    return algorithm


class Spool:
    """Updates as the run folder gives them: a fresh pass each time, one at a time, no indexing."""

    def __init__(self, updates):
        self.updates, self.walks = updates, 0

    def __len__(self):
        return len(self.updates)

    def __iter__(self):
        self.walks += 1
        return iter(self.updates)


T6 = [(1, 1), (1.1, 0.9), (0.9, 1.05), (1.02, 0.97), (0.95, 1.1), (100, -100), (50, 60)]


def test_a_median_reads_the_updates_once_per_tensor_and_ignores_outliers():
    vectors = [torch.tensor(v, dtype=torch.float64) for v in T6]
    spool = Spool(
        [Update(f"c{i}", 1, {X: v, "y": -v}, 1, {}) for i, v in enumerate(vectors)],
    )
    state = start(median(), {**at(10.0, 20.0), "y": torch.zeros(2, dtype=torch.float64)})
    after = median().step(state, median().combine(state, spool))
    assert spool.walks == 2
    by_hand = [sorted(v[i] for v in T6)[3] for i in (0, 1)]
    assert by_hand == [1.02, 1.0]
    assert after.adapter[X].tolist() == pytest.approx([10 + 1.02, 20 + 1.0], abs=1e-12)
    assert after.adapter["y"].tolist() == pytest.approx([-1.02, -1.0], abs=1e-12)
    assert weighted_mean((1.0, u.delta) for u in spool)[X].tolist() == pytest.approx(
        [22.1386, -4.9971], abs=5.1e-5
    )


# --- base patches: FLoRA (mixed ranks, stacked) and FedEx-LoRA (residual)


def patch_of(extra):
    """What the frozen weight gained so far; the model adds it to its base."""
    return product(extra["base_patch"])


def stacked(old, new):
    """Two lists of factor pairs as one: their product is the sum of the products."""
    return {A: torch.cat([old[A], new[A]]), B: torch.cat([old[B], new[B]], dim=1)}


def no_factors(adapter):
    return {A: adapter[A][:0], B: adapter[B][:, :0]}


def no_patch(adapter, num_clients):
    return {"base_patch": no_factors(adapter)}


def flora(cfg, *, both_sides=False):
    """Wang et al. 2024: stack the factors, merge them into the base, start again."""

    def layout(state, client):
        d_out, d_in = state.adapter[B].shape[0], state.adapter[A].shape[1]
        return {
            A: TensorSpec((None, d_in), state.adapter[A].dtype),
            B: TensorSpec((d_out, None), state.adapter[B].dtype),
        }

    def combine(state, updates):
        total = sum(weight_of(u, cfg) for u in updates)
        stack = no_factors(state.adapter)
        for u in updates:
            rank, p = u.delta[A].shape[0], weight_of(u, cfg) / total
            a = p * (state.adapter[A][:rank] + u.delta[A])
            b = (p if both_sides else 1.0) * (state.adapter[B][:, :rank] + u.delta[B])
            stack = stacked(stack, {A: a, B: b})
        return Change(stack)

    def step(state, change):
        gen = generator(0, "flora", state.round + 1)
        fresh = {
            A: torch.randn(state.adapter[A].shape, generator=gen, dtype=state.adapter[A].dtype),
            B: torch.zeros_like(state.adapter[B]),
        }
        patch = stacked(state.extra["base_patch"], change.delta)
        return replace(state, round=state.round + 1, adapter=fresh, extra={"base_patch": patch})

    return Algorithm(
        name="flora",
        combine=combine,
        step=step,
        init=no_patch,
        layout=layout,
        broadcasts=("base_patch",),
        linear=False,
    )


RANKS = {"c0": 1, "c1": 2, "c2": 3}


def mixed_rank_updates(algorithm, state, *, seed):
    """Clients that take the first r_i rows and columns of the received factors and train them."""
    updates = []
    for name, rank in RANKS.items():
        a, b = matrices((rank, 5), (6, rank), seed=seed + rank)
        update = Update(name, state.round + 1, {A: a, B: b}, SIZES[name], {})
        check(update, algorithm, state)
        updates.append(update)
    return updates


def after_training(state, update):
    rank = update.delta[A].shape[0]
    return {
        A: state.adapter[A][:rank] + update.delta[A],
        B: state.adapter[B][:, :rank] + update.delta[B],
    }


def test_flora_stacks_mixed_ranks_without_error_and_keeps_the_function_through_the_merge():
    algorithm = flora(AlgorithmConfig())
    state = start(algorithm, first_adapter(rank=3))
    for seed in (20, 40):
        updates = mixed_rank_updates(algorithm, state, seed=seed)
        ideal = sum(SIZES[u.client] / 10 * product(after_training(state, u)) for u in updates)
        change = algorithm.combine(state, updates)
        assert change.delta[A].shape == (6, 5)  # 1 + 2 + 3 rows
        torch.testing.assert_close(product(change.delta), ideal, rtol=0, atol=1e-12)
        merged = algorithm.step(state, change)
        whole = patch_of(merged.extra) + product(merged.adapter)
        torch.testing.assert_close(whole, patch_of(state.extra) + ideal, rtol=0, atol=1e-12)
        assert not torch.equal(merged.adapter[A], state.adapter[A])
        state = merged
    assert broadcast(algorithm, state).extra["base_patch"][A].shape == (12, 5)


def test_flora_with_weights_on_both_sides_is_wrong():
    algorithm = flora(AlgorithmConfig(), both_sides=True)
    state = start(algorithm, first_adapter(rank=3))
    updates = mixed_rank_updates(algorithm, state, seed=20)
    ideal = sum(SIZES[u.client] / 10 * product(after_training(state, u)) for u in updates)
    assert float((product(algorithm.combine(state, updates).delta) - ideal).norm()) > 1.0


def test_flora_does_not_depend_on_the_order_of_stacking():
    algorithm = flora(AlgorithmConfig())
    state = start(algorithm, first_adapter(rank=3))
    updates = mixed_rank_updates(algorithm, state, seed=20)
    there, back = (product(algorithm.combine(state, u).delta) for u in (updates, updates[::-1]))
    torch.testing.assert_close(there, back, rtol=0, atol=1e-12)


def test_flora_accepts_any_rank_but_refuses_a_wrong_width():
    algorithm = flora(AlgorithmConfig())
    state = start(algorithm, first_adapter(rank=3))
    with pytest.raises(UpdateError, match=r"has shape \(2, 4\), the server expects \('any', 5\)"):
        check_same_layout(
            {A: torch.ones(2, 4).double(), B: torch.ones(6, 2).double()},
            expected_layout(algorithm, state),
            who="client 'c0', round 1",
        )


def fedex(cfg):
    """Singhal et al. 2025: mean factors as adapter, what they miss of the mean product as patch."""

    def combine(state, updates):
        total, mean = sum(weight_of(u, cfg) for u in updates), mean_delta(updates, cfg)
        residual = no_factors(state.adapter)
        for u in updates:  # the second pass: the mean must be known
            p = weight_of(u, cfg) / total
            residual = stacked(residual, {n: p**0.5 * (u.delta[n] - mean[n]) for n in (A, B)})
        return Change(mean, {"base_patch": residual})

    def step(state, change):
        patch = stacked(state.extra["base_patch"], change.extra["base_patch"])
        return replace(move(state, change.delta), extra={"base_patch": patch})

    return Algorithm(
        name="fedex_lora",
        combine=combine,
        step=step,
        init=no_patch,
        broadcasts=("base_patch",),
        linear=False,
    )


FEDEX = fedex(AlgorithmConfig())


def patched_losses(dtype):
    """The low-rank toy on a base that carries the broadcast patch."""
    targets = matrices(*[(6, 5)] * 3, seed=9, dtype=dtype)
    return {
        f"c{i}": lambda adapter, extra, t=t: (
            0.5 * (patch_of(extra) + product(adapter) - t).square().sum()
        )
        for i, t in enumerate(targets)
    }


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_fedex_gives_every_client_the_mean_of_the_products_exactly(dtype, atol):
    state, memories = start(FEDEX, first_adapter(dtype=dtype)), {}
    for r in (1, 2, 3):
        before = state
        state, updates = play_round(
            FEDEX, state, patched_losses(dtype), memories, sizes=SIZES, lr=0.05, steps=5
        )
        ideal = sum(SIZES[u.client] / 10 * product(add(before.adapter, u.delta)) for u in updates)
        received = broadcast(FEDEX, state)
        got = patch_of(received.extra) + product(received.adapter)
        torch.testing.assert_close(got, patch_of(before.extra) + ideal, rtol=0, atol=atol)
        assert received.extra["base_patch"][A].shape[0] == r * 3 * 2  # K r columns a round


def test_fedexs_residual_is_the_cross_covariance_of_rank_k_minus_one_times_r():
    gen = matrices(*[(2, 5), (6, 2)] * 3, seed=13)
    deltas = [{A: gen[2 * i], B: gen[2 * i + 1]} for i in range(3)]
    updates = [Update(f"c{i}", 1, d, SIZES[f"c{i}"], {}) for i, d in enumerate(deltas)]
    state = start(FEDEX, first_adapter())
    after = FEDEX.step(state, FEDEX.combine(state, updates))
    factors = [add(state.adapter, d) for d in deltas]
    missing = sum(p * product(f) for p, f in zip((0.5, 0.3, 0.2), factors, strict=True)) - product(
        after.adapter
    )
    torch.testing.assert_close(patch_of(after.extra), missing, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(missing).item() == 4  # (K - 1) r, T8
    assert float(missing.norm()) > 1.0


def test_fedex_with_one_client_has_nothing_to_patch():
    state = start(FEDEX, first_adapter())
    one = Update("c0", 1, {A: torch.ones(2, 5).double(), B: torch.ones(6, 2).double()}, 4, {})
    assert float(patch_of(FEDEX.step(state, FEDEX.combine(state, [one])).extra).norm()) == 0.0


# --- what all of them share


@pytest.mark.parametrize("algorithm", [SCAFFOLD, FFA, FEDSA, FEDEX], ids=lambda a: a.name)
def test_rounds_leave_their_inputs_untouched_and_resume_from_a_copied_state(algorithm):
    losses, adapter = (
        (LOSSES, at(1.0, -2.0)) if algorithm is SCAFFOLD else (low_rank_losses(), first_adapter())
    )
    memories, state = {}, start(algorithm, adapter)
    state, _ = play_round(algorithm, state, losses, memories, lr=0.02, steps=3)
    before = sha256(state.adapter), {k: sha256(s) for k, s in state.extra.items()}
    copy = ServerState(**{f.name: getattr(state, f.name) for f in dataclasses.fields(state)})
    first, _ = play_round(algorithm, state, losses, dict(memories), lr=0.02, steps=3)
    again, _ = play_round(algorithm, copy, losses, dict(memories), lr=0.02, steps=3)
    assert (sha256(state.adapter), {k: sha256(s) for k, s in state.extra.items()}) == before
    assert sha256(first.adapter) == sha256(again.adapter)
    assert first.round == state.round + 1
