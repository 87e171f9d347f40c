"""kill -9 at named points, then resume: the same adapter, byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import silotune
from tests.conftest import write_tiny_recipe
from tests.forked import run_forked
from tests.integration.kill_at import POINTS, run_and_die

ADAPTER = Path("adapter") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model):
    """The recipe, and the run that nobody interrupted."""
    place = tmp_path_factory.mktemp("whole")
    recipe = write_tiny_recipe(place, tiny_model, algorithm="fedadam")
    return recipe, silotune.run(recipe, out=place / "whole")


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_the_same_bytes(whole, tmp_path, point):
    recipe, untouched = whole
    out = tmp_path / "run"
    assert run_forked(run_and_die, point, str(recipe), str(out)) == -signal.SIGKILL
    done = silotune.run(resume=out)
    assert (out / ADAPTER).read_bytes() == (untouched.path / ADAPTER).read_bytes()
    same = ("clients", "bytes_up", "bytes_down", "tokens_trained", "result_round")
    assert {k: done.summary[k] for k in same} == {k: untouched.summary[k] for k in same}
    rows = [(r["event"], r["round"], r.get("client")) for r in done.metrics]
    assert len(rows) == len(set(rows))
    leftovers = [p for p in out.rglob("*") if p.name.endswith((".part", ".gone"))]
    assert not leftovers
    assert not (out / "spool").exists()
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["round-00003"]


def test_clients_that_were_spooled_are_not_trained_again(whole, tmp_path, monkeypatch):
    recipe, _ = whole
    out = tmp_path / "run"
    killed = run_forked(run_and_die, "half of an update", str(recipe), str(out))
    assert killed == -signal.SIGKILL
    from silotune.federation import client

    asked = []
    real = client.train_round

    def train_round(worker, data, broadcast, memory, *rest, **how):
        asked.append((broadcast.round, data.name))
        return real(worker, data, broadcast, memory, *rest, **how)

    monkeypatch.setattr(client, "train_round", train_round)
    silotune.run(resume=out)
    # it dies in the second update of round 2: the first one stays
    assert asked[:2] == [(2, "hospital-1"), (2, "hospital-2")]


def listen():
    """A process ignores what its parent ignored, and tests may run under nohup."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGTERM", pytest.param("SIGHUP", marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_cleanly_and_it_resumes(whole, tmp_path, name):
    recipe, _ = whole
    out = tmp_path / "run"
    command = [sys.executable, "-m", "silotune", "run", str(recipe), "rounds=400"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=listen,
    )
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "round-00001").exists():
        assert time.monotonic() < deadline, "no round within 60 s"
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    assert f"stopped by {name}" in errors
    assert f"--resume {out}" in errors
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its group is left
    assert not (out / "summary.json").exists()
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["round"] in (0, 1)


def test_a_reader_of_stderr_that_ends_early_does_not_end_the_run(whole, tmp_path):
    """`silotune run recipe.toml 2>&1 | head -1` once stopped the run at its second line."""
    recipe, untouched = whole
    out = tmp_path / "run"
    command = f"{sys.executable} -m silotune run {recipe} --out {out} 2>&1 >{tmp_path}/said"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert (out / ADAPTER).read_bytes() == (untouched.path / ADAPTER).read_bytes()
    assert "adapter" in (tmp_path / "said").read_text()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup, where SIGHUP must not end a run."""
    from silotune.cli.frame import errors_as_exit_codes

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with errors_as_exit_codes():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
