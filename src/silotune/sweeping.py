"""Many runs of one recipe, each with other values of some keys, ranked by held-out loss.

A sweep is a folder of run folders. A run that is finished is never trained again, one that was
interrupted goes on from its last round, and one that failed is tried again when the sweep is
resumed. Every run is what `silotune run` with the same keys would give, bit for bit.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from silotune.bench import Bench, attempt, needs
from silotune.checking import check
from silotune.config import RunConfig, load_recipe, usable_threads, with_overrides
from silotune.devices import available_memory_bytes, pick_device
from silotune.disk import write_atomically, write_json, write_rows, written_rows
from silotune.errors import ConfigError, RunFolderError, SilotuneError
from silotune.finished import Run
from silotune.grid import (
    Axis,
    Range,
    SweepConfig,
    combinations,
    is_swept,
    read_axes,
    split_keys,
)
from silotune.launch import place_for
from silotune.planning import plan
from silotune.progress import Progress, human_bytes
from silotune.ranking import ranked
from silotune.searching import Search
from silotune.store import RunFolder, held_out_losses
from silotune.sweep_page import sweep_page
from silotune.sweep_worker import WorkerProcess

MEMORY_SHARE = 0.8
"""Of the free memory that runs at the same time may take together."""


class SweepFolder(RunFolder):
    """One sweep on disk. It is no run: `silotune run --resume` refuses it."""

    RECIPE = "sweep.toml"
    KIND = "sweep"
    COMMAND = "silotune sweep"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    number: int
    keys: tuple[str, ...]
    """What it changes, as overrides."""
    run: RunConfig

    def place(self, folder: RunFolder) -> Path:
        """Its run folder."""
        return folder.path / "runs" / f"{self.number:03d}"

    @property
    def title(self) -> str:
        """For people."""
        return " ".join(self.keys)


@dataclass(frozen=True)
class Sweep:
    """A finished sweep on disk."""

    path: Path

    @property
    def result(self) -> dict[str, Any]:
        """sweep.json: every run's keys, losses, bytes and seconds, the best first; failures last.

        See docs/sweep.md.
        """
        result = SweepFolder.open(self.path).read_json("sweep.json")
        if result is None:
            raise RunFolderError(
                f"{self.path} is not finished.\n"
                f"  Go on with it: silotune sweep --resume {self.path}"
            )
        return result

    @property
    def best(self) -> Run:
        """The run with the lowest held-out loss."""
        return Run(self.path / self.result["runs"][0]["path"])

    def report(self) -> Path:
        """Write report.html: all runs on one page, without a network. Returns its path."""
        result = self.result
        curves = {
            own["number"]: held_out_losses(Run(self.path / own["path"]).metrics)
            for own in result["runs"]
            if own["failed"] is None
        }
        finished = RunFolder.open(self.best.path)
        page = sweep_page(
            result, curves, SweepFolder.open(self.path).run, finished.read_json("provenance.json")
        )
        write_atomically(self.path / "report.html", page.encode())
        return self.path / "report.html"


def sweep(
    recipe: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    runs: Sequence[str] = (),
    search: int = 0,
    jobs: int | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Train a recipe with every combination of some keys' values, or go on with a sweep.

    Args:
        recipe: A shipped name, a TOML file or a config; its [sweep] counts too.
        overrides: Dotted `key=value` texts. One with several values, "train.lr=1e-4,1e-3", is
            swept; with `search` also a range, "train.lr=1e-5..1e-3,log". Others hold for all runs.
        runs: Instead of combinations the runs themselves, each with its overrides in one text.
        search: Train so many runs whose values Optuna chooses.
        jobs: Runs at the same time, each in a process with a base of its own; by default as many
            as processors and memory allow, and on a GPU one.
        out: The folder to create; by default runs/<time>-<recipe>-sweep. Never overwritten.
        resume: A sweep to go on with. Its own recipe and keys count.
        progress: Told what happens; silent by default.

    Raises:
        SilotuneError: See errors.py. A mistake in any of the runs is found before the first one
            begins. A run that fails later does not: it is in the result with its reason.
    """
    progress = progress or Progress()
    if resume is not None:
        if recipe is not None or overrides or runs or search or out is not None:
            raise ConfigError(
                "a resumed sweep keeps its recipe and its keys, so nothing else has a place.\n"
                "  Give --resume and, if you like, --jobs; or start a new sweep."
            )
        folder = SweepFolder.open(Path(resume))
        trials = _trials(folder.run)
    elif recipe is None:
        raise ConfigError("give a recipe, or --resume with the folder of a sweep.")
    else:
        base = _read(recipe, overrides, runs, search)
        trials = _trials(base)
        num_runs = base.sweep.search or len(trials)
        _check(trials)
        if not _chooses_threads(recipe, overrides):
            at_once = jobs or _num_jobs(trials, num_runs, progress)
            threads = max(1, usable_threads() // at_once)
            runtime = base.runtime.model_copy(update={"threads": threads})
            base = base.model_copy(update={"runtime": runtime})
            jobs = at_once
        folder = SweepFolder.create(place_for(recipe, out, "-sweep"), base)
        trials = _trials(base)
    progress.note(f"sweep folder: {folder.path}")
    try:
        with folder.locked():
            return _sweep(folder, trials, jobs, progress)
    except BaseException:
        progress.note(f"go on with: silotune sweep --resume {folder.path}")
        raise


# --- what is tried --------------------------------------------------------------------------------


def _read(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str],
    runs: Sequence[str],
    search: int,
) -> RunConfig:
    """The recipe with its [sweep], from the recipe's own and what was asked."""
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
            f"{given[0]}: the runs are listed already.\n"
            "  Give combinations, or a list of runs, not both."
        )
    wanted = SweepConfig(
        keys=() if listed else keys, runs=listed, search=search or run.sweep.search
    )
    if not wanted.keys and not wanted.runs:
        raise ConfigError(
            "there is nothing to sweep.\n  Give a key several values, as in train.lr=1e-4,1e-3, or "
            "list the runs."
        )
    if wanted.search and wanted.runs:
        raise ConfigError(
            "a search chooses its runs itself.\n"
            "  Give keys with values or ranges, as in train.lr=1e-5..1e-3,log, or list the runs."
        )
    return run.model_copy(update={"sweep": wanted})


