"""The keeper of an engine's processes: whoever started it is gone, so is everything below it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from silotune.runtime.flower import process_keeper
from silotune.runtime.flower.process_keeper import MARK

GRACE_S = 0.2
SHORT = f"""
import sys
from pathlib import Path
from silotune.runtime.flower import process_keeper
process_keeper.GRACE_S = {GRACE_S}
process_keeper.main(sys.argv[1], Path(sys.argv[2]))
"""
"""The keeper itself, with less patience."""
ENDED_S = 10.0
"""A busy machine's time for what takes a fraction of a second."""

SAY = """
import os, pathlib, signal, subprocess, sys, time
def say(name):
    part = pathlib.Path(sys.argv[1]) / (name + ".part")
    part.write_text(str(os.getpid()))
    part.rename(part.with_suffix(""))
"""
SIMPLE = SAY + "say('simple'); time.sleep(600)"
DEAF = SAY + "signal.signal(signal.SIGTERM, signal.SIG_IGN); say('deaf'); time.sleep(600)"
# away from its parent, its group and its session, deaf, and without the engine's mark
HIDDEN = (
    SAY
    + """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import os, time; exec(os.environ['SAY']); say('hidden'); time.sleep(600)"
        os.execve(sys.executable, [sys.executable, '-S', '-c', code, sys.argv[1]], {'SAY': SAY})
    os._exit(0)
os.wait()
say('parent')
time.sleep(600)
"""
).replace("{'SAY': SAY}", "{'SAY': " + repr(SAY) + "}")
ORPHAN = (
    SAY + "say('left'); subprocess.Popen([sys.executable, '-S', '-c', sys.argv[2], sys.argv[1]])"
)
# starts another when it is asked to end
HYDRA = (
    SAY
    + """
def grow(*_):
    subprocess.Popen([sys.executable, '-S', '-c', sys.argv[2], sys.argv[1]])
    os._exit(0)
signal.signal(signal.SIGTERM, grow)
say('hydra')
time.sleep(600)
"""
)


