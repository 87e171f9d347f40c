"""Programs are restarted when they end; runs wait, run, stop, fail and are retried."""

import json
import os
import signal
import sys
import time

import pytest

from silotune.core.errors import ConfigError, EngineError
from silotune.deployment import queue, supervisor
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.join import init
from silotune.deployment.orders import find_run, runs_of, state_of
from silotune.deployment.queue import Queue, resubmit, stop, submit
from silotune.deployment.supervisor import Supervisor, only_one
from silotune.recipes.parse import load_recipe
from tests.conftest import write_tiny_recipe

# --- programs ------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    private, logs, notes = tmp_path / "private", tmp_path / "logs", []
    private.mkdir()
    logs.mkdir()
    made = Supervisor(private, logs=logs, environment=dict(os.environ), note=notes.append)
    yield made, notes
    made.close()


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def until(ready, made: Supervisor, timeout_s: float = 10):
    """Tend until a condition holds; returns what ended in the meantime."""
    ended, deadline = [], time.monotonic() + timeout_s
    while not ready(ended):
        assert time.monotonic() < deadline
        ended += made.tend()
        time.sleep(0.02)
    return ended


def test_a_program_that_ends_is_restarted_after_a_pause_that_grows(kept, tmp_path):
    made, notes = kept
    path = tmp_path / "starts"
    code = f"import time; open({str(path)!r}, 'a').write(f'{{time.monotonic()}}\\n'); 1 / 0"
    made.keep("node", python(code), rest_s=0.2)
    until(lambda _: path.exists() and len(path.read_text().splitlines()) == 3, made)
    first, second, third = map(float, path.read_text().splitlines())
    assert second - first >= 0.2
    assert third - second >= 0.4
    assert notes[0].startswith("node ended (exit status 1; ")
    assert notes[0].endswith("node.log) and is restarted in 0.2 s")
    assert notes[1].endswith("in 0.4 s")


def test_the_pause_is_bounded_and_a_steady_program_gets_the_shortest_again(kept, monkeypatch):
    made, notes = kept
    monkeypatch.setattr(supervisor, "MOST_REST_S", 0.3)
    made.keep("node", python("raise SystemExit(1)"), rest_s=0.2)
    until(lambda _: len(notes) == 3, made)
    assert [note.split(" in ")[-1] for note in notes] == ["0.2 s", "0.3 s", "0.3 s"]
    monkeypatch.setattr(supervisor, "STEADY_S", 0.0)
    until(lambda _: len(notes) == 4, made)
    assert notes[3].endswith("in 0.2 s")


def test_a_signal_is_named(kept):
    made, notes = kept
    made.keep("node", python("import time; time.sleep(60)"), rest_s=60)
    time.sleep(0.3)
    made.tell("node", signal.SIGKILL)
    until(lambda _: notes, made)
    assert "node ended (signal SIGKILL" in notes[0]


def test_a_program_that_runs_once_is_reported_and_not_restarted(kept, tmp_path):
    made, notes = kept
    made.start_once("job", python("print('said'); raise SystemExit(4)"), log=tmp_path / "job.log")
    assert until(lambda ended: ended, made) == [("job", 4)]
    assert (tmp_path / "job.log").read_text() == "said\n"
    assert not notes
    made.close()
    assert not (tmp_path / "private").exists(), "short-lived files go with the programs"


def test_the_end_of_the_keeper_is_an_error(kept):
    made, _ = kept
    os.kill(made._kept.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="the keeper of all programs has ended"):
        until(lambda _: False, made)


def test_what_may_run_only_once_is_refused_a_second_time(tmp_path):
    lock = tmp_path / "lock"
    with (
        only_one(lock, what="this server is already up"),
        pytest.raises(ConfigError, match="this server is already up, in another process"),
        only_one(lock, what="this server is already up"),
    ):
        pass
    with only_one(lock, what="this server is already up"):
        pass


# --- runs ----------------------------------------------------------------------------------------


class Programs:
    """A stub supervisor: records what is started and told."""

    def __init__(self):
        self.started, self.told = [], []

    def start_once(self, name, argv, *, log):
        self.started.append(argv)

    def tell(self, name, signum=signal.SIGTERM):
        self.told.append(name)


@pytest.fixture
def consortium(tmp_path):
    Consortium.create(tmp_path / "fl", name="fl", address="localhost")
    init("north", tmp_path / "north")
    Consortium.open(tmp_path / "fl").approve(tmp_path / "north" / "request.toml")
    return tmp_path / "fl"


@pytest.fixture
def recipe(tmp_path, tiny_model):
    return write_tiny_recipe(tmp_path, tiny_model)


