"""Flower strategies as algorithms: the arithmetic is theirs, the memory is ours, refusals explain.

Oracles are written out in numpy from Flower's rules, over three rounds, with unequal weights and
changes of both signs. Strategies as users write them are in own_strategies.py.
"""

import logging
import random
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.cli.run import check as check_command
from silotune.core.errors import ConfigError, QuorumError
from silotune.core.tree import sha256
from silotune.core.types import Change, ServerState, Update
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.recipes.algorithm import FLOWER, PYTHON, FlowerStrategyConfig
from silotune.recipes.parse import parse, to_toml
from silotune.runtime.flower import strategy as flower_strategy
from silotune.runtime.flower.strategy import algorithm_of, in_memory
from silotune.runtime.flower.strategy_check import TRAPS, check_algorithm, strategy_warnings

FLWR = "flwr.serverapp.strategy"
NAMES = ("east", "north", "south", "west")
START = {"b": torch.tensor([0.5, -0.25]), "a": torch.tensor([[1.0, -2.0, 0.0], [0.1, 0.2, -0.3]])}
RUNS = [
    *("FedAvg", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi", "FedMedian", "FedTrimmedAvg"),
    *("Krum", "MultiKrum", "Bulyan", "QFedAvg"),
]
NEEDS = {
    "QFedAvg": {"client_learning_rate": 0.1},
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.7},
}


@pytest.fixture(autouse=True)
def own_strategies_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield
    sys.modules.pop("own_strategies", None)


def config(name, *, weights="examples", **options) -> FlowerStrategyConfig:
    path = name if "." in name else f"{FLWR}.{name}"
    return FlowerStrategyConfig(name=f"flower:{path}", weights=weights, options=options)


def bridge(name, **options):
    return algorithm_of(config(name, **{**NEEDS.get(name, {}), **options}))


def own(name, **options):
    return config(f"own_strategies.{name}", **options)


def change_of(client, round_, shape) -> torch.Tensor:
    gen = torch.Generator().manual_seed(NAMES.index(client) * 100 + round_)
    return torch.randn(shape, generator=gen) * 0.1


def update(client, round_, delta=None, num_examples=None):
    return Update(
        client=client,
        round=round_,
        delta=delta or {n: change_of(client, round_, t.shape) for n, t in START.items()},
        num_examples=num_examples or 2 * NAMES.index(client) + 1,
        metrics={"train_loss": 1.0 + NAMES.index(client)},
    )


def updates_of(round_):
    return [update(client, round_) for client in NAMES]


def step(algorithm, state, updates):
    return algorithm.step(state, algorithm.combine(state, updates))


def play(algorithm, *, rounds=3, state=None):
    state = state or ServerState(0, START, algorithm.init(START, len(NAMES)))
    for _ in range(rounds):
        state = step(algorithm, state, updates_of(state.round + 1))
    return state


def mistake(cfg, *, num_clients=7) -> str:
    with pytest.raises(ConfigError) as caught:
        check_algorithm(cfg, num_clients=num_clients)
    return str(caught.value)


# --- the arithmetic is the strategy's


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_flowers_fedavg_is_our_fedavg_up_to_float32(weights):
    theirs = play(algorithm_of(config("FedAvg", weights=weights)))
    ours = play(fedavg(FedAvgConfig(weights=weights)))
    assert theirs.round == 3
    for name in START:
        torch.testing.assert_close(theirs.adapter[name], ours.adapter[name], rtol=1e-6, atol=1e-6)


def test_weights_matter():
    by_examples, uniform = (
        play(algorithm_of(config("FedAvg", weights=w))) for w in ("examples", "uniform")
    )
    assert not torch.allclose(by_examples.adapter["a"], uniform.adapter["a"], atol=1e-3)


