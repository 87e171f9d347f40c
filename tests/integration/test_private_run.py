"""Whole private runs on the tiny model: the promise, the ledger, the statement, the refusals."""

import json
from dataclasses import asdict

import pandas as pd
import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError
from silotune.federation import privacy_statement
from silotune.federation.ledger import write_down
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.privacy.accountant import spent
from silotune.privacy.client_level import Release
from tests.conftest import write_tiny_recipe

UNIFORM = "algorithm.weights=uniform"
CLIENT = ["privacy.unit=client", "privacy.delta=1e-3", "privacy.clip_norm=0.5", UNIFORM]
SEEDED = [*CLIENT, "privacy.noise_multiplier=2", "privacy.noise=seeded"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("private"), tiny_model)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    return silotune.run(recipe, SEEDED, out=tmp_path_factory.mktemp("runs") / "seeded")


def test_check_says_what_is_promised_before_anything_runs(recipe):
    keys = [*CLIENT, "privacy.target_epsilon=3"]
    answer = CliRunner().invoke(app, ["check", str(recipe), *keys])
    assert answer.exit_code == 0, answer.output
    assert "privacy: (3.000, 0.001)-DP per client after 3 rounds" in answer.stdout
    told = silotune.check(recipe, keys).promise
    assert told is not None
    cost = spent(noise_multiplier=told["noise_multiplier"], num_releases=3, delta=1e-3)
    assert 2.99 < cost.pld <= 3
    assert silotune.check(recipe).promise is None


def test_a_statement_can_be_computed_anew_from_what_is_printed(done):
    answer = CliRunner().invoke(app, ["privacy", str(done.path), "--json"])
    found = json.loads(answer.stdout)
    assert [row["round"] for row in found["releases"]] == [1, 2, 3]
    assert {row["noise_multiplier"] for row in found["releases"]} == {2.0}
    assert {row["num_planned"] for row in found["releases"]} == {3}
    cost = spent(noise_multiplier=2.0, num_releases=3, delta=found["promise"]["delta"])
    assert found["epsilon"] == {"pld": cost.pld, "rdp": cost.rdp}
    twice = spent(noise_multiplier=1.0, num_releases=3, delta=1e-3)
    assert found["epsilon_replace"] == twice.pld
    assert done.summary["privacy"]["epsilon"] == found["epsilon"]


def test_every_output_says_that_seeded_noise_protects_nobody(done):
    told = "ANYTHING: the noise is seeded"
    assert told in CliRunner().invoke(app, ["privacy", str(done.path)]).stdout
    for text in ((done.path / "README.md").read_text(), done.report().read_text()):
        assert told in text
        assert "DP per client" in text
    card = (done.export() / "README.md").read_text()
    assert told in card
    assert "Held-out loss" not in card, "it has no noise, and an export is for others"


def test_tables_for_papers_hold_no_number_without_noise(done):
    done.report(tables="csv", charts="svg")
    clients = pd.read_csv(done.path / "tables" / "clients.csv")
    assert list(clients["num_train"]) == [c["num_train"] for c in done.summary["clients"].values()]
    assert clients[["base_loss", "federated_loss", "change"]].isna().all(axis=None)
    rounds = pd.read_csv(done.path / "tables" / "rounds.csv")
    assert len(rounds) == 3
    assert rounds[["train_loss", "held_out_loss"]].isna().all(axis=None)
    assert not [file for file in (done.path / "charts").iterdir() if "loss" in file.name]


def test_without_a_section_every_output_says_that_there_is_none(recipe, tmp_path):
    plain = silotune.run(recipe, ["rounds=1"], out=tmp_path / "r")
    assert "without differential privacy" in (plain.path / "README.md").read_text()
    assert "no differential privacy" in CliRunner().invoke(app, ["privacy", str(plain.path)]).stdout
    assert "privacy" not in plain.summary


def test_the_noise_is_in_the_adapter_and_no_two_secure_runs_are_the_same(done, recipe, tmp_path):
    keys = [*CLIENT, "privacy.noise_multiplier=2", "rounds=1"]
    one, other = (silotune.run(recipe, keys, out=tmp_path / name) for name in ("a", "b"))
    assert one.summary["adapter_sha256"] != other.summary["adapter_sha256"]
    again = silotune.run(recipe, SEEDED, out=tmp_path / "c")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]
    assert one.privacy is not None
    assert not any("ANYTHING" in text for text in one.privacy["not_protected"])


