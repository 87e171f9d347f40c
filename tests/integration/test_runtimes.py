"""Flower's two engines give the plain loop's result and leave nothing behind. Real processes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tomli_w

import silotune
from silotune.core.processors import usable_threads
from tests.conftest import hospital_rows, write_jsonl, write_tiny_recipe

ADAPTER = Path("adapter") / "adapter_model.safetensors"
ENGINES = ("flower-simulation", "flower")
SHORT = ["rounds=2", "data.max_rows=4"]
BEFORE = set(psutil.pids())
FOLDERS_BEFORE = set(Path("/tmp").glob("silotune-*"))
pytestmark = [pytest.mark.timeout(600), pytest.mark.engine]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_model):
    """Two clients instead of three: every client of a deployment needs several processes."""
    place = tmp_path_factory.mktemp("runtimes")
    path = write_tiny_recipe(place, tiny_model, algorithm="fedadam")
    write_jsonl(place / "hospitals.jsonl", hospital_rows(num_clients=2))
    return path


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """The same recipe in all three runtimes; one actor in simulation. The server scores, too."""
    place = tmp_path_factory.mktemp("runs")
    own = write_jsonl(place / "own.jsonl", [{"question": "Who?", "answer": f"I {n}"} for n in "ab"])
    one_actor = [f"runtime.client_cpus={usable_threads()}"]
    return {
        name: silotune.run(
            recipe,
            [
                *(*SHORT, f"runtime.name={name}", f"evaluate.server_path={own}"),
                *(one_actor if name.endswith("simulation") else []),
            ],
            out=place / name,
        )
        for name in ("in-process", *ENGINES)
    }


@pytest.mark.slow  # in tests/unit/runtime/flower/test_server.py without an engine
def test_private_noise_is_added_at_the_server_of_an_engine_too(recipe, tmp_path):
    keys = [
        *(*SHORT, "algorithm.weights=uniform", "privacy.unit=client", "privacy.delta=0.1"),
        *("privacy.noise_multiplier=1", "privacy.noise=seeded", "privacy.clip_norm=0.5"),
    ]
    one_actor = [f"runtime.client_cpus={usable_threads()}", "runtime.name=flower-simulation"]
    here = silotune.run(recipe, keys, out=tmp_path / "here")
    there = silotune.run(recipe, [*keys, *one_actor], out=tmp_path / "there")
    assert there.summary["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there.summary["privacy"] == here.summary["privacy"]


ENGINE_WORDS = ("/silotune-", "flower-", "flwr-", "silotune.runtime.flower", "flwr.supernode")
"""Private folders, Flower's programs, ours, and the fork servers of clients."""


