"""Starts Flower's engine for one run, follows it, and ends it: nothing outlives the run.

SuperLink, SuperNodes and Ray live in a private folder with the caller's directory and environment,
under a keeper that ends them when this process is gone. The rounds run in the server app
(`flower_server.py`); this file only starts, watches and reports.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from silotune.client_config import (
    LOCATIONS,
    is_client_folder,
    load_client_configs,
    write_client_configs,
)
from silotune.config import RunConfig
from silotune.errors import ConfigError, EngineError
from silotune.files import EXAMPLES, locate
from silotune.reading import DataConfig
from silotune.runtime.job import Job, Measured
from silotune.runtime.keeper import MARK, end_all
from silotune.runtime.reported import OUTCOME, Follower, read_outcome
from silotune.server import DistillConfig, ServerConfig
from silotune.sources import SOURCES, resolve

START_S = 60.0
"""Seconds in which the SuperLink has to answer."""
SUBMIT_S = 120.0
"""Seconds in which the server app has to begin."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
OWN = "each client's own"
APP = """\
[project]
name = "silotune-run"
version = "0.0.0"
[tool.flwr.app]
publisher = "silotune"
[tool.flwr.app.components]
serverapp = "silotune.runtime.flower_server:app"
clientapp = "silotune.runtime.flower_client:app"
[tool.flwr.app.config]
"""


def check_installed(run: RunConfig) -> None:
    """Refuse a runtime whose libraries are not here, before anything is started.

    Raises:
        ConfigError: Names the extra to install.
    """
    extra = "simulation" if run.runtime.name == "flower-simulation" else "flower"
    needed = ("flwr", "psutil", "ray") if extra == "simulation" else ("flwr", "psutil")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"runtime.name = '{run.runtime.name}' needs {', '.join(missing)}.\n"
            f"  Install it: pip install 'silotune[{extra}]'"
        )


