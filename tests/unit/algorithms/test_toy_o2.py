"""Toy O2: FedEx-LoRA's residual drifts away on clients that differ, and what stops it.

Six clients fit matrices W_i of 8 x 6: a common one of rank 2 and norm 1, plus `het` times one of
their own of norm 1. Client i's loss is |P - W_i|^2 / 2 in the product P of an adapter of rank 2 and
what stands beside it. A round is 20 gradient steps of 0.2 on both factors; the adapter starts from
B = 0 and A of norm 1. What is compared is the squared distance to the mean of all W_i, which is the
best that any matrix could do. Only orders are checked.
"""

import pytest
import torch
from torch import Tensor

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedex import FedExConfig, drift_warning, fedex
from silotune.algorithms.flexlora import FlexLoRAConfig, flexlora
from silotune.algorithms.flora import FLoRAConfig, flora
from silotune.core.algorithm import Algorithm
from silotune.core.lora import joined
from silotune.core.seeds import generator
from silotune.core.types import AdapterState, ServerState, Update

A, B = "lora_A", "lora_B"
CLIENTS, D_OUT, D_IN, RANK, STEPS, LR = 6, 8, 6, 2, 20, 0.2


def normal(seed: int, name: str, *shape: int) -> Tensor:
    """Standard normal values."""
    return torch.randn(*shape, generator=generator(seed, "toy", name), dtype=torch.float64)


def targets(seed: int, het: float) -> Tensor:
    """The clients' matrices: (client, d_out, d_in)."""
    common = normal(seed, "left", D_OUT, RANK) @ normal(seed, "right", RANK, D_IN)
    own = normal(seed, "own", CLIENTS, D_OUT, D_IN)
    return common / common.norm() + het * own / own.norm(dim=(1, 2), keepdim=True)


def product(adapter: AdapterState) -> Tensor:
    """The adapter's function, with what stands beside it."""
    whole = joined(adapter)
    return whole[B] @ whole[A]


def train(state: ServerState, wanted: Tensor) -> list[Update]:
    """One round at all clients."""
    first = {n: state.adapter[n] for n in (A, B)}
    beside = product(state.adapter) - first[B] @ first[A]
    a, b = (first[n].expand(CLIENTS, -1, -1) for n in (A, B))
    for _ in range(STEPS):
        slope = b @ a + beside - wanted
        a, b = a - LR * b.mT @ slope, b - LR * slope @ a.mT
    deltas = [{A: a[i] - first[A], B: b[i] - first[B]} for i in range(CLIENTS)]
    return [Update(f"c{i}", state.round + 1, delta, 1, {}) for i, delta in enumerate(deltas)]


def distances(algorithm: Algorithm, *, het: float, at: tuple[int, ...], seed: int = 0):
    """At the end of these rounds: the result's squared distance to the best matrix; the ratios."""
    wanted, first = targets(seed, het), normal(seed, "A", RANK, D_IN)
    state = ServerState(0, {A: first / first.norm(), B: normal(seed, "B", D_OUT, RANK) * 0})
    found: list[float] = []
    ratios: list[float] = []
    for r in range(1, max(at) + 1):
        change = algorithm.combine(state, train(state, wanted))
        report = algorithm.report(state, change) if algorithm.report else {}
        state = algorithm.step(state, change)
        if r in at:
            whole = algorithm.result(state)
            found.append(float((product(whole) - wanted.mean(0)).square().sum()))
            ratios.append(report.get("residual_ratio", 0.0))
    return found, ratios


FEDIT, FEDEX = fedavg(FedAvgConfig()), fedex(FedExConfig())
FADES = fedex(FedExConfig(residual_decay=0.9))
EXPORTED = fedex(FedExConfig(residual="export"))
FLORA, FLEX = flora(FLoRAConfig()), flexlora(FlexLoRAConfig())


@pytest.mark.parametrize("algorithm", [FEDIT, FEDEX, EXPORTED, FLORA, FLEX], ids=lambda a: a.name)
def test_clients_that_agree_are_fitted_by_all_and_nothing_drifts(algorithm):
    (last,), ratios = distances(algorithm, het=0.0, at=(30,))
    assert last < 1e-3
    assert not drift_warning(ratios)


@pytest.mark.parametrize(("algorithm", "warns"), [(FEDEX, True), (FADES, False), (EXPORTED, False)])
@pytest.mark.parametrize("het", [0.3, 1.0])
def test_a_run_warns_of_the_drift_and_not_of_its_remedies(algorithm, warns, het):
    _, ratios = distances(algorithm, het=het, at=tuple(range(1, 61)))
    assert bool(drift_warning(ratios)) == warns


def test_on_clients_that_differ_the_residual_drifts_and_what_stops_it():
    rounds = (5, 20, 60)
    drift, ratios = distances(FEDEX, het=1.0, at=rounds)
    (plain,), (faded,), (merged,) = (
        distances(algorithm, het=1.0, at=(60,))[0] for algorithm in (FEDIT, FADES, FLORA)
    )
    (exported,), _ = distances(EXPORTED, het=1.0, at=(60,))
    assert ratios == sorted(ratios)
    assert drift[0] < drift[1] < drift[2]
    assert drift[2] > 2 * plain
    assert faded < 1.5 * plain
    assert merged < 0.5 * plain
    assert exported < 1.05 * plain
