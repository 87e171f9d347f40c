"""A consortium by its own commands: real processes, keys and certificates, and the proxy."""

import json
import math
import os
import platform
import re
import signal
import ssl
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import httpx
import psutil
import pytest
from flwr.superlink.routers.control.router import router as control

import silotune
from silotune.deployment.consortium.certificates import client_certificate, new_key, pem, write_key
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.consortium.kit import read_kit
from silotune.runtime.flower.engine import free_port
from tests.conftest import hospital_rows, open_to_others, write_jsonl, write_tiny_recipe
from tests.forked import run_typed

pytestmark = [pytest.mark.timeout(600), pytest.mark.engine]

CLIENTS = ("hospital-0", "hospital-1", "hospital-2")


def silotune_command(*words) -> list[str]:
    return [sys.executable, "-m", "silotune", *map(str, words)]


class Place:
    """A consortium and its clients, each with its own folder."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.server = folder / "consortium"
        self.port = free_port()
        self.recipe = write_tiny_recipe(folder, model)
        self.processes: dict[str, subprocess.Popen] = {}
        address = f"127.0.0.1:{self.port}"
        self.do("server", "init", "demo", "--address", address, "--listen", address)

    def do(self, *words) -> str:
        done = run_typed(words, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, name: str, *words) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                silotune_command(*words), cwd=self.folder, stdout=log, stderr=log
            )

    def up(self) -> None:
        self.start("up", "server", "up", "--page", "--port", 0)

    def add(self, name: str) -> None:
        """The operators of a client and of the server do what the documentation says."""
        rows = [{k: v for k, v in r.items() if k != "source"} for r in rows_of(name)]
        write_jsonl(self.folder / f"{name}.jsonl", rows)
        self.do("client", "init", name)
        self.do("server", "approve", f"{name}/request.toml")
        kit = self.server / "kits" / f"{name}.toml"
        words = ("--data", f"{name}.jsonl", "--model", self.model)
        self.start(name, "client", "join", kit, *words)
        own = self.folder / name / "client.toml"
        self.wait_for(f"{own} to be written", own.is_file)
        # these clients hold out one row each, fewer than a new client.toml allows to be scored
        own.write_text(own.read_text().replace("min_count = 5", "min_count = 1"))

    def submit(self, *overrides) -> Path:
        said = self.do("server", "submit", self.recipe, *overrides)
        return self.folder / said.removeprefix("run folder: ").strip()

    def status(self) -> dict:
        return json.loads(self.do("server", "status", "--json"))

    def state(self, run: Path) -> str:
        return json.loads((run / "server.json").read_text())["state"]

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def wait_for(self, what: str, ready, timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert time.monotonic() < deadline, f"timed out waiting for {what}: {self.log('up')}"
            time.sleep(0.2)

    def wait_until_done(self, run: Path, timeout_s: float = 150) -> None:
        def ended() -> bool:
            state = self.state(run)
            assert state not in ("failed", "stopped"), (run / "job.log").read_text()
            return state == "done"

        self.wait_for(f"the end of {run.name}", ended, timeout_s)

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(60)


def rows_of(name: str) -> list[dict]:
    return [row for row in hospital_rows() if row["source"] == name]


def trained(run: Path) -> dict[int, set[str]]:
    """Whose update was used, by round."""
    found: dict[int, set[str]] = {}
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if row["event"] == "train" and row["status"] == "ok":
            found.setdefault(row["round"], set()).add(row["client"])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    made = Place(tmp_path_factory.mktemp("deployment"), tiny_model)
    made.up()
    for name in CLIENTS[:2]:
        made.add(name)
    yield made
    made.close()


@pytest.fixture(scope="module")
def first(place):
    """A normal run with two clients and one round."""
    joined = [f"'{name}' is connected to demo" for name in CLIENTS[:2]]
    place.wait_for(
        "both clients",
        lambda: all(text in place.log(n) for text, n in zip(joined, CLIENTS[:2], strict=True)),
    )
    run = place.submit("rounds=1")
    place.wait_until_done(run)
    return run


def test_the_page_of_a_server_shows_its_clients_and_its_run(first, place):
    address = re.findall(r"live page: (\S+)", place.log("up"))[-1]

    def look() -> dict:
        return httpx.get(f"{address}state", trust_env=False, timeout=30).json()

    def knows_clients() -> bool:
        table = look()["parts"][0]
        return [row[:2] for row in table["rows"]] == [[name, "online"] for name in CLIENTS[:2]]

    place.wait_for("the page to show both clients online", knows_clients)
    now = look()
    assert (now["title"], now["state"]) == ("demo", "up")
    assert now["parts"][1]["rows"][0][:3] == [first.name, "done", "1 of 1"]
    assert any(first.name in value for _, value in now["facts"])
    assert httpx.get(address.rstrip("/")[:-1] + "/", trust_env=False).status_code == 403


def test_a_client_sees_that_it_is_connected_and_what_it_sent(first, place):
    name = CLIENTS[0]
    assert "sent round 1: update" in place.log(name)
    found = json.loads(place.do("client", "status", name, "--json"))
    assert (found["name"], found["joined"], found["connected"]) == (name, True, True)
    assert found["consortium"] == "demo"
    (run,) = [own for own in found["runs"] if own["run"] == (first / "run-id").read_text()]
    assert run["answers"] == 3
    assert run["bytes"] > 0
    said = place.do("client", "status", name)
    assert f"{name}: connected to demo for" in said
    assert "last answer: answer to evaluate" in said


def test_what_left_the_clients_names_no_machine_and_what_they_were_told_no_path(first, place):
    for name in CLIENTS[:2]:
        text = (place.folder / name / "state" / "outbound.jsonl").read_text()
        told = [json.loads(line) for line in text.splitlines()]
        assert {line["asked"] for line in told if "run" in line} >= {"query", "train", "evaluate"}
        assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
        assert str(place.folder) not in text
        assert str(Path(place.model).parent) not in text
        (recipe,) = {line["text"] for line in told if "text" in line}
        assert json.loads(recipe)["model"]["name"] == f"copy:{Path(place.model).name}"


def test_a_consortium_learns_what_one_process_learns_bit_for_bit(first, place, tmp_path):
    write_jsonl(tmp_path / "two.jsonl", [r for n in CLIENTS[:2] for r in rows_of(n)])
    keys = ["rounds=1", f"data.path={tmp_path / 'two.jsonl'}"]
    here = silotune.run(place.recipe, keys, out=tmp_path / "here")
    summary = json.loads((first / "summary.json").read_text())
    assert summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert summary["clients"] == here.summary["clients"]


def test_each_client_loads_the_base_once_per_run(first):
    summary = json.loads((first / "summary.json").read_text())
    # the server loads it twice: for the first adapter, and for the result
    assert summary["base_model_loads"] == 2 + len(CLIENTS[:2])


def test_no_client_learns_a_path_of_the_server_or_who_else_is_in(first, place):
    """The recipe travels through the clients' logs and state; the server's folder does not."""
    for name in CLIENTS[:2]:
        for path in (place.folder / name).rglob("*"):
            if path.is_file() and path.name not in ("client.toml", "key.pem"):
                text = path.read_bytes()
                assert str(place.server).encode() not in text, path
                other = CLIENTS[1 - CLIENTS.index(name)]
                assert other.encode() not in text, path


def test_a_client_has_a_list_of_everything_that_left_it(first, place):
    name = CLIENTS[0]
    shown = json.loads(place.do("client", "outbound", name, "--json"))
    layout = next(line["shapes"] for line in shown if "shapes" in line)
    answers = [line for line in shown if "run" in line]
    assert [line["asked"] for line in answers] == ["query", "train", "evaluate"]
    rows = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [r for r in rows if r["event"] == "train" and r["client"] == name]
    assert {line["run"] for line in answers} == {place.status()["runs"][0]["id"]}
    update = answers[1]
    assert update["bytes_numbers"] == trained["bytes_up"]
    numbers = sum(math.prod(shape) for shape in layout.values())
    assert 4 * numbers == trained["bytes_up"]
    assert update["norm"] == pytest.approx(trained["delta_norm"])
    assert update["said"]["update"]["num_examples"] == trained["num_examples"]
    assert set(answers[0]["said"]) == {"report", "process", "client"}
    text = json.dumps(shown)
    assert not any(row["question"] in text for row in rows_of(name))


def test_nobody_else_on_either_machine_can_read_what_a_server_or_a_client_keeps(first, place):
    """Logs, the outbound list and the run folders were readable by all users."""
    assert (place.folder / CLIENTS[0] / "state" / "worker.log").is_file()
    assert first.is_relative_to(place.server)
    assert os.umask(0o022) & 0o077 == 0o022, "otherwise this test shows nothing"
    for folder in (place.server, *(place.folder / name for name in CLIENTS[:2])):
        assert open_to_others(folder) == []


def test_the_doctor_finds_nothing_wrong_and_says_what_it_checked(first, place):
    kit = place.server / "kits" / f"{CLIENTS[0]}.toml"
    said = place.do("client", "doctor", kit)
    found = {line.split()[1]: line for line in said.splitlines()}
    looked_at = ("kit", "programs", "server", "clock", "version", "disk")
    assert list(found) == [*looked_at, "limits", "rows", "model", "memory"]
    assert all(line.startswith("ok ") for line in found.values()), said
    ran = json.loads((first / "summary.json").read_text())["clients"][CLIENTS[0]]
    assert f"{ran['num_train']} to train on, {ran['num_eval']} held out" in found["rows"]
    assert "the same as on the server" in found["model"]


# --- what a client's credentials open ------------------------------------------------------------


def gate_client(place: Place, name: str) -> httpx.Client:
    kit = read_kit(place.server / "kits" / f"{name}.toml")
    certificate = place.folder / f"{name}-certificate.pem"
    certificate.write_text(kit.certificate)
    (place.folder / "authority.pem").write_text(kit.authority)
    context = ssl.create_default_context(cafile=str(place.folder / "authority.pem"))
    context.load_cert_chain(certificate, place.folder / name / "key.pem")
    kind = {"Content-Type": "application/protobuf"}
    return httpx.Client(base_url=f"https://127.0.0.1:{place.port}", verify=context, headers=kind)


CONTROL = sorted(route.path for route in control.routes)


def test_every_control_path_is_refused_to_a_client(first, place):
    assert "/v1/control/start-run" in CONTROL, CONTROL
    with gate_client(place, CLIENTS[0]) as client:
        assert client.post("/v1/fleet/pull-messages").status_code != 403, "this one is let through"
        for path in CONTROL:
            tricks = ("", "/v1/fleet/..", "/v1/fleet/%2e%2e/..", "/", "/v1/fleet/;/..")
            for before in tricks:
                for method in ("POST", "GET", "PUT"):
                    said = client.request(method, before + path)
                    assert said.status_code in (403, 404), (method, before + path)
        for path in ("/", "/docs", "/openapi.json", "/health", "/v1/runtime/pull", "/metrics"):
            assert client.post(path).status_code == client.get(path).status_code == 403


HEARD = (400, 401)
"""The gate lets a request through, and the engine refuses it: it is no message, or not signed."""


def test_only_the_path_that_carries_contents_takes_large_requests(first, place):
    """Bug: an approved client made the engine hold bodies of 60 MB on every path, unsigned."""
    with gate_client(place, CLIENTS[0]) as client:
        for path in ("pull-messages", "push-messages", "send-node-heartbeat", "get-run"):
            assert client.post(f"/v1/fleet/{path}", content=bytes(300_000)).status_code == 413
            assert client.post(f"/v1/fleet/{path}", content=bytes(200_000)).status_code in HEARD
        path = "/v1/fleet/push-object"
        assert client.post(path, content=bytes(5_000_000)).status_code in HEARD
        assert client.post(path, content=bytes(9_000_000)).status_code == 413


def test_without_the_proxy_anybody_may_control_the_engine(first, place):
    """What the gate is for: the engine itself asks for no credentials at all."""
    table = tomllib.loads((place.server / "engine" / "flwr" / "config.toml").read_text())
    address = table["superlink"]["engine"]["address"]
    kind = {"Content-Type": "application/protobuf"}
    with httpx.Client(base_url=f"https://{address}", verify=False, headers=kind) as nobody:
        for name in ("list-nodes", "list-runs"):
            assert nobody.post(f"/v1/control/{name}").status_code == 200


@pytest.mark.parametrize("kind", ["no certificate", "own authority", "never approved"])
def test_a_client_that_was_not_approved_does_not_get_past_the_handshake(
    first, place, tmp_path, kind
):
    consortium = Consortium.open(place.server)
    key = new_key()
    context = ssl.create_default_context(cafile=str(place.server / "authority" / "certificate.pem"))
    if kind != "no certificate":
        signer = new_key() if kind == "own authority" else consortium._signer()
        made = client_certificate(consortium.authority(), signer, key.public_key(), CLIENTS[0])
        write_key(tmp_path / "key.pem", key)
        (tmp_path / "certificate.pem").write_text(pem(made))
        context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "key.pem")
    with (
        httpx.Client(base_url=f"https://127.0.0.1:{place.port}", verify=context) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.post("/v1/fleet/pull-messages")


# --- who comes and goes, and what is killed ------------------------------------------------------


@pytest.mark.slow  # test_kills.py kills each process, the administrators' trial joins and stops
def test_a_third_client_joins_and_a_killed_server_and_a_stopped_run_resume(first, place):
    """Enough rounds for all of this on a slow machine: the run is stopped at the end."""
    run = place.submit("rounds=500", "evaluate.every=0")
    place.wait_for("a first round", lambda: 1 in trained(run))
    place.add(CLIENTS[2])
    place.wait_for(
        "the third client", lambda: any(CLIENTS[2] in own for own in trained(run).values())
    )
    killed = place.processes.pop("up")
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    done = max(trained(run))
    assert place.state(run) == "running", "nobody could record that it is not"
    place.up()
    place.wait_for("all three", lambda: trained(run).get(done + 2) == set(CLIENTS))
    found = trained(run)
    assert sorted(found) == list(range(1, max(found) + 1)), "no round is missing"
    assert found[1] == set(CLIENTS[:2])
    place.do("server", "stop", run.name)
    place.wait_for("the stop", lambda: place.state(run) == "stopped")
    kept = max(trained(run))
    assert not (run / "summary.json").exists()
    place.do("server", "submit", "--again", run.name)
    place.wait_for("another round", lambda: kept + 1 in trained(run))
    assert f"round {kept + 1}/500" in place.do("server", "log", run.name)
    place.do("server", "stop")
    place.wait_for("the second stop", lambda: place.state(run) == "stopped")


def test_a_revoked_client_is_out_at_once_and_nobody_else(first, place):
    others = {own["name"] for own in place.status()["clients"]} - {CLIENTS[0]}
    assert CLIENTS[1] in others
    with gate_client(place, CLIENTS[0]) as client, gate_client(place, CLIENTS[1]) as other:
        assert client.post("/v1/fleet/pull-messages").status_code == 401
        kit = place.server / "kits" / f"{CLIENTS[0]}.toml"
        (place.folder / "kit-0.toml").write_bytes(kit.read_bytes())
        place.do("server", "revoke", CLIENTS[0])
        place.wait_for("its end", lambda: f"{CLIENTS[0]} is out" in place.log("up"))

        def refused() -> bool:
            try:
                client.post("/v1/fleet/pull-messages")
            except httpx.TransportError:
                return True
            return False

        place.wait_for("the gate", refused, 20)
        assert other.post("/v1/fleet/pull-messages").status_code == 401, "a signature is missing"
    done = run_typed(["client", "doctor", place.folder / "kit-0.toml"], cwd=place.folder)
    assert done.returncode == 1
    assert "does not let this client in" in done.stdout
    clients = {own["name"]: own["online"] for own in place.status()["clients"]}
    assert clients == dict.fromkeys(others, True)


@pytest.mark.slow  # this file does the same step by step
def test_a_rehearsal_does_all_of_it_and_leaves_nothing_running(tiny_model, tmp_path):
    """Split from one data set, as in a simulation; one client, as each needs several processes."""
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    words = ["rehearse", recipe, "rounds=1", "--clients", "1", "--out", "rehearsal", "--json"]
    done = subprocess.run(
        silotune_command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "hospital-0 is connected" in done.stderr
    summary = json.loads(done.stdout)
    assert list(summary["clients"]) == [CLIENTS[0]]
    left = [p.info for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(p.info)]
    assert left == []


def test_every_command_of_the_readme_is_one_that_is_run_here():
    """test_readme.py leaves them out, because some never end."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^silotune ((?:server|client) \w+|rehearse)", readme, re.MULTILINE))
    here = Path(__file__).read_text(encoding="utf-8")
    assert shown
    for words in shown:
        assert ", ".join(f'"{word}"' for word in words.split()) in here or words == "rehearse"
