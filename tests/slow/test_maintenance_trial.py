"""docs/how-to/maintain.md, followed over a network: keys, backups, and one side that is newer."""

import os
import shutil
import tarfile
from pathlib import Path

import pytest

from tests.integration.test_deployment import trained
from tests.slow.network import Machine, carry, rounds_with, usable, wait_for
from tests.slow.test_administrators_trial import Trial, note

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not usable(), reason="needs root, `ip`, and network namespaces"),
]


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    made = Trial(tmp_path_factory.mktemp("maintenance"))
    yield made
    made.network.close()


@pytest.fixture(scope="module")
def two(trial):
    """Two clients that have joined."""
    found = [trial.add("north", 0), trial.add("south", 1)]
    for client in found:
        trial.join(client)
    trial.wait_until_connected(*found)
    return found


def join_again(trial: Trial, *clients: Machine, environment: dict[str, str] | None = None) -> None:
    """End `join`, forget what it has said, and start it; then wait until it is connected."""
    for client in clients:
        if "client join" in client.processes:
            client.end("client join")
        (client.home / "client join.log").unlink()
        trial.join(client, environment)
    trial.wait_until_connected(*clients)


def up_again(
    server: Machine, environment: dict[str, str] | None = None, *, folder: str = "consortium"
) -> None:
    (server.home / "server up.log").unlink()
    server.start(f"silotune server up --folder {folder}", environment)
    wait_for("the gate", lambda: "fingerprint" in server.said("server up"))


def one_run(trial: Trial, *names: str, keys: str = "") -> Path:
    """A run of one round, in which these clients take part."""
    run = trial.submit(f"rounds=1 runtime.join_timeout_s=60 {keys}")
    trial.wait_until(run, "done")
    assert trained(run) == {1: set(names)}
    return run


def take_kit(trial: Trial, client: Machine) -> None:
    kits = trial.server.home / "consortium" / "kits"
    carry(kits / f"{client.name}.toml", client.home / f"{client.name}-kit.toml")


def test_a_client_and_the_server_replace_their_keys(trial, two):
    north, south = two
    before = north.do("silotune client renew north")
    carry(north.home / "north" / "request.toml", trial.server.home / "north-request.toml")
    after = trial.server.do("silotune server approve north-request.toml")
    assert before.splitlines()[0] == after.splitlines()[0], "as compared by telephone"
    take_kit(trial, north)
    join_again(trial, north)
    one_run(trial, "north", "south")
    trial.server.end("server up")
    note(trial.server.do("silotune server renew"))
    up_again(trial.server)
    one_run(trial, "north", "south")
    assert "FAIL" not in south.do("silotune client doctor south-kit.toml")


def test_a_new_authority_in_the_middle_of_a_run(trial, two):
    run = trial.submit("rounds=12")
    trial.wait_for_round(run, 2)
    trial.server.do("silotune server stop")
    trial.wait_until(run, "stopped")
    finished = max(trained(run))
    assert finished < 12
    trial.server.end("server up")
    note(trial.server.do("silotune server renew --authority"))
    up_again(trial.server)
    for client in two:
        found = client.try_(f"silotune client doctor {client.name}-kit.toml")
        assert found.returncode == 1
        assert "FAIL  server" in found.stdout, "its kit is of the old authority"
        note(found.stdout)
        take_kit(trial, client)
        refused = client.try_(
            f"silotune client join {client.name}-kit.toml --data rows.jsonl --model model"
        )
        assert refused.returncode != 0, "until its people have compared the new one"
        note(refused.stderr)
        client.end("client join")
        (client.home / client.name / "kit.toml").unlink()
    for client in two:
        join_again(trial, client)
    trial.server.do(f"silotune server submit --again {run.name}")
    trial.wait_until(run, "done")
    assert sorted(trained(run)) == list(range(1, 13))
    for client in two:
        assert 12 in rounds_with(run, client.name)
    trial.server.do("silotune audit-log verify consortium")


@pytest.mark.parametrize("place", ["consortium", "restored/consortium"])
def test_a_backup_is_restored(trial, two, place):
    """At another path, too: the folders of runs said where their consortium had been."""
    server = trial.server
    run = trial.submit("rounds=6")
    trial.wait_for_round(run, 2)
    server.do("silotune server stop")
    trial.wait_until(run, "stopped")
    server.end("server up")
    here, there, archive = (server.home / n for n in ("consortium", place, "backup.tar.gz"))
    with tarfile.open(archive, "w:gz") as made:
        made.add(here, here.name)
    shutil.rmtree(here)
    with tarfile.open(archive) as kept:
        kept.extractall(there.parent, filter="data")
    server.do(f"silotune audit-log verify {place}")
    up_again(server, folder=place)
    server.do(f"silotune server submit --again {run.name} --folder {place}")
    run = there / "runs" / run.name
    trial.wait_until(run, "done")
    assert sorted(trained(run)) == list(range(1, 7))
    for client in two:
        assert 6 in rounds_with(run, client.name)
    server.end("server up")
    there.rename(here)
    up_again(server)
    trial.wait_until_connected(*two)


def newer(folder: Path) -> dict[str, str]:
    """The same code under the name of a later release, for lack of one."""
    about = folder / "newer" / "silotune-9.0.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: silotune\nVersion: 9.0.0\n")
    paths = [str(about.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def test_a_client_is_upgraded_before_the_server_in_the_middle_of_a_run(trial, two, tmp_path):
    north, later = two[0], newer(tmp_path)
    run = trial.submit("rounds=14")
    trial.wait_for_round(run, 2)
    join_again(trial, north, environment=later)
    trial.wait_until(run, "done")
    assert rounds_with(run, "north")[-1] == 14
    assert "9.0.0" in trial.server.do("silotune server status")
    found = north.try_("silotune client doctor north-kit.toml", later).stdout
    assert "FAIL  version" in found
    note(found)


def test_the_server_is_upgraded_before_a_client_in_the_middle_of_a_run(trial, two, tmp_path):
    south, later = two[1], newer(tmp_path)
    run = trial.submit("rounds=8")
    trial.wait_for_round(run, 2)
    trial.server.end("server up")
    assert max(trained(run)) < 8
    up_again(trial.server, later)
    trial.wait_until(run, "done")
    assert sorted(trained(run)) == list(range(1, 9))
    assert 8 in rounds_with(run, "south"), "which is still the older one"
    # a client that lists versions takes no part any more
    own = south.home / "south" / "client.toml"
    text = own.read_text()
    assert text.count("[limits]") == 1
    own.write_text(text.replace("[limits]", '[limits]\nversions = ["0.1.0"]', 1))
    join_again(trial, south)
    one_run(trial, "north")
    note(south.do("silotune client outbound south"))
