"""FedAdagrad, FedAdam and FedYogi against Algorithm 2 of Reddi et al. 2021, written out in Python.

The printed vectors are T1, T2 and T3 of the specification; `paper` and `flower` below
recompute them, one float at a time, without torch.
"""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from silotune.algorithms import ALGORITHMS
from silotune.core.tree import sha256
from silotune.core.types import Change, ServerState, Update

A, B = "layers.0.lora_A", "layers.0.lora_B"
ADAPTIVE = ["fedadagrad", "fedadam", "fedyogi"]
adaptive = pytest.mark.parametrize("name", ADAPTIVE)


def paper(name, changes, *, eta, b1, b2, tau):
    """One coordinate through Algorithm 2: the sum of its moves, and the last m and v."""
    moved, m, v = 0.0, 0.0, tau * tau
    for d in changes:
        m = b1 * m + (1 - b1) * d
        if name == "fedadagrad":
            v = v + d * d
        elif name == "fedadam":
            v = b2 * v + (1 - b2) * d * d
        elif v > d * d:
            v = v - (1 - b2) * d * d
        elif v < d * d:
            v = v + (1 - b2) * d * d
        moved += eta * m / (math.sqrt(v) + tau)
    return moved, m, v


def flower(change, *, eta, b1, b2, tau, exponent):
    """Flower's first FedAdam step: v starts at 0, and the step size carries Adam's correction."""
    m, v = (1 - b1) * change, (1 - b2) * change * change
    corrected = eta * math.sqrt(1 - b2**exponent) / (1 - b1**exponent)
    return corrected * m / (math.sqrt(v) + tau)


def build(name, **changed):
    config, builder = ALGORITHMS[name]
    if name == "fedadagrad":
        changed.pop("beta2", None)
    return builder(config(**changed))


def start(algorithm, values, *, dtype=torch.float32):
    adapter = {A: torch.tensor(values, dtype=dtype)}
    return ServerState(0, adapter, algorithm.init(adapter, 1))


def run(algorithm, state, changes):
    for change in changes:
        delta = torch.tensor(change, dtype=state.adapter[A].dtype)
        state = algorithm.step(state, Change({A: delta}))
    return state


# --- the rule


T1 = {
    "fedadam": (0.9, (0.0905028, -0.0951261)),
    "fedyogi": (0.9, (0.0904988, -0.0951249)),
    "fedadagrad": (0.0, (0.0990050, -0.0995013)),  # the paper's FedAdagrad has beta1 = 0
}


@adaptive
def test_one_step_gives_the_printed_vector(name):
    b1, printed = T1[name]
    algorithm = build(name, server_lr=0.1, beta1=b1, beta2=0.99, tau=1e-3)
    moved = run(algorithm, start(algorithm, [0.0, 0.0]), [[0.1, -0.2]]).adapter[A].tolist()
    oracle = [paper(name, [d], eta=0.1, b1=b1, b2=0.99, tau=1e-3)[0] for d in (0.1, -0.2)]
    assert oracle == pytest.approx(printed, abs=5.1e-8)  # all seven digits that are printed
    assert moved == pytest.approx(printed, abs=1e-6)


def test_the_papers_rule_is_not_flowers_rule():
    algorithm = build("fedadam", server_lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3)
    moved = run(algorithm, start(algorithm, [0.0, 0.0]), [[0.1, -0.2]]).adapter[A].tolist()
    for exponent, printed in [(2, (0.0674963, -0.0707105)), (1, (0.0909091, -0.0952381))]:
        other = [
            flower(d, eta=0.1, b1=0.9, b2=0.99, tau=1e-3, exponent=exponent) for d in (0.1, -0.2)
        ]
        assert other == pytest.approx(printed, abs=5.1e-8)
        assert all(abs(x - y) > 1e-4 for x, y in zip(moved, other, strict=True))


@adaptive
@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_several_unequal_rounds_follow_the_paper(name, tau):
    # both signs, one coordinate below tau, a round without movement, squares around v for Yogi
    changes = [[0.1, -0.2, 1e-5], [-0.3, 0.1, -2e-5], [0.0, 0.0, 0.0], [0.01, 0.6, 3e-5]]
    constants = {"b1": 0.7, "b2": 0.9, "tau": tau}
    algorithm = build(name, server_lr=0.3, beta1=0.7, beta2=0.9, tau=tau)
    state = start(algorithm, [1.0, -2.0, 0.5], dtype=torch.float64)
    state = run(algorithm, state, changes)
    for i, first in enumerate((1.0, -2.0, 0.5)):
        moved, m, v = paper(name, [c[i] for c in changes], eta=0.3, **constants)
        assert state.adapter[A][i].item() == pytest.approx(first + moved, abs=1e-12)
        assert state.extra["first_moment"][A][i].item() == pytest.approx(m, abs=1e-14)
        assert state.extra["second_moment"][A][i].item() == pytest.approx(v, abs=1e-14)


