"""A consortium's runs: submitted, taken one after the other, stopped, and told about.

Each is a run folder like any other. Beside its own files it has server.json (what the server is to
do with it) and job.log (what the run said). A run that fails is tried again from what it finished.
"""

import json
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import free_place, write_json
from silotune.core.errors import ConfigError
from silotune.deployment.consortium.folder import Consortium
from silotune.deployment.supervisor import Note, Supervisor
from silotune.federation.client_config import LOCATIONS
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe, parse, to_toml
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import RuntimeConfig
from silotune.workflows.check import check

ORDERS, LOG = "server.json", "job.log"
WAITING, RUNNING, STOPPED, FAILED, DONE = "waiting", "running", "stopped", "failed", "done"
STOPPING = "stopping"
TRIES = 5
"""How often a run is tried again without having finished another round."""
REST_S = 10.0
"""Before the second try; doubled before each further one."""
KEPT = ("threads", "join_timeout_s")
"""What counts of a recipe's [runtime]; where and how it would run otherwise does not."""


def submit(folder: Path, recipe: str | Path | RunConfig, overrides: Sequence[str] = ()) -> Path:
    """Queue a recipe; the server takes it as soon as the ones before are done.

    Args:
        folder: The consortium's.
        recipe: A shipped name, a TOML file or a config. What it says about where rows are, and how
            they are cut, is of no use here: every client's rows are its own.
        overrides: Dotted `key=value` texts on top of it.

    Returns:
        The new run folder.

    Raises:
        SilotuneError: The recipe has a mistake; all are told.
    """
    Consortium.open(folder)
    elsewhere = [f"runtime.{key}=none" for key in RuntimeConfig.model_fields if key not in KEPT]
    # keys of [runtime] that count here would contradict a recipe for another runtime
    here = [*overrides, *elsewhere, "runtime.name=flower"]
    given = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, here)
    checked = check(for_real_clients(given, folder))
    stem = "run" if isinstance(recipe, RunConfig) else Path(recipe).stem
    name = f"{time.strftime('%Y-%m-%d-%H%M%S')}-{stem}"
    made = RunFolder.create(free_place(folder / "runs" / name), checked.run)
    _write(made.path, WAITING)
    return made.path


def for_real_clients(run: RunConfig, folder: Path) -> RunConfig:
    """The recipe with a consortium's members for clients."""
    table = tomllib.loads(to_toml(run))
    data = {k: v for k, v in table.get("data", {}).items() if k not in LOCATIONS}
    table["data"] = {**data, "path": str(folder.absolute())}
    table.pop("partition", None)
    kept = {k: v for k, v in table.get("runtime", {}).items() if k in KEPT}
    table["runtime"] = {**kept, "name": "flower"}
    return parse(table)


def resubmit(folder: Path, name: str) -> Path:
    """Let a run that was stopped, or failed, go on.

    Raises:
        ConfigError: There is no such run, or it is done.
    """
    path = find_run(folder, name)
    if _read(path)["state"] == DONE:
        raise ConfigError(f"{path} is done: nothing is left to do.")
    _write(path, WAITING)
    return path


def stop(folder: Path, name: str) -> Path:
    """Stop a run; what it finished is kept, and it can go on later.

    Raises:
        ConfigError: There is no such run.
    """
    path = find_run(folder, name)
    state = _read(path)["state"]
    if state in (DONE, FAILED, STOPPED):
        raise ConfigError(f"{path.name} is not running: it is {state}.")
    _write(path, STOPPING if state == RUNNING else STOPPED)
    return path


def runs_of(folder: Path) -> Mapping[str, Path]:
    """All runs of a consortium by name, the oldest first."""
    return {p.name: p for p in sorted((folder / "runs").iterdir()) if (p / ORDERS).is_file()}


def find_run(folder: Path, name: str | None) -> Path:
    """A run by its name or a part of it; the latest when None.

    Raises:
        ConfigError: There is none, or more than one.
    """
    found = runs_of(folder)
    if name is None and found:
        return list(found.values())[-1]
    if (
        name is not None and name in found
    ):  # a second run of the same second has the first one's name and more
        return found[name]
    fit = [path for own, path in found.items() if name is not None and name in own]
    if len(fit) != 1:
        known = ", ".join(found) or "none"
        raise ConfigError(f"{len(fit)} runs are called '{name or ''}'.\n  Runs: {known}.")
    return fit[0]


def state_of(path: Path) -> dict[str, Any]:
    """What the server does with a run: state, why, tries."""
    return _read(path)


class Queue:
    """The server's side: one job at a time."""

    def __init__(self, folder: Path, note: Note) -> None:
        """A run that was under way when the last server ended waits again."""
        self._folder, self._note = folder, note
        self._now: Path | None = None
        self._due: dict[str, float] = {}
        for path in runs_of(folder).values():
            state = _read(path)["state"]
            if state in (RUNNING, STOPPING):
                _write(path, WAITING if state == RUNNING else STOPPED)

    def tend(self, supervisor: Supervisor) -> None:
        """Start the next job, or stop the one that is to stop."""
        if self._now is not None:
            if _read(self._now)["state"] == STOPPING:
                supervisor.tell("job")
            return
        now = time.monotonic()
        for path in runs_of(self._folder).values():
            if _read(path)["state"] == WAITING and self._due.get(path.name, 0) <= now:
                self._now = path
                _write(path, RUNNING, tries=_read(path)["tries"], round_=_round(path))
                command = [sys.executable, "-m", "silotune", "run", "--resume", str(path)]
                supervisor.start_once("job", command, log=path / LOG)
                self._note(f"{path.name} runs")
                return

    def job_ended(self, code: int) -> None:
        """Decide what becomes of the run whose job has ended."""
        assert self._now is not None
        path, self._now = self._now, None
        before = _read(path)
        tries = 0 if _round(path) > before["round"] else before["tries"] + 1
        why = f"its job ended with exit status {code}; {path / LOG} says why"
        if code == 0:
            _write(path, DONE)
        elif before["state"] == STOPPING:
            _write(path, STOPPED, why="as asked")
        elif code == ConfigError.exit_code or tries >= TRIES:
            _write(path, FAILED, why=why, tries=tries)
        else:
            rest = REST_S * 2 ** max(0, tries - 1)
            self._due[path.name] = time.monotonic() + rest
            _write(path, WAITING, why=f"{why}; tried again in {rest:g} s", tries=tries)
        after = _read(path)
        self._note(f"{path.name}: {after['state']}{': ' if after['why'] else ''}{after['why']}")


def _round(path: Path) -> int:
    """The last round that was finished."""
    rounds = [row["round"] for row in RunFolder.open(path).metrics() if row["event"] == "round"]
    return max(rounds, default=0)


def _read(path: Path) -> dict[str, Any]:
    return json.loads((path / ORDERS).read_text(encoding="utf-8"))


def _write(path: Path, state: str, *, why: str = "", tries: int = 0, round_: int = 0) -> None:
    write_json(path / ORDERS, {"state": state, "why": why, "tries": tries, "round": round_})
