"""The server side of FedAvg, FedProx and FedAvgM, and what every registered algorithm must do."""

import dataclasses
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedopt import FedAvgMConfig, fedavgm
from silotune.algorithms.fedprox import FedProxConfig, fedprox
from silotune.core.algorithm import (
    LocalContext,
    expected_extra,
    expected_layout,
    starting_state,
)
from silotune.core.errors import ConfigError
from silotune.core.lora import is_beside, is_core, joined
from silotune.core.tree import layout_of, sha256
from silotune.core.types import Change, ServerState, Update

PROPERTY = settings(max_examples=20, deadline=None)
A, B, BIAS = "layers.0.lora_A", "layers.0.lora_B", "bias"
BESIDE_B = "layers.0.residual_B"

values = st.floats(-1e3, 1e3, width=32)


@st.composite
def states(draw):
    """Two factors, (2, 3) and (2, 2), and a bias, (2,), float32."""
    flat = torch.tensor(draw(st.lists(values, min_size=12, max_size=12)), dtype=torch.float32)
    parts = flat[:6].reshape(2, 3), flat[6:10].reshape(2, 2), flat[10:]
    return {name: t.clone() for name, t in zip((A, B, BIAS), parts, strict=True)}


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
    return starting_state(algorithm, adapter, 2)


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
        dataclasses.replace(u, delta={n: torch.zeros_like(d) for n, d in u.delta.items()})
        for u in updates
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
FACTS = {name: config.facts for name, (config, _) in ALGORITHMS.items()}
each = pytest.mark.parametrize("name", DEFAULTS)
REWRITES = {"fedsvd", "fed_sb", "flexlora", "flora"}
"""Give the same product to other factors, so that signs and steps of single factors say nothing."""
ADAPTER = {A: torch.tensor([[1.0, -2.0, 3.0]]), B: torch.tensor([[0.5], [-1.5]])}
NORTH = {A: torch.tensor([[0.1, -0.2, 3e-4]]), B: torch.tensor([[0.5], [-0.25]])}
SOUTH = {A: torch.tensor([[-0.3, 0.05, 1e-4]]), B: torch.tensor([[0.125], [2.0]])}


def double(tensors):
    return {n: t.double() for n, t in tensors.items()}


def is_sent(algorithm, tensor, round_):
    return algorithm.local.trains(tensor, round_) and not algorithm.local.personal(tensor)


def several_updates(name, sign=1.0, *, round_=1):
    """Five clients with unequal weights, both signs, one coordinate far below tau."""
    deltas = [
        {A: sign * NORTH[A], B: NORTH[B]},
        {A: SOUTH[A], B: sign * SOUTH[B]},
        *({n: (1 + i * i / 7) * d for n, d in NORTH.items()} for i in range(3)),
    ]
    sent = [
        {n: d for n, d in delta.items() if is_sent(DEFAULTS[name], n, round_)} for delta in deltas
    ]
    extra = {"control": sent} if FACTS[name].sends_more else {}
    return [
        update(f"client-{i}", d, i + 1, extra={k: tensors[i] for k, tensors in extra.items()})
        for i, d in enumerate(sent)
    ]


@each
def test_every_algorithm_builds_under_its_own_name_and_plays_a_round(name):
    algorithm = DEFAULTS[name]
    state = start(algorithm, ADAPTER)
    after = play(algorithm, state, several_updates(name))
    assert algorithm.name == name
    assert after.round == 1
    own = {n: t for n, t in after.adapter.items() if not (is_beside(n) or is_core(n))}
    assert layout_of(own) == layout_of(ADAPTER)
    assert any(map(is_beside, after.adapter)) == FACTS[name].residual
    assert any(map(is_core, after.adapter)) == FACTS[name].core
    assert after.extra.keys() == state.extra.keys()
    learning = {n: t for n, t in ADAPTER.items() if is_sent(algorithm, n, 2)}
    assert expected_layout(algorithm, after) == layout_of(learning)
    assert learning
    assert bool(expected_extra(algorithm, after)) == FACTS[name].sends_more
    assert set(algorithm.broadcasts) <= set(after.extra)
    assert all(bool(torch.isfinite(t).all()) for t in after.adapter.values())


@each
def test_what_an_algorithm_says_about_itself_is_what_it_is(name):
    """`check` refuses recipes by these facts; the functions are what the facts are about."""
    facts, algorithm = FACTS[name], DEFAULTS[name]
    assert facts.linear == algorithm.linear
    assert facts.sends_more == (algorithm.extra_layout is not None)
    assert facts.remembers == (algorithm.local.finish is not None)
    assert facts.residual != algorithm.local.trains(BESIDE_B, 1)
    assert bool(facts.keeps) == any(algorithm.local.personal(n) for n in ADAPTER)
    assert facts.paper
    assert facts.differs.endswith(".")
    bare = {"weight": torch.ones(2, 2)}
    if facts.needs_lora:
        with pytest.raises(ConfigError, match=f"algorithm.name = '{name}' works on LoRA's two"):
            algorithm.init(bare, 2)
    else:
        assert algorithm.init(bare, 2) is not None


def product_of(adapter):
    whole = joined(adapter)
    return whole[B].double() @ whole[A].double()


@each
def test_the_server_moves_to_where_the_clients_agree_to_go(name):
    # a flipped sign in a server's step fails here
    delta = {A: torch.tensor([[0.1, -0.2, 0.3]]), B: torch.tensor([[-0.5], [0.25]])}
    algorithm = DEFAULTS[name]
    sent = {n: d for n, d in delta.items() if is_sent(algorithm, n, 1)}
    more = {"control": sent} if FACTS[name].sends_more else {}
    updates = [update(f"client-{i}", sent, extra=more) for i in range(5)]
    after = play(algorithm, start(algorithm, ADAPTER), updates)
    if name in REWRITES:
        there = {**ADAPTER, **{n: ADAPTER[n] + d for n, d in sent.items()}}
        torch.testing.assert_close(product_of(after.adapter), product_of(there), rtol=0, atol=1e-6)
        return
    for n, d in sent.items():
        assert torch.equal(torch.sign(after.adapter[n] - ADAPTER[n]), torch.sign(d))


