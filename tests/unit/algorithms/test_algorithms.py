"""The server side of FedAvg, FedProx and FedAvgM, and what every registered algorithm must do."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedopt import FedAvgMConfig, fedavgm
from silotune.algorithms.fedprox import FedProxConfig, fedprox
from silotune.core.algorithm import LocalContext, expected_extra, expected_layout
from silotune.core.tree import layout_of, sha256
from silotune.core.types import Change, ServerState, Update

PROPERTY = settings(max_examples=20, deadline=None)
A, B = "layers.0.lora_A", "layers.0.lora_B"

values = st.floats(-1e3, 1e3, width=32)


@st.composite
def states(draw):
    """A state of two tensors, (3,) and (2, 2), float32."""
    flat = torch.tensor(draw(st.lists(values, min_size=7, max_size=7)), dtype=torch.float32)
    return {A: flat[:3].clone(), B: flat[3:].reshape(2, 2).clone()}


@st.composite
def rounds(draw):
    """A server state and the updates of one to five clients, in name order."""
    state = ServerState(draw(st.integers(0, 9)), draw(states()))
    many = draw(st.lists(st.tuples(st.integers(1, 500), states()), min_size=1, max_size=5))
    return state, [update(f"client-{i}", d, 2 * n) for i, (n, d) in enumerate(many)]


def update(client, delta, num_examples=1, **more):
    return Update(client, 1, delta, num_examples, {}, **more)


def play(algorithm, state, updates):
    return algorithm.step(state, algorithm.combine(state, updates))


def start(algorithm, adapter):
    return ServerState(0, adapter, algorithm.init(adapter, 2))


def fingerprint(state):
    return state.round, sha256(state.adapter), fingerprints(state.extra)


def fingerprints(extra):
    return {purpose: sha256(tensors) for purpose, tensors in extra.items()}


def assert_near(got, expected, *, atol):
    torch.testing.assert_close(dict(got), dict(expected), rtol=1e-6, atol=atol)


# --- FedAvg


def test_fedavg_adds_the_mean_weighted_by_examples():
    # by hand: 10 + (1 * 4 + 3 * -8) / 4 = 5 and -1 + (1 * -1 + 3 * 1) / 4 = -0.5
    state = ServerState(4, {A: torch.tensor([10.0, -1.0])})
    updates = [
        update("north", {A: torch.tensor([4.0, -1.0])}, 1),
        update("south", {A: torch.tensor([-8.0, 1.0])}, 3),
    ]
    after = play(fedavg(FedAvgConfig()), state, updates)
    assert after.adapter[A].tolist() == [5.0, -0.5]
    assert after.round == 5


def test_uniform_weights_give_every_client_the_same_say():
    state = ServerState(0, {A: torch.zeros(1)})
    updates = [
        update("north", {A: torch.tensor([4.0])}, 1),
        update("south", {A: torch.tensor([-8.0])}, 300),
    ]
    after = play(fedavg(FedAvgConfig(weights="uniform")), state, updates)
    assert after.adapter[A].item() == -2.0


@PROPERTY
@given(rounds(), st.randoms(use_true_random=False))
def test_arrival_order_does_not_change_one_bit_of_the_new_adapter(played, random):
    state, updates = played
    arrived = random.sample(updates, len(updates))
    spooled = sorted(arrived, key=lambda u: u.client)
    algorithm = fedavg(FedAvgConfig())
    assert fingerprint(play(algorithm, state, spooled)) == fingerprint(
        play(algorithm, state, updates)
    )


@PROPERTY
@given(rounds())
def test_one_client_leads_the_server_to_its_own_adapter(played):
    state, (one, *_) = played
    change = fedavg(FedAvgConfig()).combine(state, [one])
    after = play(fedavg(FedAvgConfig()), state, [one])
    assert all(torch.equal(change.delta[n], d) for n, d in one.delta.items())
    assert_near(after.adapter, {n: t + one.delta[n] for n, t in state.adapter.items()}, atol=1e-4)


@PROPERTY
@given(rounds())
def test_clients_that_do_not_move_are_a_fixed_point(played):
    state, updates = played
    still = [
        dataclasses.replace(u, delta={A: torch.zeros(3), B: torch.zeros(2, 2)}) for u in updates
    ]
    after = play(fedavg(FedAvgConfig()), state, still)
    assert all(torch.equal(t, state.adapter[n]) for n, t in after.adapter.items())


@PROPERTY
@given(rounds(), st.integers(2, 9))
def test_counting_every_example_several_times_changes_nothing(played, times):
    state, updates = played
    more = [dataclasses.replace(u, num_examples=times * u.num_examples) for u in updates]
    algorithm = fedavg(FedAvgConfig())
    there, back = (algorithm.combine(state, u).delta for u in (more, updates))
    assert_near(there, back, atol=1e-9)


@PROPERTY
@given(rounds())
def test_a_client_split_into_two_clones_of_half_its_examples_changes_nothing(played):
    state, (one, *others) = played
    half = one.num_examples // 2
    clones = [dataclasses.replace(one, client=f"clone-{i}", num_examples=half) for i in (1, 2)]
    algorithm = fedavg(FedAvgConfig())
    whole, split = (algorithm.combine(state, [*u, *others]).delta for u in ([one], clones))
    assert_near(split, whole, atol=1e-9)


@PROPERTY
@given(rounds())
def test_every_new_coordinate_stays_between_what_the_clients_hold(played):
    state, updates = played
    after = play(fedavg(FedAvgConfig()), state, updates)
    for name, t in after.adapter.items():
        held = torch.stack([state.adapter[name].double() + u.delta[name].double() for u in updates])
        slack = 1e-6 * (held.abs().amax(0) + state.adapter[name].abs()) + 1e-9
        slack = slack + 1e-6 * torch.stack([u.delta[name].abs() for u in updates]).amax(0)
        assert bool((t >= held.amin(0) - slack).all())
        assert bool((t <= held.amax(0) + slack).all())


def test_one_plain_step_at_every_client_is_one_step_on_the_pooled_rows():
    gen = torch.Generator().manual_seed(7)
    sizes, lr = {"east": 3, "north": 8, "west": 5}, 0.1
    rows = {n: torch.randn(k, 4, generator=gen, dtype=torch.float64) for n, k in sizes.items()}
    targets = {n: torch.randn(k, generator=gen, dtype=torch.float64) for n, k in sizes.items()}
    received = torch.randn(4, generator=gen, dtype=torch.float64)

    def delta(x, y):  # -lr * gradient of the mean of (x w - y)^2
        return -lr * 2 * x.T @ (x @ received - y) / len(y)

    updates = [update(n, {A: delta(rows[n], targets[n])}, sizes[n]) for n in sizes]
    after = play(fedavg(FedAvgConfig()), ServerState(0, {A: received}), updates)
    pooled = delta(torch.cat(list(rows.values())), torch.cat(list(targets.values())))
    torch.testing.assert_close(after.adapter[A], received + pooled, rtol=0, atol=1e-12)


def lora_round(*, sizes=(5, 3, 2), d_out=6, d_in=5, rank=2):
    gen = torch.Generator().manual_seed(11)

    def normal(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    adapter = {A: normal(rank, d_in), B: torch.zeros(d_out, rank, dtype=torch.float64)}
    deltas = [{A: normal(rank, d_in), B: normal(d_out, rank)} for _ in sizes]
    updates = [update(f"c{i}", d, n) for i, (d, n) in enumerate(zip(deltas, sizes, strict=True))]
    return ServerState(0, adapter), updates


def product(adapter):
    return adapter[B] @ adapter[A]  # (d_out, d_in)


def held(state, updates):
    """Each client's share and full factors after training."""
    total = sum(u.num_examples for u in updates)
    return [
        (u.num_examples / total, {n: state.adapter[n] + u.delta[n] for n in u.delta})
        for u in updates
    ]


