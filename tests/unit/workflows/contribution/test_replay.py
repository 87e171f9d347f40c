"""Replays and first-order shares as arithmetic, and what is refused before anything is loaded."""

import numpy as np
import pytest
import torch

import silotune
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedopt import FedAdamConfig
from silotune.core.algorithm import Algorithm
from silotune.core.errors import ConfigError
from silotune.core.tree import subtract
from silotune.core.types import ServerState, Update
from silotune.federation.kept_updates import KeptUpdates
from silotune.federation.spool import Spool
from silotune.recipes.parse import parse
from silotune.runtime.flower.strategy import algorithm_of
from silotune.workflows.contribution.contribution import check_possible
from silotune.workflows.contribution.measured import RowDifferences, client_numbers
from silotune.workflows.contribution.replay import replay
from silotune.workflows.contribution.row_gradients import adds_up, shares

DELTAS = {"a": (1.0, 4), "twin": (1.0, 4), "c": (-3.0, 2)}
"""Client: every value of its delta, and its number of rows."""
FIRST = ServerState(0, {"w": torch.zeros(2)})


@pytest.fixture
def rounds(tmp_path):
    found = {}
    for r, clients in enumerate((["a", "c", "twin"], ["c"]), start=1):
        spool = Spool(tmp_path / f"round-{r:05d}")
        for name in clients:
            value, num = DELTAS[name]
            spool.add(Update(name, r, {"w": torch.full((2,), value)}, num, {}))
        found[r] = KeptUpdates(spool.folder, r, clients)
    return found


def last(rounds, without=None) -> float:
    *_, state = replay(fedavg(FedAvgConfig()), FIRST, rounds, without=without)
    assert state.round == 2
    return float(state.adapter["w"][0])


def test_a_replay_is_the_mean_of_the_others_in_every_round(rounds):
    assert last(rounds) == pytest.approx((4 + 4 - 6) / 10 - 3)
    assert last(rounds, "a") == pytest.approx((4 - 6) / 6 - 3)
    assert last(rounds, "twin") == last(rounds, "a")
    # in round 2 nobody else took part: it changes nothing
    assert last(rounds, "c") == pytest.approx(1.0)
    assert last(rounds, "nobody") == last(rounds)


@pytest.mark.parametrize("cfg", [FedAvgConfig(), FedAvgConfig(server_lr=0.5, weights="uniform")])
def test_the_shares_of_all_clients_add_up_to_the_servers_step(rounds, cfg):
    before, after, *_ = replay(fedavg(cfg), FIRST, rounds)
    parts = shares(rounds[1], cfg)
    total = sum(part["w"] for part in parts.values())
    assert torch.allclose(total, subtract(after.adapter, before.adapter)["w"].double())
    assert torch.equal(parts["a"]["w"], parts["twin"]["w"])
    assert adds_up(cfg)
    assert not adds_up(FedAdamConfig())


def numbers(value: float, *, rows: int = 15, spread: float = 0.0) -> dict:
    values = value + spread * np.linspace(-1, 1, rows)
    own = RowDifferences(np.full(rows, 2.0), values, -values)
    return client_numbers({"one": {"a": own, "b": own}})["one"]


def test_the_numbers_are_means_over_targets_with_a_verdict_each():
    found = numbers(0.5, spread=0.1)
    assert found["num_rows"] == 30
    assert found["leave_one_out"]["mean"] == pytest.approx(0.25)
    assert found["gradient"]["mean"] == pytest.approx(-0.25)
    assert [found[key]["verdict"] for key in ("leave_one_out", "gradient")] == ["helped", "hurt"]
    assert found["others"]["b"] == {
        "num_rows": 15,
        "leave_one_out": pytest.approx(0.25),
        "gradient": pytest.approx(-0.25),
    }


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ({"value": 0.0}, "noise"),
        ({"value": 0.01, "spread": 1.0}, "noise"),
        ({"value": 0.5, "rows": 9}, "too few rows"),
    ],
)
def test_an_estimate_that_says_nothing_is_marked(kind, verdict):
    assert numbers(**kind)["leave_one_out"]["verdict"] == verdict


