"""`silotune plan`, compared with finished runs of tiny models: bytes are exact."""

import json

import pytest
from typer.testing import CliRunner

import silotune
from silotune.cli import app
from silotune.recipes.parse import parse
from tests.conftest import (
    build_tiny_model,
    changed,
    hospital_rows,
    small_table,
    write_jsonl,
    write_tiny_recipe,
)
from tests.tiny_encoders import build_tiny_encoder


@pytest.fixture
def recipe(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows(num_clients=4))

    def make(**changes):
        table = small_table(tiny_model, data)
        return parse(changed(table, changes))

    return make


def agree(run, place) -> None:
    """A plan and the finished run count the same bytes, message by message."""
    planned = silotune.plan(run, measured=False).traffic
    done = silotune.run(run, out=place)
    assert (planned.bytes_down, planned.bytes_up) == (
        done.summary["bytes_down"],
        done.summary["bytes_up"],
    )
    trained = [row for row in done.metrics if row["event"] == "train"]
    assert {row["bytes_up"] for row in trained} == {planned.up}
    first = {row["bytes_down"] for row in trained if row["round"] == 1}
    assert max(first) < planned.down, "clients have the first adapter already"
    second = {row["bytes_down"] for row in trained if row["round"] == 2}
    assert second <= {planned.down, planned.news}
    both = sum(row["bytes_down"] + row["bytes_up"] for row in trained)
    assert (planned.training, planned.scoring) == (both, planned.total - both)
    assert planned.rounds == done.summary["rounds"]
    if run.task == "classify":
        for way, one in (("up", planned.head_up), ("down", planned.head_up)):
            num_sent = sum(row.get(f"bytes_{way}", 0) > 0 for row in done.metrics)
            assert done.summary[f"head_bytes_{way}"] == one * num_sent


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm__name": "fedprox"},
        {"algorithm__name": "fedadam"},
        {"algorithm__name": "fedavgm", "sampling__fraction": 0.5},
        {"sampling__num_clients": 1, "evaluate__every": 2},
        {"sampling__num_clients": 3, "evaluate__every": 0},
        {"rounds": 5, "evaluate__every": 4, "sampling__fraction": 0.5},
        {"budget__bytes": 40_000},
        {"adapter__dora": True},
        {"adapter": {"kind": "ia3"}},
        {"adapter": {"kind": "prompt", "virtual_tokens": 3}},
        {"adapter": {"kind": "prefix", "virtual_tokens": 3}},
        {"adapter": {"kind": "peft", "peft": {"peft_type": "LOHA", "r": 2}}},
        {"adapter": {"kind": "peft", "peft": {"peft_type": "ADALORA", "total_step": 9}}},
        {"adapter": {"kind": "full"}, "train__lr": 1e-4},
        {"adapter__peft": {"init_lora_weights": "gaussian"}},
        {"algorithm": {"name": "flower:flwr.serverapp.strategy.FedAvg"}},
    ],
    ids=str,
)
def test_a_plan_and_a_run_count_the_same_bytes(recipe, tmp_path, changes):
    agree(recipe(**changes), tmp_path / "run")


@pytest.mark.parametrize(
    ("family", "kind", "head"),
    [  # every two of the three keys in every combination
        ("bert", "lora", "train"),
        ("bert", "lora", "local"),
        ("bert", "full", "freeze"),
        ("distilbert", "full", "train"),
        ("distilbert", "full", "local"),
        ("distilbert", "lora", "freeze"),
    ],
)
def test_the_head_of_a_classifier_is_counted_where_it_is_sent(recipe, tmp_path, family, kind, head):
    rows = [
        {"text": f"film {n}", "label": ("bad", "good", "fair")[n % 3], "site": "ab"[n % 4 == 0]}
        for n in range(24)
    ]
    # BertForMaskedLM has no pooler, so its files lack one, and it learns with the head
    kind_of_model = {"bert": "AutoModelForMaskedLM", "distilbert": "AutoModel"}[family]
    place = build_tiny_encoder(tmp_path / "model", family, kind=kind_of_model)
    run = recipe(
        task="classify",
        model={"name": str(place), "dtype": "float32"},
        data={"path": str(write_jsonl(tmp_path / "films.jsonl", rows))},
        partition={"by": "site"},
        adapter={"kind": kind, "head": head},
        sampling__num_clients=1,
    )
    agree(run, tmp_path / "run")
    planned = silotune.plan(run, measured=False).traffic
    assert (planned.head_up > 0) == (head == "train")
    assert (planned.kept > 0) == (head == "local")