def test_a_simulation_recipe_gets_the_members_as_clients(consortium, recipe):
    # its deadline was refused: on its own the recipe runs in one process, which has none
    keys = ["rounds=7", "runtime.join_timeout_s=5"]
    run = load_recipe(submit(consortium, recipe, keys) / "recipe.toml")
    assert run.runtime.join_timeout_s == 5
    assert run.data.path == str(consortium)
    assert (run.runtime.name, run.rounds) == ("flower", 7)
    given = load_recipe(recipe)
    assert (run.train, run.adapter, run.model) == (given.train, given.adapter, given.model)


def test_nothing_is_queued_without_clients_or_with_a_mistake(consortium, recipe):
    with pytest.raises(ConfigError):
        submit(consortium, recipe, ["rounds=0"])
    Consortium.open(consortium).revoke("north")
    with pytest.raises(ConfigError, match="has no clients yet"):
        submit(consortium, recipe)
    assert not runs_of(consortium)
    with pytest.raises(ConfigError, match="is not the folder of a consortium"):
        submit(recipe.parent, recipe)


def test_runs_go_one_at_a_time_and_each_resumes_from_its_folder(consortium, recipe):
    one, two = submit(consortium, recipe), submit(consortium, recipe)
    programs, made = Programs(), Queue(consortium, lambda text: None)
    made.tend(programs)
    made.tend(programs)
    (command,) = programs.started
    assert command[1:] == ["-m", "silotune", "run", "--resume", str(one)]
    assert (state_of(one)["state"], state_of(two)["state"]) == ("running", "waiting")
    made.job_ended(0)
    assert state_of(one)["state"] == "done"
    made.tend(programs)
    assert programs.started[1][-1] == str(two)
    with pytest.raises(ConfigError, match="there is nothing left to do"):
        resubmit(consortium, one.name)


def test_a_run_that_fails_is_retried_and_then_waits_for_people(consortium, recipe, monkeypatch):
    monkeypatch.setattr(queue, "REST_S", 0.0)
    run, programs = submit(consortium, recipe), Programs()
    made = Queue(consortium, lambda text: None)
    for n in range(1, queue.TRIES + 1):
        made.tend(programs)
        made.job_ended(1)
        assert len(programs.started) == n
    assert state_of(run)["state"] == "failed"
    assert f"see {run / 'job.log'}" in state_of(run)["why"]
    made.tend(programs)
    assert len(programs.started) == queue.TRIES
    resubmit(consortium, run.name)
    made.tend(programs)
    assert len(programs.started) == queue.TRIES + 1


def test_a_finished_round_restores_all_tries(consortium, recipe, monkeypatch):
    monkeypatch.setattr(queue, "REST_S", 0.0)
    run, programs = submit(consortium, recipe), Programs()
    made = Queue(consortium, lambda text: None)
    for _ in range(queue.TRIES - 1):
        made.tend(programs)
        made.job_ended(1)
    made.tend(programs)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "round", "round": 1, "seconds": 1.0}) + "\n")
    made.job_ended(1)
    assert (state_of(run)["state"], state_of(run)["tries"]) == ("waiting", 0)


def test_a_mistake_is_not_retried(consortium, recipe):
    run, made = submit(consortium, recipe), Queue(consortium, lambda text: None)
    made.tend(Programs())
    made.job_ended(2)
    assert state_of(run)["state"] == "failed"


def test_a_run_is_stopped_while_it_waits_and_while_it_runs(consortium, recipe):
    one, two = submit(consortium, recipe), submit(consortium, recipe)
    made, programs = Queue(consortium, lambda text: None), Programs()
    stop(consortium, two.name)
    assert state_of(two)["state"] == "stopped"
    made.tend(programs)
    stop(consortium, one.name)
    made.tend(programs)
    assert programs.told == ["job"]
    made.job_ended(143)
    assert (state_of(one)["state"], state_of(one)["why"]) == ("stopped", "as requested")
    with pytest.raises(ConfigError, match="is not running: it is stopped"):
        stop(consortium, one.name)


def test_a_run_of_a_killed_server_is_queued_again(consortium, recipe):
    one, two = submit(consortium, recipe), submit(consortium, recipe)
    killed = Queue(consortium, lambda text: None)
    killed.tend(Programs())
    Queue(consortium, lambda text: None)
    assert (state_of(one)["state"], state_of(two)["state"]) == ("waiting", "waiting")
    killed.tend(Programs())
    stop(consortium, one.name)
    assert state_of(one)["state"] == "stopped"


def test_runs_are_found_by_a_part_of_their_names(consortium, recipe):
    with pytest.raises(ConfigError, match="Runs: none"):
        find_run(consortium, None)
    one, two = submit(consortium, recipe), submit(consortium, recipe)
    assert find_run(consortium, None) == two
    assert find_run(consortium, two.name) == two
    with pytest.raises(ConfigError, match="2 runs match 'tiny'"):
        find_run(consortium, "tiny")
    assert one in runs_of(consortium).values()