class Kept:
    """A keeper and what it was told to start."""

    def __init__(self, tmp_path, command):
        self.folder = tmp_path / "private"
        self.folder.mkdir()
        self.pids = tmp_path / "pids"
        self.pids.mkdir()
        self.log = tmp_path / "log"
        self.mark = f"mark of {tmp_path}"
        self.process = subprocess.Popen(
            [sys.executable, *command, self.mark, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def order(self, name, code, *more):
        argv = [sys.executable, "-S", "-c", code, str(self.pids), *more]
        line = json.dumps({"name": name, "argv": argv, "log": str(self.log)}).encode() + b"\n"
        self.process.stdin.write(line)
        self.process.stdin.flush()

    def pid(self, name) -> int:
        wait_until(lambda: (self.pids / name).exists(), f"{name} to begin")
        return int((self.pids / name).read_text())

    def close(self):
        self.process.stdin.close()


def wait_until(true, what, seconds=ENDED_S):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_end(pids):
    wait_until(lambda: not any(map(runs, pids)), "processes to end")


@pytest.fixture
def start(tmp_path):
    """Starts keepers; kills what a failed test leaves behind."""
    kept: list[Kept] = []

    def start(command=("-c", SHORT)):
        kept.append(Kept(tmp_path, command))
        return kept[-1]

    yield start
    for one in kept:
        with contextlib.suppress(BrokenPipeError):
            one.close()
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        one.process.stderr.close()
        for path in one.pids.glob("*"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def bystanders():
    """Processes that the keeper has no business with: one plain, one of another engine."""
    code = ["-S", "-c", "import time; time.sleep(600)"]
    others = [
        subprocess.Popen([sys.executable, *code], env={**os.environ, **mark})
        for mark in ({}, {MARK: "another engine"})
    ]
    yield others
    for other in others:
        assert other.poll() is None, "an unrelated process was ended"
        other.kill()
        other.wait()


def test_the_command_that_the_engine_starts_ends_what_it_started_and_its_folder(start, bystanders):
    kept = start(("-m", "silotune.runtime.flower.process_keeper"))
    (kept.folder / "engine.log").write_text("...")
    kept.order("simple", SIMPLE)
    pid = kept.pid("simple")
    assert psutil.Process(pid).environ()[MARK] == kept.mark
    kept.close()
    assert kept.process.wait(timeout=ENDED_S) == 0
    assert not runs(pid)
    assert not kept.folder.exists()
    assert kept.process.stderr.read() == b""


def test_a_tree_of_hidden_and_deaf_processes_ends_when_the_pipe_closes(start, bystanders):
    kept = start()
    kept.order("simple", SIMPLE)
    kept.order("deaf", DEAF)
    kept.order("hidden", HIDDEN)
    kept.order("orphan", ORPHAN, DEAF.replace("'deaf'", "'orphan'"))
    kept.order("hydra", HYDRA, DEAF.replace("'deaf'", "'head'"))
    names = ("simple", "deaf", "hidden", "parent", "orphan", "hydra")
    pids = {name: kept.pid(name) for name in names}
    hidden = psutil.Process(pids["hidden"])
    assert MARK not in hidden.environ(), "it is found only as an adopted child"
    assert hidden.ppid() == kept.process.pid
    assert os.getsid(hidden.pid) != os.getsid(kept.process.pid)
    began = time.monotonic()
    kept.close()
    assert kept.process.wait(timeout=ENDED_S) == 0
    assert time.monotonic() - began >= GRACE_S, "the deaf have been asked first"
    assert not any(map(runs, pids.values()))
    assert not runs(kept.pid("head")), "what was started meanwhile has ended too"
    assert not kept.folder.exists()


def test_everything_ends_when_the_starter_is_killed(start, tmp_path, bystanders):
    """kill -9 of a run: only the keeper is left to tidy up."""
    kept = start()  # only for its folders and its end
    starter = f"""
import json, subprocess, sys, time
kept = subprocess.Popen(
    [sys.executable, "-c", {SHORT!r}, {kept.mark!r}, {str(kept.folder)!r}],
    stdin=subprocess.PIPE, start_new_session=True,
)
for name, code in (("deaf", {DEAF!r}), ("hidden", {HIDDEN!r})):
    argv = [sys.executable, "-S", "-c", code, {str(kept.pids)!r}]
    order = dict(name=name, argv=argv, log={str(kept.log)!r})
    kept.stdin.write(json.dumps(order).encode() + b"\\n")
kept.stdin.flush()
open({str(kept.pids / "keeper")!r}, "w").write(str(kept.pid))
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-S", "-c", starter])
    pids = [kept.pid(name) for name in ("deaf", "hidden", "parent")]
    wait_until(lambda: (kept.pids / "keeper").read_text() != "", "the keeper")
    pids.append(kept.pid("keeper"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    began = time.monotonic()
    all_end(pids)
    assert time.monotonic() - began < GRACE_S + ENDED_S
    assert not kept.folder.exists()


def test_a_process_of_the_engine_that_was_started_elsewhere_ends_by_its_mark(start, bystanders):
    kept = start()
    kept.order("simple", SIMPLE)
    kept.pid("simple")
    code = ["-S", "-c", "import time; time.sleep(600)"]
    marked = subprocess.Popen([sys.executable, *code], env={**os.environ, MARK: kept.mark})
    kept.close()
    assert marked.wait(timeout=ENDED_S) == -signal.SIGTERM
    assert kept.process.wait(timeout=ENDED_S) == 0


def test_a_program_that_ends_by_itself_is_reported_with_its_status(start):
    kept = start()
    kept.order("good", "pass")
    kept.order("bad", "import sys; print('its last words', file=sys.stderr); sys.exit(3)")
    kept.order("killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    reports = [json.loads(kept.process.stdout.readline()) for _ in range(3)]
    assert sorted(reports, key=lambda r: r["ended"]) == [
        {"ended": "bad", "code": 3},
        {"ended": "good", "code": 0},
        {"ended": "killed", "code": -9},
    ]
    assert "its last words" in kept.log.read_text()
    assert kept.process.poll() is None


def test_an_orphan_that_ends_is_reaped_and_not_reported(start):
    kept = start()
    kept.order("orphan", ORPHAN, SAY + "say('brief')")
    pid = kept.pid("brief")
    report = json.loads(kept.process.stdout.readline())
    assert report == {"ended": "orphan", "code": 0}
    wait_until(lambda: not psutil.pid_exists(pid), "the orphan to be reaped")
    kept.order("next", "pass")
    assert json.loads(kept.process.stdout.readline()) == {"ended": "next", "code": 0}


def test_orders_that_arrive_in_pieces_or_together_are_all_followed(start):
    kept = start()
    stdin = kept.process.stdin
    orders = [
        json.dumps(
            {
                "name": f"n{i}",
                "argv": [sys.executable, "-S", "-c", "pass"],
                "log": str(kept.log),
                "pad": "x" * 30_000,
            }
        )
        for i in range(4)
    ]
    data = "".join(order + "\n" for order in orders).encode()
    stdin.write(data[:10])
    stdin.flush()
    time.sleep(0.05)
    stdin.write(data[10:])
    stdin.flush()
    reports = [json.loads(kept.process.stdout.readline()) for _ in range(4)]
    assert sorted(r["ended"] for r in reports) == ["n0", "n1", "n2", "n3"]


def test_a_program_that_is_not_there_is_reported_and_the_others_go_on(start):
    kept = start()
    kept.order("simple", SIMPLE)
    pid = kept.pid("simple")
    order = {"name": "none", "argv": ["/no/such/program"], "log": str(kept.log)}
    kept.process.stdin.write(json.dumps(order).encode() + b"\n")
    kept.process.stdin.flush()
    assert json.loads(kept.process.stdout.readline()) == {"ended": "none", "code": 127}
    assert runs(pid)
    kept.close()
    assert kept.process.wait(timeout=ENDED_S) == 0
    assert b"/no/such/program" in kept.process.stderr.read()


def test_a_keeper_that_fails_ends_all_and_leaves_the_log_to_its_starter(start):
    """The log is in the folder that it removes if all went well."""
    kept = start()
    kept.order("deaf", DEAF)
    pid = kept.pid("deaf")
    kept.process.stdin.write(b"no JSON\n")
    kept.process.stdin.flush()
    assert kept.process.wait(timeout=ENDED_S) != 0
    assert not runs(pid)
    assert kept.folder.exists()
    assert b"JSONDecodeError" in kept.process.stderr.read()


def test_a_process_that_calls_it_directly_keeps_its_own_children(monkeypatch, tmp_path, bystanders):
    """The engine does when its keeper was killed. It used to end every child of the user's process,
    and to take away their exit statuses."""
    monkeypatch.setattr(process_keeper, "GRACE_S", GRACE_S)
    mark = f"mark of {tmp_path}"
    deaf = subprocess.Popen(
        [sys.executable, "-S", "-c", DEAF, str(tmp_path)], env={**os.environ, MARK: mark}
    )
    wait_until(lambda: (tmp_path / "deaf").exists(), "it to begin")
    ends = subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(7)"])
    wait_until(lambda: not runs(ends.pid), "it to end")
    process_keeper.end_all(mark, adopted=False)
    assert deaf.wait(timeout=ENDED_S) == -signal.SIGKILL
    assert ends.wait() == 7, "its status belongs to the process that started it"
    assert bystanders[0].poll() is None


def test_a_process_that_cannot_be_ended_is_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(process_keeper, "GRACE_S", 0.1)
    told = []

    class Stuck:
        def terminate(self):
            told.append("terminate")

        def kill(self):
            told.append("kill")

    monkeypatch.setattr(psutil.Process, "terminate", Stuck.terminate)
    monkeypatch.setattr(psutil.Process, "kill", Stuck.kill)
    monkeypatch.setattr(process_keeper, "left_of", lambda mark, *, adopted: [Stuck()])
    began = time.monotonic()
    process_keeper.end_all("mark", adopted=False)
    assert time.monotonic() - began < 5
    assert told[0] == "terminate"
    assert set(told[1:]) == {"kill"}
