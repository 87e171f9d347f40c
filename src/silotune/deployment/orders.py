"""What the server does with each run of a consortium, as it is written in the run's folder.

Loads no torch: whoever only looks at a consortium starts at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import write_json
from silotune.core.errors import ConfigError
from silotune.core.reading_back import read_object
from silotune.federation.roster import ORDERS

WAITING, RUNNING, STOPPED, FAILED, DONE = "waiting", "running", "stopped", "failed", "done"
STOPPING = "stopping"


def runs_of(folder: Path) -> Mapping[str, Path]:
    """All runs of a consortium by name, oldest first."""
    return {p.name: p for p in sorted((folder / "runs").iterdir()) if (p / ORDERS).is_file()}


def find_run(folder: Path, name: str | None) -> Path:
    """A run by its name or a part of it; the latest when None.

    Raises:
        ConfigError: There is none, or more than one.
    """
    found = runs_of(folder)
    if name is None and found:
        return list(found.values())[-1]
    # an exact match wins: of two runs made in the same second, one name contains the other
    if name is not None and name in found:
        return found[name]
    fit = [path for own, path in found.items() if name is not None and name in own]
    if len(fit) != 1:
        known = ", ".join(found) or "none"
        how_many = f"{len(fit)} runs match" if fit else "no run matches"
        raise ConfigError(f"{how_many} '{name or ''}'.\n  Runs: {known}.")
    return fit[0]


def state_of(path: Path) -> dict[str, Any]:
    """What the server is doing with a run: state, why, tries, round."""
    return read_object(path / ORDERS, fix=f"Restore it from a copy, or remove {path}.")


def write_state(path: Path, state: str, *, why: str = "", tries: int = 0, round_: int = 0) -> None:
    """Say what the server should do, or does, with a run."""
    write_json(path / ORDERS, {"state": state, "why": why, "tries": tries, "round": round_})
