"""FedDyn and DiLoCo on solved toys. SCAFFOLD is in core/test_algorithm_interface.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.algorithms.diloco import DiLoCoConfig, diloco
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.feddyn import FedDynConfig, feddyn
from silotune.algorithms.scaffold import ScaffoldConfig, scaffold
from silotune.core.types import Change, ServerState
from tests.unit.core.test_algorithm_interface import (
    LOSSES,
    OPTIMUM,
    X,
    at,
    play_round,
    run,
    start,
)

# --- FedDyn


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_feddyn_reaches_the_optimum_where_fedavg_stops_elsewhere(alpha):
    dyn = run(feddyn(FedDynConfig(alpha=alpha)), LOSSES, at(0.0), rounds=150, lr=0.1, steps=60)
    plain = run(fedavg(FedAvgConfig()), LOSSES, at(0.0), rounds=30, lr=0.1, steps=60)
    assert dyn.adapter[X].item() == pytest.approx(OPTIMUM, abs=1e-4)
    assert abs(plain.adapter[X].item() - OPTIMUM) > 0.5


def test_feddyns_server_memory_is_minus_the_mean_of_the_clients_gradients():
    """At every round h is the mean of what the clients keep, also of those not asked: eq. 2."""
    algorithm = feddyn(FedDynConfig(alpha=0.7))
    state, memories = start(algorithm, at(0.0)), {}
    for cohort in (["c0", "c1", "c2"], ["c0", "c2"], ["c1"], ["c0", "c1", "c2"]):
        state, _ = play_round(algorithm, state, LOSSES, memories, cohort)
        kept = [memories.get(n, {}).get("gradient", at(0.0))[X] for n in LOSSES]
        torch.testing.assert_close(
            state.extra["mean_gradient"][X], sum(kept) / 3, rtol=0, atol=1e-12
        )


def test_feddyns_first_round_is_fedavg_over_alpha_by_hand():
    """g = 0, so the client minimises its loss plus alpha / 2 |theta - received|^2 from 2."""
    algorithm = feddyn(FedDynConfig(alpha=0.5))
    state, updates = play_round(
        algorithm, start(algorithm, at(2.0)), LOSSES, {}, ["c1"], steps=400, lr=0.05
    )
    # c1: 4 / 2 (x - 1)^2 + 0.5 / 2 (x - 2)^2 is least at (4 + 1) / 4.5
    moved = 5 / 4.5 - 2
    assert updates[0].delta[X].item() == pytest.approx(moved, abs=1e-9)
    # h = -alpha (1 / 3) moved; theta = 2 + moved - h / alpha
    assert state.adapter[X].item() == pytest.approx(2 + moved + moved / 3, abs=1e-9)


def test_what_clients_keep_for_feddyn_and_scaffold_never_travels():
    for algorithm in (feddyn(FedDynConfig()), scaffold(ScaffoldConfig())):
        memories = {}
        _, updates = play_round(algorithm, start(algorithm, at(0.0)), LOSSES, memories)
        assert all(memories[name] for name in LOSSES)
        sent = {purpose for u in updates for purpose in u.extra}
        assert sent <= {"control"}  # SCAFFOLD's change of variates, not the variates
        for update in updates:
            for tensors in update.extra.values():
                assert tensors.keys() == update.delta.keys()


# --- DiLoCo


def test_the_first_outer_step_is_the_printed_one():
    delta = torch.tensor([0.1, -0.2], dtype=torch.float64)
    algorithm = diloco(DiLoCoConfig(server_lr=0.7, momentum=0.9))
    state = algorithm.step(start(algorithm, at(0.0, 0.0)), Change({X: delta}))
    assert state.adapter[X].tolist() == pytest.approx([0.133, -0.266])


@given(
    deltas=st.lists(st.floats(-1, 1), min_size=1, max_size=8),
    server_lr=st.floats(0.1, 2),
    momentum=st.floats(0, 0.95),
)
def test_the_outer_steps_are_those_of_torchs_nesterov_sgd(deltas, server_lr, momentum):
    """An independent oracle: torch.optim.SGD(nesterov=True) on the pseudo-gradient -D."""
    algorithm = diloco(DiLoCoConfig(server_lr=server_lr, momentum=momentum))
    state = start(algorithm, at(1.0))
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=server_lr, momentum=momentum, nesterov=momentum > 0)
    for d in deltas:
        state = algorithm.step(state, Change({X: torch.tensor([d], dtype=torch.float64)}))
        p.grad = torch.tensor([-d], dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(state.adapter[X], p.detach(), rtol=0, atol=1e-9)


def test_without_momentum_and_at_rate_1_it_is_fedavg():
    one, other = diloco(DiLoCoConfig(server_lr=1, momentum=0)), fedavg(FedAvgConfig())
    plain, state = (run(a, LOSSES, at(3.0), rounds=4).adapter[X] for a in (other, one))
    assert torch.equal(plain, state)


def test_its_momentum_is_saved_with_the_state():
    algorithm = diloco(DiLoCoConfig())
    state = algorithm.step(start(algorithm, at(0.0)), Change(at(0.5)))
    copied = ServerState(1, state.adapter, {"momentum": dict(state.extra["momentum"])})
    one, other = (algorithm.step(s, Change(at(0.25))).adapter[X] for s in (state, copied))
    assert torch.equal(one, other)