def drive(job: Job) -> Measured:
    """Run a job's rounds on Flower: the simulation engine, or the deployment engine on loopback.

    Raises:
        EngineError: A process of the engine ended, or did not answer.
        SilotuneError: What ended the rounds, as in any runtime.
    """
    if job.state.round == 0:
        job.folder.save(job.state, last=False)  # where the server app finds the first adapter
    with _private_folder() as private, _Engine(private, job) as engine:
        engine.start_superlink()
        if job.run.runtime.name == "flower":
            engine.start_clients()
        engine.submit()
        outcome = engine.follow()
    processes = outcome["processes"]
    return Measured(
        num_rows=outcome["num_rows"],
        base_model_loads=sum(p["base_loads"] for p in processes),
        # under [privacy] real clients say 0
        peak_memory_bytes=max((p["peak_memory_bytes"] for p in processes), default=0) or None,
    )


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder of this user alone, with a short path: sockets allow 107 bytes."""
    short = Path("/tmp")
    made = tempfile.mkdtemp(prefix="silotune-", dir=short if short.is_dir() else None)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


class _Engine:
    """The processes of one run."""

    def __init__(self, private: Path, job: Job) -> None:
        self.private, self.job, self.runtime = private, job, job.run.runtime
        self.log = private / "engine.log"
        self.port = _free_port()
        self.mark = secrets.token_hex(16)
        self.run_id: int | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Engine":
        home = self.private / "flwr"
        home.mkdir()
        connection = {"address": self.address, "insecure": True}
        table = {"superlink": {"default": "engine", "engine": connection}}
        (home / "config.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        lock = self.job.folder.lock_fd
        with self.log.open("ab") as log:
            self._keeper = subprocess.Popen(
                [sys.executable, "-m", "silotune.runtime.keeper", self.mark, str(self.private)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment(),
                start_new_session=True,  # Ctrl-C reaches this process alone
                # the folder stays taken until the last process of this engine is gone
                pass_fds=() if lock is None else (lock,),
            )
        assert self._keeper.stdout is not None
        os.set_blocking(self._keeper.stdout.fileno(), False)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        if kind is not None and issubclass(kind, Exception):
            self._keep_log()
        with contextlib.suppress(BrokenPipeError):
            self._keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(timeout=60)
        if self._keeper.returncode != 0:
            self._keeper.kill()
            self._keeper.wait()
            end_all(self.mark, adopted=False)  # this process may have children of its own
        if self._keeper.stdout is not None:
            self._keeper.stdout.close()

    @property
    def host(self) -> str:
        return "127.0.0.1" if self.runtime.host == "localhost" else self.runtime.host

    @property
    def address(self) -> str:
        """Host and port as Flower reads them: IPv6 in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def _environment(self) -> dict[str, str]:
        """The caller's, without what Flower would send home or install."""
        asked = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK]
        no_proxy = ",".join(filter(None, asked))
        own = {
            # a proxy for the world outside would be asked for this machine's own ports too
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            # Flower starts its own programs by name
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(self.private / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self.private),
            "TMPDIR": str(self.private),
            "OMP_NUM_THREADS": str(self.runtime.threads),
            # without it every actor of Ray would need a longer start and its own copy of the logs
            "RAY_DEDUP_LOGS": "0",
        }
        if self.runtime.ray_address is not None:
            own["RAY_ADDRESS"] = self.runtime.ray_address
        return {**os.environ, **own}

    # --- starting

    def _order(self, name: str, *argv: str) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        order = {"name": name, "argv": [_program(argv[0]), *argv[1:]], "log": str(self.log)}
        self._keeper.stdin.write(json.dumps(order).encode() + b"\n")
        self._keeper.stdin.flush()

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
        """A SuperNode per client, each with the path of its own configuration and nothing else."""
        for name, path in self._client_configs().items():
            self._order(
                f"client {name}",
                "flower-supernode",
                "--insecure",
                *("--superlink", self.address),
                *("--port", str(_free_port())),
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
        return write_client_configs(folder, self.job.rows, run, model=copy, state=state)

    # --- submitting

    def submit(self) -> None:
        """Hand the app over: a pyproject whose components point into this package."""
        app = self.private / "app"
        app.mkdir()
        settings = {
            "recipe": _travelling(self.job.run).model_dump_json(serialize_as_any=True),
            "clients": json.dumps(sorted(self.job.names)),
            "run": self.job.folder.run_id(),
            "folder": str(self.job.folder.path.absolute()),
            "private": str(self.private),
            "base_sha256": self.job.base_sha256,
            "local": json.dumps(sorted(self.job.local)),
        }
        empty = "".join(f'{key} = ""\n' for key in settings)
        (app / "pyproject.toml").write_text(APP + empty, encoding="utf-8")
        values = self.private / "settings.toml"
        values.write_text(tomli_w.dumps(settings), encoding="utf-8")
        command = ["run", str(app), "engine", "--run-config", str(values), "--format", "json"]
        if self.runtime.name == "flower-simulation":
            command += ["--federation-config", self._resources()]
        answer = self._flwr(*command)
        self.run_id = answer.get("run-id")
        if not answer.get("success") or self.run_id is None:
            raise self._problem("Flower did not take the run")

    def _resources(self) -> str:
        wanted: dict[str, object] = {
            "num-supernodes": len(self.job.names),
            "client-resources-num-cpus": self.runtime.client_cpus or self.runtime.threads,
            "client-resources-num-gpus": float(self.runtime.client_gpus or 0),
        }
        return " ".join(f"{key}={value}" for key, value in wanted.items())

    def _flwr(self, *words: str) -> dict[str, Any]:
        """One command of Flower's own, its answer read as JSON."""
        done = subprocess.run(
            [_program("flwr"), *words],
            env={**self._environment(), MARK: self.mark},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        with self.log.open("a", encoding="utf-8") as log:
            log.write(done.stderr)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(done.stdout)
            return {}
        return answer if isinstance(answer, dict) else {}

    def _keep_log(self) -> None:
        """Leave what the engine wrote in the run folder: it ended with an error."""
        if self.run_id is not None:
            self._flwr("log", str(self.run_id), "engine", "--show")
        if self.log.exists() and self.job.folder.path.is_dir():
            shutil.copyfile(self.log, self.job.folder.path / "engine.log")

    # --- watching

    def follow(self) -> dict[str, Any]:
        """Pass on progress until the server app has left its outcome.

        Raises:
            EngineError: It ended without one.
        """
        follower = Follower(self.private, self.job.progress)
        deadline = time.monotonic() + SUBMIT_S
        while True:
            self._check_alive()
            gone = follower.pid is not None and not _is_running(follower.pid)
            late = follower.pid is None and time.monotonic() > deadline
            ended = (self.private / OUTCOME).exists()  # looked at first: the last lines come before
            follower.follow()
            if ended and (outcome := read_outcome(self.private)):
                return outcome
            if gone or late:
                what = "ended without a result" if gone else f"did not begin within {SUBMIT_S:g} s"
                raise self._problem(f"Flower's server app {what} (Flower says: {self._status()})")
            time.sleep(0.1)

    def _status(self) -> str:
        runs = self._flwr("ls", "engine", "--run-id", str(self.run_id), "--format", "json")
        entry = (runs.get("runs") or [{}])[0]
        return str(entry.get("status", "unknown"))

    def _check_alive(self) -> None:
        """Raise when a process of the engine has ended on its own."""
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        if self._keeper.poll() is not None:
            raise self._problem("the keeper of the engine's processes has ended")
        while line := self._keeper.stdout.readline():
            report = json.loads(line)
            what = f"{report['ended']} ended with exit status {report['code']}"
            if report["ended"] == "superlink":
                raise self._problem(f"Flower's {what}")
            self.job.progress.note(what)

    def _problem(self, what: str) -> EngineError:
        return EngineError(
            f"{what}.\n  What the engine wrote: {self.job.folder.path / 'engine.log'}\n"
            "  What was finished is kept; resume the run to go on."
        )


def _travelling(run: RunConfig) -> RunConfig:
    """The recipe as it is sent: whole paths in simulation, no place of rows in deployment."""
    # what the server does with its own rows is no client's business
    mine = {"server": ServerConfig(), "distill": DistillConfig()}
    if run.runtime.name == "flower":
        data = _without_places(run.data)
        return run.model_copy(update={"data": data, "partition": None, **mine})
    # but that a part of them is not the clients' is: actors read the rows anew
    mine["server"] = ServerConfig(data_fraction=run.server.data_fraction)
    whole = {
        key: str(Path(value).expanduser().absolute())
        for key in ("path", "eval_path")
        if (value := getattr(run.data, key))
        and value not in EXAMPLES
        and Path(value).expanduser().exists()
    }
    model = {}
    if run.model.name not in SOURCES and Path(run.model.name).expanduser().exists():
        model = {"name": str(Path(run.model.name).expanduser().absolute())}
    return run.model_copy(
        update={
            "data": run.data.model_copy(update=whole),
            "model": run.model.model_copy(update=model),
            **mine,
        }
    )


def _without_places(data: DataConfig) -> DataConfig:
    """What a recipe says of rows without saying where they are."""
    place = locate(data.path)
    if place is not None and is_client_folder(place):
        return data.model_copy(update={key: _default(key) for key in LOCATIONS} | {"path": OWN})
    # these clients were cut from one data set: their rows are converted and split already
    return DataConfig(path=OWN, system=data.system, template=data.template, labels=data.labels)


def _default(key: str) -> Any:
    return DataConfig.model_fields[key].default


def _program(name: str) -> str:
    """A console script of the same environment as this Python."""
    beside = Path(sysconfig.get_path("scripts")) / name
    return str(beside) if beside.exists() else name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_running(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