class StopIn(Progress):
    """Ends a run after a round was released and before it is over, as a kill would."""

    def __init__(self, round_: int) -> None:
        self.round_ = round_

    def end_round(self, round_, rows):
        if round_ == self.round_:
            raise KeyboardInterrupt


def test_an_interrupted_private_run_goes_on_to_the_same_adapter(done, recipe, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        silotune.run(recipe, SEEDED, out=tmp_path / "r", progress=StopIn(2))
    again = silotune.run(resume=tmp_path / "r")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]
    assert again.summary["privacy"] == done.summary["privacy"]


def test_a_round_that_a_crash_repeats_is_a_release_more_and_the_run_ends_one_sooner(
    recipe, tmp_path, monkeypatch
):
    """The ledger never resets, and the last adapter below the promise is the result."""
    save = RunFolder.save

    def crash(self, state, *, last):
        if state.round == 2:
            raise KeyboardInterrupt
        save(self, state, last=last)

    keys = [*CLIENT, "privacy.noise_multiplier=2"]
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            silotune.run(recipe, keys, out=tmp_path / "r")
    again = silotune.run(resume=tmp_path / "r")
    found = again.privacy
    assert found is not None
    assert [row["round"] for row in found["releases"]] == [1, 2, 2]
    assert found["num_released"] == found["promise"]["num_releases"] == 3
    assert again.summary["rounds"] == again.summary["result_round"] == 2
    assert found["epsilon"] == found["promise"]["epsilon"]


def test_a_line_of_the_ledger_that_a_crash_cut_off_swallows_no_later_release(done, tmp_path):
    folder = RunFolder.create(tmp_path / "r", done.config)
    (folder.path / "privacy.jsonl").write_text('{"round": 1, "noi')
    write_down(folder.path / "privacy.jsonl", asdict(Release(1, 2.0, 0.5, 3, 3)))
    found = privacy_statement.releases(folder)
    assert [row["round"] for row in found] == [1, 1]
    assert found[1]["noise_multiplier"] == 2.0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["privacy.unit=client"],
            "privacy.noise_multiplier: give either noise_multiplier or target_epsilon",
        ),
        ([*SEEDED, "privacy.target_epsilon=3"], "give either noise_multiplier or target_epsilon"),
        (
            ["privacy.unit=client", "privacy.noise_multiplier=1", UNIFORM],
            "privacy.delta: is missing",
        ),
        (["privacy.noise_multiplier=1"], 'only has an effect with unit = "client" or "record"'),
        ([*SEEDED, "algorithm.weights=examples"], "weighting by rows"),
        ([*SEEDED, "checkpoint.keep=best"], "held-out losses, which have no noise"),
        (
            [*SEEDED, "runtime.name=flower"],
            "evaluate.every: must be 0 with [privacy] and runtime.name",
        ),
        ([*SEEDED, "privacy.quantile=0.3"], 'only has an effect with clipping = "adaptive"'),
        ([*SEEDED, "privacy.clipping=adaptive"], "noise multiplier below 0.3"),
        ([*SEEDED, "privacy.unit=row"], "privacy.unit"),
        ([*SEEDED, "privacy.max_participations=2"], "only has an effect with noise at the client"),
        (
            [*SEEDED, "algorithm={ name = 'flower:flwr.serverapp.strategy.FedAvg' }"],
            "Flower strategy",
        ),
        ([*SEEDED, 'compare.algorithms=["fedprox"]'], "compare.algorithms.0.weights"),
    ],
)
def test_what_would_mean_less_than_it_says_is_refused_before_the_run(recipe, keys, message):
    with pytest.raises(ConfigError) as caught:
        silotune.check(recipe, keys)
    assert message in str(caught.value)


def test_a_promise_without_noise_is_strict_json_and_promises_nothing(recipe, tmp_path):
    """It once held Infinity, which no other program's JSON reads."""
    keys = [*CLIENT, "privacy.noise_multiplier=0", "rounds=1"]
    done = silotune.run(recipe, keys, out=tmp_path / "r")

    def refuse(name):
        raise AssertionError(name)

    for name in ("privacy.json", "summary.json"):
        json.loads((done.path / name).read_text(), parse_constant=refuse)
    told = CliRunner().invoke(app, ["privacy", str(done.path)]).stdout
    assert "(no bound, 0.001)-DP per client" in told
    assert "ANYTHING: the noise multiplier is 0" in told


def test_a_delta_that_gives_a_client_away_is_warned_of(recipe):
    keys = [key for key in SEEDED if "delta" not in key]
    found = silotune.check(recipe, [*keys, "privacy.delta=0.5"])
    assert any("revealing one of them completely" in text for text in found.warnings)
