"""Client apps are forks of one process that has imported Flower: what differs from programs."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from silotune.runtime.flower import superexec
from silotune.runtime.flower.kept_processes import program
from silotune.runtime.flower.supernode import EXECUTOR, start_own_executor

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(sys.platform != "linux", reason="client apps are programs elsewhere"),
]

SCRIPT = """
import json, os, subprocess, sys, time
from multiprocessing import active_children, forkserver
from types import SimpleNamespace
import psutil
from silotune.runtime.flower.superexec import CLIENT_APP, fork_client_apps

def server():
    (own,) = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    return own

def done(what):
    for process in active_children():
        process.join(60)
    print(f"--- {what}", flush=True)

if __name__ == "__main__":
    module = SimpleNamespace()
    fork_client_apps(module)
    start = module.subprocess.Popen
    start([CLIENT_APP, "--help"])
    done("shown")
    start([CLIENT_APP, "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done("quiet")
    print(json.dumps({"threads": server().num_threads()}), flush=True)
    first = server()
    first.kill()
    while first.status() != psutil.STATUS_ZOMBIE:  # waiting for it would hide that it has ended
        time.sleep(0.05)
    start([CLIENT_APP, "--help"])
    done("again")
    start(["echo", "a program"])
    time.sleep(1)
"""


def test_a_client_app_is_a_fork_that_does_what_the_program_does(tmp_path):
    script = tmp_path / "executor.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, rest = done.stdout.split("--- shown\n")
    own = subprocess.run([program("flwr-clientapp"), "--help"], capture_output=True, text=True)
    assert shown == own.stdout
    assert shown.startswith("usage: flwr-clientapp")
    quiet, rest = rest.split("--- quiet\n")
    assert quiet == ""
    facts, rest = rest.split("\n", 1)
    assert json.loads(facts) == {"threads": 1}, "a lock that another thread holds stays locked"
    again, other = rest.split("--- again\n")
    assert again == shown, "a fork server that was killed is started again"
    assert other == "a program\n"


def test_a_client_app_needs_no_torch():
    """The fork server would carry it for every client of this machine."""
    ready = "; ".join(f"import {name}" for name in superexec.READY)
    code = f"{ready}; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_supernode_starts_our_executor_and_nothing_else_of_its_own(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda argv: started.append(list(argv)))
    module = SimpleNamespace()
    start_own_executor(module)
    module.subprocess.Popen([EXECUTOR, "--insecure", "--parent-pid", "7"])
    module.subprocess.Popen(["other", "--insecure"])
    ours = [sys.executable, "-m", superexec.__name__, "--insecure", "--parent-pid", "7"]
    assert started == [ours, ["other", "--insecure"]]
