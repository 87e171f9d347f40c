"""What a run shows of its own prediction: bytes to the byte, memory and time once measured."""

import json
from dataclasses import asdict

import pytest

import silotune
from silotune.core.errors import ConfigError, UpdateError
from silotune.recipes.parse import parse
from silotune.results.run_tables import prediction_notes, prediction_table
from silotune.runtime import inprocess
from silotune.workflows.check import on_a_day
from silotune.workflows.plan import outcome as plan_outcome
from silotune.workflows.plan.measure import Measurement
from silotune.workflows.plan.memory import BatchShape
from silotune.workflows.plan.outcome import compare_with_prediction
from silotune.workflows.plan.times import expected_times, rounds_within
from tests.conftest import changed, hospital_rows, small_table, write_jsonl


@pytest.fixture
def recipe(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows())

    def make(**changes):
        table = small_table(tiny_model, data)
        return parse(changed(table, changes))

    return make


def made_up(**changes) -> Measurement:
    """Three rounds of 100 tokens, at a tenth of a second each; three clients' scores of 10 s."""
    known = {
        "device": "cpu",
        "real_rows": True,
        "batch": BatchShape(2, 40, 20),
        "peak_bytes": 400_000_000,
        "bytes_per_shape": 0,
        "seconds_building": 0.0,
        "num_shapes": 3,
        "seconds_start": 5.0,
        "seconds_per_token": 0.1,
        "seconds_per_scored_token": 1.0,
        "train_tokens": (100, 100, 100),
        "scored_tokens": {"hospital-0": 3, "hospital-1": 3, "hospital-2": 4},
    }
    return Measurement(**{**known, **changes})


@pytest.fixture
def measured(monkeypatch):
    """Every step that is measured, which then costs nothing."""
    asked = []

    def stand_in(run):
        asked.append(run)
        return made_up()

    monkeypatch.setattr(plan_outcome, "measure", stand_in)
    return asked


# --- bytes

