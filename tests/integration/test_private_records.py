"""Whole runs that protect rows: each client's plan, its ledger, the statement, the refusals."""

import hashlib
import json
import math

import pytest
import torch
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.core.errors import ConfigError, DataError, QuorumError
from silotune.federation import client
from silotune.federation.ledger import lines
from silotune.privacy.accountant import Steps, spent_in_all
from tests.conftest import build_tiny_model, write_jsonl, write_tiny_recipe
from tests.tiny_encoders import build_tiny_encoder

RECORD = ["privacy.unit=record", "privacy.delta=1e-2", "privacy.clip_norm=0.5"]
NOISY = [*RECORD, "privacy.noise_multiplier=1"]
SEEDED = [*NOISY, "privacy.noise=seeded"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    return write_tiny_recipe(tmp_path_factory.mktemp("private"), tiny_model)


@pytest.fixture(scope="module")
def done(recipe, tmp_path_factory):
    return silotune.run(recipe, SEEDED, out=tmp_path_factory.mktemp("runs") / "seeded")


def test_every_client_finds_the_noise_for_its_own_rows(recipe):
    keys = [*RECORD, "privacy.target_epsilon=3"]
    answer = CliRunner().invoke(app, ["check", str(recipe), *keys])
    assert answer.exit_code == 0, answer.output
    assert "privacy: (3.000, 0.01)-DP per record after 3 rounds" in answer.stdout
    own = "privacy: client 'hospital-0': (3.000, 0.01)-DP per record with a noise multiplier of"
    assert own in answer.stdout
    told = silotune.check(recipe, keys).promise
    assert told is not None
    noise = {name: own["noise_multiplier"] for name, own in told["clients"].items()}
    sizes = {name: own["num_examples"] for name, own in told["clients"].items()}
    assert len(set(sizes.values())) == 3, "or this would show nothing"
    assert sorted(noise, key=noise.__getitem__) == sorted(sizes, key=lambda n: -sizes[n])
    for own in told["clients"].values():
        assert own["sampling_rate"] == 2 / own["num_examples"]
        steps = Steps(own["noise_multiplier"], 3 * 2, own["sampling_rate"])
        assert spent_in_all([steps], delta=1e-2).pld == own["epsilon"]["pld"]
        assert 2.99 < own["epsilon"]["pld"] <= 3


def test_a_statement_can_be_computed_anew_from_what_is_printed(done):
    answer = CliRunner().invoke(app, ["privacy", str(done.path), "--json"])
    found = json.loads(answer.stdout)
    assert len(found["releases"]) == 3 * 3
    worst = 0.0
    for name, own in found["clients"].items():
        rows = [row for row in found["releases"] if row["client"] == name]
        assert [row["round"] for row in rows] == [1, 2, 3]
        steps = [Steps(r["noise_multiplier"], r["num_lots"], r["sampling_rate"]) for r in rows]
        cost = spent_in_all(steps, delta=found["promise"]["delta"])
        assert own == {"num_released": 3, "epsilon": {"pld": cost.pld, "rdp": cost.rdp}}
        worst = max(worst, cost.pld)
    assert found["epsilon"]["pld"] == worst == found["promise"]["epsilon"]["pld"]
    assert worst <= found["promise"]["epsilon_prv"] <= worst + 0.05
    assert done.summary["privacy"]["epsilon"] == found["epsilon"]
    for name, digest in found["sha256"].items():
        assert hashlib.sha256((done.path / name).read_bytes()).hexdigest() == digest
    assert len(found["sha256"]) == 3
    told = CliRunner().invoke(app, ["privacy", str(done.path)]).stdout
    assert "DP per record" in told
    assert "ANYTHING: the noise is seeded" in told


def test_the_adapter_moved_and_is_read_again(done):
    adapter = done.adapter()
    assert any(float(t.abs().max()) > 0 for n, t in adapter.items() if "lora_B" in n)
    assert all(bool(torch.isfinite(t).all()) for t in adapter.values())
    assert done.load().has_adapter
    card = (done.export() / "README.md").read_text()
    assert "DP per record" in card
    assert "Held-out loss" not in card, "it has no noise, and an export is for others"


def test_seeded_runs_repeat_and_secure_ones_do_not(done, recipe, tmp_path):
    again = silotune.run(recipe, SEEDED, out=tmp_path / "again")
    assert again.summary["adapter_sha256"] == done.summary["adapter_sha256"]
    one, other = (
        silotune.run(recipe, [*NOISY, "rounds=1"], out=tmp_path / name) for name in ("a", "b")
    )
    assert one.summary["adapter_sha256"] != other.summary["adapter_sha256"]
    assert not any("ANYTHING" in text for text in one.privacy["not_protected"])


def test_what_comes_from_the_lots_is_drawn_anew_in_every_round(done):
    trained = [row for row in done.metrics if row["event"] == "train"]
    assert len({(row["client"], row["num_tokens"]) for row in trained}) > 3
    assert {row["num_steps"] for row in trained} == {2}


def crash_once(patch, where):
    """Training ends as by a kill, after the release is written down and before it is made."""
    train_round = client.train_round

    def crash(worker, data, broadcast, *rest, **more):
        if (data.name, broadcast.round) == where:
            raise KeyboardInterrupt
        return train_round(worker, data, broadcast, *rest, **more)

    patch.setattr(client, "train_round", crash)


def interrupted(recipe, keys, out, monkeypatch):
    with monkeypatch.context() as patch:
        crash_once(patch, ("hospital-1", 2))
        with pytest.raises(KeyboardInterrupt):
            silotune.run(recipe, keys, out=out)
    return silotune.run(resume=out)


def test_a_client_whose_budget_a_crash_has_used_up_stays_away_and_the_others_go_on(
    recipe, tmp_path, monkeypatch
):
    found = interrupted(recipe, [*NOISY, "sampling.quorum=0.5"], tmp_path / "r", monkeypatch)
    own = lines(tmp_path / "r" / "clients" / "hospital-1" / "privacy.jsonl")
    assert [line["round"] for line in own] == [1, 2, 2], "the ledger never resets"
    last = {row["client"]: row["status"] for row in found.metrics
            if row["event"] == "train" and row["round"] == 3}  # fmt: skip
    assert last["hospital-1"] == "privacy budget spent"
    assert last["hospital-0"] == last["hospital-2"] == "ok"
    told = found.privacy
    assert told["epsilon"] == told["promise"]["epsilon"]


def test_spent_budgets_end_a_run_cleanly_with_its_last_adapter(recipe, tmp_path, monkeypatch):
    keys = [*NOISY, "sampling.quorum=1.0", "checkpoint.every=3"]
    found = interrupted(recipe, keys, tmp_path / "r", monkeypatch)
    assert found.summary["rounds"] == found.summary["result_round"] == 2
    assert found.privacy["num_released"] == 3
    assert found.adapter()


def test_nobody_with_a_budget_in_the_first_round_is_an_error_that_says_so(
    recipe, tmp_path, monkeypatch
):
    keys = [*NOISY, "sampling.quorum=1.0", "rounds=1"]
    with monkeypatch.context() as patch:
        crash_once(patch, ("hospital-1", 1))
        with pytest.raises(KeyboardInterrupt):
            silotune.run(recipe, keys, out=tmp_path / "r")
    with pytest.raises(QuorumError, match="privacy budget spent: client 'hospital-1', round 1: "):
        silotune.run(resume=tmp_path / "r")


def test_a_client_takes_part_no_more_often_than_its_noise_is_for(recipe, tmp_path):
    keys = [*NOISY, "privacy.max_participations=2", "sampling.quorum=0.1"]
    found = silotune.run(recipe, keys, out=tmp_path / "r")
    assert found.summary["rounds"] == 2
    told = found.privacy
    assert told["promise"]["num_releases"] == 2
    assert {own["num_released"] for own in told["clients"].values()} == {2}
    assert told["epsilon"] == told["promise"]["epsilon"]


CLIENTS = ["privacy.unit=client", "privacy.noise_at=client", "privacy.delta=1e-2"]


def test_clients_can_noise_their_own_changes_and_need_not_trust_the_server(recipe, tmp_path):
    keys = [*CLIENTS, "privacy.noise_multiplier=2", "privacy.clip_norm=0.5", "rounds=2"]
    found = silotune.run(recipe, keys, out=tmp_path / "r")
    told = found.privacy
    assert {own["num_released"] for own in told["clients"].values()} == {2}
    cost = spent_in_all([Steps(2.0, 2)], delta=1e-2)
    assert told["epsilon"] == {"pld": cost.pld, "rdp": cost.rdp}
    assert not any("whoever runs the server" in text for text in told["not_protected"])
    norms = [row["delta_norm"] for row in found.metrics if row["event"] == "train"]
    size = sum(t.numel() for t in found.adapter().values())
    assert all(0.8 < norm / math.sqrt(size) < 1.25 for norm in norms), "2 * 0.5 in every number"


def test_noise_of_clients_is_on_what_is_clipped_over_all_tensors(recipe, tmp_path):
    """Without noise, the server sees changes of exactly the norm."""
    keys = [*CLIENTS, "privacy.noise_multiplier=0", "privacy.clip_norm=1e-3", "rounds=1"]
    found = silotune.run(recipe, keys, out=tmp_path / "r")
    norms = [row["delta_norm"] for row in found.metrics if row["event"] == "train"]
    assert norms == pytest.approx([1e-3] * 3, rel=1e-5)
    assert found.privacy["epsilon"]["pld"] is None


def test_a_comparison_trains_every_arm_with_the_same_protection_and_says_so(recipe, tmp_path):
    keys = [*SEEDED, "compare.seeds=1", "rounds=1"]
    result = silotune.compare(recipe, keys, out=tmp_path / "c").result
    assert any("every arm except the base protects its rows" in text for text in result["notes"])
    arms = result["arms"]
    assert arms["local"]["tokens"] == arms["federated"]["tokens"] > 0, "the same secret lots"
    own = sorted((tmp_path / "c").rglob("privacy.jsonl"))
    assert len(own) == 3 + 3 + 1  # lone clients, the federation's clients, the pooled rows


def test_a_comparison_says_which_arms_noise_at_the_server_leaves_out(recipe, tmp_path):
    keys = [*CLIENTS[:1], *CLIENTS[2:], "privacy.noise_multiplier=1", "privacy.noise=seeded"]
    keys += ["algorithm.weights=uniform", "compare.seeds=1", "rounds=1"]
    result = silotune.compare(recipe, keys, out=tmp_path / "c").result
    assert any("local and centralized arms have no noise" in text for text in result["notes"])


def test_a_classifier_learns_its_head_under_the_same_bound(tmp_path):
    model = build_tiny_encoder(tmp_path / "m", "bert")
    rows = [{"text": "ab" * (i % 7 + 1), "label": "ab"[i % 2], "who": "xy"[i // 12]}
            for i in range(24)]  # fmt: skip
    path = tmp_path / "c.toml"
    path.write_text(
        f"""
rounds = 2
task = "classify"
model = {{ name = "{model}", dtype = "float32" }}
adapter = {{ rank = 2, alpha = 4 }}
data = {{ path = "{write_jsonl(tmp_path / "rows.jsonl", rows)}", text = "text", label = "label" }}
partition = {{ by = "who" }}
train = {{ batch_size = 3, local_epochs = 1, max_length = 32 }}
report = {{ page = false }}
"""
    )
    found = silotune.run(path, [*NOISY], out=tmp_path / "r")
    sizes = {name: len(own.train) for name, own in silotune.check(path).rows.items()}
    lots = {(row["client"], row["num_lots"]) for row in found.privacy["releases"]}
    assert lots == {(name, math.ceil(size / 3)) for name, size in sizes.items()}
    assert any("classifier" in name for name in found.adapter())


def test_ffa_lora_and_a_base_in_four_bits_can_protect_rows(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = build_tiny_model(tmp_path / "wide", width=64)
    path = write_tiny_recipe(tmp_path, model, algorithm="ffa_lora")
    keys = [*SEEDED, "model.quantization=nf4", "rounds=1"]
    found = silotune.run(path, keys, out=tmp_path / "r")
    assert any(float(t.abs().max()) > 0 for n, t in found.adapter().items() if "lora_B" in n)
    assert math.isfinite(found.privacy["epsilon"]["pld"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ["privacy.unit=record", "privacy.noise_multiplier=1"],
            "below 1 divided by the number of records",
        ),
        ([*NOISY, "data.max_rows=4"], "data.max_rows: keeps a fixed number of rows"),
        ([*NOISY, "train.packing=true"], "train.packing: merges rows"),
        ([*NOISY, "model.gradient_checkpointing=true"], "hides the gradients of single rows"),
        (
            [*NOISY, "adapter.kind=ia3"],
            "adapter.kind: must be 'lora' without dora for privacy.unit",
        ),
        ([*NOISY, "adapter.dora=true"], "without dora"),
        ([*NOISY, "privacy.clipping=adaptive"], "only works with noise at the server"),
        ([*NOISY, "privacy.noise_at=client"], "the noise for rows is always at the client"),
        ([*NOISY, 'train.compat=["same-samples"]'], "rules out a secret draw of rows"),
        ([*NOISY, "checkpoint.keep=best"], "held-out losses, which have no noise"),
        (
            [*NOISY, "runtime.name=flower"],
            "evaluate.every: must be 0 with [privacy] and runtime.name",
        ),
        ([*SEEDED, "runtime.name=flower", "evaluate.every=0"], "'seeded' is for simulations"),
    ],
)
def test_what_would_mean_less_than_it_says_is_refused_before_the_run(recipe, keys, message):
    with pytest.raises(ConfigError) as caught:
        silotune.check(recipe, keys)
    assert message in str(caught.value)


def test_a_client_with_a_single_train_row_is_refused_by_name(recipe):
    """It may be the one that is left because all would be held out: others decide which one."""
    keys = [*NOISY, "data.eval_fraction=0.999"]
    with pytest.raises(DataError, match="client 'hospital-0' has 1 row to train on"):
        silotune.check(recipe, keys)
    assert silotune.check(recipe, ["data.eval_fraction=0.999"]).rows


def test_a_delta_that_gives_a_row_away_is_warned_of(recipe):
    keys = [key for key in NOISY if "delta" not in key]
    found = silotune.check(recipe, [*keys, "privacy.delta=0.2"])
    sizes = {name: len(own.train) for name, own in found.rows.items()}
    name = min(sizes, key=sizes.__getitem__)
    assert 1 / sizes[name] <= 0.2
    assert any(f"{sizes[name]} rows of client '{name}'" in text for text in found.warnings)
