"""Ceilings for what a run may send and how long it may take, and the rules of a leaderboard's
tracks."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import silotune
from silotune.algorithms import ALGORITHMS
from silotune.core.errors import ConfigError
from silotune.core.tree import sha256
from silotune.core.types import Broadcast, Score, ServerState, Update
from silotune.federation.budget import begin_part, expected_seconds, read_spent
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import parse
from silotune.recipes.tracks import TRACKS
from silotune.results.budget_texts import budget_lines, budget_warnings
from silotune.workflows.check import check, check_track
from tests.conftest import changed, hospital_rows, small_table, write_jsonl

# --- the ceiling, with clients that answer without training

NAMES = ("east", "north", "south", "west")
START = {"lora_A": torch.zeros(2, 3), "lora_B": torch.ones(3, 2)}
ONE = 4 * (2 * 3 + 3 * 2)
"""Bytes of the adapter, either way."""


def down(broadcast: Broadcast) -> int:
    """Every adapter but the first one, which clients make themselves, travels."""
    return ONE if broadcast.round > 1 else 0


class Clients:
    def names(self):
        return list(NAMES)

    def num_rows(self):
        return {name: {"num_train": 1, "num_eval": 1} for name in self.names()}

    def train(self, messages: Mapping[str, Broadcast]):
        for name, broadcast in messages.items():
            update = Update(
                client=name,
                round=broadcast.round,
                delta={n: torch.ones_like(t) for n, t in START.items()},
                num_examples=1,
                metrics={"train_loss": 1.0, "num_tokens": 5, "seconds_training": 0.1, "seconds": 1},
                bytes_down=down(broadcast),
                bytes_up=ONE,
            )
            yield replace(update, score=Score(name, 2.0, 2, 1, 1)) if broadcast.score else update

    def evaluate(self, messages: Mapping[str, Broadcast]):
        for name, broadcast in messages.items():
            yield Score(name, 3.0, 2, 1, 1, size_bytes=down(broadcast))


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
    scored_on_the_way = sum(1 for r in range(1, num_rounds) if every and r % every == 0)
    absent = len(NAMES) - asked  # whoever trains scores in the same message
    messages = asked * (2 * num_rounds - 1) + absent * scored_on_the_way
    return ONE * (messages + (len(NAMES) if every else 0))


@given(
    asked=st.integers(1, 4),
    every=st.integers(0, 3),
    limit=st.integers(0, 2 * 4 * 4 + 3 * 4 + 8).map(lambda messages: messages * ONE),
    short=st.booleans(),
)
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


# --- the ceiling for hours, by a clock that only the clients move


class SlowClients(Clients):
    """Each message takes its seconds by a clock of their own: steps, and a score beside them."""

    def __init__(self, steps, *, score=0.0, now=0.0):
        self.steps, self.score, self.now = steps, score, now

    def clock(self):
        return self.now

    def train(self, messages: Mapping[str, Broadcast]):
        for update in super().train(messages):
            beside = self.score if messages[update.client].score else 0.0
            steps = self.steps[update.round - 1] / len(messages)
            self.now += steps + beside
            seconds = {"seconds_training": steps, "seconds": steps + beside}
            yield replace(update, metrics={**update.metrics, **seconds})

    def evaluate(self, messages: Mapping[str, Broadcast]):
        for score in super().evaluate(messages):
            self.now += self.score
            yield score


def go_slowly(folder, clients, *, progress=None):
    """As workflows/run.py begins a part of a run, on a folder that may hold an earlier one."""
    begin_part(folder, clients.clock())
    state = folder.load_state() or ServerState(0, START, {})
    folder.rewind(state.round)
    cfg, build = ALGORITHMS["fedavg"]
    return run_rounds(
        folder.run,
        state,
        algorithm=build(cfg()),
        clients=clients,
        folder=folder,
        progress=progress or Progress(),
        clock=clients.clock,
    )


def rounds_by_hand(steps, *, score: float, every: int, limit: float) -> int:
    """The longest round so far and the last scoring must fit, from the second round on."""
    spent, longest = 0.0, 0.0
    for done, step in enumerate(steps):
        last = len(NAMES) * score if every else 0.0
        if done and spent + longest + last > limit:
            return done
        took = step + (last if every and done % every == 0 else 0.0)
        spent, longest = spent + took, max(longest, took)
    return len(steps)


@given(
    steps=st.lists(st.integers(1, 40).map(lambda n: 4.0 * n), min_size=4, max_size=4),
    score=st.sampled_from([0.0, 1.0, 8.0]),
    every=st.integers(0, 3),
    limit=st.integers(1, 720),
)
def test_a_run_ends_before_the_round_that_would_go_beyond_its_hours(
    tmp_path_factory, steps, score, every, limit
):
    run = stand_in_recipe(evaluate__every=every, budget__hours=(limit + 0.5) / 3600)
    folder = RunFolder.create(tmp_path_factory.mktemp("hours") / "run", run)
    clients = SlowClients(steps, score=score)
    state = go_slowly(folder, clients)
    assert state.round == rounds_by_hand(steps, score=score, every=every, limit=limit + 0.5)
    spent, saved = read_spent(folder), folder.load_state()
    assert spent is not None
    assert saved is not None
    assert spent["ended_by"] == (None if state.round == 4 else "budget.hours")
    assert (saved.round, sha256(saved.adapter)) == (state.round, sha256(state.adapter))
    scored = {r["client"] for r in folder.metrics() if r["event"] == "evaluate"}
    assert scored == (set(NAMES) if every else set())
    if state.round > 1 and max(steps) == steps[0]:  # no round was longer than those before it
        assert clients.now <= limit + 0.5


class StopAfter(Progress):
    def __init__(self, round_):
        self.round = round_

    def end_round(self, round_, rows):
        if round_ == self.round:
            raise KeyboardInterrupt


@pytest.mark.parametrize("round_", [1, 2, 3])
def test_a_resumed_run_counts_the_hours_before_it_and_not_those_between(tmp_path, round_):
    run = stand_in_recipe(rounds=6, budget__hours=35 / 3600)
    folder = RunFolder.create(tmp_path / "run", run)
    clients = SlowClients([10.0] * 6)
    with pytest.raises(KeyboardInterrupt):
        go_slowly(folder, clients, progress=StopAfter(round_))
    later = SlowClients([10.0] * 6, now=clients.now - 5000)  # another start of the machine
    assert go_slowly(folder, later).round == 3
    spent = read_spent(folder)
    assert spent is not None
    assert (spent["seconds"], spent["ended_by"]) == (30.0, "budget.hours")


def test_hours_count_on_where_rounds_are_repeated_from_their_spooled_updates(tmp_path):
    # no checkpoint before the fifth round: the first two come again at once, their hours are spent
    run = stand_in_recipe(rounds=6, budget__hours=35 / 3600, checkpoint__every=5)
    folder = RunFolder.create(tmp_path / "run", run)
    clients = SlowClients([10.0] * 6)
    with pytest.raises(KeyboardInterrupt):
        go_slowly(folder, clients, progress=StopAfter(2))
    assert go_slowly(folder, clients).round == 3
    assert clients.now == 30.0


def test_whichever_ceiling_comes_first_ends_the_run(tmp_path):
    both = {"budget__bytes": bytes_of(3, asked=4, every=1), "budget__hours": 25 / 3600}
    for name, changes in {
        "budget.hours": both,
        "budget.bytes": {**both, "budget__hours": 100 / 3600},
    }.items():
        folder = RunFolder.create(tmp_path / name, stand_in_recipe(**changes))
        state = go_slowly(folder, SlowClients([10.0] * 4))
        spent = read_spent(folder)
        assert spent is not None
        assert (state.round, spent["ended_by"]) == ({"budget.hours": 2}.get(name, 3), name)


def test_clients_that_only_score_count_by_their_rows():
    def score(client, num_examples):
        row = {"event": "evaluate", "round": 0, "client": client, "status": "ok"}
        return {**row, "num_examples": num_examples}

    def train(client, seconds):
        row = {"event": "train", "round": 1, "client": client, "train_loss": 1.0}
        return {**row, "seconds": seconds, "seconds_training": 10.0}

    rows = [train("a", 12.0), train("b", 13.0), score("a", 2), score("b", 3), score("c", 5)]
    one = {"event": "round", "round": 1, "seconds": 60.0}
    assert expected_seconds([*rows, one]) == (60.0, 10.0)
    # clients side by side: all scores, and all steps, were in these seconds
    assert expected_seconds([*rows, {**one, "seconds": 7.0}]) == (7.0, 7.0)
    assert expected_seconds([train("a", 12.0), {**one, "seconds": 14.0}]) == (14.0, 0.0)
    assert expected_seconds([]) == (0.0, 0.0)


# --- whole runs

ADAPTER = 4 * 2 * (2 * (16 + 16) + 2 * (16 + 8))
"""Bytes: float32, two layers, rank 2, q_proj of 16 to 16 and v_proj of 16 to 8."""
TWO_ROUNDS = 3 * ADAPTER + 2 * 3 * ADAPTER + 3 * ADAPTER
"""Three clients: back, there and back again, and the last adapter to each to be scored. The first
one is on both sides already."""


@pytest.fixture
def recipe(tmp_path, tiny_model):
    data = write_jsonl(tmp_path / "rows.jsonl", hospital_rows())

    def make(**changes):
        table = small_table(tiny_model, data) | {"rounds": 4, "checkpoint": {"every": 5}}
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
    assert sent(done.metrics) == 3 * ADAPTER + 3 * ADAPTER


@pytest.mark.parametrize("moment", ["round 1", "round 2", "scoring"])
@pytest.mark.parametrize("every", [1, 5])
def test_a_limited_run_that_was_stopped_ends_as_one_that_was_not(
    recipe, tmp_path, moment, every, monkeypatch
):
    class Stop(Progress):
        def end_round(self, round_, rows):
            if moment == f"round {round_}":
                raise KeyboardInterrupt

        def begin_scoring(self, clients):
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
    first = 3 * ADAPTER + 3 * ADAPTER
    with pytest.raises(ConfigError) as caught:
        silotune.run(recipe(**limit_of(first - 1)), out=tmp_path / "run")
    assert str(caught.value) == (
        "budget.bytes = 5375, but one round sends 5376 bytes.\n"
        "  Raise it, or send less: a lower adapter.rank or sampling.fraction."
    )
    assert not (tmp_path / "run").exists()


def test_a_first_round_beyond_the_hours_leaves_a_result_and_a_warning(recipe, tmp_path):
    class Heard(Progress):
        said = ()

        def note(self, text):
            self.said = (*self.said, text)

    heard = Heard()
    one = silotune.run(recipe(rounds=1), out=tmp_path / "one")
    done = silotune.run(
        recipe(budget__hours=1e-9, report__page=True), out=tmp_path / "run", progress=heard
    )
    assert done.summary["adapter_sha256"] == one.summary["adapter_sha256"]
    assert done.summary["rounds"] == 1
    assert done.summary["overall"]["federated_loss"] is not None
    (first,), (second,) = budget_lines(done.summary), budget_warnings(done.summary)
    assert first == "budget.hours ended the run after round 1 of 4"
    assert second.startswith("budget.hours = 1e-09 was exceeded: the run took ")
    assert "and round 1 alone took " in second
    assert "budget.hours ends the run after round 1" in heard.said
    assert f"warning: {second}" in heard.said
    for name in ("README.md", "report.html"):
        text = (done.path / name).read_text("utf-8")
        assert first in text, name
        assert second in text, name


def test_hours_that_suffice_are_not_mentioned(recipe, tmp_path):
    done = silotune.run(recipe(rounds=2, budget__hours=1.0), out=tmp_path / "run")
    assert budget_lines(done.summary) == budget_warnings(done.summary) == []
    assert done.summary["budget"]["ended_by"] is None
    assert 0 < done.summary["budget"]["seconds"] < 3600


def test_a_run_that_its_hours_ended_stays_ended_when_its_last_scoring_is_resumed(recipe, tmp_path):
    class Stop(Progress):
        def begin_scoring(self, clients):
            raise KeyboardInterrupt

    run = recipe(budget__hours=1e-9)
    with pytest.raises(KeyboardInterrupt):
        silotune.run(run, out=tmp_path / "run", progress=Stop())
    resumed = silotune.run(resume=tmp_path / "run")
    assert resumed.summary["rounds"] == resumed.summary["budget"]["rounds"] == 1
    assert resumed.summary["budget"]["ended_by"] == "budget.hours"


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
    "data.path = 'flwrlabs/other', the track requires 'DATA'": {"data__path": "flwrlabs/other"},
    "partition.num_clients = 3, the track requires NUM": {"partition__num_clients": 3},
    "partition.num_clients = None, the track requires NUM": {"partition": {"by": "source"}},
    "budget.bytes is above 200000000000 or not set": {"budget__bytes": None},
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