def adaptive(name, *, eta, b1, b2, tau, rounds=3):
    """Flower's rule, in float64: m and v start at 0, FedAdam's exponent is the round plus one."""
    sizes = np.array([2 * i + 1 for i in range(len(NAMES))], dtype=float)
    out = {}
    for tensor, start in START.items():
        theta = start.double().numpy()
        m, v = np.zeros_like(theta), np.zeros_like(theta)
        for r in range(1, rounds + 1):
            changes = [change_of(c, r, start.shape).double().numpy() for c in NAMES]
            d = sum(w * c for w, c in zip(sizes / sizes.sum(), changes, strict=True))
            m = b1 * m + (1 - b1) * d
            if name == "FedAdagrad":
                v = v + d**2
            elif name == "FedAdam":
                v = b2 * v + (1 - b2) * d**2
            else:
                v = np.where(v > d**2, v - (1 - b2) * d**2, v + (1 - b2) * d**2)
            rate = eta
            if name == "FedAdam":
                rate = eta * np.sqrt(1 - b2 ** (r + 1)) / (1 - b1 ** (r + 1))
            theta = theta + rate * m / (np.sqrt(v) + tau)
        out[tensor] = theta
    return out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FedAdagrad", {"eta": 0.05, "tau": 1e-2}),
        ("FedAdam", {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2}),
        ("FedYogi", {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 1e-2}),
    ],
)
def test_adaptive_strategies_follow_flowers_rule_over_three_rounds(name, options):
    b1, b2 = options.get("beta_1", 0.0), options.get("beta_2", 0.0)
    expected = adaptive(name, eta=options["eta"], b1=b1, b2=b2, tau=options["tau"])
    found = play(bridge(name, **options)).adapter
    for tensor, value in expected.items():
        np.testing.assert_allclose(found[tensor].numpy(), value, rtol=0, atol=2e-6)
        assert np.abs(value - START[tensor].numpy()).min() > 1e-3  # every coordinate has moved


def test_fedavgm_is_heavy_ball_over_three_rounds():
    sizes = np.array([2 * i + 1 for i in range(len(NAMES))], dtype=float)
    found = play(bridge("FedAvgM", server_momentum=0.6, server_learning_rate=0.7)).adapter
    for tensor, start in START.items():
        theta, v = start.double().numpy(), 0.0
        for r in (1, 2, 3):
            changes = [change_of(c, r, start.shape).double().numpy() for c in NAMES]
            v = 0.6 * v + sum(w * c for w, c in zip(sizes / sizes.sum(), changes, strict=True))
            theta = theta + 0.7 * v
        np.testing.assert_allclose(found[tensor].numpy(), theta, rtol=0, atol=2e-6)


def one_step(name, values, **options):
    """One client moves a zero vector by `values`, or several clients by several vectors."""
    vectors = values if isinstance(values[0], tuple) else [values]
    state = ServerState(0, {"x": torch.zeros(len(vectors[0]))})
    updates = [
        Update(f"c{i}", 1, {"x": torch.tensor(v)}, i + 1, {"train_loss": 1.0})
        for i, v in enumerate(vectors)
    ]
    return step(bridge(name, **options), state, updates).adapter["x"].tolist()


def test_fedadam_of_flower_gives_the_published_first_step_and_ours_another():
    # T2: D = (.1, -.2), beta .9 and .99, tau 1e-3, eta .1, v0 = 0, exponent 2
    found = one_step("FedAdam", (0.1, -0.2), eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    assert found == pytest.approx((0.0674963, -0.0707105), abs=2e-7)


T6 = [
    *((1.0, 1.0), (1.1, 0.9), (0.9, 1.05), (1.02, 0.97), (0.95, 1.1)),
    *((100.0, -100.0), (50.0, 60.0)),
]


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("FedMedian", {}, (1.02, 1.0)),
        ("FedTrimmedAvg", {"beta": 0.29}, (1.04, 1.0066667)),
        ("Krum", {"num_malicious_nodes": 2}, (1.0, 1.0)),
        # the three lowest scores are those of clients 0, 3 and 2, which hold 1, 4 and 3 examples
        (
            "MultiKrum",
            {"num_malicious_nodes": 2, "num_nodes_to_select": 3},
            ((1.0 + 4 * 1.02 + 3 * 0.9) / 8, (1.0 + 4 * 0.97 + 3 * 1.05) / 8),
        ),
    ],
)
def test_robust_strategies_find_the_benign_clients(name, options, expected):
    assert one_step(name, T6, **options) == pytest.approx(expected, abs=1e-5)


