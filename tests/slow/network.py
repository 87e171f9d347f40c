"""Machines for tests: network namespaces on one bridge, each with an address and a home folder.

Needs root and `ip`. Each machine runs its commands in its own home. Files get from one to another
only by `carry`, as by post.
"""

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.forked import command, run_forked
from tests.integration.test_deployment import trained

PREFIX = f"st{os.getpid()}"
HUB = f"{PREFIX}-hub"
CLONE_NEWNET = 0x40000000
"""As setns(2) calls a network namespace."""


def usable() -> bool:
    """Whether this machine lets us make network namespaces and links between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"{PREFIX}-try"
    with contextlib.suppress(subprocess.CalledProcessError):
        ip("netns", "add", name)
        try:
            ip("link", "add", "one", "netns", name, "type", "veth", "peer", "name", "two")
            return True
        finally:
            ip("netns", "del", name)
    return False


def ip(*words: object) -> str:
    done = subprocess.run(
        ["ip", *map(str, words)], check=True, capture_output=True, text=True, timeout=30
    )
    return done.stdout


class Network:
    """A bridge, and the machines on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machines: dict[str, Machine] = {}
        ip("netns", "add", HUB)
        ip("-n", HUB, "link", "add", "bridge", "type", "bridge")
        ip("-n", HUB, "link", "set", "bridge", "up")

    def machine(self, name: str) -> "Machine":
        made = self.machines[name] = Machine(name, self.folder / name, len(self.machines) + 1)
        return made

    def close(self) -> None:
        for machine in self.machines.values():
            machine.close()
        ip("netns", "del", HUB)


class Machine:
    """One of the machines."""

    def __init__(self, name: str, home: Path, number: int) -> None:
        self.name, self.home, self.space = name, home, f"{PREFIX}-{name}"
        self.address = f"10.77.0.{number}"
        self.processes: dict[str, subprocess.Popen] = {}
        home.mkdir()
        ip("netns", "add", self.space)
        peer = ("peer", "name", name, "netns", HUB)
        ip("link", "add", "eth0", "netns", self.space, "type", "veth", *peer)
        ip("-n", HUB, "link", "set", name, "master", "bridge", "up")
        ip("-n", self.space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        ip("-n", self.space, "link", "set", "lo", "up")
        self.link("up")

    def link(self, state: str) -> None:
        """Plug the cable in or out: up, down."""
        ip("-n", self.space, "link", "set", "eth0", state)

    def slow_down(self, rate: str) -> None:
        """Send no faster than this, as `tc` reads it, for instance 256kbit."""
        shape = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "2s")
        words = ("tc", "-n", self.space, "qdisc", "replace", "dev", "eth0", *shape)
        subprocess.run(words, check=True, capture_output=True)

    def full_speed(self) -> None:
        """Undo `slow_down`."""
        words = ("tc", "-n", self.space, "qdisc", "del", "dev", "eth0", "root")
        subprocess.run(words, check=True, capture_output=True)

    def _argv(self, command: str) -> list[str]:
        words = shlex.split(command)
        assert words[0] == "silotune", command
        return [*("ip", "netns", "exec", self.space), sys.executable, "-m", *words]

    def _environment(self, more: dict[str, str] | None) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.home), "OMP_NUM_THREADS": "1", **(more or {})}

    def try_(
        self, command: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command here; return its output, whatever its exit status.

        With an environment of its own it is a new process, otherwise a fork with the libraries.
        """
        if environment is None:
            return self._typed(command)
        return subprocess.run(
            self._argv(command),
            cwd=self.home,
            env=self._environment(environment),
            capture_output=True,
            text=True,
        )

    def _typed(self, command: str) -> subprocess.CompletedProcess[str]:
        words = shlex.split(command)
        with tempfile.TemporaryDirectory() as scratch:
            streams = [Path(scratch) / name for name in ("in", "out", "err")]
            streams[0].touch()
            where = (self.space, self._environment(None), words[1:], str(self.home))
            code = run_forked(_command_in, *where, [str(path) for path in streams])
            said = [path.read_text(encoding="utf-8") for path in streams[1:]]
        return subprocess.CompletedProcess(words, code, *said)

    def do(self, command: str) -> str:
        """Run a command here that has to succeed."""
        done = self.try_(command)
        assert done.returncode == 0, f"{self.name}: {command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, command: str, environment: dict[str, str] | None = None) -> None:
        """Start a command here that keeps running; its output goes to a log of its name."""
        name = " ".join(command.split()[1:3])
        with (self.home / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self._argv(command),
                cwd=self.home,
                env=self._environment(environment),
                stdout=log,
                stderr=log,
            )

    def end(self, name: str) -> int:
        """Send SIGTERM to what was started; return its exit status."""
        self.processes[name].terminate()
        return self.processes.pop(name).wait(300)

    def crash(self) -> None:
        """What a power failure does: every process is gone, and the cable is dead."""
        self.link("down")
        for pid in ip("netns", "pids", self.space).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), 9)
        for process in self.processes.values():
            process.wait(60)
        self.processes.clear()

    def said(self, name: str) -> str:
        path = self.home / f"{name}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name)
        self.crash()
        ip("netns", "del", self.space)


def _command_in(
    space: str, environment: dict[str, str], argv: list[str], cwd: str, streams: list[str]
) -> None:
    """In a fork: what `ip netns exec` does for the network, and then the command."""
    with open(f"/var/run/netns/{space}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    os.environ.update(environment)
    command(argv, cwd, streams)


def carry(source: Path, to: Path) -> None:
    """By post, by e-mail, on a stick: the only way a file leaves a machine."""
    shutil.copyfile(source, to)


def wait_for(what: str, ready, timeout_s: float = 600, *, told=lambda: "") -> float:
    """Wait until it is ready; return the seconds it took."""
    began = time.monotonic()
    while not ready():
        assert time.monotonic() - began < timeout_s, f"timed out waiting for {what}.\n{told()}"
        time.sleep(0.2)
    return time.monotonic() - began


def missed(run: Path) -> list[str]:
    """Who gave no usable update, in which round, and why."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        f"{row['client']}, round {row['round']}: {row['status']}"
        for row in rows
        if row["event"] == "train" and row["status"] != "ok"
    ]


def rounds_with(run: Path, name: str) -> list[int]:
    """The rounds in which a client's update was used."""
    return sorted(round_ for round_, names in trained(run).items() if name in names)


def fill(folder: Path) -> Path:
    """Take all the room that is left in a folder's file system, with one file."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    return filler
