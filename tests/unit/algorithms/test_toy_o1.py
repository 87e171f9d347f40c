"""Toy O1: noise on the clients' mean reverses the order of FedIT and FFA-LoRA; RoLoRA is between.

Low-rank regression by our own `fedavg` (on LoRA factors it is FedIT), `ffa_lora` and `rolora`: 8
clients with 64 rows each of y = W x, x standard normal of 48 dimensions, y of 8, W of rank 4 and
norm 1. An adapter B A of rank 4 starts with B = 0 and PEFT's A. 60 rounds of 5 full gradient steps
of 0.05.
Each client's delta is clipped to an L2 norm of 1 over all of its tensors together; the mean of the
8 gets Gaussian noise of deviation z / 8 on each value, as client-level differential privacy adds
it. The error is |B A - W| / |W|, the mean over 10 seeds.

RoLoRA trains both factors, one at a time, and lands between the two on either side of the crossing:
.42 to .48 without noise on five of these sets, and on two of them 1.2 at z = .5, 2.4 to 2.5 at
z = 1, 6.7 to 7.1 at z = 2. In the specification's draw of this toy, it leads without noise.

Only the order is checked, on seeds 0 to 9. It is the same on all of the ten sets 0 to 9, 100 to
109, ... 900 to 909, and for every single seed of them. Their means, FedIT and FFA-LoRA:
z = 0: .20 to .27, .94 to .97; z = .5: 1.3 to 1.5, 1.1; z = 1: 3.5 to 4.0, 1.4; z = 2: 11 to 14,
2.2 to 2.4. Above 1 an error is worse than no training. A narrower x or a longer W moves the
crossover to more noise: FedIT then still leads at z = .5.
"""

import pytest
import torch
from torch import Tensor

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.ffa_lora import FFALoRAConfig, ffa_lora
from silotune.algorithms.rolora import RoLoRAConfig, rolora
from silotune.core.algorithm import Algorithm
from silotune.core.seeds import generator
from silotune.core.tree import add, subtract
from silotune.core.types import Change, ServerState, Update

FEDIT, FFA = fedavg(FedAvgConfig()), ffa_lora(FFALoRAConfig())
ROLORA = rolora(RoLoRAConfig())
A, B = "lora_A", "lora_B"
CLIENTS, ROUNDS, STEPS, LR, CLIP_NORM = 8, 60, 5, 0.05, 1.0
ROWS, D_IN, D_OUT, RANK = 64, 48, 8, 4


def draw(seeds: range, purpose: str, *shape: int) -> Tensor:
    """Standard normal, each seed by its own generator; the seeds are the first dimension."""
    each = (generator(seed, "toy", purpose) for seed in seeds)
    return torch.stack([torch.randn(*shape, generator=g, dtype=torch.float64) for g in each])


def first_a(seeds: range) -> Tensor:
    """As PEFT draws it: uniform between -1 / sqrt(d_in) and 1 / sqrt(d_in)."""
    each = (generator(seed, "toy", "A") for seed in seeds)
    drawn = [torch.rand(RANK, D_IN, generator=g, dtype=torch.float64) for g in each]
    return (2 * torch.stack(drawn) - 1) / D_IN**0.5


def norm(*tensors: Tensor) -> Tensor:
    """Over all given matrices together, of each seed: (..., 1, 1)."""
    return torch.stack([t.square().sum((-2, -1), keepdim=True) for t in tensors]).sum(0).sqrt()


def error(algorithm: Algorithm, z: float, seeds: range) -> Tensor:
    """The relative error after the last round, of each seed."""
    w = draw(seeds, "W, left", D_OUT, RANK) @ draw(seeds, "W, right", RANK, D_IN)
    w = w / norm(w)
    x = draw(seeds, "rows", CLIENTS, ROWS, D_IN)
    moments = (x.mT @ x / ROWS).transpose(0, 1)  # (client, seed, d_in, d_in)
    zeros = torch.zeros(len(seeds), D_OUT, RANK, dtype=torch.float64)
    state = ServerState(0, {A: first_a(seeds), B: zeros})
    for r in range(1, ROUNDS + 1):
        updates = train(algorithm, state, w, moments)
        change = algorithm.combine(state, updates)
        noise = {
            n: z * CLIP_NORM / CLIENTS * draw(seeds, f"noise on {n}, round {r}", *t.shape[1:])
            for n, t in change.delta.items()
        }
        state = algorithm.step(state, Change(add(change.delta, noise)))
    return (norm(state.adapter[B] @ state.adapter[A] - w) / norm(w)).flatten()


def train(algorithm: Algorithm, state: ServerState, w: Tensor, moments: Tensor) -> list[Update]:
    """One round at all clients: gradient steps on half the mean squared error, then the clip."""
    round_, received = state.round + 1, state.adapter
    now = {n: t.expand(CLIENTS, *t.shape) for n, t in received.items()}
    for _ in range(STEPS):
        slope = (now[B] @ now[A] - w) @ moments  # with respect to B A
        gradients = {A: now[B].mT @ slope, B: slope @ now[A].mT}
        for n, gradient in gradients.items():
            if algorithm.local.trains(n, round_):
                now[n] = now[n] - LR * gradient
    updates: list[Update] = []
    for i in range(CLIENTS):
        moved = subtract({n: t[i] for n, t in now.items()}, received)
        delta = {n: t for n, t in moved.items() if algorithm.local.trains(n, round_)}
        factor = (CLIP_NORM / norm(*delta.values())).clamp(max=1.0)
        delta = {n: factor * t for n, t in delta.items()}
        updates.append(Update(f"client {i}", round_, delta, ROWS, {}))
    return updates


def test_without_noise_the_more_of_both_factors_is_trained_the_closer():
    fedit, rolora_, ffa = (error(a, 0.0, range(10)).mean() for a in (FEDIT, ROLORA, FFA))
    assert fedit < 0.8 * rolora_
    assert rolora_ < 0.8 * ffa


@pytest.mark.parametrize("z", [1.0, *(pytest.param(z, marks=pytest.mark.slow) for z in (0.5, 2.0))])
def test_with_noise_the_order_is_reversed_because_noise_on_both_factors_is_multiplied(z):
    fedit, rolora_, ffa = (error(a, z, range(10)).mean() for a in (FEDIT, ROLORA, FFA))
    assert ffa < 0.95 * rolora_
    assert rolora_ < 0.95 * fedit