def test_bulyan_averages_what_is_nearest_to_the_median_of_its_selection():
    f, vectors = 1, np.array([*T6[:6], (1.0, 1.2)])
    apart = ((vectors[:, None] - vectors[None]) ** 2).sum(-1)
    scores = np.sort(apart, axis=1)[:, 1 : len(vectors) - f - 1].sum(1)
    chosen = vectors[np.argsort(scores)[: len(vectors) - 2 * f]]
    off = np.abs(chosen - np.median(chosen, axis=0))
    nearest = np.argsort(off, axis=0)[: len(chosen) - 2 * f]
    expected = np.take_along_axis(chosen, nearest, axis=0).mean(0)
    found = one_step("Bulyan", [tuple(v) for v in vectors.tolist()], num_malicious_nodes=f)
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


def test_qfedavg_weights_clients_by_their_training_loss():
    lr, q = 0.1, 2.0
    losses = np.array([1.0, 2.0, 3.0, 4.0])
    state = ServerState(0, START)
    found = step(bridge("QFedAvg", client_learning_rate=lr, q=q), state, updates_of(1)).adapter
    changes = {n: [change_of(c, 1, t.shape).numpy() for c in NAMES] for n, t in START.items()}
    squares = np.array([sum((changes[n][i] ** 2).sum() for n in START) for i in range(4)]) / lr**2
    h = q * losses ** (q - 1) * squares + losses**q / lr
    for name, start in START.items():
        pull = sum(loss**q * c / lr for loss, c in zip(losses, changes[name], strict=True))
        expected = start.numpy() + pull / h.sum()
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=0, atol=1e-6)


@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=2, max_size=2),
)
def test_a_step_arrives_at_exactly_the_bits_that_the_strategy_returned(old, new):
    # a weight that shrinks more than 2^29 times in one round is the one that is rounded
    old, new = (torch.where(t.abs() < 1e-5, 0.0, t) for t in (torch.tensor(old), torch.tensor(new)))
    delta = {"x": new.double() - old.double()}
    after = bridge("FedAvg").step(ServerState(0, {"x": old}), Change(delta))
    assert torch.equal(after.adapter["x"], new)
    assert after.adapter["x"].dtype == torch.float32


def test_what_the_strategy_returned_is_what_the_run_holds(monkeypatch):
    returned = {}
    keep = flower_strategy.aggregate

    def spy(*args):
        returned.update(keep(*args))
        return returned

    monkeypatch.setattr(flower_strategy, "aggregate", spy)
    state = play(bridge("FedAdam"), rounds=2)
    assert sha256(state.adapter) == sha256(returned)


def test_a_combined_change_says_that_it_is_not_a_sum_of_deltas():
    assert bridge("FedAvg").linear is False
    assert bridge("FedAvg").local.penalty is None


# --- the order of arrival, and what is left behind


@pytest.mark.parametrize("name", RUNS)
def test_the_order_of_arrival_cannot_change_a_bit(name):
    algorithm, state = bridge(name), ServerState(0, START)
    one, other = updates_of(1), [updates_of(1)[i] for i in (2, 0, 3, 1)]
    assert sha256(step(algorithm, state, one).adapter) == sha256(
        step(algorithm, state, other).adapter
    )


class Listens(logging.Handler):
    def __init__(self):
        super().__init__()
        self.heard = []

    def emit(self, record):
        self.heard.append(record.getMessage())


@pytest.fixture
def flowers_log():
    logger, handler = logging.getLogger("flwr"), Listens()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.heard
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_flower_is_quiet_during_the_calls_and_only_then(flowers_log):
    play(bridge("FedAvg"), rounds=1)
    check_algorithm(config("FedAvg"), num_clients=3)
    logging.getLogger("flwr").info("as before")
    assert flowers_log == ["as before"]


def test_nothing_is_changed_in_place_and_the_process_is_left_as_it_was():
    state, updates = ServerState(0, START), updates_of(1)
    before = (sha256(START), [sha256(u.delta) for u in updates])
    drawn = random.getstate()
    for name in RUNS:
        step(bridge(name), state, updates)
    assert before == (sha256(START), [sha256(u.delta) for u in updates])
    assert random.getstate() == drawn
    assert TaskIdentity._run_id is TaskIdentity._task_id is TaskIdentity._node_id is None


