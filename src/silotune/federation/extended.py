"""Rounds that were added to a run after it began.

recipe.toml stays as it was written at the start. What was changed since is in extended.json, one
entry per extension, and whoever opens the folder gets the recipe with these changes. The file
appears complete or not at all, so a kill leaves a run with the old number of rounds or the new one.
"""

import time
from pathlib import Path
from typing import Any

from silotune.federation.run_record import EXTENDED, extensions
from silotune.recipes.parse import with_overrides
from silotune.recipes.schema import RunConfig


def with_extensions(folder: Path, run: RunConfig) -> RunConfig:
    """A run's recipe with what its extensions changed.

    Args:
        folder: The run's.
        run: What recipe.toml says.
    """
    for one in extensions(folder):
        keys = [f"{key}={value}" for key, value in one["after"].items()]
        run = with_overrides(run, keys, name=str(folder / EXTENDED))
    return run


def extension(before: RunConfig, after: RunConfig, *, after_round: int) -> dict[str, Any]:
    """An entry of the file, dated today.

    Args:
        before: The recipe that the run has had so far.
        after: The recipe for the rounds that are left.
        after_round: The round that was done last.
    """
    old, new = (
        {
            "rounds": run.rounds,
            "train.schedule": run.train.schedule,
            "train.lr_min": run.train.lr_min,
        }
        for run in (before, after)
    )
    changed = [key for key in old if old[key] != new[key]]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "after_round": after_round,
        "before": {key: old[key] for key in changed},
        "after": {key: new[key] for key in changed},
    }