def test_the_product_of_mean_factors_misses_the_mean_product_by_the_cross_covariance():
    state, updates = lora_round()
    mean = play(fedavg(FedAvgConfig()), state, updates).adapter
    clients = held(state, updates)
    missing = sum(p * product(f) for p, f in clients) - product(mean)
    covariance = sum(p * (f[B] - mean[B]) @ (f[A] - mean[A]) for p, f in clients)
    torch.testing.assert_close(missing, covariance, rtol=0, atol=1e-12)
    assert float(missing.norm()) > 1.0
    assert torch.linalg.matrix_rank(missing).item() == (3 - 1) * 2  # (K - 1) r


def test_a_rotation_inside_a_clients_factors_moves_fedavg_but_not_the_clients_product():
    state, updates = lora_round()
    turn, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0], [-3.0, 1.0]], dtype=torch.float64))
    full = {n: state.adapter[n] + updates[0].delta[n] for n in (A, B)}
    turned = {A: turn.T @ full[A], B: full[B] @ turn}
    delta = {n: turned[n] - state.adapter[n] for n in turned}
    other = [dataclasses.replace(updates[0], delta=delta), *updates[1:]]
    torch.testing.assert_close(product(turned), product(full), rtol=0, atol=1e-12)
    algorithm = fedavg(FedAvgConfig())
    moved = product(play(algorithm, state, other).adapter) - product(
        play(algorithm, state, updates).adapter
    )
    assert float(moved.norm()) > 0.1


