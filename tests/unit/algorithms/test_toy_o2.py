"""Toy O2: a residual that is added to the base drifts if clients disagree.

Six clients fit W_i = W + het E_i by LoRA factors of rank 2: W has rank 2 and norm 1, the E_i are
full and have norm 1. Each takes 20 gradient steps of 0.1 on |W0 + B A - W_i|^2 / 2 in every round;
all take part. The loss is the mean over clients, after the last round.

FedEx-LoRA (Singhal et al. 2025, arXiv:2410.09432) adds to W0 what the mean of the factors misses of
the mean product, so that every round is exact. It is written out here, as five lines of algebra:
what is tested is the claim, not a file of the package. With equal clients nothing is missed. With
other ones, the missed part does not vanish where FedAvg stands still: it enters W0 in every round,
in directions that the two factors do not see and cannot take back.
"""

import functools

import torch

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedrot import FedRotConfig, fedrot
from silotune.algorithms.flexlora import FlexLoRAConfig, flexlora
from silotune.core.algorithm import LocalContext
from silotune.core.seeds import generator
from silotune.core.tree import subtract
from silotune.core.types import ServerState, Update

A, B = "lora_A", "lora_B"
CLIENTS, D, RANK, STEPS, LR = 6, 10, 2, 20, 0.1
ALGORITHMS = {
    "fedavg": fedavg(FedAvgConfig()),
    "flexlora": flexlora(FlexLoRAConfig()),
    "fedrot": fedrot(FedRotConfig()),
}


def drawn(seed, purpose, *shape):
    gen = generator(seed, "toy O2", purpose)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


@functools.cache
def losses(het, rounds, *, name="fedavg", residual=False, decay=1.0, seeds=(0, 1)):
    """The mean over seeds of the loss after the last round, and of the best that any W could do."""
    found = [_play(het, rounds, ALGORITHMS[name], residual, decay, seed) for seed in seeds]
    return tuple(sum(values) / len(seeds) for values in zip(*found, strict=True))


def _play(het, rounds, algorithm, residual, decay, seed):
    shared = drawn(seed, "left", D, RANK) @ drawn(seed, "right", RANK, D)
    other = drawn(seed, "other", CLIENTS, D, D)
    wanted = shared / shared.norm() + het * other / other.norm(dim=(1, 2), keepdim=True)
    first = {A: drawn(seed, "A", RANK, D) / D**0.5, B: torch.zeros(D, RANK).double()}
    state, base = ServerState(0, first), torch.zeros(D, D).double()
    for round_ in range(1, rounds + 1):
        held = _train(state.adapter, base, wanted)
        if algorithm.local.align is not None:
            context = LocalContext(state.adapter, {}, {})
            held = [algorithm.local.align(own, context, round_) for own in held]
        updates = [
            Update(f"c{i}", round_, subtract(own, state.adapter), 1, {})
            for i, own in enumerate(held)
        ]
        state = algorithm.step(state, algorithm.combine(state, updates))
        if residual:
            mean = sum(own[B] @ own[A] for own in held) / CLIENTS
            base = decay * base + mean - state.adapter[B] @ state.adapter[A]
    whole = base + state.adapter[B] @ state.adapter[A]

    def loss(w):
        return float((w - wanted).square().sum((1, 2)).mean() / 2)

    return loss(whole), loss(wanted.mean(0))


def _train(received, base, wanted):
    a, b = (received[n].expand(CLIENTS, *received[n].shape) for n in (A, B))
    for _ in range(STEPS):
        slope = base + b @ a - wanted
        a, b = a - LR * b.mT @ slope, b - LR * slope @ a.mT
    return [{A: a[i], B: b[i]} for i in range(CLIENTS)]


def test_with_equal_clients_a_residual_is_nothing():
    assert losses(0.0, 40)[0] < 1e-3
    assert abs(losses(0.0, 40, residual=True)[0] - losses(0.0, 40)[0]) < 1e-9


def test_with_clients_that_disagree_fedavg_stands_still_and_the_residual_drifts():
    early, late = (losses(1.0, rounds)[0] for rounds in (20, 60))
    assert abs(late - early) < 0.05 * early
    drift = [losses(1.0, rounds, residual=True)[0] for rounds in (10, 20, 60)]
    assert drift[0] < drift[1] < drift[2]
    assert drift[2] > 1.2 * late, "every round is exact, and the result is worse"
    assert losses(1.0, 60)[1] < late, "more than rank 2 could do better, but this does not"


def test_a_residual_that_decays_stays_near_fedavg():
    kept = losses(1.0, 60, residual=True)[0]
    decayed = losses(1.0, 60, residual=True, decay=0.9)[0]
    plain = losses(1.0, 60)[0]
    assert abs(decayed - plain) < 0.25 * (kept - plain)


def test_what_keeps_the_rank_does_not_drift():
    plain = losses(1.0, 20)[0]
    for name in ("flexlora", "fedrot"):
        assert abs(losses(1.0, 20, name=name)[0] - plain) < 0.05 * plain