def test_numbers_that_flowers_engine_has_set_are_kept(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_run_id", 77)
    with in_memory():
        assert (TaskIdentity._run_id, TaskIdentity._node_id) == (77, 1)
    assert TaskIdentity._run_id == 77
    assert TaskIdentity._node_id is None


def test_building_the_algorithm_imports_neither_flower_nor_the_class(monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    algorithm = algorithm_of(own("Remembers"))  # a client does this
    assert "own_strategies" not in sys.modules
    assert algorithm.init(START, 3) == {}


# --- memory is a value: stop and resume is run-through


class StandInClients:
    def names(self):
        return list(NAMES)

    def num_rows(self):
        return {name: {"num_train": 1000000, "num_eval": 0} for name in self.names()}

    def train(self, messages):
        for client, broadcast in messages.items():
            assert not broadcast.extra  # a strategy's memory stays at the server
            facts = {"num_tokens": 5, "seconds": 1, "seconds_training": 1}
            plain = update(client, broadcast.round)
            yield replace(plain, metrics={**plain.metrics, **facts})

    def evaluate(self, messages):
        return []


def recipe(cfg, *, rounds=3):
    table = {"rounds": rounds, "data": {"path": "medquad_mini"}, "evaluate": {"every": 0}}
    return parse({**table, "algorithm": cfg.model_dump()})


def run_in(place, cfg, *, rounds, state=None):
    run = recipe(cfg)
    folder = RunFolder.open(place) if place.exists() else RunFolder.create(place, run)
    state = folder.load_state() or ServerState(0, START)
    until = run.model_copy(update={"rounds": rounds})
    tools = {"algorithm": algorithm_of(run.algorithm), "progress": Progress()}
    run_rounds(until, state, clients=StandInClients(), folder=folder, **tools)
    return folder.load_state()


@pytest.mark.parametrize("cfg", [*RUNS, "own_strategies.Remembers"])
def test_a_run_that_stops_and_resumes_from_its_folder_has_the_same_bits(tmp_path, cfg):
    cfg = config(cfg, **NEEDS.get(cfg, {}))
    through = play(algorithm_of(cfg))
    stopped = run_in(tmp_path / "run", cfg, rounds=1)
    resumed = run_in(tmp_path / "run", cfg, rounds=3)
    assert (stopped.round, resumed.round) == (1, 3)
    assert sha256(resumed.adapter) == sha256(through.adapter) != sha256(stopped.adapter)
    assert {p: sha256(s) for p, s in resumed.extra.items()} == {
        p: sha256(s) for p, s in through.extra.items()
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FedAvg", set()),
        ("FedYogi", {"flower.dict.current_arrays", "flower.dict.m_t", "flower.dict.v_t"}),
        ("FedAvgM", {"flower.record.current_arrays", "flower.list.momentum_vector"}),
        ("QFedAvg", {"flower.record.current_arrays"}),
    ],
)
def test_only_what_the_calls_changed_is_remembered(name, expected):
    assert set(play(bridge(name), rounds=1).extra) == expected


def test_every_kind_of_memory_is_kept_with_its_type():
    extra = play(algorithm_of(own("Remembers")), rounds=1).extra
    kinds = {purpose.split(".")[2]: purpose.split(".")[1] for purpose in extra}
    assert kinds == {
        "rounds": "number",
        "scalar": "scalar",
        "flag": "number",
        "array": "array",
        "by_name": "dict",
        "in_order": "list",
        "record": "record",
        "emptied": "dict",
        "nothing": "none",
        "number": "number",
    }


@pytest.mark.parametrize("name", ["FedYogi", "FedAvgM", "own_strategies.Remembers"])
def test_without_its_memory_a_strategy_would_give_another_result(name):
    algorithm = bridge(name)
    state = play(algorithm, rounds=1)
    forgot = play(algorithm, rounds=1, state=replace(state, extra={}))
    assert sha256(forgot.adapter) != sha256(play(algorithm, rounds=1, state=state).adapter)


# --- what is refused, and when


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("num_clients", [3, 20])
def test_the_check_accepts_these(name, num_clients):
    check_algorithm(config(name, **NEEDS.get(name, {})), num_clients=num_clients)


def test_the_check_accepts_a_users_classes_and_our_own_algorithms():
    check_algorithm(own("Remembers", share=0.25), num_clients=5)
    check_algorithm(own("OwnKeys"), num_clients=5)
    check_algorithm(FedAvgConfig(), num_clients=5)
    assert strategy_warnings(FedAvgConfig()) == []


def test_a_strategys_own_keys_are_used():
    plain, keyed = (play(algorithm_of(c)) for c in (config("FedAvg"), own("OwnKeys")))
    assert sha256(plain.adapter) == sha256(keyed.adapter)


def test_an_option_reaches_the_class_and_its_base():
    weak, strong = (
        play(algorithm_of(c)).adapter["a"] for c in (own("Remembers"), own("Remembers", share=5.0))
    )
    assert not torch.equal(weak, strong)
    check_algorithm(own("Remembers", arrayrecord_key="theirs"), num_clients=3)  # FedAvg's own


PROX = f"algorithm.name: 'flower:{FLWR}.FedProx' needs its own messages: it sends the config key"


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (
            config("FedProx", proximal_mu=0.1),
            f"{PROX} 'proximal-mu'.\n"
            '  Use silotune\'s own: algorithm.name = "fedprox", with the keys weights, server_lr, '
            "mu.",
        ),
        (
            config("FedXgbCyclic"),
            "needs its own messages: it sends 1 message to 1 of 7 clients.\n"
            "  Choose another strategy; our clients would not read them.",
        ),
        (
            config("FedXgbBagging"),
            "fails in a rehearsal with 7 clients per round: round 1: FedXgbBagging could not "
            "combine 7 updates: InconsistentMessageReplies: Expected exactly one Array",
        ),
        (
            config("DifferentialPrivacyServerSideFixedClipping", noise_multiplier=1.0),
            "wraps another strategy, which a recipe cannot express.\n"
            "  Name a strategy that does not wrap another.",
        ),
        (
            config("QFedAvg"),
            "cannot be built without client_learning_rate.\n"
            "  Set algorithm.options.client_learning_rate.",
        ),
        (
            config("FedYogi", etta=0.1),
            "has no option 'etta'. Did you mean 'eta'?\n"
            "  Its options: arrayrecord_key, beta_1, beta_2, configrecord_key, eta, eta_l, ",
        ),
        (
            config("FedTrimmedAvg", beta=0.7),
            "cannot be built: ValueError: `beta` must be in the range [0, 0.5).\n"
            "  Change [algorithm.options].",
        ),
        (
            config("FedYogi", eta="fast"),
            "fails in a rehearsal with 7 clients per round: UFuncTypeError: ufunc 'multiply'",
        ),
        (
            config("Bulyan", num_malicious_nodes=2),
            "fails in a rehearsal with 7 clients per round: round 1: Bulyan could not combine 7 "
            "updates: it returned no arrays.\n"
            "  Change [algorithm.options], ask more clients, or choose another strategy.",
        ),
        (
            config("FedYogy"),
            f"does not exist: '{FLWR}' has no 'FedYogy'. Did you mean 'FedYogi'?\n"
            "  Its strategies: Bulyan, ",
        ),
        (config("Result"), f"is not a subclass of {FLWR}.Strategy.\n  Name a class of the message"),
        (config("Strategy"), "cannot be built: TypeError: Can't instantiate abstract class"),
        (
            config("flwr.server.strategy.FedAvg"),
            "Name a class of the message API; those in flwr.server.strategy are of the older API.",
        ),
        (
            config("nowhere_at_all.Mine"),
            "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'.\n"
            "  Correct the path; a module of your own must be on PYTHONPATH.",
        ),
        (
            own("Rolls"),
            "gives a different result after a stop than without one: it draws random numbers, or "
            "keeps memory outside its attributes.\n"
            "  Keep memory in attributes, as arrays or numbers",
        ),
        (own("Hides"), "gives a different result after a stop than without one"),
        (
            own("Journal"),
            "keeps memory that cannot be saved: 'journal' (list).\n"
            "  Keep numbers, arrays, lists and dicts of arrays, and ArrayRecords only.",
        ),
        (own("Sends"), "sends its own messages.\n  Choose another strategy."),
        (own("SendsOther"), "needs its own messages: it sends arrays other than the adapter"),
        (own("AsksHalf"), "needs its own messages: it sends 3 messages to 3 of 7 clients"),
        (own("AsksOneTwice"), "needs its own messages: it sends 7 messages to 6 of 7 clients"),
        (own("Renames"), "returns other tensors than it received.\n  Choose another strategy."),
        (own("Breaks"), "fails in a rehearsal with 7 clients per round: RuntimeError: boom.\n"),
        (own("Divides"), "Divides could not combine 7 updates: 'a' holds NaN or infinity"),
    ],
    ids=lambda value: value.name.rpartition(".")[2] if hasattr(value, "name") else "",
)
def test_what_cannot_run_is_refused_by_the_check(cfg, text):
    found = mistake(cfg)
    assert text in found
    assert cfg.name in found or found.startswith("round 1: ")
    assert "\n  " in found  # how to fix it


