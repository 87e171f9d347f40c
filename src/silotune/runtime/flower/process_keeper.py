"""Holds an engine's processes, and ends them all once the process that started it is gone.

It reads lines of JSON from standard input: what to start, and what to send a signal to. When that
input closes (the run is over, or was killed), it ends everything that was started: all of its
descendants, including those that lost their parents, and, for systems where it cannot adopt those,
every process that carries the engine's mark in its environment. Then it removes the engine's
private folder. Start it as `python -m silotune.runtime.flower.process_keeper MARK FOLDER`.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psutil import Process

MARK = "SILOTUNE_ENGINE"
"""Environment variable that every process of an engine carries; its value names the engine."""
GRACE_S = 10.0
"""Seconds between asking a process to end and killing it."""
CANNOT_START = 127
"""Exit status for a program that cannot be started, as in a shell."""
PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h: orphans among the descendants become children of this process."""


def main(mark: str, folder: Path) -> None:
    """Start what is requested and report what ends, until the input closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    pending = b""
    try:
        while True:
            ready, _, _ = select.select([0], [], [], 0.2)
            if ready:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    break
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    order = json.loads(line)
                    if "signal" in order:
                        _tell(started, order["name"], order["signal"])
                        continue
                    try:
                        process = _start(order, mark)
                    except OSError as error:
                        sys.stderr.write(f"{error}\n")
                        _report(order["name"], CANNOT_START)
                    else:
                        started[process.pid] = order["name"], process
            for pid, status in _ended_children():
                if pid in started:
                    _report(started.pop(pid)[0], os.waitstatus_to_exitcode(status))
    finally:
        end_all(mark, adopted=True)
    # not after an error: the process that started this one still reads the log
    shutil.rmtree(folder, ignore_errors=True)


def _tell(started: dict[int, tuple[str, subprocess.Popen[bytes]]], name: str, signum: int) -> None:
    for pid, (own, _) in started.items():
        if own == name:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def _report(name: str, code: int) -> None:
    sys.stdout.write(json.dumps({"ended": name, "code": code}) + "\n")
    sys.stdout.flush()


def _start(order: dict[str, Any], mark: str) -> subprocess.Popen[bytes]:
    with Path(order["log"]).open("ab") as log:
        return subprocess.Popen(
            order["argv"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, MARK: mark},
        )


def _ended_children() -> list[tuple[int, int]]:
    """Children that have ended since the last call, adopted ones too, with their status."""
    found: list[tuple[int, int]] = []
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            found.append(ended)
    return found


def left_of(mark: str, *, adopted: bool) -> "list[Process]":
    """The processes of an engine that are still running: those that carry its mark.

    Args:
        mark: The engine's own value of `MARK`.
        adopted: Include all descendants of this process. Only a keeper has no unrelated ones.
    """
    import psutil

    below = psutil.Process().children(recursive=True) if adopted else []
    found = {p.pid: p for p in below}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or not ours to look at
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process
    found.pop(os.getpid(), None)
    return list(found.values())


def end_all(mark: str, *, adopted: bool) -> None:
    """Ask all processes that are left to end; kill those that do not, and what they started.

    Gives up on processes that even the system cannot end after twice GRACE_S. See `left_of`.
    """
    import psutil

    def tell(how: "Callable[[Process], None]") -> None:
        for process in left_of(mark, adopted=adopted):
            with contextlib.suppress(psutil.Error):
                how(process)

    tell(psutil.Process.terminate)
    deadline = time.monotonic() + GRACE_S
    while left_of(mark, adopted=adopted) and time.monotonic() < deadline + GRACE_S:
        if time.monotonic() > deadline:
            tell(psutil.Process.kill)
        time.sleep(0.1)
        if adopted:
            _ended_children()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
