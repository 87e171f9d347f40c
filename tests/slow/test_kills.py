"""kill -9 of every kind of process of a consortium in mid-run: the run still finishes."""

import json
import os
import signal
import sys
import time

import psutil
import pytest

from tests.integration.test_deployment import CLIENTS, Place, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROUNDS = 4
LONGER = {"SuperNode": 25}
"""The engine counts a killed one as present for a minute, during which others continue."""
FORK = "multiprocessing.forkserver of multiprocessing.forkserver"
"""A fork has the command line of the process that it was forked from."""
# what to kill: words of its command line, and whether it is the server's or a client's
VICTIMS = {
    "SuperLink": ("silotune.runtime.flower.superlink", "up"),
    "executor": ("flower-superexec", "up"),
    "server app": ("flwr-serverapp", "up"),
    "server's gate": ("caddy", "up"),
    "the run's job": ("run --resume", "up"),
    "SuperNode": ("flower.supernode", CLIENTS[0]),
    "client's gate": ("caddy", CLIENTS[0]),
    "fork server": ("multiprocessing.forkserver", CLIENTS[0]),
    "client app": (FORK, CLIENTS[0]),
    "resident worker": ("silotune.runtime.flower.resident_worker", CLIENTS[0]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    made = Place(tmp_path_factory.mktemp("kills"), tiny_model)
    made.up()
    for name in CLIENTS[:2]:
        made.add(name)
    for name in CLIENTS[:2]:
        made.wait_for(name, lambda name=name: "is connected to" in made.log(name))
    yield made
    made.close()


def victim(place: Place, words: str, whose: str) -> psutil.Process | None:
    """A descendant of the server's or a client's process, found by its command line."""
    of, _, above = words.partition(" of ")
    for process in psutil.Process(place.processes[whose].pid).children(recursive=True):
        try:
            parent = process.parent()
            if (
                of in " ".join(process.cmdline())
                and process.status() != psutil.STATUS_ZOMBIE
                and (not above or (parent and above in " ".join(parent.cmdline())))
            ):
                return process
        except psutil.Error:
            continue
    return None


@pytest.mark.parametrize("kind", VICTIMS)
def test_a_killed_process_does_not_end_the_run(place, kind):
    words, whose = VICTIMS[kind]
    last = LONGER.get(kind, ROUNDS)
    run = place.submit(f"rounds={last}", "sampling.timeout_s=120", "train.local_steps=4")
    place.wait_for("a first round", lambda: 1 in trained(run), 400)
    began = time.monotonic()
    found: list[psutil.Process] = []

    def there() -> bool:
        if (process := victim(place, words, whose)) is not None:
            found.append(process)
        return bool(found)

    place.wait_for(kind, there, 90)
    os.kill(found[0].pid, signal.SIGKILL)
    place.wait_until_done(run, 600)
    took = time.monotonic() - began
    rounds = trained(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    missed = [
        f"{r['client']}, round {r['round']}: {r['status']}"
        for r in rows
        if r["event"] == "train" and r["status"] != "ok"
    ]
    sys.stderr.write(
        f"\n{kind}: done {took:.0f} s after the kill; {'; '.join(missed) or 'nobody missed'}\n"
    )
    assert sorted(rounds) == list(range(1, last + 1))
    assert rounds[last] == set(CLIENTS[:2]), "the killed client takes part again"
    assert (run / "summary.json").is_file()
