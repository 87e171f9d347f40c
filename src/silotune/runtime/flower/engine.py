"""Starts Flower's engine for one run, follows it, and ends it: nothing outlives the run.

SuperLink, SuperNodes and Ray use a private folder, and the caller's directory and environment. A
keeper holds them and ends them when this process is gone. The rounds run in the server app
(`server.py`); this file only starts, watches and reports.
"""

import contextlib
import importlib.util
import json
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from silotune.core.atomic_files import write_atomically
from silotune.core.errors import ConfigError
from silotune.data.files import locate
from silotune.federation.client_config import is_client_folder, load_client_configs
from silotune.federation.simulated_clients import write_client_configs
from silotune.models.sources import resolve
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.engine_command import CONNECTION, engine_environment
from silotune.runtime.flower.kept_processes import KEEPER, Kept
from silotune.runtime.flower.process_keeper import MARK
from silotune.runtime.flower.submit import NODE, Link
from silotune.runtime.identity import add_throwaways
from silotune.runtime.job import Job, Measured

START_S = 60.0
"""Seconds the SuperLink has to answer."""
LOG = "engine.log"
"""The engine's output."""


def check_installed(run: RunConfig) -> None:
    """Refuse a runtime whose libraries are not installed, before anything is started.

    Raises:
        ConfigError: Names the extra to install.
    """
    extra = "simulation" if run.runtime.name == "flower-simulation" else "flower"
    needed = ("flwr", "psutil", "ray") if extra == "simulation" else ("flwr", "psutil")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"runtime.name = '{run.runtime.name}' needs {', '.join(missing)}.\n"
            f"  Install it: make env EXTRAS={extra}"
        )


def drive(job: Job) -> Measured:
    """Run a job's rounds on Flower: the simulation engine, or the deployment engine on loopback.

    Raises:
        EngineError: A process of the engine ended, or did not answer.
        SilotuneError: The rounds ended with it, as in any runtime.
    """
    if job.state.round == 0:
        job.folder.save(job.state, last=False)  # where the server app finds the first adapter
    job.progress.doing("starting Flower's engine")
    with private_folder() as private, _Engine(private, job) as engine:
        engine.start_superlink()
        if job.run.runtime.name == "flower":
            engine.start_clients()
        engine.submit()
        outcome = engine.follow()
    return measured_from(outcome)