def test_a_module_that_fails_to_import_is_explained(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("import nothing_of_that_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'"
    assert text in mistake(config("half_written.Mine"))


def test_a_strategy_that_waits_for_more_clients_is_given_up(monkeypatch):
    monkeypatch.setattr(flower_strategy, "WAIT_S", 0.1)
    assert "Waits waits for more than 7 clients" in mistake(own("Waits"))
    check_algorithm(own("Waits"), num_clients=20)
    with pytest.raises(QuorumError, match=r"^round 1: Waits waits for more than 4 clients\.\n  A"):
        play(algorithm_of(own("Waits")))


def test_without_flower_the_extra_is_named(monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "flwr"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    found = mistake(config("FedYogi"))
    assert f"'flower:{FLWR}.FedYogi' needs Flower: " in found
    assert found.endswith("Install it where the server runs: make env EXTRAS=flower.")


# --- during a run


def test_too_few_updates_end_the_run_with_the_round_named():
    algorithm = bridge("Bulyan", num_malicious_nodes=1)  # needs seven
    with pytest.raises(QuorumError) as caught:
        play(algorithm)
    assert str(caught.value) == (
        "round 1: Bulyan could not combine 4 updates: it returned no arrays.\n"
        "  Start a new run with more clients per round, different [algorithm.options] or another "
        "algorithm.name."
    )


def test_flowers_own_errors_name_the_round_and_bugs_stay_bugs():
    with pytest.raises(QuorumError, match=r"^round 1: FedXgbBagging .*InconsistentMessageReplies"):
        play(bridge("FedXgbBagging"))
    with pytest.raises(RuntimeError, match=r"^boom$"):
        play(algorithm_of(own("Breaks", after=1)))


# --- warnings


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "FedAdam",
            ["moment starts at 0", "exponent round + 1", '"fedadam" is silotune\'s own FedAdam'],
        ),
        ("FedYogi", ["moment starts at 0", '"fedyogi" is silotune\'s own FedYogi']),
        ("FedAdagrad", ["moment starts at 0", '"fedadagrad" is silotune\'s own']),
        ("Krum", ["distances are computed between full weights in float32"]),
        ("MultiKrum", ["distances are computed", "it sums in float32"]),
        ("Bulyan", ["runs Multi-Krum once", "distances are computed"]),
        ("FedAvg", ["it sums in float32", '"fedavg" is silotune\'s own FedAvg']),
        ("FedAvgM", ["it sums in float32", '"fedavgm" is silotune\'s own FedAvgM']),
        ("FedMedian", []),
    ],
)
def test_known_traps_are_named(name, texts):
    found = strategy_warnings(config(name, **NEEDS.get(name, {})))
    assert found[-1] == (
        "A Flower strategy holds all updates of a round in memory; silotune's own hold one."
    )
    assert all(any(text in line for line in found) for text in texts)
    assert bool(texts) == (len(found) > 1)
    assert all(line.endswith(".") and "\n" not in line for line in found)
    assert ("exponent" in " ".join(found)) == (name == "FedAdam")