def _chooses_threads(recipe: str | Path | RunConfig, overrides: Sequence[str]) -> bool:
    """Whether somebody said how many threads a run has."""
    run = recipe if isinstance(recipe, RunConfig) else load_recipe(recipe)
    named = (text.partition("=")[0].strip() for text in overrides)
    return "threads" in run.runtime.model_fields_set or "runtime.threads" in named


def _trials(base: RunConfig) -> list[Trial]:
    """All runs; of a search the two at the ends of every key, which are there to be checked."""
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
                    "  Take one out."
                )
    return trials


def _ends(axes: Sequence[Axis], at: int) -> tuple[str, ...]:
    ends = (
        (a.key, (a.values.low, a.values.high)[at] if isinstance(a.values, Range) else a.values[at])
        for a in axes
    )
    return tuple(f"{key}={value}" for key, value in ends)


def trial_of(base: RunConfig, number: int, keys: tuple[str, ...]) -> Trial:
    """A run of a sweep.

    Raises:
        ConfigError: The keys make no recipe; the run is named.
    """
    plain = base.model_copy(update={"sweep": SweepConfig()})
    run = with_overrides(plain, keys, name=f"run {number}: {' '.join(keys)}")
    if run.seed != base.seed and run.data.split_seed is None:
        # all seeds are scored on the same rows
        run = run.model_copy(update={"data": run.data.model_copy(update={"split_seed": base.seed})})
    return Trial(number, keys, run)