# --- every algorithm


DEFAULTS = {name: build(config()) for name, (config, build) in ALGORITHMS.items()}
each = pytest.mark.parametrize("name", DEFAULTS)


def two_updates(sign=1.0):
    """Unequal weights, both signs, one coordinate far below tau."""
    north = {A: sign * torch.tensor([0.1, -0.2, 3e-4]), B: torch.tensor([[0.5], [-0.25]])}
    south = {A: torch.tensor([-0.3, 0.05, 1e-4]), B: sign * torch.tensor([[0.125], [2.0]])}
    return [update("north", north, 1), update("south", south, 3)]


ADAPTER = {A: torch.tensor([1.0, -2.0, 3.0]), B: torch.tensor([[0.5], [-1.5]])}


@each
def test_every_algorithm_builds_under_its_own_name_and_plays_a_round(name):
    algorithm = DEFAULTS[name]
    state = start(algorithm, ADAPTER)
    after = play(algorithm, state, two_updates())
    assert algorithm.name == name
    assert after.round == 1
    assert layout_of(after.adapter) == layout_of(ADAPTER)
    assert after.extra.keys() == state.extra.keys()
    learning = {n: t for n, t in ADAPTER.items() if algorithm.local.trains(n, 2)}
    assert expected_layout(algorithm, after) == layout_of(learning)
    assert learning
    assert expected_extra(algorithm, after) == {}
    assert set(algorithm.broadcasts) <= set(after.extra)
    assert all(bool(torch.isfinite(t).all()) for t in after.adapter.values())


@each
def test_the_server_moves_to_where_the_clients_agree_to_go(name):
    # a flipped sign in a server's step fails here
    delta = {A: torch.tensor([0.1, -0.2, 0.3]), B: torch.tensor([[-0.5], [0.25]])}
    algorithm = DEFAULTS[name]
    after = play(algorithm, start(algorithm, ADAPTER), [update("north", delta)])
    for n, d in delta.items():
        assert torch.equal(torch.sign(after.adapter[n] - ADAPTER[n]), torch.sign(d))


@each
@given(played=rounds())
@settings(max_examples=5, deadline=None)
def test_no_algorithm_touches_its_inputs(name, played):
    drawn, updates = played
    algorithm = DEFAULTS[name]
    state = dataclasses.replace(drawn, extra=algorithm.init(drawn.adapter, len(updates)))
    before, deltas = fingerprint(state), [sha256(u.delta) for u in updates]
    change = algorithm.combine(state, updates)
    combined = sha256(change.delta), fingerprints(change.extra)
    algorithm.step(state, change)
    assert fingerprint(state) == before
    assert [sha256(u.delta) for u in updates] == deltas
    assert (sha256(change.delta), fingerprints(change.extra)) == combined


@each
def test_step_counts_the_round_and_leaves_tensors_without_a_change_as_they_are(name):
    algorithm = DEFAULTS[name]
    state = play(algorithm, start(algorithm, ADAPTER), two_updates())
    change = Change({B: torch.tensor([[0.5], [-0.25]])})
    after = algorithm.step(state, change)
    assert after.round == state.round + 1
    assert torch.equal(after.adapter[A], state.adapter[A])
    assert not torch.equal(after.adapter[B], state.adapter[B])
    for purpose, moments in state.extra.items():
        assert torch.equal(after.extra[purpose][A], moments[A])
        assert not torch.equal(after.extra[purpose][B], moments[B])


@each
def test_server_lr_scales_the_step(name):
    config, build = ALGORITHMS[name]
    moved = []
    for server_lr in (0.25, 0.5):
        algorithm = build(config(server_lr=server_lr))
        zero = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in ADAPTER.items()}
        updates = [
            dataclasses.replace(u, delta={n: d.double() for n, d in u.delta.items()})
            for u in two_updates()
        ]
        moved.append(play(algorithm, start(algorithm, zero), updates).adapter)
    assert_near(moved[1], {n: 2 * t for n, t in moved[0].items()}, atol=0)
    assert all(bool((t != 0).all()) for t in moved[0].values())


@each
def test_every_algorithm_here_says_that_its_change_is_a_weighted_sum(name):
    assert DEFAULTS[name].linear
    one, two = two_updates()
    state = start(DEFAULTS[name], ADAPTER)
    change = DEFAULTS[name].combine(state, [one, two])
    mean = {n: 0.25 * one.delta[n] + 0.75 * two.delta[n] for n in ADAPTER}
    assert_near(change.delta, mean, atol=1e-9)
    assert change.extra == {}