def test_a_users_class_inherits_the_traps_of_its_base():
    assert strategy_warnings(own("Remembers")) == strategy_warnings(config("FedAvg"))


def test_a_users_class_with_its_own_aggregation_does_not_inherit_the_traps_of_what_it_replaces():
    """They were told that Flower's FedAvg sums in float32, which such a class never calls."""
    memory = strategy_warnings(config("FedMedian"))
    assert strategy_warnings(own("Replaces")) == memory
    assert strategy_warnings(own("ReplacesBelow")) == memory


def test_every_strategy_that_runs_was_looked_at():
    assert set(RUNS) == set(TRAPS)


# --- the recipe, the check and the command


def test_a_recipe_with_options_is_read_and_written_back():
    run = parse(
        {
            "rounds": 1,
            "data": {"path": "medquad_mini"},
            "algorithm": {
                "name": f"flower:{FLWR}.FedYogi",
                "weights": "uniform",
                "options": {"eta": 0.01, "n": 3, "on": True, "text": "x"},
            },
        }
    )
    assert isinstance(run.algorithm, FlowerStrategyConfig)
    values = run.algorithm.options
    assert values == {"eta": 0.01, "n": 3, "on": True, "text": "x"}
    assert [type(v) for v in values.values()] == [float, int, bool, str]
    assert parse(tomllib.loads(to_toml(run))) == run