def _check(trials: Sequence[Trial]) -> None:
    """Find every mistake before the first run begins."""
    for trial in trials:
        if trial.run.runtime.name == "flower":
            raise ConfigError(
                "runtime.name = 'flower' cannot be swept: a sweep would keep real clients busy "
                "for all of its runs.\n  Set runtime.name = 'in-process' or 'flower-simulation'."
            )
        if trial.run.evaluate.every == 0:
            raise ConfigError(
                "evaluate.every = 0: a sweep ranks its runs by their held-out loss.\n"
                f"  Set evaluate.every={trial.run.rounds} to score the base and the end only."
            )
        try:
            check(trial.run)
        except SilotuneError as error:
            raise type(error)(f"run {trial.number}, {trial.title}: {error}") from error


def _num_jobs(trials: Sequence[Trial], num_runs: int, progress: Progress) -> int:
    """How many runs may go on at the same time: as processors and memory allow."""
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
        f"{at_once} run(s) at the same time, on {cores} processors: each takes at most "
        f"{human_bytes(most)} of {human_bytes(free)} of free memory"
    )
    return at_once


# --- training -------------------------------------------------------------------------------------


class Source(Protocol):
    """Where the next run comes from. Used by one thread at a time."""

    def take(self, last: Trial | None) -> Trial | None:
        """The next run for a process that did `last` before; None where no more are needed."""
        ...

    def tell(self, trial: Trial, loss: float | None) -> None:
        """A run ended; without a loss it failed."""
        ...


class Listed:
    """Runs that are known from the beginning."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._left = list(trials)

    def take(self, last: Trial | None) -> Trial | None:
        """Runs that need the same base follow each other, so that it is not loaded again."""
        if not self._left:
            return None
        same = (i for i, t in enumerate(self._left) if last and needs(t.run) == needs(last.run))
        return self._left.pop(next(same, 0))

    def tell(self, trial: Trial, loss: float | None) -> None:
        """Nothing follows from it."""


class Searched:
    """Runs that Optuna chooses; runs.jsonl in the folder remembers which."""

    FILE = "runs.jsonl"

    def __init__(self, folder: SweepFolder) -> None:
        self._folder, base = folder, folder.run
        axes = read_axes(base.sweep.keys, search=True)
        self._search = Search(axes, seed=base.seed)
        self.trials: list[Trial] = []
        again: list[Trial] = []
        for row in written_rows(folder.path / self.FILE):
            trial = trial_of(base, row["number"], tuple(row["keys"]))
            self.trials.append(trial)
            loss = loss_of(trial, folder)
            if loss is None:
                again.append(trial)
            else:
                self._search.remember(trial.keys, loss)
        self._again = Listed(again)
        self._tried_again = {trial.number for trial in again}

    def take(self, last: Trial | None) -> Trial | None:
        """First what an earlier process left, then a proposal."""
        left = self._again.take(last)
        if left is not None or len(self.trials) >= self._folder.run.sweep.search:
            return left
        keys = self._search.propose()
        if keys is None:
            return None
        trial = trial_of(self._folder.run, len(self.trials) + 1, keys)
        self.trials.append(trial)
        rows = [{"number": t.number, "keys": list(t.keys)} for t in self.trials]
        write_rows(self._folder.path / self.FILE, rows)
        return trial

    def tell(self, trial: Trial, loss: float | None) -> None:
        """What the next proposals stand on."""
        if trial.number in self._tried_again:
            self._search.remember(trial.keys, loss)
        else:
            self._search.tell(trial.keys, loss)


def loss_of(trial: Trial, folder: SweepFolder) -> float | None:
    """A finished run's held-out loss; None where it is not finished."""
    place = trial.place(folder)
    summary = RunFolder.open(place).read_json("summary.json") if place.exists() else None
    return summary and summary["overall"]["federated_loss"]


