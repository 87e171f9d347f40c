"""A consortium over a network, by the commands of docs/deploy.md: machines, addresses, homes.

Each machine is a network namespace; files get from one to another by hand. The first test is a day
of the administrators; the others cut links, slow them down, fill disks and set clocks wrong.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from silotune.runtime.parts import LEAST_BYTES, MOST_BYTES
from tests.conftest import build_tiny_model, hospital_rows, write_jsonl, write_tiny_recipe
from tests.integration.test_deployment import trained
from tests.slow.network import Machine, Network, carry, fill, missed, rounds_with, usable, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not usable(), reason="needs root, `ip`, and network namespaces"),
]
PORT = 8443


def note(text: str) -> None:
    """The result, for docs/deploy.md."""
    sys.stderr.write(f"\n{text}\n")


class Trial:
    """The consortium's server, and its clients."""

    def __init__(self, folder: Path, *, width: int = 16, keys: str = "") -> None:
        self.network = Network(folder)
        self.model = build_tiny_model(folder / "base", width=width)
        self.keys = keys
        self.fingerprints: dict[str, str] = {}
        server = self.server = self.network.machine("server")
        write_tiny_recipe(server.home, self.model)
        server.do(f"silotune server init hospitals --address {server.address}:{PORT}")
        server.start("silotune server up")
        wait_for("the gate", lambda: "fingerprint" in server.said("server up"))

    def add(self, name: str, number: int, *, machine: str | None = None) -> Machine:
        """What the operators of a client and of the server do, following docs/deploy.md."""
        server, client = self.server, self.network.machine(machine or name)
        client.name = name
        here = hospital_rows(max(3, number + 1))
        rows = [row for row in here if row["source"] == f"hospital-{number}"]
        write_jsonl(
            client.home / "rows.jsonl", [{k: r[k] for k in ("question", "answer")} for r in rows]
        )
        shutil.copytree(self.model, client.home / "model")
        ours = client.do(f"silotune client init {name}")
        carry(client.home / name / "request.toml", server.home / f"{name}-request.toml")
        theirs = server.do(f"silotune server approve {name}-request.toml")
        assert ours.splitlines()[0] == theirs.splitlines()[0], "as compared by telephone"
        self.fingerprints[name] = ours.splitlines()[0].partition(": ")[2]
        carry(
            server.home / "consortium" / "kits" / f"{name}.toml", client.home / f"{name}-kit.toml"
        )
        return client

    def join(self, client: Machine, environment: dict[str, str] | None = None) -> None:
        command = f"silotune client join {client.name}-kit.toml --data rows.jsonl --model model"
        client.start(command, environment)

    def wait_until_connected(self, *clients: Machine) -> None:
        for client in clients:
            wait_for(
                client.name,
                lambda own=client: (
                    f"'{own.name}' is connected to hospitals" in own.said("client join")
                ),
                told=lambda own=client: own.said("client join"),
            )

    def submit(self, overrides: str) -> Path:
        said = self.server.do(f"silotune server submit tiny.toml {self.keys} {overrides}")
        return self.server.home / said.removeprefix("run folder: ").strip()

    def state(self, run: Path) -> str:
        return json.loads((run / "server.json").read_text())["state"]

    def wait_for_round(self, run: Path, round_: int, timeout_s: float = 180) -> None:
        wait_for(
            f"round {round_}",
            lambda: max(trained(run), default=0) >= round_,
            timeout_s,
            told=lambda: self.server.said("server up"),
        )

    def wait_until(self, run: Path, state: str, timeout_s: float = 600) -> float:
        def told() -> str:
            log = run / "job.log"
            return self.server.said("server up") + (log.read_text() if log.exists() else "")

        return wait_for(
            f"{run.name} {state}", lambda: self.state(run) == state, timeout_s, told=told
        )


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    made = Trial(tmp_path_factory.mktemp("trial"))
    yield made
    made.network.close()


@pytest.fixture(scope="module")
def two(trial):
    """Two clients that have joined."""
    found = [trial.add("north", 0), trial.add("south", 1)]
    for client in found:
        said = client.do(
            f"silotune client doctor {client.name}-kit.toml --data rows.jsonl --model model"
        )
        assert "FAIL" not in said, said
        trial.join(client)
    trial.wait_until_connected(*found)
    return found