FIELDS = [
    (name, field) for name, (config, _) in ALGORITHMS.items() for field in config.model_fields
]


def another(config, field):
    """A legal value of a field that is not its default."""
    default = getattr(config(), field)
    return "uniform" if default == "examples" else default / 2 or 0.5


def observed(name, **changed):
    """All that can be observed of an algorithm: two rounds, its pull on a client, its settings."""
    config, build = ALGORITHMS[name]
    algorithm = build(config(**changed))
    state = start(algorithm, ADAPTER)
    for sign in (1.0, -1.0):
        state = play(algorithm, state, two_updates(sign))
    now = {n: t + 1.0 for n, t in ADAPTER.items()}
    penalty = algorithm.local.penalty
    pull = None if penalty is None else float(penalty(now, LocalContext(ADAPTER, {}, {})))
    return fingerprint(state), pull, dict(algorithm.local.settings)


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_field_is_described_and_has_an_effect(name, field):
    config, _ = ALGORITHMS[name]
    assert config.model_fields[field].description
    assert observed(name, **{field: another(config, field)}) != observed(name)


@each
def test_unknown_keys_are_refused(name):
    config, _ = ALGORITHMS[name]
    with pytest.raises(ValidationError, match="leraning_rate"):
        config(leraning_rate=1.0)


# --- FedProx, server side (its clients train in test_algorithm_interface.py)


def pull(mu, now, received):
    return fedprox(FedProxConfig(mu=mu)).local.penalty(now, LocalContext(received, {}, {}))


def test_fedprox_pulls_with_half_mu_times_the_squared_distance():
    # by hand: 0.5 * 0.3 * ((1 - 3)^2 + (-2 - 2)^2 + (0.5 - 0)^2) = 0.15 * 20.25
    now = {A: torch.tensor([1.0, -2.0], requires_grad=True), B: torch.tensor([[0.5]])}
    received = {A: torch.tensor([3.0, 2.0]), B: torch.tensor([[0.0]]), "frozen": torch.ones(9)}
    value = pull(0.3, now, received)
    value.backward()
    assert value.item() == pytest.approx(0.15 * 20.25)
    assert now[A].grad.tolist() == pytest.approx([0.3 * (1 - 3), 0.3 * (-2 - 2)])


def test_fedprox_without_mu_adds_no_term_at_all():
    assert fedprox(FedProxConfig(mu=0)).local.penalty is None


@pytest.mark.parametrize("mu", [0.0, 0.01, 3.0])
def test_fedprox_names_its_mu_for_the_client_to_echo(mu):
    assert fedprox(FedProxConfig(mu=mu)).local.settings == {"mu": mu}


@PROPERTY
@given(rounds(), st.floats(0, 10), st.sampled_from(["examples", "uniform"]), st.floats(0.1, 2))
def test_the_server_side_of_fedprox_is_fedavg_bit_for_bit(played, mu, weights, server_lr):
    state, updates = played
    prox = fedprox(FedProxConfig(mu=mu, weights=weights, server_lr=server_lr))
    plain = fedavg(FedAvgConfig(weights=weights, server_lr=server_lr))
    assert fingerprint(play(prox, state, updates)) == fingerprint(play(plain, state, updates))


# --- FedAvgM


@PROPERTY
@given(rounds(), st.sampled_from(["examples", "uniform"]), st.floats(0.1, 2))
def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(played, weights, server_lr):
    drawn, updates = played
    plain = fedavg(FedAvgConfig(weights=weights, server_lr=server_lr))
    heavy = fedavgm(FedAvgMConfig(weights=weights, server_lr=server_lr, momentum=0))
    state = dataclasses.replace(drawn, extra=heavy.init(drawn.adapter, len(updates)))
    for _ in range(2):
        drawn, state = play(plain, drawn, updates), play(heavy, state, updates)
    assert sha256(state.adapter) == sha256(drawn.adapter)
    assert state.round == drawn.round


def test_under_a_constant_change_momentum_grows_as_the_geometric_series():
    beta, delta = 0.9, torch.tensor([0.1, -0.2], dtype=torch.float64)
    algorithm = fedavgm(FedAvgMConfig(momentum=beta, server_lr=0.5))
    state = start(algorithm, {A: torch.tensor([3.0, -1.0], dtype=torch.float64)})
    expected = state.adapter[A].clone()
    for t in range(1, 13):
        state = algorithm.step(state, Change({A: delta}))
        velocity = delta * (1 - beta**t) / (1 - beta)
        expected = expected + 0.5 * velocity
        torch.testing.assert_close(state.extra["momentum"][A], velocity, rtol=0, atol=1e-12)
        torch.testing.assert_close(state.adapter[A], expected, rtol=0, atol=1e-12)
