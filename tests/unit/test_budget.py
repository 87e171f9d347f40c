"""A ceiling for what a run may send, and the rules of a leaderboard's tracks."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import silotune
from silotune.algorithms import ALGORITHMS
from silotune.checking import check, check_track
from silotune.config import parse
from silotune.errors import ConfigError
from silotune.progress import Progress
from silotune.rounds import run_rounds
from silotune.store import RunFolder
from silotune.tracks import TRACKS
from silotune.tree import sha256
from silotune.types import Broadcast, Score, ServerState, Update
from tests.conftest import changed, hospital_rows, write_jsonl

# --- the ceiling, with clients that answer without training

NAMES = ("east", "north", "south", "west")
START = {"lora_A": torch.zeros(2, 3), "lora_B": torch.ones(3, 2)}
ONE = 4 * (2 * 3 + 3 * 2)
"""Bytes of the adapter, either way."""


class Clients:
    def names(self):
        return list(NAMES)

    def train(self, cohort, broadcast: Broadcast):
        for name in cohort:
            update = Update(
                client=name,
                round=broadcast.round,
                delta={n: torch.ones_like(t) for n, t in START.items()},
                num_examples=1,
                metrics={"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1},
                bytes_down=ONE,
                bytes_up=ONE,
            )
            yield replace(update, score=Score(name, 2.0, 2, 1, 1)) if broadcast.score else update

    def evaluate(self, cohort, broadcast: Broadcast):
        for name in cohort:
            yield Score(name, 3.0, 2, 1, 1, size_bytes=ONE)


def stand_in_recipe(**changes):
    table = {"rounds": 4, "data": {"path": "medquad_mini"}, "partition": {"by": "source"}}
    return parse(changed(table, changes))


def go(place, run):
    cfg, build = ALGORITHMS["fedavg"]
    folder = RunFolder.create(place, run)
    state = run_rounds(
        run,
        ServerState(0, START, {}),
        algorithm=build(cfg()),
        clients=Clients(),
        folder=folder,
        progress=Progress(),
    )
    return state, folder


def sent(rows) -> int:
    return sum(row.get("bytes_down", 0) + row.get("bytes_up", 0) for row in rows)


def bytes_of(num_rounds: int, *, asked: int, every: int) -> int:
    """What a run of so many rounds sends, its last scoring too; counted by hand."""
    scored_on_the_way = sum(1 for r in range(num_rounds) if every and r % every == 0)
    absent = len(NAMES) - asked  # whoever trains scores in the same message
    messages = 2 * asked * num_rounds + absent * scored_on_the_way
    return ONE * (messages + (len(NAMES) if every else 0))


@given(
    asked=st.integers(1, 4),
    every=st.integers(0, 3),
    limit=st.integers(0, 2 * 4 * 4 + 3 * 4 + 8).map(lambda messages: messages * ONE),
    short=st.booleans(),
)
@settings(max_examples=40)
def test_a_run_does_as_many_rounds_as_fit_below_its_ceiling(
    tmp_path_factory, asked, every, limit, short
):
    limit = max(1, limit - short)  # exactly so many messages, or one byte too few for the last
    run = stand_in_recipe(sampling__num_clients=asked, evaluate__every=every, budget__bytes=limit)
    place = tmp_path_factory.mktemp("limited") / "run"
    fitting = [r for r in range(1, 5) if bytes_of(r, asked=asked, every=every) <= limit]
    if not fitting:
        with pytest.raises(ConfigError, match="one round sends"):
            go(place, run)
        assert not RunFolder.open(place).has_begun()
        return
    state, folder = go(place, run)
    assert state.round == max(fitting)
    assert sent(folder.metrics()) == bytes_of(state.round, asked=asked, every=every) <= limit
    scored = {row["client"] for row in folder.metrics() if row["event"] == "evaluate"}
    assert scored == (set(NAMES) if every else set())
    saved = folder.load_state()
    assert saved is not None
    assert (saved.round, sha256(saved.adapter)) == (state.round, sha256(state.adapter))


# --- whole runs

ADAPTER = 4 * 2 * (2 * (16 + 16) + 2 * (16 + 8))
"""Bytes: float32, two layers, rank 2, q_proj of 16 to 16 and v_proj of 16 to 8."""
TWO_ROUNDS = 2 * 3 * 2 * ADAPTER + 3 * ADAPTER
"""Three clients, there and back twice, and the last adapter to each to be scored."""


@pytest.fixture
def recipe(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows())

    def make(**changes):
        table = {
            "seed": 3,
            "rounds": 4,
            "model": {"name": str(tiny_model), "dtype": "float32"},
            "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
            "data": {"path": str(data)},
            "partition": {"by": "source"},
            "train": {"batch_size": 2, "local_steps": 1, "lr": 1e-2, "max_length": 128},
            "checkpoint": {"every": 5},
            "runtime": {"device": "cpu", "threads": 1},
            "report": {"page": False, "samples": 0},
        }
        return parse(changed(table, changes))

    return make


def limit_of(size_bytes: int) -> dict:
    return {"budget__bytes": size_bytes}


def test_a_limited_run_is_the_run_of_the_rounds_that_it_can_afford(recipe, tmp_path):
    whole = silotune.run(recipe(rounds=2), out=tmp_path / "whole")
    shown = {"report__page": True, **limit_of(TWO_ROUNDS)}
    limited = silotune.run(recipe(**shown), out=tmp_path / "limited")
    assert sent(limited.metrics) == TWO_ROUNDS
    assert limited.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    for key in ("rounds", "result_round", "clients", "overall", "bytes_up", "bytes_down"):
        assert limited.summary[key] == whole.summary[key], key
    assert limited.summary["rounds"] == limited.summary["result_round"] == 2
    (checkpoint,) = (limited.path / "checkpoints").iterdir()
    assert checkpoint.name == "round-00002"
    for name in ("README.md", "report.html"):
        text = (limited.path / name).read_text("utf-8")
        assert "2 rounds of fedavg" in text, name
        assert "4 rounds" not in text, name


def test_one_byte_less_is_one_round_less(recipe, tmp_path):
    done = silotune.run(recipe(**limit_of(TWO_ROUNDS - 1)), out=tmp_path / "run")
    assert done.summary["rounds"] == 1
    assert sent(done.metrics) == 3 * 2 * ADAPTER + 3 * ADAPTER


@pytest.mark.parametrize("moment", ["round 1", "round 2", "scoring"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_limited_run_that_was_stopped_ends_as_one_that_was_not(
    recipe, tmp_path, moment, every, monkeypatch
):
    class Stop(Progress):
        def end_round(self, round_, rows):
            if moment == f"round {round_}":
                raise KeyboardInterrupt

        def begin_scoring(self, names):
            if moment == "scoring":
                raise KeyboardInterrupt

    run = recipe(checkpoint__every=every, **limit_of(TWO_ROUNDS))
    with pytest.raises(KeyboardInterrupt):
        silotune.run(run, out=tmp_path / "run", progress=Stop())
    resumed = silotune.run(resume=tmp_path / "run")
    whole = silotune.run(run, out=tmp_path / "whole")
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert sent(resumed.metrics) == TWO_ROUNDS
    events = [(r["event"], r["round"], r.get("client")) for r in resumed.metrics]
    assert events == [(r["event"], r["round"], r.get("client")) for r in whole.metrics]


def test_a_ceiling_below_one_round_is_a_mistake_and_leaves_nothing(recipe, tmp_path):
    first = 3 * 2 * ADAPTER + 3 * ADAPTER
    with pytest.raises(ConfigError) as caught:
        silotune.run(recipe(**limit_of(first - 1)), out=tmp_path / "run")
    assert str(caught.value) == (
        "budget.bytes = 8063, but one round sends 8064 bytes.\n"
        "  Raise it, or send less: a lower adapter.rank or sampling.fraction."
    )
    assert not (tmp_path / "run").exists()


# --- tracks of the leaderboard

PUBLISHED = {  # data set and number of clients, as the leaderboard's own apps have them
    "general": ("flwrlabs/alpaca-gpt4", 20),
    "finance": ("flwrlabs/fingpt-sentiment-train", 50),
    "medical": ("flwrlabs/medical-meadow-medical-flashcards", 20),
    "code": ("flwrlabs/code-alpaca-20k", 10),
}


def on_track(track: str, **changes):
    data, num_clients = PUBLISHED[track]
    table = {
        "rounds": 200,
        "data": {"path": data},
        "partition": {"kind": "iid", "num_clients": num_clients},
        "track": track,
        "budget": {"bytes": 200_000_000_000},
    }
    return parse(changed(table, changes))


def test_the_four_tracks_are_allowed_as_published():
    assert set(TRACKS) == set(PUBLISHED)
    for track in PUBLISHED:
        check_track(on_track(track))
        check_track(on_track(track, budget__bytes=1))


BROKEN = {
    "data.path = 'flwrlabs/other', the track's is 'DATA'": {"data__path": "flwrlabs/other"},
    "partition.num_clients = 3, the track's is NUM": {"partition__num_clients": 3},
    "partition.num_clients = None, the track's is NUM": {"partition": {"by": "source"}},
    "budget.bytes is above 200000000000 or absent": {"budget__bytes": None},
}


@pytest.mark.parametrize("track", PUBLISHED)
def test_every_rule_of_a_track_that_is_broken_is_named(track):
    data, num_clients = PUBLISHED[track]
    for text, changes in BROKEN.items():
        with pytest.raises(ConfigError) as caught:
            check_track(on_track(track, **changes))
        first, rule, mend = str(caught.value).splitlines()
        assert first == f"track = '{track}' does not allow:"
        assert rule.strip() == text.replace("DATA", data).replace("NUM", str(num_clients))
        assert "track=none" in mend
    everything = {"data__path": "x", "partition": {"by": "x"}, "budget__bytes": 200_000_000_001}
    with pytest.raises(ConfigError) as caught:
        check_track(on_track(track, **everything))
    assert len(str(caught.value).splitlines()) == 5


def test_a_broken_track_is_told_before_any_row_is_read(tmp_path):
    with pytest.raises(ConfigError, match="does not allow"):
        check(on_track("medical", data__path=str(tmp_path / "missing.jsonl")))
