"""What is in a folder of runs: one line for each run, comparison and sweep.

This file reads a few files of each folder and compares no hashes: a list is for people, and costs
neither torch nor a second per run. Whatever cannot be read is one line of the list, not an error.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from silotune.core.errors import RunFolderError, SilotuneError, first_line
from silotune.core.public_call import public
from silotune.core.reading_back import read_json, read_object, read_rows, read_toml
from silotune.core.safe_text import folder_name
from silotune.federation.run_record import EXTENDED


class Kind(NamedTuple):
    """What marks a folder, and what marks it as finished."""

    name: str
    recipe: str
    result: str
    resume: str


KINDS = (
    Kind("run", "recipe.toml", "summary.json", "silotune run --resume"),
    Kind("comparison", "comparison.toml", "comparison.json", "silotune compare --resume"),
    Kind("sweep", "sweep.toml", "sweep.json", "silotune sweep --resume"),
)
FIX = "Restore it from a copy."
OWN = "federated"
"""The arm of a comparison that trains the recipe itself; others are "federated: <name>"."""


class Listed(NamedTuple):
    """One run, comparison or sweep."""

    name: str
    kind: str
    """run, comparison or sweep; empty for a folder that could not be read."""
    state: str
    """done, how far it got, or what is wrong with it."""
    loss: float | None
    """Held-out loss: the lowest of a sweep's runs, or of a comparison's federated arms."""
    best: str | None
    """The folder of that run, relative to a sweep or comparison; None for a run."""
    began: str
    """When its folder was created, in this machine's time."""


def kind_of(path: Path) -> Kind | None:
    """What a folder is; None if it is none of ours."""
    return next((kind for kind in KINDS if (path / kind.recipe).is_file()), None)


@public
def runs(folder: Path | str = "runs") -> list[Listed]:
    """List the runs, comparisons and sweeps in a folder, oldest first.

    Returns:
        name, kind, state, held-out loss, best run and date of each. One that cannot be read is
        listed with the reason.

    Raises:
        RunFolderError: There is no such folder.
    """
    place = Path(folder)
    if not str(folder) or not place.is_dir():  # an empty text is the present folder to Path
        raise RunFolderError(
            f"{place} is not a folder.\n  Give the folder that holds your runs, by default runs."
        )
    found = [(path, kind) for path in place.iterdir() if (kind := kind_of(path)) is not None]
    lines = [_listed(path, kind) for path, kind in found if not path.name.startswith(".")]
    return sorted(lines, key=lambda line: (line.began, line.name))


def refuse_collection(path: Path, command: str = "") -> None:
    """Refuse a comparison or sweep where a run is needed, and name its best run.

    Args:
        path: What was given as a run.
        command: What the user typed before it, such as "silotune ask".

    Raises:
        RunFolderError: It is a comparison or a sweep.
    """
    kind = kind_of(path)
    if kind is None or kind.name == "run":
        return
    found = _listed(path, kind)
    if found.best is None:
        fix = f"It has no finished run yet. To continue: {kind.resume} {path}"
    else:
        what = "Its best run" if found.loss is None else f"Its best run ({found.loss:.3f})"
        fix = f"{what}: {f'{command} ' if command else ''}{path / found.best}"
    raise RunFolderError(f"{path} is not a run folder: it is a {kind.name}.\n  {fix}")


def _listed(path: Path, kind: Kind) -> Listed:
    began = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / kind.recipe).stat().st_mtime))
    loss = best = None
    try:
        recipe = read_toml(path / kind.recipe, fix=FIX)
        if (path / kind.result).is_file():
            result = read_object(path / kind.result, fix=FIX)
            loss, best = _best(result, kind.name)
            state = _ended(result, kind.name)
        else:
            state = _under_way(path, recipe, kind.name)
    except SilotuneError as error:
        state = f"damaged: {first_line(str(error))}"
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        state = f"damaged: {kind.result} lacks what it should hold ({type(error).__name__})"
    return Listed(path.name, kind.name, state, loss, best, began)


def _best(result: Mapping[str, Any], kind: str) -> tuple[float | None, str | None]:
    """The lowest held-out loss, and the run that has it, relative to the folder."""
    if kind == "run":
        return _number(result["overall"]["federated_loss"]), None
    if kind == "sweep":
        first = result["runs"][0]  # lowest loss first, failures last
        return (None, None) if first["failed"] else (_number(first["loss"]), first["path"])
    means = {
        arm: scores["mean"]
        for arm, scores in result["overall"]["scores"]["loss"].items()
        if arm.partition(":")[0] == OWN and scores["mean"] is not None
    }
    arm = min(means, key=lambda arm: means[arm])
    place = folder_name(arm.replace(": ", "-"))
    return _number(means[arm]), f"seed-{result['seeds'][0]}/{place}/run"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _ended(result: Mapping[str, Any], kind: str) -> str:
    if kind != "sweep":
        return "done"
    failed = sum(own["failed"] is not None for own in result["runs"])
    return f"done, {failed} of {len(result['runs'])} runs failed" if failed else "done"


def _under_way(path: Path, recipe: Mapping[str, Any], kind: str) -> str:
    now = "running" if _is_locked(path / "run.lock") else "stopped"
    if kind != "run":
        return now
    file = path / "metrics.jsonl"
    rows = read_rows(file, fix=FIX) if file.is_file() else []
    done = max((row["round"] for row in rows if row["event"] == "round"), default=0)
    longer = path / EXTENDED
    rounds = (
        read_json(longer, fix=FIX)[-1]["after"]["rounds"] if longer.is_file() else recipe["rounds"]
    )
    return f"{now}, round {done} of {rounds} done"


def _is_locked(path: Path) -> bool:
    """Whether a process is working on a folder; asking takes the lock for an instant."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return False
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
