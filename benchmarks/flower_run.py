"""Starts a Flower app in Flower's simulation as its users do, and measures what it leaves running.

For peers.py and messages.py. Each run has a home folder of its own; the SuperLink that `flwr run`
starts would stay, so everything with this home is ended afterwards.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

import psutil
import torch


def environment(home: Path) -> dict[str, str]:
    """That of a run with this home folder; nothing is asked of a network.

    With PYTHONDONTWRITEBYTECODE every process would compile all modules anew, which costs those
    most that start most processes.
    """
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return inherited | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


class Memory:
    """The peak memory of all processes with a home folder."""

    def __init__(self, home: Path) -> None:
        self.peak, self._home, self._done = 0, str(home), Event()
        self._thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def processes(self) -> list[psutil.Process]:
        """All processes of the run."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("FLWR_HOME") == self._home:
                    found.append(process)
            except psutil.Error:
                continue  # it has ended
        return found

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            total = 0
            for process in self.processes():
                try:
                    # a page that several processes share counts once
                    total += cast(Any, process.memory_full_info()).pss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


def run_app(
    app: Path, config: Mapping[str, str | int], *, home: Path, nodes: int, cores_each: int
) -> int:
    """`flwr run` on all processors, from start to end; its output goes to `home`/log.

    Returns:
        The peak bytes of all its processes.
    """
    home.mkdir(parents=True)
    given = " ".join(f"{k}={v if isinstance(v, int) else repr(v)}" for k, v in config.items())
    federation = f"num-supernodes={nodes} client-resources-num-cpus={cores_each}"
    command = ["flwr", "run", str(app), "--run-config", given, "--stream"]
    federation += f" init-args-num-cpus={os.cpu_count() or 1}"
    if torch.cuda.is_available():  # one actor has all of it, as it has all processors
        federation += " client-resources-num-gpus=1.0 init-args-num-gpus=1"
    command += ["--federation-config", federation]
    with Memory(home) as memory, (home / "log").open("w") as log:
        try:
            subprocess.run(command, env=environment(home), stdout=log, stderr=log, check=False)
        finally:
            for process in memory.processes():
                process.kill()
    return memory.peak