def engine_processes() -> list[psutil.Process]:
    """The processes of an engine, found by its private folder or by Flower's programs."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            dead = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if not dead and process.pid not in BEFORE and any(word in line for word in ENGINE_WORDS):
            found.append(process)
    return found


def private_folders() -> set[Path]:
    return set(Path("/tmp").glob("silotune-*")) - FOLDERS_BEFORE


def start(recipe: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "silotune", "run", str(recipe), *overrides, "--out", str(out)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path.name} within 150 s"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def wait_until_free(out: Path) -> None:
    """Until the engine of a killed run is gone: its keeper holds the run folder that long."""
    import fcntl

    deadline = time.monotonic() + 60
    with (out / "run.lock").open() as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, "the engine outlives its run"
                time.sleep(0.1)
            else:
                return


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gives_the_same_adapter_bit_for_bit(runs, engine):
    ours, theirs = runs["in-process"].path, runs[engine].path
    assert (ours / ADAPTER).read_bytes() == (theirs / ADAPTER).read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_records_the_same_numbers(runs, engine):
    timed = {"seconds", "seconds_training"}

    def numbers(run):
        rows = [{k: v for k, v in row.items() if k not in timed} for row in run.metrics]
        return sorted(rows, key=lambda r: (r["round"], r["event"], r.get("client", "")))

    assert numbers(runs[engine]) == numbers(runs["in-process"])
    assert [r["round"] for r in runs[engine].metrics if r["event"] == "server-test"] == [0, 1, 2]
    same = ("clients", "overall", "bytes_up", "bytes_down", "tokens_trained", "result_round")
    ours, theirs = runs["in-process"].summary, runs[engine].summary
    assert {k: theirs[k] for k in same} == {k: ours[k] for k in same}


def test_no_round_loads_the_base_again(runs):
    # the starting process loads it for the first adapter and for the result
    assert runs["in-process"].summary["base_model_loads"] == 1
    assert runs["flower-simulation"].summary["base_model_loads"] == 2 + 1  # one actor
    assert runs["flower"].summary["base_model_loads"] == 2 + 2  # a worker for each client


def test_nothing_is_left_behind(runs):
    assert engine_processes() == []
    assert private_folders() == set()
    for engine in ENGINES:
        left = {p.name for p in runs[engine].path.iterdir()}
        assert left <= {p.name for p in runs["in-process"].path.iterdir()} | {"run-id"}


def test_rows_of_a_rehearsal_do_not_stay_on_disk(runs):
    secret = hospital_rows(num_clients=2)[0]["question"].encode()
    for path in runs["flower"].path.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("engine", "name"),
    [
        (ENGINES[0], "SIGTERM"),
        (ENGINES[1], "SIGKILL"),
    ],
)
@pytest.mark.slow  # test_resume.py sends signals, test_process_keeper.py kills a starter
def test_an_ended_run_takes_its_engine_along_and_resumes_to_the_same_bytes(
    recipe, runs, tmp_path, engine, name
):
    """One signal per engine; the loop and the keeper do not distinguish them."""
    out = tmp_path / "run"
    process = start(recipe, out, *SHORT, f"runtime.name={engine}")
    wait_for(out / "checkpoints" / "round-00001", process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=90)
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
        wait_until_free(out)
    else:
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped by SIGTERM" in errors
        assert f"--resume {out}" in errors
    assert engine_processes() == []  # the keeper ends what a dead starter cannot
    assert private_folders() == set()
    assert not (out / "summary.json").exists()
    silotune.run(resume=out)
    assert (out / ADAPTER).read_bytes() == (runs["in-process"].path / ADAPTER).read_bytes()


@pytest.mark.slow  # in tests/unit/runtime/flower/test_server.py without an engine
def test_a_run_without_quorum_fails_and_saves_no_adapter(recipe, tmp_path):
    """Flower itself ends such a run with exit status 0 and an untrained adapter."""
    out = tmp_path / "run"
    process = start(recipe, out, "train.lr=1e20", "runtime.name=flower-simulation")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "QuorumError: round 1: 0 usable updates of 2" in errors
    assert "hospital-0: training failed" in errors
    assert not (out / "adapter").exists()
    assert engine_processes() == []


@pytest.mark.slow
def test_clients_take_data_and_limits_from_their_own_configuration(tiny_model, tmp_path):
    """One of three declines because of its limit; the others use rows the server never names."""
    clients = tmp_path / "clients"
    for n in range(3):
        own = clients / f"files-{n}"
        own.mkdir(parents=True)
        rows = [row for row in hospital_rows() if row["source"] == f"hospital-{n}"]
        write_jsonl(own / "mine.jsonl", rows)
        table = {
            "name": f"hospital-{n}",
            "state": f"state-{n}",
            "model": str(tiny_model),
            "data": {"path": f"files-{n}/mine.jsonl"},
            "limits": {"max_steps": 1 if n == 1 else 2},
            "runtime": {"device": "cpu", "threads": 1},
        }
        (clients / f"{n}.toml").write_text(tomli_w.dumps(table))
    recipe = write_tiny_recipe(tmp_path, tiny_model)
    process = start(
        recipe,
        tmp_path / "run",
        "rounds=1",
        "runtime.name=flower",
        "partition.by=none",
        f"data.path={clients}",
    )
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "hospital-1: declined: client 'hospital-1' does not take part" in errors
    assert "train.local_steps = 2 is above limits.max_steps" in errors
    written = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    trained = {r["client"]: r["status"] for r in rows if r["event"] == "train"}
    assert trained == {"hospital-0": "ok", "hospital-1": "declined", "hospital-2": "ok"}
    assert (clients / "state-0" / "worker.log").exists()
    assert str(clients) not in written
    assert "hospital-0" in output
