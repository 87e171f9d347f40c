"""Run a program that a model wrote, so that it can do little harm. Linux and macOS.

What holds it: a process of its own (Python without site packages and without our environment, in an
empty folder, stdin closed, output thrown away); kernel limits on CPU time, memory, files and
processes; an audit hook that refuses other processes, the network, and every file but Python's own
library; and where `unshare` works, a user, network and process namespace of its own. At the
deadline its whole process group is killed.

What it is not: a wall against code that is written to break out. It guards a machine from what
models write by accident. Give programs of people you do not trust a virtual machine.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from silotune.core.errors import ConfigError

CHILD = Path(__file__).with_name("sandboxed.py")
PASSED = 86  # not 0, which a program reaches by leaving early
ISOLATION = (
    ("--user", "--net", "--pid", "--fork", "--kill-child"),  # also kills what left the group
    ("--user", "--net"),
)


@dataclass(frozen=True)
class Limits:
    """What a program may use up."""

    wall_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    """Address space, Python's own included."""


Outcome = Literal["passed", "failed", "timeout"]


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that cuts the network off, found by trying it; empty where none works."""
    unshare = shutil.which("unshare")
    for flags in ISOLATION if unshare else ():
        command = (str(unshare), *flags)
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            quiet = subprocess.DEVNULL
            tried = [*command, "--", sys.executable, "-I", "-S", "-c", ""]
            done = subprocess.run(
                tried, stdin=quiet, stdout=quiet, stderr=quiet, env={}, timeout=20, check=False
            )
            if done.returncode == 0:
                return command
    return ()


def network_note() -> str:
    """What a report must say about the network; empty where it was cut off."""
    if isolation():
        return ""
    return (
        "unshare --user --net does not work here: the network was reachable for the programs, "
        "but for an audit hook."
    )


def check_sandbox(limits: Limits | None = None) -> None:
    """Make sure that a harmless program passes; otherwise all would seem to fail by themselves.

    Raises:
        ConfigError: It does not, or this system has no kernel limits (Windows).
    """
    if os.name != "posix" or run_program("import math, typing", limits) != "passed":
        raise ConfigError(
            "the sandbox for programs does not work on this machine: its Python cannot be started, "
            "or the kernel does not know the limits.\n"
            "  Run the suite on Linux, for instance in a container, or allow more memory and time."
        )


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a program of Python in the sandbox.

    Args:
        source: Its text.
        limits: What it may use up.

    Returns:
        "passed" if it ran through to its end, "timeout" if it was killed at the deadline, and
        "failed" for everything else: an exception, an early exit, a limit, a crash.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="silotune-sandbox-") as folder:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        return _run(program, limits)


def _run(program: Path, limits: Limits) -> Outcome:
    arguments = (str(program), str(limits.cpu_s), str(limits.memory_bytes), str(PASSED))
    start = [*isolation(), "--"] if isolation() else []
    child = subprocess.Popen(
        [*start, sys.executable, "-I", "-S", str(CHILD), *arguments],
        cwd=program.parent,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a group of its own, to be killed as a whole
    )
    try:
        code = child.wait(limits.wall_s)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        # also after a proper end: what it may have left behind must not live on
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return "passed" if code == PASSED else "failed"