ONE = 4 * 2 * (2 * (16 + 16) + 2 * (16 + 8))
"""Bytes of the adapter, either way: float32, two layers, rank 2, q_proj and v_proj."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampling__num_clients": 1, "evaluate__every": 2},
        {"evaluate__every": 0},
        {"budget__bytes": 2 * 3 * 2 * ONE + 3 * ONE},
        {"algorithm__name": "fedprox"},
        {"adapter": {"kind": "full"}, "train__lr": 1e-4, "rounds": 1},
    ],
    ids=str,
)
def test_predicted_bytes_are_the_actual_ones(recipe, tmp_path, changes):
    done = silotune.run(recipe(**changes), out=tmp_path / "run")
    pair = done.summary["predicted"]["bytes"]
    sent = sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in done.metrics)
    assert pair == {"predicted": sent, "actual": sent, "difference": 0.0}
    assert prediction_notes(done.summary) == []
    ((what, *_, difference),) = prediction_table(done.summary)[1:]  # nothing else was predicted
    assert (what, difference) == ("sent, both ways", "+0.0 %")


def test_a_head_that_stays_at_its_client_is_in_neither_number(recipe, tmp_path):
    rows = [{"text": f"film {n}", "label": "ab"[n % 2], "site": "xy"[n % 4 > 1]} for n in range(20)]
    changes = {
        "task": "classify",
        "data": {"path": str(write_jsonl(tmp_path / "films.jsonl", rows))},
        "partition": {"by": "site"},
    }
    sent = {}
    for head in ("train", "local"):
        done = silotune.run(recipe(**changes, adapter__head=head), out=tmp_path / head)
        sent[head] = done.summary["predicted"]["bytes"]
        assert sent[head]["predicted"] == sent[head]["actual"]
    assert sent["local"]["actual"] < sent["train"]["actual"]


def test_a_client_that_fails_is_named_beside_the_bytes_that_it_did_not_send(
    recipe, tmp_path, monkeypatch
):
    as_ever = inprocess.take_part

    def fail_once(worker, data, broadcast, own):
        if (data.name, broadcast.round) == ("hospital-1", 2):
            raise UpdateError("client 'hospital-1', round 2: NaN")
        return as_ever(worker, data, broadcast, own)

    monkeypatch.setattr(inprocess, "take_part", fail_once)
    run = recipe(sampling__quorum=0.5, report__page=True)
    done = silotune.run(run, out=tmp_path / "run")
    whole = 3 * 3 * 2 * ONE  # the first adapter is there already, the last one is scored
    assert done.summary["predicted"]["bytes"] == {
        "predicted": whole,
        "actual": whole - 2 * ONE,
        "difference": pytest.approx(-2 / 18),
    }
    note = "1 message without a usable answer, so not counted as sent: hospital-1"
    assert prediction_notes(done.summary) == [note]
    page, card = ((done.path / name).read_text("utf-8") for name in ("report.html", "README.md"))
    assert note in page
    assert note in card
    assert "<td>−11.1 %</td>" in page
    assert "| sent, both ways | 16.1 kB | 14.3 kB | -11.1 % |" in card


def test_rounds_that_hours_cut_are_named_beside_their_bytes(recipe, tmp_path):
    done = silotune.run(recipe(budget__hours=1e-9), out=tmp_path / "run")
    pair = done.summary["predicted"]["bytes"]
    assert (pair["predicted"], pair["actual"]) == (6 * 3 * ONE, 2 * 3 * ONE)
    assert prediction_notes(done.summary) == [
        "the prediction is for 3 rounds, and the run ended after 1"
    ]


# --- memory and time


def test_a_measured_run_shows_all_three_costs(recipe, tmp_path):
    run = recipe(plan__measure=True, report__page=True)
    done = silotune.run(run, out=tmp_path / "run")
    planned = json.loads((done.path / "plan.json").read_text("utf-8"))
    rows = [row for row in done.metrics if row["event"] == "train"]
    by_round = [
        sum(row["num_padded_tokens"] for row in rows if row["round"] == r) for r in (1, 2, 3)
    ]
    assert planned["measured"]["train_tokens"] == by_round
    assert planned["measured"]["real_rows"]
    assert 1 <= planned["measured"]["num_shapes"] <= 9  # three clients, one batch a round
    found = done.summary["predicted"]
    assert found["memory"]["predicted"] == planned["peak_bytes"] > 1e8
    assert found["memory"]["actual"] == done.summary["peak_memory_bytes"]
    assert found["seconds"]["predicted"] == planned["times"]["total"]
    assert 0 < found["seconds"]["actual"] < done.summary["seconds_total"]
    assert [row[0] for row in prediction_table(done.summary)] == [
        "cost",
        "sent, both ways",
        "peak memory",
        "time until the last score",
    ]
    assert "Predicted and actual" in (done.path / "report.html").read_text("utf-8")


def test_a_resumed_run_reads_its_prediction_and_measures_nothing(recipe, tmp_path, measured):
    class Stop(silotune.Progress):
        def end_round(self, round_, rows):
            raise KeyboardInterrupt

    run = recipe(plan__measure=True)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(run, out=tmp_path / "run", progress=Stop())
    before = (tmp_path / "run" / "plan.json").read_bytes()
    done = silotune.run(resume=tmp_path / "run")
    assert measured == [on_a_day(run)]
    assert (done.path / "plan.json").read_bytes() == before
    found = done.summary["predicted"]
    assert found["bytes"]["difference"] == 0
    assert (found["memory"]["predicted"], found["seconds"]["predicted"]) == (400_000_000, 75.0)


def test_a_run_for_which_not_even_one_round_fits_its_hours_is_a_mistake(recipe, tmp_path, measured):
    # 5 s of start, 10 s of steps, twice 10 s of scores: of the base, and of the result
    fits = recipe(plan__measure=True, budget__hours=35.1 / 3600)
    assert silotune.run(fits, out=tmp_path / "fits").summary["rounds"] >= 1
    with pytest.raises(ConfigError) as caught:
        silotune.run(recipe(plan__measure=True, budget__hours=34.9 / 3600), out=tmp_path / "run")
    assert str(caught.value) == (
        "budget.hours = 0.00969444, but one round takes about 35 s, including loading and scores.\n"
        "  Raise it, or do less in a round: fewer train.local_steps, a lower sampling.fraction or "
        "data.max_eval_rows."
    )
    assert not (tmp_path / "run").exists()
    assert len(measured) == 2


def test_a_step_that_fails_is_told_and_the_run_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_outcome, "measure", lambda run: "it was killed")
    done = silotune.run(recipe(plan__measure=True, rounds=1), out=tmp_path / "run")
    assert prediction_notes(done.summary) == [
        "memory and time were not predicted: it was killed",
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"runtime": {"name": "flower-simulation", "threads": 1}},
            "the prediction is for clients that train one after another in one process",
        ),
        (
            {"server": {"work": "fine-tune", "data_fraction": 0.2}},
            "the prediction does not include the server's own training",
        ),
    ],
)
def test_time_that_does_not_compare_is_left_out_with_the_reason(recipe, changes, why):
    run = recipe(plan__measure=True, **changes)
    times = expected_times(run, 3, 3, made_up())
    planned = {
        "rounds": 3,
        "bytes_down": 10,
        "bytes_up": 10,
        "peak_bytes": 100,
        "times": {**asdict(times), "total": times.total},
    }
    rows = [{"event": "round", "round": 3, "bytes_down": 20}]
    found = compare_with_prediction(run, planned, rows, peak_bytes=110, seconds=9.0)
    assert found["memory"]["difference"] == pytest.approx(0.1)
    assert found["seconds"] is None
    assert f"time is not compared: {why}" in found["notes"]


def test_a_server_without_rows_cannot_measure(recipe):
    with pytest.raises(
        ConfigError, match=r"plan\.measure: cannot be used with runtime\.name = 'fl"
    ):
        recipe(plan__measure=True, runtime={"name": "flower"})


# --- what a plan says of hours


def test_a_plan_foretells_the_round_that_its_hours_end_at(recipe):
    # 5 s, then 20 s (10 of them scores of what came) for each round, and 10 s at the end
    run = recipe(budget__hours=1.0)
    times = expected_times(run, 3, 3, made_up())
    assert (times.total, times.score, times.scoring) == (75.0, 10.0, 40.0)
    for limit, rounds in ((34.9, 0), (35.1, 1), (54.9, 1), (55.1, 2), (75.1, 3)):
        within = recipe(budget__hours=limit / 3600)
        assert rounds_within(within, times, 3) == rounds, limit


@pytest.mark.parametrize(
    ("hours", "note"),
    [
        (1.0, "budget.hours is met: about 1 min 15 s of 1 h 00 min"),
        (60 / 3600, "budget.hours ends the run after about round 2 of 3"),
        (
            0.001,
            "budget.hours = 0.001, but one round takes about 35 s, including loading and scores",
        ),
    ],
)
def test_a_plan_says_whether_hours_are_met(recipe, monkeypatch, hours, note):
    monkeypatch.setattr("silotune.workflows.plan.plan.measure", lambda run: made_up())
    assert note in silotune.plan(recipe(budget__hours=hours)).notes


def test_a_plan_says_of_every_ceiling_what_it_knows(recipe):
    run = recipe(budget={"bytes": 18_900, "hours": 1.0})
    assert silotune.plan(run, measured=False).notes[-2:] == (
        "budget.bytes is met: 16.1 kB of 18.9 kB",
        "it is unknown whether budget.hours is met: no time is given",
    )