def measured_from(outcome: Mapping[str, Any]) -> Measured:
    """Convert the server app's outcome to what the run's report needs."""
    processes = outcome["processes"]
    return Measured(
        num_rows=outcome["num_rows"],
        base_model_loads=sum(p["base_loads"] for p in processes),
        # under [privacy], real clients report 0
        peak_memory_bytes=max((p["peak_memory_bytes"] for p in processes), default=0) or None,
    )


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can enter, with a short path: a socket's may have 107 bytes."""
    short = Path("/tmp")
    made = tempfile.mkdtemp(prefix="silotune-", dir=short if short.is_dir() else None)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _Engine(Link):
    """The processes of one run."""

    def __init__(self, private: Path, job: Job) -> None:
        super().__init__(job, work=private / "runs" / job.folder.run_id(), log=private / LOG)
        self.private, self.runtime = private, job.run.runtime
        self.port = free_port()
        self._kept: Kept | None = None

    def __enter__(self) -> "_Engine":
        home = self.private / "flwr"
        home.mkdir()
        write_connection(home, {"address": self.address, "insecure": True})
        self._kept = Kept(
            self.private,
            log=self.log,
            environment=self._environment(),
            # the run folder stays locked until the last process of this engine is gone
            lock=self.job.folder.lock_fd,
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._kept is not None
        if kind is not None and issubclass(kind, Exception):
            self._keep_log()
        self._kept.close()

    @property
    def host(self) -> str:
        return "127.0.0.1" if self.runtime.host == "localhost" else self.runtime.host

    @property
    def address(self) -> str:
        """Host and port as Flower reads them: IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def _environment(self) -> dict[str, str]:
        own = engine_environment(
            self.private / "flwr",
            private=self.private,
            runs=self.private / "runs",
            threads=self.runtime.threads,
        )
        own |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.private),
            # otherwise every Ray actor would start more slowly and keep its own copy of the logs
            "RAY_DEDUP_LOGS": "0",
        }
        if self._kept is not None:
            own[MARK] = self._kept.mark
        if self.runtime.ray_address is not None:
            own["RAY_ADDRESS"] = self.runtime.ray_address
        return own

    # --- starting

    def _order(self, name: str, *argv: str) -> None:
        assert self._kept is not None
        self._kept.start(name, argv, log=self.log)

    def start_superlink(self) -> None:
        """Start it and wait until it answers."""
        kind = ["--simulation"] if self.runtime.name == "flower-simulation" else []
        self._order(
            "superlink",
            "flower-superlink",
            *kind,
            "--insecure",
            *("--host", self.host, "--port", str(self.port)),
            *("--database", ":flwr-in-memory:"),
            "--disable-runtime-dependency-installation",
        )
        deadline = time.monotonic() + START_S
        while not self._answers():
            self._check_alive()
            if time.monotonic() > deadline:
                raise self._problem(f"Flower's SuperLink did not answer within {START_S:g} s")
            time.sleep(0.1)

    def _answers(self) -> bool:
        address = f"http://{self.address}/health"
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with contextlib.suppress(OSError), direct.open(address, timeout=2) as page:
            return page.status == 200
        return False

    def start_clients(self) -> None:
        """Start a SuperNode per client; each gets its configuration's path and nothing else."""
        for name, path in self._client_configs().items():
            self._order(
                f"client {name}",
                *NODE,
                "--insecure",
                *("--superlink", self.address),
                *("--port", str(free_port())),
                *("--node-config", f"client={json.dumps(str(path))}"),
            )

    def _client_configs(self) -> Mapping[str, Path]:
        run = self.job.run
        place = locate(run.data.path)
        if place is not None and is_client_folder(place):
            return load_client_configs(place)
        base = resolve(run.model.name)
        copy = str(base.absolute()) if isinstance(base, Path) else None
        folder, state = self.private / "clients", self.job.folder.client_folder
        made = write_client_configs(folder, self.job.rows, run, model=copy, state=state)
        if run.secure_sum.is_on:
            add_throwaways(made)
        return made

    def _options(self) -> list[str]:
        if self.runtime.name != "flower-simulation":
            return []
        return ["--federation-config", self._resources()]

    def _resources(self) -> str:
        wanted: dict[str, object] = {
            "num-supernodes": len(self.job.names),
            "client-resources-num-cpus": self.runtime.client_cpus or self.runtime.threads,
            "client-resources-num-gpus": float(self.runtime.client_gpus or 0),
        }
        return " ".join(f"{key}={value}" for key, value in wanted.items())

    def _keep_log(self) -> None:
        """Copy the engine's log to the run folder, because the run ended with an error."""
        if self.run_id is not None:
            self._flwr("log", str(self.run_id), CONNECTION, "--show")
        if self.log.exists() and self.job.folder.path.is_dir():
            write_atomically(self.job.folder.path / LOG, self.log.read_bytes())

    def _check_alive(self) -> None:
        """Raise if a process of the engine has ended unexpectedly."""
        assert self._kept is not None
        for name, code in self._kept.ended():
            if name == KEEPER:
                raise self._problem("the keeper of the engine's processes has ended")
            what = f"{name} ended with exit status {code}"
            if name == "superlink":
                raise self._problem(f"Flower's {what}")
            self.job.progress.note(what)


def write_connection(home: Path, connection: Mapping[str, Any]) -> None:
    """Tell Flower's commands where the SuperLink is."""
    table = {"superlink": {"default": CONNECTION, CONNECTION: dict(connection)}}
    write_atomically(home / "config.toml", tomli_w.dumps(table).encode())


def free_port() -> int:
    """A port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