def test_a_decoder_can_classify_too(recipe, tmp_path, tiny_model):
    rows = [{"text": f"film {n}", "label": "ab"[n % 2], "site": "xy"[n % 4 > 1]} for n in range(20)]
    run = recipe(
        task="classify",
        data={"path": str(write_jsonl(tmp_path / "films.jsonl", rows))},
        partition={"by": "site"},
    )
    agree(run, tmp_path / "run")


# --- a measured plan, and the command


def plan(*words):
    return CliRunner(env={"NO_COLOR": "1"}).invoke(app, ["plan", *map(str, words)])


@pytest.fixture(scope="module")
def plan_and_run(tmp_path_factory, tiny_model):
    """One step is really measured, in a process of its own, for all tests here."""
    place = tmp_path_factory.mktemp("measured")
    data = write_jsonl(place / "rows.jsonl", hospital_rows(num_clients=4))
    run = parse(changed(small_table(tiny_model, data), {"evaluate__every": 2}))
    return silotune.plan(run), silotune.run(run, out=place / "run")


def test_an_available_model_is_measured_on_the_clients_own_rows(plan_and_run):
    found, done = plan_and_run
    assert found.measured is not None
    assert found.times is not None
    assert found.measured.real_rows
    assert found.peak_bytes == found.measured.peak_bytes > 1e8
    rows = [row for row in done.metrics if row["event"] == "train"]
    by_round = [
        sum(row["num_padded_tokens"] for row in rows if row["round"] == r) for r in (1, 2, 3)
    ]
    assert list(found.measured.train_tokens) == by_round  # the run's own batches, to the token
    assert found.batch.num_rows == 2
    assert found.times.total > found.times.training > found.times.round > found.times.client > 0


def test_a_step_that_fails_leaves_an_estimate_and_says_why(recipe, tmp_path):
    place = build_tiny_model(tmp_path / "broken")
    (place / "model.safetensors").write_bytes(b"nothing")
    found = silotune.plan(recipe(model={"name": str(place), "dtype": "float32"}))
    assert found.measured is None
    assert found.peak_bytes is not None
    (why,) = [note for note in found.notes if "no time is given" in note]
    assert why.startswith("no step could be measured, so no time is given: ")
    assert "header" in why  # what the library says about the file


def test_the_command_shows_bytes_memory_time_and_what_fits(
    tmp_path, tiny_model, plan_and_run, monkeypatch
):
    monkeypatch.setattr(
        "silotune.workflows.plan.plan.measure", lambda run: plan_and_run[0].measured
    )
    path = write_tiny_recipe(tmp_path, tiny_model)
    done = plan(path, "--memory", "64", "--bytes", "9500")
    assert done.exit_code == 0, done.output
    one = 4 * 2 * (2 * (16 + 16) + 2 * (16 + 8))
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"to one client, the whole adapter {one:,} {one} B" in lines
    assert f"total {3 * 3 * 2 * one:,} 16.1 kB" in lines
    assert "part client server" in lines
    assert any(line.startswith("measured on cpu: ") for line in lines)
    assert "time on this machine, one client at a time" in lines
    assert "it does not fit; each of these changes would make it fit, cheapest first" in lines
    assert any(line.startswith("adapter.rank=1 ") for line in lines)
    assert any(line.startswith("rounds=1 ") for line in lines)


def test_nothing_is_measured_with_no_measure(tmp_path, tiny_model):
    done = plan(write_tiny_recipe(tmp_path, tiny_model), "--no-measure", "--bytes", "99999")
    assert done.exit_code == 0, done.output
    assert "time on this machine" not in done.stdout
    assert "note: memory is estimated, and no time is given: nothing was measured" in done.stdout
    assert "it fits" in done.stdout


def test_numbers_for_a_machine(tmp_path, tiny_model):
    done = plan(write_tiny_recipe(tmp_path, tiny_model), "--no-measure", "--json", "rounds=1")
    assert done.exit_code == 0, done.output
    numbers = json.loads(done.stdout)
    assert numbers["traffic"]["rounds"] == 1
    assert numbers["times"] is None


def test_a_mistake_is_one_error_and_nothing_else(tmp_path, tiny_model):
    done = plan(write_tiny_recipe(tmp_path, tiny_model), "adapter.rnak=3")
    assert done.exit_code == 2
    assert "Did you mean adapter.rank?" in done.stderr
    assert done.stdout == ""