def _sweep(
    folder: SweepFolder, trials: Sequence[Trial], jobs: int | None, progress: Progress
) -> Sweep:
    before = folder.read_json("sweep.json")
    if before is not None and all(own["failed"] is None for own in before["runs"]):
        return Sweep(folder.path)
    base = folder.run
    num_runs = base.sweep.search or len(trials)
    at_once = jobs or _num_jobs(trials, num_runs, progress)
    source = Searched(folder) if base.sweep.search else Listed(trials)
    failed = _Work(folder, source, num_runs, progress).do(at_once)
    done = source.trials if isinstance(source, Searched) else trials
    write_json(folder.path / "sweep.json", _result(folder, done, failed))
    finished = Sweep(folder.path)
    if base.report.page and len(failed) < len(done):
        finished.report()
    return finished


class _Work:
    """Runs of a sweep under way: who trains what, and what was told about it."""

    def __init__(
        self, folder: SweepFolder, source: Source, num_runs: int, progress: Progress
    ) -> None:
        self.folder, self.source, self.progress = folder, source, progress
        self.num_runs = num_runs
        self.failed: dict[int, str] = {}
        self._lock = threading.Lock()

    def do(self, at_once: int) -> Mapping[int, str]:
        """Train all. Returns why some failed, by number."""
        if at_once == 1:
            bench = Bench(self.progress)
            self._follow(lambda place: attempt(bench, RunFolder.open(place)))
            return self.failed
        logs = [self.folder.path / f"worker-{n}.log" for n in range(1, at_once + 1)]
        workers = [WorkerProcess(log) for log in logs]
        with ThreadPoolExecutor(at_once) as pool:
            try:
                for ended in [pool.submit(self._follow, worker.train) for worker in workers]:
                    ended.result()
            finally:  # an error or a signal here must not wait for the others' runs
                with self._lock:
                    self.source = Listed([])
                for worker in workers:
                    worker.stop()
        return self.failed

    def _follow(self, train: Callable[[Path], str | None]) -> None:
        """Train one run after the other until there are no more."""
        trial: Trial | None = None
        while True:
            with self._lock:
                trial = self.source.take(trial)
                if trial is None:
                    return
                place = trial.place(self.folder)
                if not place.exists():
                    RunFolder.create(place, trial.run)
                self.progress.note(f"[{trial.number}/{self.num_runs}] {trial.title}")
            why = train(place)
            with self._lock:
                self._ended(trial, why)

    def _ended(self, trial: Trial, why: str | None) -> None:
        loss = None if why is not None else loss_of(trial, self.folder)
        self.source.tell(trial, loss)
        if why is not None:
            self.failed[trial.number] = why
            self.progress.note(f"[{trial.number}/{self.num_runs}] failed: {why}")
        else:
            words = "no held-out loss" if loss is None else f"held-out loss {loss:.3f}"
            self.progress.note(f"[{trial.number}/{self.num_runs}] done: {words}")


def _result(
    folder: SweepFolder, trials: Sequence[Trial], failed: Mapping[int, str]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for trial in trials:
        row: dict[str, Any] = {
            "number": trial.number,
            "path": str(trial.place(folder).relative_to(folder.path)),
            "keys": dict(text.split("=", 1) for text in trial.keys),
            "failed": failed.get(trial.number),
        }
        if row["failed"] is None:
            run = Run(trial.place(folder))
            row |= _numbers(run)
        rows.append(row)
    return {"name": folder.path.name, **ranked(rows), "note": folder.run.report.note}


def _numbers(run: Run) -> dict[str, Any]:
    summary = run.summary
    last = summary["result_round"]
    scored = [r for r in run.metrics if r["event"] == "evaluate" and r["round"] == last]
    return {
        "task": summary["task"],
        "base_loss": summary["overall"]["base_loss"],
        "loss": summary["overall"]["federated_loss"],
        "scores": (summary.get("scores") or {}).get("overall", {}).get("federated"),
        "num_scored": sum(row.get("num_tokens", 0) for row in scored),
        "bytes": summary["bytes_up"] + summary["bytes_down"],
        "seconds": summary["seconds_total"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "rounds": summary["rounds"],
        "epsilon": summary.get("privacy", {}).get("epsilon", {}).get("pld"),
    }
