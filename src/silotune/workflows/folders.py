"""Where to create the folder of a run, a comparison or a sweep, and how to resume one."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from silotune.core.atomic_files import free_place
from silotune.core.errors import ConfigError
from silotune.federation.roster import CHOSEN
from silotune.federation.run_folder import RunFolder
from silotune.recipes.parse import load_recipe
from silotune.recipes.schema import RunConfig
from silotune.workflows.check import Checked, check

F = TypeVar("F", bound=RunFolder)


def open_folder(
    kind: type[F],
    recipe: str | Path | RunConfig | None,
    overrides: Sequence[str],
    *,
    out: Path | str | None,
    resume: Path | str | None,
) -> tuple[F, Checked]:
    """Create a folder of this kind, or open the one to resume, and check its recipe.

    Raises:
        ConfigError, ModelError, DataError, RunFolderError: See `check` and `RunFolder`.
    """
    if resume is not None:
        if out is not None:
            raise ConfigError("out and resume exclude each other.\n  Give only one of them.")
        folder = kind.open(Path(resume))
        if recipe is not None:
            given = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe, overrides)
            same = () if given.data.date else ("data.date",)  # the day on which the run began
            _check_same_recipe(check(recipe, overrides).run, folder, same)
        elif overrides:
            raise ConfigError(
                "a resumed run keeps its recipe, so overrides do not apply.\n"
                "  Leave them out, or start a new run."
            )
        return folder, check(folder.run, clients=folder.read_json(CHOSEN))
    if recipe is None:
        raise ConfigError("there is no recipe.\n  Give a recipe, or a run folder to resume.")
    checked = check(recipe, overrides)
    name = "" if isinstance(recipe, RunConfig) else Path(recipe).stem
    return kind.create(place_for(recipe, out), checked.run, name=name), checked


def place_for(recipe: str | Path | RunConfig, out: Path | str | None, ending: str = "") -> Path:
    """The path of a new folder: `out`, or by default an unused runs/<time>-<recipe><ending>."""
    if out is not None:
        return Path(out)
    name = "run" if isinstance(recipe, RunConfig) else Path(recipe).stem
    return free_place(Path("runs") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}{ending}")


def dotted_values(run: RunConfig) -> dict[str, Any]:
    """All values of a recipe by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in run.model_dump(serialize_as_any=True).items():
        inner = value if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat


def _check_same_recipe(given: RunConfig, folder: RunFolder, ignored: Sequence[str]) -> None:
    old, new = dotted_values(folder.run), dotted_values(given)
    keys = (old.keys() | new.keys()).difference(ignored)
    different = sorted(key for key in keys if old.get(key) != new.get(key))
    if different:
        raise ConfigError(
            f"the recipe differs from that of {folder.path} in: {', '.join(different)}.\n"
            "  Leave the recipe out to continue with the run's own, or start a new run."
        )
