"""Hands a run to a SuperLink and follows it: what is sent, what stays here, and how it ends.

The app that Flower gets is just a pyproject whose components point into this package (`bundle.py`).
Clients receive the recipe and the run's id. What only the server may know is in a separate file, in
the folder that the server app finds through its environment.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import tomli_w

from silotune.core.atomic_files import write_json
from silotune.core.errors import EngineError
from silotune.core.installed import version
from silotune.data.files import EXAMPLES, locate
from silotune.data.reading import DataConfig
from silotune.federation.client_config import is_client_folder
from silotune.federation.client_recipe import LOCATIONS, is_public, without_server
from silotune.federation.roster import CHOSEN, MEMBERS, is_consortium
from silotune.models.sources import SOURCES
from silotune.models.start import TOLD, hash_of_start
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.bundle import project_file
from silotune.runtime.flower.engine_command import CONNECTION, RUNS, flwr
from silotune.runtime.flower.server_reports import OUTCOME, Follower, read_outcome
from silotune.runtime.job import Job
from silotune.training.server_training import DistillConfig, ServerConfig

SUBMIT_S = 120.0
"""Seconds the server app has to start."""
SETTINGS = "settings.json"
OWN = "each client's own"
NODE = (sys.executable, "-m", "silotune.runtime.flower.supernode")
"""A client's SuperNode, which starts no bundle but ours."""


class Link:
    """A running SuperLink and one job on it. Subclasses know who owns the SuperLink's processes."""

    def __init__(self, job: Job, *, work: Path, log: Path) -> None:
        """Nothing is sent yet.

        Args:
            job: The run.
            work: The run's own folder for settings, progress and outcome; its name is the run's id.
            log: Where Flower's commands write what is not JSON.
        """
        self.job, self.work, self.log = job, work, log
        self.run_id: int | None = None

    def _environment(self) -> dict[str, str]:
        raise NotImplementedError

    def _options(self) -> list[str]:
        """Further arguments of `flwr run`."""
        return []

    def _check_alive(self) -> None:
        """Raise if there is no point in waiting any longer."""

    def submit(self) -> None:
        """Hand the app over.

        Raises:
            EngineError: Flower does not accept it.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / SETTINGS, own_settings(self.job))
        told = told_settings(self.job)
        app, values = self.work / "app", self.work / "told.toml"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(project_file(told), encoding="utf-8")
        values.write_text(tomli_w.dumps(told), encoding="utf-8")
        words = ["run", str(app), CONNECTION, "--run-config", str(values), "--format", "json"]
        answer = self._flwr(*words, *self._options())
        self.run_id = answer.get("run-id")
        if not answer.get("success") or self.run_id is None:
            raise self._problem("Flower did not accept the run")

    def follow(self) -> dict[str, Any]:
        """Pass on progress until the server app has written its outcome.

        Raises:
            EngineError: It ended without one.
        """
        follower = Follower(self.work, self.job.progress)
        deadline = time.monotonic() + SUBMIT_S
        while True:
            self._check_alive()
            gone = follower.has_ended()
            late = follower.process is None and time.monotonic() > deadline
            # checked before following: the last lines of progress are written before the outcome
            ended = (self.work / OUTCOME).exists()
            follower.follow()
            if ended and (outcome := read_outcome(self.work)):
                return outcome
            if gone or late:
                what = "ended without a result" if gone else f"did not start within {SUBMIT_S:g} s"
                raise self._problem(f"Flower's server app {what} (Flower says: {self._status()})")
            time.sleep(0.1)

    def _status(self) -> str:
        runs = self._flwr("ls", CONNECTION, "--run-id", str(self.run_id), "--format", "json")
        entry = (runs.get("runs") or [{}])[0]
        return str(entry.get("status", "unknown"))

    def _flwr(self, *words: str) -> dict[str, Any]:
        return flwr(words, environment=self._environment(), log=self.log)

    def _problem(self, what: str) -> EngineError:
        return EngineError(
            f"{what}.\n  See the engine's log: {self.job.folder.path / 'engine.log'}\n"
            "  Finished rounds are kept: resume the run to continue."
        )


# --- what is sent, and what is not ----------------------------------------------------------------


def told_settings(job: Job) -> dict[str, str]:
    """What the server app and every client receive; in deployment, the keys of `bundle.TOLD`."""
    told = {
        "recipe": travelling(job.run).model_dump_json(serialize_as_any=True),
        "run": job.folder.run_id(),
        "base_sha256": job.base_sha256,
        "version": version(),
    }
    if job.run.runtime.name == "flower-simulation":  # actors run on this machine
        folder = str(job.folder.path.absolute())
        told |= {"clients": json.dumps(sorted(job.names)), "folder": folder}
    return told


def own_settings(job: Job) -> dict[str, Any]:
    """What only the server app receives."""
    start = job.run.adapter.start
    return {
        "clients": sorted(job.names),
        "folder": str(job.folder.path.absolute()),
        "base_sha256": job.base_sha256,
        "local": sorted(job.local),
        "only": job.folder.read_json(CHOSEN),
        "start": start and str(Path(start).expanduser().absolute()),
        "members": str((job.consortium / MEMBERS).absolute()) if job.consortium else None,
    }


def read_settings(run_id: str) -> tuple[Path, dict[str, Any]]:
    """The run's own folder and settings, as the server app finds them."""
    work = Path(os.environ[RUNS]) / run_id
    return work, json.loads((work / SETTINGS).read_text(encoding="utf-8"))