def test_a_single_row_of_another_client_leaves_the_interval_of_the_rest():
    many = RowDifferences(np.ones(30), np.full(30, 0.5) + np.linspace(-1, 1, 30) / 10, np.zeros(30))
    single = RowDifferences(np.ones(1), np.full(1, 9.0), np.zeros(1))
    own = client_numbers({"one": {"a": many, "b": single}})["one"]["leave_one_out"]
    assert own["mean"] == pytest.approx(0.5)
    assert own["verdict"] == "helped"


def test_verdicts_are_corrected_for_the_number_of_clients():
    """Of ten clients that did nothing, one looks different in 12 of 30 runs."""
    gen = np.random.default_rng(0)
    looked, said = 0, 0
    for _ in range(30):
        rows = [RowDifferences(np.ones(30), gen.normal(size=30), np.zeros(30)) for _ in range(10)]
        found = client_numbers({str(n): {"other": own} for n, own in enumerate(rows)})
        own = [numbers["leave_one_out"] for numbers in found.values()]
        looked += min(one["p_value"] for one in own) < 0.05
        said += {one["verdict"] for one in own} != {"noise"}
    assert looked > 6
    assert said <= 4


RECIPE = {
    "rounds": 1,
    "data": {"path": "medquad_mini"},
    "checkpoint": {"keep_updates": True},
}
PRIVATE = {"unit": "client", "noise_multiplier": 1.0, "delta": 1e-3}


@pytest.mark.parametrize(
    ("more", "says", "fix"),
    [
        ({"checkpoint": {}}, "updates were removed", "checkpoint.keep_updates=true"),
        (
            {"checkpoint": {}, "privacy": PRIVATE, "algorithm": {"weights": "uniform"}},
            "have no noise",
            "without it",
        ),
        (
            {"server": {"work": "fine-tune", "data_fraction": 0.1}},
            "the server learned between rounds",
            "without it",
        ),
        ({"task": "classify", "adapter": {"head": "local"}}, "own head", "without it"),
    ],
)
def test_a_run_that_cannot_be_replayed_is_refused_with_the_reason(tmp_path, more, says, fix):
    run = parse({**RECIPE, **more})
    with pytest.raises(ConfigError, match=says) as caught:
        check_possible(tmp_path / "run", run, algorithm_of(run.algorithm))
    assert fix in str(caught.value)


def test_an_algorithm_with_mixed_shapes_is_refused(tmp_path):
    plain = fedavg(FedAvgConfig())
    mixed = Algorithm("mixed", plain.combine, plain.step, layout=lambda state, client: {})
    with pytest.raises(ConfigError, match="tensors of different shapes"):
        check_possible(tmp_path / "run", parse(RECIPE), mixed)


def test_a_run_of_real_clients_is_refused(tmp_path):
    (tmp_path / "north.toml").write_text('name = "north"\n[data]\npath = "x.jsonl"\n')
    table = {"rounds": 1, "data": {"path": str(tmp_path)}, "runtime": {"name": "flower"}}
    run = parse(table)
    with pytest.raises(ConfigError, match="clients are real"):
        check_possible(tmp_path / "run", run, algorithm_of(run.algorithm))


def test_what_real_clients_send_is_not_kept(tmp_path):
    (tmp_path / "north.toml").write_text('name = "north"\n[data]\npath = "x.jsonl"\n')
    keys = [f"data.path={tmp_path}", "runtime.name=flower", "checkpoint.keep_updates=true"]
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_updates.*real clients"):
        silotune.check("hospitals", [*keys, "partition=none"])


def test_updates_are_not_kept_under_privacy():
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_updates.*cannot be used"):
        parse({**RECIPE, "privacy": PRIVATE, "algorithm": {"weights": "uniform"}})