def test_a_day_of_the_administrators(trial, two):
    north, south = two
    run = trial.submit("rounds=24 runtime.join_timeout_s=40")
    trial.wait_for_round(run, 2)
    # a third client joins in mid-run
    west = trial.add("west", 2)
    trial.join(west)
    trial.wait_until_connected(west)
    wait_for("west in a round", lambda: rounds_with(run, "west"))
    # one leaves
    assert south.end("client join") == 143
    left_after = max(trained(run))
    # the server's machine loses its power, and starts again
    trial.server.crash()
    trial.server.link("up")
    trial.server.start("silotune server up")
    trial.wait_for_round(run, left_after + 3)
    # one is revoked
    trial.server.do("silotune server revoke west")
    out_after = max(trained(run))
    trial.wait_until(run, "done")
    done = trained(run)
    assert sorted(done) == list(range(1, 25))
    assert rounds_with(run, "west")[0] > 2
    assert rounds_with(run, "west")[-1] <= out_after + 1, "the round that was under way"
    assert rounds_with(run, "south")[-1] <= left_after + 1
    assert done[24] == {"north"}
    note(f"a day: west from round {rounds_with(run, 'west')[0]}; {'; '.join(missed(run))}")
    # what the clients' operators look at
    shown = north.do("silotune client outbound north --json")
    answers = [line for line in json.loads(shown) if line.get("asked") == "train"]
    assert len(answers) >= len(rounds_with(run, "north"))
    refused = west.try_("silotune client doctor west-kit.toml")
    assert refused.returncode == 1
    assert "FAIL  server" in refused.stdout, refused.stdout
    note(refused.stdout)
    west.end("client join")
    # and the one that left comes back
    trial.join(south)
    run = trial.submit("rounds=1")
    trial.wait_until(run, "done")
    assert trained(run)[1] == {"north", "south"}


@pytest.mark.parametrize("seconds", [10, 100])
def test_a_cut_link_costs_only_rounds_of_its_client(trial, two, seconds):
    """The engine takes a client to be gone after a minute of silence."""
    north, _ = two
    run = trial.submit("rounds=24 sampling.timeout_s=30 runtime.join_timeout_s=20")
    trial.wait_for_round(run, 2)
    north.link("down")
    time.sleep(seconds)
    north.link("up")
    trial.wait_until(run, "done")
    assert sorted(trained(run)) == list(range(1, 25))
    assert rounds_with(run, "north")[-1] == 24, missed(run)
    note(f"link cut for {seconds} s: {'; '.join(missed(run)) or 'nobody missed a round'}")


def test_a_full_disk_at_a_client_is_named_and_it_takes_part_again(trial, two):
    north, _ = two
    state = north.home / "north" / "state"
    north.end("client join")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", state], check=True)
    try:
        trial.join(north)
        run = trial.submit("rounds=16")
        trial.wait_for_round(run, 2)
        filler = fill(state)
        wait_for("a round without north", lambda: missed(run), told=lambda: str(trained(run)))
        filler.unlink()
        trial.wait_until(run, "done")
        assert rounds_with(run, "north")[-1] == 16, missed(run)
        note(f"a client's disk full: {'; '.join(missed(run))}")
    finally:
        north.end("client join")
        subprocess.run(["umount", state], check=True)
        trial.join(north)


