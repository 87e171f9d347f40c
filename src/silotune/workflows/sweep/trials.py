"""The runs of a sweep: which keys each changes, whether it is valid, and how many fit at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.core.errors import ConfigError, SilotuneError
from silotune.core.processors import usable_threads
from silotune.core.wording import counted, human_bytes
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.models.devices import available_memory_bytes, pick_device
from silotune.recipes.parse import load_recipe, with_overrides
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import SweepConfig
from silotune.recipes.sweep_grid import Axis, Range, combinations, is_swept, read_axes, split_keys
from silotune.workflows.check import check
from silotune.workflows.plan.plan import plan

MEMORY_SHARE = 0.8
"""Share of the free memory that concurrent runs may use together."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    keys: tuple[str, ...]
    """Its overrides."""
    run: RunConfig

    def place(self, folder: RunFolder) -> Path:
        """Its run folder."""
        return folder.path / "runs" / f"{self.number:03d}"

    @property
    def title(self) -> str:
        """Its name in progress messages."""
        return " ".join(self.keys)


def read_sweep(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str],
    runs: Sequence[str],
    search: int,
) -> RunConfig:
    """The recipe with its [sweep]: the recipe's own, combined with the arguments."""
    given = [text for text in overrides if is_swept(text)]
    fixed = [text for text in overrides if not is_swept(text)]
    if isinstance(recipe, RunConfig):
        run = with_overrides(recipe, fixed) if fixed else recipe
    else:
        run = load_recipe(recipe, fixed)
    named = {text.partition("=")[0].strip() for text in overrides}
    own = [text for text in run.sweep.keys if text.partition("=")[0].strip() not in named]
    keys = () if runs else (*own, *given)
    listed = tuple(runs) or (() if given or search else run.sweep.runs)
    if runs and given:
        raise ConfigError(
            f"{given[0]}: the runs are already listed.\n"
            "  Give either combinations or a list of runs, not both."
        )
    wanted = SweepConfig(
        keys=() if listed else keys, runs=listed, search=search or run.sweep.search
    )
    if not wanted.keys and not wanted.runs:
        raise ConfigError(
            "there is nothing to sweep.\n  Give a key several values, for example "
            "train.lr=1e-4,1e-3, or list the runs."
        )
    if wanted.search and wanted.runs:
        raise ConfigError(
            "a search chooses its runs itself.\n"
            "  Either give keys with values or ranges, for example train.lr=1e-5..1e-3,log, or "
            "list the runs without a search."
        )
    return run.model_copy(update={"sweep": wanted})


def chooses_threads(recipe: str | Path | RunConfig, overrides: Sequence[str]) -> bool:
    """Whether the recipe or an override sets the number of threads."""
    run = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe)
    named = (text.partition("=")[0].strip() for text in overrides)
    return "threads" in run.runtime.model_fields_set or "runtime.threads" in named


def trials_of(base: RunConfig) -> list[Trial]:
    """All runs; for a search, two runs with the extreme values of every key, only for checking."""
    given = base.sweep
    axes = read_axes(given.keys, search=given.search > 0)
    if given.search:
        lists = [_ends(axes, at) for at in (0, -1)]
    elif given.runs:
        lists = [tuple(split_keys(text)) for text in given.runs]
    else:
        lists = combinations(axes)
    trials = [trial_of(base, number, keys) for number, keys in enumerate(lists, start=1)]
    for i, trial in enumerate(trials):
        for other in trials[:i]:
            if trial.run == other.run and not given.search:
                raise ConfigError(
                    f"runs {other.number} and {trial.number} are the same: {trial.title}.\n"
                    "  Remove one."
                )
    return trials


def _ends(axes: Sequence[Axis], at: int) -> tuple[str, ...]:
    ends = (
        (a.key, (a.values.low, a.values.high)[at] if isinstance(a.values, Range) else a.values[at])
        for a in axes
    )
    return tuple(f"{key}={value}" for key, value in ends)


def trial_of(base: RunConfig, number: int, keys: tuple[str, ...]) -> Trial:
    """Build a run of a sweep.

    Raises:
        ConfigError: The keys do not give a valid recipe; the message names the run.
    """
    plain = base.model_copy(update={"sweep": SweepConfig()})
    run = with_overrides(plain, keys, name=f"run {number}: {' '.join(keys)}")
    if run.seed != base.seed and run.data.split_seed is None:
        # all seeds are scored on the same rows
        run = run.model_copy(update={"data": run.data.model_copy(update={"split_seed": base.seed})})
    return Trial(number, keys, run)


def check_trials(trials: Sequence[Trial]) -> None:
    """Find every mistake before the first run starts."""
    for trial in trials:
        if trial.run.runtime.name == "flower":
            raise ConfigError(
                "runtime.name = 'flower' cannot be swept: a sweep would keep real clients busy "
                "for all of its runs.\n  Set runtime.name = 'in-process' or 'flower-simulation'."
            )
        if trial.run.evaluate.every == 0:
            raise ConfigError(
                "evaluate.every = 0: a sweep ranks its runs by their held-out loss.\n"
                f"  Set evaluate.every={trial.run.rounds} to score only the base and the result."
            )
        try:
            check(trial.run)
        except SilotuneError as error:
            raise type(error)(f"run {trial.number}, {trial.title}: {error}") from error


def num_jobs(trials: Sequence[Trial], num_runs: int, progress: Progress) -> int:
    """How many runs can be trained at the same time: as many as processors and memory allow."""
    cores, device = usable_threads(), pick_device(trials[0].run.runtime.device)
    free = available_memory_bytes(device)
    here = all(trial.run.runtime.name == "in-process" for trial in trials)
    if not here or device.type != "cpu" or cores == 1 or num_runs == 1 or free is None:
        return 1
    shapes = {
        repr((t.run.model, t.run.adapter, t.run.train, t.run.task)): t.run for t in trials
    }.values()
    needed = [plan(run, measured=False).peak_bytes for run in shapes]
    if None in needed:
        return 1
    most = max(size for size in needed if size is not None)
    at_once = max(1, min(cores, num_runs, int(MEMORY_SHARE * free / most)))
    progress.note(
        f"{counted(at_once, 'run')} at a time on {cores} processors: each needs at most "
        f"{human_bytes(most)} of {human_bytes(free)} free memory"
    )
    return at_once
