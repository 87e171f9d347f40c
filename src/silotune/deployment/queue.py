"""A consortium's queue of runs: submit, run one at a time, stop, and report.

Each is a run folder like any other, with two more files: server.json (what the server should do
with it) and job.log (the run's output). A run that fails is retried from what it has finished.
"""

import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from silotune.core.atomic_files import free_place
from silotune.core.errors import ConfigError
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.orders import (
    DONE,
    FAILED,
    RUNNING,
    STOPPED,
    STOPPING,
    WAITING,
    find_run,
    runs_of,
    state_of,
    write_state,
)
from silotune.deployment.supervisor import Note, Supervisor
from silotune.federation.approval import consent_sha256
from silotune.federation.client_recipe import LOCATIONS
from silotune.federation.operator_log import record
from silotune.federation.roster import CHOSEN
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe, parse, to_toml
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import RuntimeConfig
from silotune.runtime.flower.submit import travelling
from silotune.workflows.check import check

LOG = "job.log"
TRIES = 5
"""How often a run is retried without finishing another round."""
REST_S = 10.0
"""Seconds before the second try; doubled before each further one."""
KEPT = ("threads", "join_timeout_s")
"""Keys of a recipe's [runtime] that apply here; those about where and how it runs do not."""


def submit(
    folder: Path,
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    clients: Sequence[str] | None = None,
) -> Path:
    """Queue a recipe; the server runs it as soon as the runs before it are done.

    Args:
        folder: The consortium's folder.
        recipe: A shipped name, a TOML file or a config. Where its rows are, and how it partitions
            them, is ignored: every client has its own rows.
        overrides: Dotted `key=value` texts on top of it.
        clients: The only members that the run is for; others are neither asked nor told of it.

    Returns:
        The new run folder.

    Raises:
        SilotuneError: The recipe has mistakes; all are listed. Or one of `clients` is not in.
    """
    members = Consortium.open(folder).members()
    if unknown := sorted(set(clients or ()) - set(members)):
        raise ConfigError(
            f"{', '.join(map(repr, unknown))}: not in this consortium.\n"
            f"  Its members: {', '.join(members) or 'nobody'}."
        )
    elsewhere = [f"runtime.{key}=none" for key in RuntimeConfig.model_fields if key not in KEPT]
    # [runtime] keys for another runtime would contradict this one
    here = [*overrides, *elsewhere, "runtime.name=flower"]
    given = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, here)
    checked = check(for_real_clients(given, folder), clients=clients)
    stem = "run" if isinstance(recipe, RunConfig) else Path(recipe).stem
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{stem}"
    place = free_place(folder / "runs" / name)
    made = RunFolder.create(place, checked.run, name="" if stem == "run" else stem)
    if clients is not None:
        made.write_json(CHOSEN, sorted(set(clients)))
    sha256 = consent_sha256(travelling(made.run))
    record(folder, "submit", run=made.path.name, recipe_sha256=sha256, clients=clients or "all")
    write_state(made.path, WAITING)
    return made.path


def chosen_clients(run: Path) -> Sequence[str] | None:
    """The only clients that a run is for; None: all."""
    return RunFolder.open(run).read_json(CHOSEN)


def recipe_sha256(run: Path) -> str:
    """The hash under which clients know the recipe of a submitted run."""
    return consent_sha256(travelling(RunFolder.open(run).run))


def for_real_clients(run: RunConfig, folder: Path) -> RunConfig:
    """The recipe with a consortium's members as clients."""
    table = tomllib.loads(to_toml(run))
    data = {k: v for k, v in table.get("data", {}).items() if k not in LOCATIONS}
    table["data"] = {**data, "path": str(folder.absolute())}
    table.pop("partition", None)
    paths = (("server", "data_path"), ("evaluate", "server_path"), ("adapter", "start"))
    for section, key in paths:
        given = table.get(section, {}).get(key)
        if given is not None and (place := Path(given).expanduser()).exists():
            table[section][key] = str(place.absolute())  # the engine runs in another folder
    kept = {k: v for k, v in table.get("runtime", {}).items() if k in KEPT}
    table["runtime"] = {**kept, "name": "flower"}
    return parse(table)


def resubmit(folder: Path, name: str) -> Path:
    """Queue a run that was stopped or failed, so that it resumes.

    Raises:
        ConfigError: There is no such run, or it is done.
        RunFolderError: Its recipe has changed since it was submitted.
    """
    path = find_run(folder, name)
    RunFolder.open(path)  # a folder that cannot be used is not queued
    if state_of(path)["state"] == DONE:
        raise ConfigError(f"{path} is done: there is nothing left to do.")
    record(folder, "submit again", run=path.name)
    write_state(path, WAITING)
    return path


def stop(folder: Path, name: str) -> Path:
    """Stop a run; what it finished is kept, and it can be resumed later.

    Raises:
        ConfigError: There is no such run, or it is not running.
    """
    path = find_run(folder, name)
    state = state_of(path)["state"]
    if state in (DONE, FAILED, STOPPED):
        raise ConfigError(f"{path.name} is not running: it is {state}.")
    record(folder, "stop", run=path.name)
    write_state(path, STOPPING if state == RUNNING else STOPPED)
    return path


class Queue:
    """The server's side: one job at a time."""

    def __init__(self, folder: Path, note: Note) -> None:
        """A run that was under way when the server last ended is queued again."""
        self._folder, self._note = folder, note
        self._now: Path | None = None
        self._due: dict[str, float] = {}
        for path in runs_of(folder).values():
            state = state_of(path)["state"]
            if state in (RUNNING, STOPPING):
                write_state(path, WAITING if state == RUNNING else STOPPED)

    def tend(self, supervisor: Supervisor) -> None:
        """Start the next job, or stop the one that should stop."""
        if self._now is not None:
            if state_of(self._now)["state"] == STOPPING:
                supervisor.tell("job")
            return
        now = time.monotonic()
        for path in runs_of(self._folder).values():
            if state_of(path)["state"] == WAITING and self._due.get(path.name, 0) <= now:
                self._now = path
                write_state(path, RUNNING, tries=state_of(path)["tries"], round_=_round(path))
                command = [sys.executable, "-m", "silotune", "run", "--resume", str(path)]
                supervisor.start_once("job", command, log=path / LOG)
                self._note(f"{path.name} is running")
                return

    def job_ended(self, code: int) -> None:
        """Decide what happens to the run whose job has ended."""
        assert self._now is not None
        path, self._now = self._now, None
        before = state_of(path)
        tries = 0 if _round(path) > before["round"] else before["tries"] + 1
        why = f"its job ended with exit status {code}; see {path / LOG}"
        if code == 0:
            write_state(path, DONE)
        elif before["state"] == STOPPING:
            write_state(path, STOPPED, why="as requested")
        elif code == ConfigError.exit_code or tries >= TRIES:
            write_state(path, FAILED, why=why, tries=tries)
        else:
            rest = REST_S * 2 ** max(0, tries - 1)
            self._due[path.name] = time.monotonic() + rest
            write_state(path, WAITING, why=f"{why}; next try in {rest:g} s", tries=tries)
        after = state_of(path)
        self._note(f"{path.name}: {after['state']}{': ' if after['why'] else ''}{after['why']}")


def _round(path: Path) -> int:
    """The last round that was finished."""
    rounds = [row["round"] for row in RunFolder.open(path).metrics() if row["event"] == "round"]
    return max(rounds, default=0)