@adaptive
@pytest.mark.parametrize(
    ("weights", "mean"), [("examples", (1 * 0.4 + 3 * -0.2) / 4), ("uniform", (0.4 - 0.2) / 2)]
)
def test_the_server_sees_the_weighted_mean_of_unequal_clients(name, weights, mean):
    algorithm = build(name, weights=weights, tau=1e-3)
    state = start(algorithm, [1.0])
    updates = [
        Update("north", 1, {A: torch.tensor([0.4])}, 1, {}),
        Update("south", 1, {A: torch.tensor([-0.2])}, 3, {}),
    ]
    after = algorithm.step(state, algorithm.combine(state, updates))
    b1 = 0.0 if name == "fedadagrad" else 0.9
    expected, _, _ = paper(name, [mean], eta=1e-2, b1=b1, b2=0.99, tau=1e-3)
    assert after.adapter[A].item() - 1.0 == pytest.approx(expected, abs=1e-6)


@adaptive
def test_the_second_moment_starts_at_tau_squared_and_the_first_at_zero(name):
    algorithm = build(name, tau=0.02)
    extra = algorithm.init({A: torch.ones(3), B: torch.ones(2, 2)}, 1)
    assert extra.keys() == {"first_moment", "second_moment"}
    for n, shape in ((A, (3,)), (B, (2, 2))):
        assert torch.equal(extra["first_moment"][n], torch.zeros(shape, dtype=torch.float64))
        tau_squared = torch.full(shape, 0.02**2, dtype=torch.float64)
        assert torch.equal(extra["second_moment"][n], tau_squared)


@adaptive
def test_with_a_huge_tau_and_equal_step_size_it_moves_like_fedavg(name):
    algorithm = build(name, tau=1e6, server_lr=1e6, beta1=0.0)
    state = start(algorithm, [0.0, 0.0, 0.0], dtype=torch.float64)
    moved = run(algorithm, state, [[0.1, -0.2, 3.0]]).adapter[A]
    # v starts at tau^2, and FedAdam's first round leaves 0.99 of it: sqrt(v) + tau is not tau
    share = 1 / (1 + math.sqrt(0.99 if name == "fedadam" else 1.0))
    assert moved.tolist() == pytest.approx([share * d for d in (0.1, -0.2, 3.0)], rel=1e-9)


changes = st.lists(st.lists(st.floats(-10, 10), min_size=2, max_size=2), min_size=1, max_size=6)


@given(changes, st.floats(0, 0.999), st.floats(1e-4, 1))
def test_yogis_second_moment_moves_at_most_by_its_share_of_the_square_and_stays_positive(
    changes, b2, tau
):
    algorithm = build("fedyogi", beta2=b2, tau=tau)
    state = start(algorithm, [0.0, 0.0], dtype=torch.float64)
    for change in changes:
        before = state.extra["second_moment"][A]
        state = run(algorithm, state, [change])
        square = torch.tensor(change, dtype=torch.float64).square()
        moved = state.extra["second_moment"][A] - before
        assert bool((moved.abs() <= (1 - b2) * square * (1 + 1e-9) + 1e-12).all())
        assert bool((state.extra["second_moment"][A] >= 0).all())


@given(changes, st.sampled_from(ADAPTIVE), st.floats(0, 0.99))
def test_a_mirrored_change_gives_the_mirrored_step(changes, name, b1):
    algorithm = build(name, beta1=b1)
    start_ = start(algorithm, [0.0, 0.0], dtype=torch.float64)
    there = run(algorithm, start_, changes)
    back = run(algorithm, start_, [[-d for d in change] for change in changes])
    assert torch.equal(there.adapter[A], -back.adapter[A])
    assert sha256(there.extra["second_moment"]) == sha256(back.extra["second_moment"])


def test_moments_keep_squares_of_tiny_deltas_that_float32_would_lose():
    algorithm = build("fedadagrad", tau=1.0)
    state = run(algorithm, start(algorithm, [0.0]), [[1e-5]])
    assert state.extra["second_moment"][A].dtype == torch.float64
    assert state.extra["second_moment"][A].item() > 1.0
    assert state.adapter[A].dtype == torch.float32


# --- the state


def saved(state: ServerState, path: Path) -> ServerState:
    """The state written to disk and read back, as in a run folder."""
    flat = {f"adapter/{n}": t for n, t in state.adapter.items()}
    flat |= {f"{k}/{n}": t for k, s in state.extra.items() for n, t in s.items()}
    path.write_bytes(save(flat))
    parts = {}
    for key, t in load(path.read_bytes()).items():
        purpose, name = key.split("/", 1)
        parts.setdefault(purpose, {})[name] = t
    return ServerState(state.round, parts.pop("adapter"), parts)


@pytest.mark.parametrize("name", [*ADAPTIVE, "fedavgm"])
def test_stopping_and_resuming_gives_the_same_bits_as_running_on(name, tmp_path):
    algorithm = build(name)
    changes = [[0.1, -0.2], [-0.3, 0.1], [0.05, 0.6]]
    through = stopped = start(algorithm, [1.0, -2.0])
    for change in changes:
        through = run(algorithm, through, [change])
        stopped = dataclasses.replace(saved(stopped, tmp_path / "state.safetensors"))
        stopped = run(build(name), stopped, [change])
    assert stopped.round == through.round == 3
    assert sha256(stopped.adapter) == sha256(through.adapter)
    assert {k: sha256(s) for k, s in stopped.extra.items()} == {
        k: sha256(s) for k, s in through.extra.items()
    }


@adaptive
def test_a_change_to_an_unknown_tensor_fails_loudly(name):
    algorithm = build(name)
    with pytest.raises(KeyError, match="unknown"):
        algorithm.step(start(algorithm, [1.0]), Change({"unknown": torch.ones(1)}))