def travelling(run: RunConfig) -> RunConfig:
    """The recipe as it is sent: absolute paths in simulation, no path at all in deployment."""
    if run.runtime.name == "flower":
        place = locate(run.data.path)
        model = run.model.model_copy(update={"name": travelling_name(run.model.name)})
        run = run.model_copy(update={"model": model})
        if place is not None and (is_client_folder(place) or is_consortium(place)):
            return without_places(run)
        # these clients are parts of one data set: their rows are already converted and split
        own, data = without_places(run), run.data
        told = DataConfig(path=OWN, system=data.system, template=data.template, labels=data.labels)
        return own.model_copy(update={"data": told})
    # clients need not know what the server does with its own rows, except that a part of the data
    # is not theirs: actors read the rows again
    mine = {
        "server": ServerConfig(data_fraction=run.server.data_fraction),
        "distill": DistillConfig(),
        "evaluate": without_server(run)["evaluate"],
    }
    return with_absolute_paths(run).model_copy(update=mine)


def travelling_name(name: str) -> str:
    """The name of a base model as clients are told it: never a path of the server.

    A folder becomes copy:NAME, and its clients have copies of their own, which must have the same
    content.
    """
    if is_public(name):
        return name
    last = Path(os.path.abspath(os.path.expanduser(name))).name
    return f"copy:{re.sub(r'[^A-Za-z0-9_.-]+', '-', last) or 'model'}"


def with_absolute_paths(run: RunConfig) -> RunConfig:
    """The recipe with paths that mean the same in any directory."""
    places = {"data": ("path", "eval_path"), "model": ("name",), "adapter": ("start",)}
    places |= {"server": ("data_path",), "evaluate": ("server_path",), "distill": ("teacher",)}
    parts = {
        part: (own := getattr(run, part)).model_copy(
            update={key: _absolute(value) for key in keys if (value := getattr(own, key))}
        )
        for part, keys in places.items()
    }
    return run.model_copy(update=parts)


def _absolute(name: str) -> str:
    """The absolute path, if `name` is a path on this machine and not a name of ours."""
    place = Path(name).expanduser()
    ours = name in EXAMPLES or name in SOURCES
    return name if ours or not place.exists() else str(place.absolute())


def without_places(run: RunConfig) -> RunConfig:
    """A recipe for real clients: it says what rows look like, but not where they are."""
    data = run.data.model_copy(update={key: _default(key) for key in LOCATIONS} | {"path": OWN})
    adapter = run.adapter.model_copy(update={"ranks": {}})  # each client knows its own
    if adapter.start is not None:
        adapter = adapter.model_copy(update={"start": TOLD + hash_of_start(adapter.start)})
    told = {"data": data, "adapter": adapter, "partition": None}
    return run.model_copy(update={**told, **without_server(run)})


def _default(key: str) -> Any:
    return DataConfig.model_fields[key].default
