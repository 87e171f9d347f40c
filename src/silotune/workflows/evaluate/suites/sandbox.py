"""Run a program that a model wrote so that it can do little harm. Linux and macOS.

The program runs in a separate process: Python without site packages and without our environment, in
an empty folder, with stdin closed and output discarded. Kernel limits restrict CPU time, memory,
files and processes. An audit hook refuses other processes, the network, and every file except
Python's own library. If `unshare` works, the process also has its own user, network and process
namespaces. At the deadline, its entire process group is killed.

This does not stop code that is written to break out. It protects a machine from what models write
by accident. Run programs of people you do not trust in a virtual machine.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from silotune.core.errors import ConfigError

CHILD = Path(__file__).with_name("sandboxed.py")
PASSED = 86  # not 0, because a program can exit early with 0
ISOLATION = (
    (
        "--user",
        "--net",
        "--pid",
        "--fork",
        "--kill-child",
    ),  # also kills processes that left the group
    ("--user", "--net"),
)


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    wall_s: float = 10.0
    cpu_s: int = 8
    memory_bytes: int = 1 << 30
    """Address space, including Python's own."""


Outcome = Literal["passed", "failed", "timeout"]
Language = Literal["python", "js", "cpp"]


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that cuts off the network, found by trying it; empty if none works."""
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
    """What a report must say about the network; empty if it was cut off."""
    if isolation():
        return ""
    return (
        "unshare --user --net does not work here: only an audit hook kept the programs from "
        "using the network."
    )


def check_sandbox(limits: Limits | None = None) -> None:
    """Check that a harmless program passes; otherwise every program would seem to fail.

    Raises:
        ConfigError: It does not pass, or this system has no kernel limits (Windows).
    """
    if os.name != "posix" or run_program("import math, typing", limits) != "passed":
        raise ConfigError(
            "the sandbox for programs does not work on this machine: its Python cannot be started, "
            "or the kernel does not support the limits.\n"
            "  Run the suite on Linux, for example in a container, or allow more memory and time."
        )


def run_program(source: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program in the sandbox.

    Args:
        source: Its text.
        limits: What it may use.

    Returns:
        "passed" if it ran to its end, "timeout" if it was killed at the deadline, and "failed" for
        everything else: an exception, an early exit, a limit, a crash.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="silotune-sandbox-") as folder:
        program = Path(folder) / "program.py"
        program.write_text(source, encoding="utf-8", errors="replace")
        arguments = (str(program), str(limits.cpu_s), str(limits.memory_bytes), str(PASSED))
        return in_child(arguments, Path(folder), wall_s=limits.wall_s)


def in_child(
    arguments: Sequence[str],
    folder: Path,
    *,
    wall_s: float,
    passed: int = PASSED,
    options: Sequence[str] = (),
) -> Outcome:
    """Run sandboxed.py in a separate, isolated process group.

    Args:
        arguments: What it is told.
        folder: Its working folder.
        wall_s: Seconds until everything that it started is killed.
        passed: The exit code of a program that passed.
        options: More options for `unshare`, where it works.
    """
    start = [*isolation(), *options, "--"] if isolation() else []
    child = subprocess.Popen(
        [*start, sys.executable, "-I", "-S", str(CHILD), *arguments],
        cwd=folder,
        env={},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # its own process group, so that all of it can be killed
    )
    try:
        code = child.wait(wall_s)
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        # also after a normal end: processes that it left behind must not keep running
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return "passed" if code == passed else "failed"