@each
def test_clients_that_do_not_move_leave_the_function_where_it_is(name):
    algorithm = DEFAULTS[name]
    still = {n: torch.zeros_like(t) for n, t in ADAPTER.items() if is_sent(algorithm, n, 1)}
    more = {"control": still} if FACTS[name].sends_more else {}
    updates = [update(f"client-{i}", still, i + 1, extra=more) for i in range(5)]
    after = play(algorithm, start(algorithm, ADAPTER), updates)
    torch.testing.assert_close(product_of(after.adapter), product_of(ADAPTER), rtol=1e-6, atol=1e-6)


@each
@given(played=rounds())
@settings(max_examples=5, deadline=None)
def test_no_algorithm_touches_its_inputs(name, played):
    drawn, updates = played
    algorithm = DEFAULTS[name]
    if FACTS[name].sends_more:
        updates = [dataclasses.replace(u, extra={"control": u.delta}) for u in updates]
    updates = [dataclasses.replace(updates[i % len(updates)], client=f"c{i}") for i in range(5)]
    first = starting_state(algorithm, drawn.adapter, len(updates))
    state = dataclasses.replace(first, round=drawn.round)
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
    state = play(algorithm, start(algorithm, ADAPTER), several_updates(name))
    delta = {B: torch.tensor([[0.5], [-0.25]])}
    change = Change(delta, {k: delta for k in state.extra if k in ("control", "mean_gradient")})
    after = algorithm.step(state, change)
    assert after.round == state.round + 1
    if name not in REWRITES:
        assert torch.equal(after.adapter[A], state.adapter[A])
    if name != "flora":  # which starts every round from 0
        assert not torch.equal(after.adapter[B], state.adapter[B])
    for purpose, moments in state.extra.items():
        if purpose != "clients":
            assert torch.equal(after.extra[purpose][A], moments[A])
            assert not torch.equal(after.extra[purpose][B], moments[B])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, (config, _) in ALGORITHMS.items()
        if "server_lr" in config.model_fields and name != "fed_sb"  # at B = 0 its A becomes 0
    ],
)
def test_server_lr_scales_the_step(name):
    config, build = ALGORITHMS[name]
    moved = []
    for server_lr in (0.25, 0.5):
        algorithm = build(config(server_lr=server_lr))
        zero = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in ADAPTER.items()}
        updates = [
            dataclasses.replace(
                u, delta=double(u.delta), extra={k: double(t) for k, t in u.extra.items()}
            )
            for u in several_updates(name)
        ]
        moved.append(play(algorithm, start(algorithm, zero), updates).adapter)
    assert_near(moved[1], {n: 2 * t for n, t in moved[0].items()}, atol=1e-9)
    assert any(bool((t != 0).all()) for t in moved[0].values())


@pytest.mark.parametrize("name", [n for n, facts in FACTS.items() if facts.linear])
def test_a_change_that_is_called_linear_is_the_weighted_sum_of_the_deltas(name):
    updates = several_updates(name)
    state = start(DEFAULTS[name], ADAPTER)
    change = DEFAULTS[name].combine(state, updates)
    total = sum(u.num_examples for u in updates)
    mean = {n: sum(u.num_examples / total * u.delta[n] for u in updates) for n in updates[0].delta}
    assert_near(change.delta, mean, atol=1e-7)


@each
@given(st.randoms(use_true_random=False))
@settings(max_examples=3, deadline=None)
def test_in_every_algorithm_arrival_order_changes_no_bit(name, random):
    algorithm, updates = DEFAULTS[name], several_updates(name)
    arrived = random.sample(updates, len(updates))
    spooled = sorted(arrived, key=lambda u: u.client)
    state = start(algorithm, ADAPTER)
    assert fingerprint(play(algorithm, state, spooled)) == fingerprint(
        play(algorithm, state, updates)
    )


FIELDS = [
    (name, field)
    for name, (config, _) in ALGORITHMS.items()
    for field, about in config.model_fields.items()
    if about.annotation != Literal["uniform"]  # has no other value
]


def another(config, field):
    """A legal value of a field that is not its default."""
    default = getattr(config(), field)
    if field == "smoothing":  # far above the distances between clients, or it does nothing
        return 100.0
    if field == "residual_rank":  # the toy's adapter has rank 1, and so has its residual
        return 1
    if isinstance(default, bool):
        return not default
    if isinstance(default, str):
        return {"examples": "uniform", "gradient": "displacement", "train": "export"}[default]
    if isinstance(default, int):  # a number of clients, or of iterations
        return default - 1 if default == 1 else 1
    return 1 if default is None else default / 2 or 0.5


def observed(name, **changed):
    """All that can be observed of an algorithm: two rounds, its pull on a client, its settings."""
    config, build = ALGORITHMS[name]
    algorithm = build(config(**changed))
    state = start(algorithm, ADAPTER)
    for round_, sign in enumerate((1.0, -1.0), start=1):
        state = play(algorithm, state, several_updates(name, sign, round_=round_))
    now = {n: t + 1.0 for n, t in ADAPTER.items()}
    penalty = algorithm.local.penalty
    pull = None if penalty is None else float(penalty(now, LocalContext(ADAPTER, {}, {})))
    return (
        fingerprint(state),
        pull,
        dict(algorithm.local.settings),
        config(**changed).needs_plain_sgd,
    )


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