@pytest.mark.parametrize(
    ("section", "text"),
    [
        (
            {"eta": 0.1},
            "algorithm.eta: unknown key. Put the strategy's arguments in algorithm.options.",
        ),
        (
            {"option": {}},
            "algorithm.option: unknown key. Did you mean 'options'? "
            "Put the strategy's arguments in algorithm.options.",
        ),
        (
            {"options": {"fraction_train": 0.5}},
            "algorithm.options: 'fraction_train' is not an option: [sampling] decides which "
            "clients take part.",
        ),
        (
            {"options": {"weighted_by_key": "x"}},
            "algorithm.options: 'weighted_by_key' is not an option: algorithm.weights "
            "decides how clients are weighted.",
        ),
        (
            {"options": {"eta": [1]}},
            "algorithm.options: 'eta' should be a number, a string, true or false.",
        ),
        ({"options": {"eta": float("nan")}}, "algorithm.options: 'eta' should be a finite number."),
        (
            {"options": 3},
            "algorithm.options: is a section; set individual keys in it, for example "
            "algorithm.options.key = value.",
        ),
        (
            {"name": FLOWER},
            "algorithm.name: is not the path of a class. Name a strategy like this: "
            "flower:flwr.serverapp.strategy.FedYogi.",
        ),
        (
            {"name": "fedavg", "options": {}},
            f"algorithm.options: is a key of {PYTHON}, {FLOWER}, not of ",
        ),
        (
            {"name": "python:a.b"},
            "there is no algorithm 'python:a.b'.",
        ),
        (
            {"name": PYTHON},
            "algorithm.name: is not the path of a function. Name a function like this: python:my_p",
        ),
        ({"name": "flower:FedYogi"}, "there is no algorithm 'flower:FedYogi'. Did you mean 'fed"),
        ({"name": f"{FLWR}.FedYogi"}, "Name a strategy like this: flower:flwr.serverapp."),
    ],
)
def test_mistakes_in_the_section_are_explained(section, text):
    table = {"name": f"flower:{FLWR}.FedYogi", **section}
    with pytest.raises(ConfigError) as caught:
        parse({"rounds": 1, "data": {"path": "medquad_mini"}, "algorithm": table})
    head, *lines = str(caught.value).split("\n  ")
    assert head == "1 mistake in recipe 'recipe':"
    assert text in lines[0]
    assert len(lines) == 1


def test_the_check_of_a_recipe_finds_it_and_the_command_prints_the_warnings(capsys):
    def section(name: str, more: str = "") -> str:  # replaces the recipe's, server_lr included
        return f'algorithm={{name="flower:{FLWR}.{name}"{more}}}'

    with pytest.raises(ConfigError, match="needs its own messages"):
        silotune.check("hospitals", [section("FedProx")])
    with pytest.raises(ConfigError, match=r"Bulyan could not combine 5 updates"):
        silotune.check("hospitals", [section("Bulyan", ", options={num_malicious_nodes=1}")])
    checked = silotune.check("hospitals", [section("FedYogi"), "algorithm.options.eta=0.02"])
    assert checked.warnings == strategy_warnings(checked.run.algorithm) != []
    check_command("hospitals", [section("FedYogi")])
    out = capsys.readouterr().out
    assert all(f"warning: {text}\n" in out for text in checked.warnings)
    check_command("hospitals", [section("FedYogi")], json=True)
    assert "warning" not in capsys.readouterr().out