def test_a_full_disk_at_the_server_loses_nothing_that_was_finished(trial, two):
    server = trial.server
    run = trial.submit("rounds=12")
    trial.wait_for_round(run, 2)
    server.end("server up")
    kept = server.home / "consortium-kept"
    place = server.home / "consortium"
    shutil.copytree(place, kept)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    try:
        shutil.copytree(kept, place, dirs_exist_ok=True)
        server.start("silotune server up")
        trial.wait_for_round(run, max(trained(run)) + 1)
        filler = fill(place)
        before = max(trained(run))

        def ended() -> bool:
            up = server.processes["server up"].poll() is not None
            return up or trial.state(run) in ("waiting", "failed")

        wait_for("an end", ended, 300)
        note(f"the server's disk full: {server.said('server up').splitlines()[-1]}")
        filler.unlink()
        if server.processes["server up"].poll() is not None:
            server.start("silotune server up")
        if trial.state(run) == "failed":
            server.do(f"silotune server submit --again {run.name}")
        trial.wait_until(run, "done")
        assert sorted(trained(run)) == list(range(1, 13))
        assert before < 12, "the disk was full in mid-run"
    finally:
        server.end("server up")
        shutil.copytree(place, kept, dirs_exist_ok=True)
        subprocess.run(["umount", place], check=True)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        server.start("silotune server up")


def test_a_client_whose_clock_is_wrong_is_refused_and_told_so(trial, two):
    """By ten minutes; the engine's signatures are valid for five."""
    faketime = pytest.importorskip("libfaketime", reason="sets a process's clock")
    library = Path(faketime.__file__).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
    north, _ = two
    north.end("client join")
    wrong = {"LD_PRELOAD": str(library), "FAKETIME": "+10m", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    trial.join(north, wrong)
    run = trial.submit("rounds=2 runtime.join_timeout_s=20")
    trial.wait_until(run, "done")
    assert not rounds_with(run, "north")
    (said,) = (line for line in north.said("client join").splitlines() if "not connected" in line)
    assert "to find out why: silotune client doctor" in said
    note(f"a wrong clock: {'; '.join(missed(run))}; {said}")
    found = north.try_("silotune client doctor north-kit.toml", wrong).stdout
    assert "FAIL  clock" in found, found
    assert found.count("FAIL") == 1, "and nothing else"
    note(found)
    north.end("client join")
    trial.join(north)
    run = trial.submit("rounds=1")
    trial.wait_until(run, "done")
    assert rounds_with(run, "north") == [1]


def test_a_slow_link_costs_only_time(trial, two):
    """4.5 MB each way, at 1 Mbit/s from the client: more than half a minute."""
    over_a_slow_link(trial, two[0], 1000, "adapter.rank=10000 adapter.alpha=10000")


def over_a_slow_link(trial, north, kbit, keys):
    """Two rounds; returns the bytes that the client sent in one."""
    north.slow_down(f"{kbit}kbit")
    run = trial.submit(f"rounds=2 {keys}")
    trial.wait_until(run, "done")
    north.full_speed()
    assert rounds_with(run, "north") == [1, 2], missed(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row["event"] == "round"]
    size = next(row["bytes_up"] for row in rows if row["event"] == "train")
    assert min(seconds) > 8 * size / (1e3 * kbit)
    note(f"{kbit} kbit/s and {size} bytes: rounds of {', '.join(f'{s:.0f} s' for s in seconds)}")
    return size


def test_an_int4_adapter_passes_over_a_very_slow_link(trial, two):
    """2.4 MB from the client at 256 kbit/s, in parts of 512 KB."""
    keys = 'adapter.rank=40000 adapter.alpha=40000 wire.up="int4"'
    assert over_a_slow_link(trial, two[0], 256, keys) > MOST_BYTES


def test_a_part_that_takes_more_than_half_a_minute_passes(trial, two):
    """0.6 MB at 64 kbit/s: a part of 512 KB takes 65 s, and Flower would give up after 30."""
    keys = 'adapter.rank=10000 adapter.alpha=10000 wire.up="int4"'
    assert over_a_slow_link(trial, two[0], 64, keys) > LEAST_BYTES


def test_a_long_local_training_triggers_no_timeout(trial, two):
    """Longer than the engine's limits: a minute for heartbeats, five for signatures."""
    run = trial.submit("rounds=1 train.local_steps=24000 evaluate.every=0")
    trial.wait_until(run, "done", 1300)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    took = [row["seconds"] for row in rows if row["event"] == "train"]
    assert rounds_with(run, "north") == rounds_with(run, "south") == [1], missed(run)
    assert min(took) > 310, "not long enough to show anything"
    note(f"local training of {min(took):.0f} s and more: nobody missed the round")
