"""Train a recipe many times with different values for some keys; rank the runs by held-out loss.

A sweep is a folder of run folders. When a sweep is resumed, finished runs are never trained again,
interrupted runs continue after their last round, and failed runs are tried again. Every run equals
that of `silotune run` with the same keys, bit for bit.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from pydantic import Field

from silotune.core.atomic_files import write_atomically, write_rows, written_rows
from silotune.core.errors import ConfigError, RunFolderError
from silotune.core.processors import usable_threads
from silotune.core.public_call import as_path, public
from silotune.federation.metrics import held_out_losses
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.recipes.schema import RunConfig
from silotune.recipes.sweep_grid import read_axes
from silotune.results.frames import frame, value_of
from silotune.results.paper import TableKind, check_kinds, write_charts, write_tables
from silotune.results.run import Run
from silotune.results.svg import ChartKind, saving
from silotune.workflows.check import on_a_day
from silotune.workflows.folders import place_for
from silotune.workflows.in_memory import keep_beside
from silotune.workflows.shared_base import Bench, attempt, needs
from silotune.workflows.sweep.page import sweep_page
from silotune.workflows.sweep.ranking import SEED, ranked, run_table, settings_of, sweep_table
from silotune.workflows.sweep.search import Search
from silotune.workflows.sweep.trials import (
    Trial,
    check_trials,
    chooses_threads,
    num_jobs,
    read_sweep,
    trial_of,
    trials_of,
)
from silotune.workflows.sweep.worker import WorkerProcess

if TYPE_CHECKING:
    from pandas import DataFrame


class SweepFolder(RunFolder):
    """One sweep on disk. It is not a run: `silotune run --resume` refuses it."""

    RECIPE = "sweep.toml"
    KIND = "sweep"
    COMMAND = "silotune sweep"
    RESULT = "sweep.json"
    MADE_AGAIN = ("sweep.json",)


@dataclass(frozen=True)
class Sweep:
    """A finished sweep on disk."""

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path(self.path, "Sweep"))  # strings are accepted too

    @property
    def result(self) -> dict[str, Any]:
        """sweep.json (docs/sweep.md): the runs, best first, and failures last."""
        result = SweepFolder.open(self.path).read_json("sweep.json")
        if result is None:
            raise RunFolderError(
                f"{self.path} is not finished.\n  Resume it: silotune sweep --resume {self.path}"
            )
        return result

    @property
    def best(self) -> Run:
        """The run with the lowest held-out loss."""
        return Run(self.path / self.result["runs"][0]["path"])

    def table(self, *, seeds_together: bool = False) -> "DataFrame":
        """One row per run: its keys as numbers where they are, losses, bytes, seconds.

        Losses are in nats per token (classify: per row), of held-out rows.

        Args:
            seeds_together: One row per setting instead: the mean held-out loss over its seeds, and
                a 95 % t interval (low, high; NaN for a single seed).
        """
        rows = settings_of(self.result["runs"]) if seeds_together else self.result["runs"]
        columns = [key for key in self.result["keys"] if not seeds_together or key != SEED]
        return frame(
            {
                **{key: value_of(row["keys"].get(key, "")) for key in columns},
                **{key: value for key, value in row.items() if key not in ("keys", "scores")},
                **(row.get("scores") or {}),
            }
            for row in rows
        )

    @public
    def report(self, *, charts: ChartKind | None = None, tables: TableKind | None = None) -> Path:
        """Write report.html: all runs on one page that needs no network. Returns its path.

        Args:
            charts: Also write every chart as a file, into charts/.
            tables: Also write the tables, into tables/: "csv" unrounded, "latex" as on the page.
        """
        check_kinds(charts, tables)
        result = self.result
        curves = {
            own["number"]: held_out_losses(Run(self.path / own["path"]).metrics)
            for own in result["runs"]
            if own["failed"] is None
        }
        finished = RunFolder.open(self.best.path)
        run, provenance = SweepFolder.open(self.path).run, finished.read_json("provenance.json")
        with saving(charts) as saved:
            page = sweep_page(result, curves, run, provenance)
        write_atomically(self.path / "report.html", page.encode())
        write_charts(self.path, saved)
        write_tables(
            self.path,
            tables,
            numbers=lambda: {"runs": self.table(), "settings": self.table(seeds_together=True)},
            texts=lambda: {"runs": run_table(result), "settings": sweep_table(result)},
        )
        return self.path / "report.html"


@public
def sweep(
    recipe: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    runs: Sequence[str] = (),
    search: Annotated[int, Field(ge=0)] = 0,
    jobs: Annotated[int, Field(ge=1)] | None = None,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
    rows: Any = None,
    model: Any = None,
) -> Sweep:
    """Train a recipe with every combination of some keys' values, or resume a sweep.

    Args:
        recipe: A shipped name, a TOML file or a config; its [sweep] applies too.
        overrides: Dotted `key=value` strings. A key with several values, "train.lr=1e-4,1e-3", is
            swept; with `search`, so is a range, "train.lr=1e-5..1e-3,log". Others apply to all.
        runs: The runs themselves instead of combinations, each with its overrides in one string.
        search: Train this many runs, with values that Optuna chooses.
        jobs: Number of concurrent runs, each in a process with its own base; by default as many as
            processors and memory allow, and one on a GPU.
        out: The folder to create; by default `runs/<time>-<recipe>-sweep`. Never replaced.
        resume: A sweep to resume, with its own recipe and keys.
        progress: Receives progress messages; silent by default.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written beside the sweep folder.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.

    Raises:
        SilotuneError: A mistake in any run, found before the first one starts. A run that fails
            later raises nothing: the result lists it with the reason.
    """
    progress = progress or Progress()
    overrides = keep_beside(out, rows, model, overrides, resume)
    if resume is not None:
        if recipe is not None or overrides or runs or search or out is not None:
            raise ConfigError(
                "a resumed sweep keeps its recipe and its keys, so it takes no others.\n"
                "  Give --resume and optionally --jobs, or start a new sweep."
            )
        folder = SweepFolder.open(Path(resume))
        trials = trials_of(folder.run)
    elif recipe is None:
        raise ConfigError("there is no recipe.\n  Give a recipe, or --resume SWEEP-FOLDER.")
    else:
        base = on_a_day(read_sweep(recipe, overrides, runs, search))
        trials = trials_of(base)
        num_runs = base.sweep.search or len(trials)
        check_trials(trials)
        if not chooses_threads(recipe, overrides):
            at_once = jobs or num_jobs(trials, num_runs, progress)
            threads = max(1, usable_threads() // at_once)
            runtime = base.runtime.model_copy(update={"threads": threads})
            base = base.model_copy(update={"runtime": runtime})
            jobs = at_once
        folder = SweepFolder.create(place_for(recipe, out, "-sweep"), base)
        trials = trials_of(base)
    progress.note(f"sweep folder: {folder.path}")
    try:
        with folder.locked():
            return _sweep(folder, trials, jobs, progress)
    except BaseException:
        progress.note(f"to continue: silotune sweep --resume {folder.path}")
        raise


# --- training -------------------------------------------------------------------------------------


class Source(Protocol):
    """Where the next run comes from. Used by one thread at a time."""

    def take(self, last: Trial | None) -> Trial | None:
        """The next run for a process whose previous run was `last`; None if there are no more."""
        ...

    def tell(self, trial: Trial, loss: float | None) -> None:
        """Report the end of a run; without a loss, it failed."""
        ...


class Listed:
    """Runs that are known from the start."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._left = list(trials)

    def take(self, last: Trial | None) -> Trial | None:
        """The next run, if possible one that needs the same base, so that it is not reloaded."""
        if not self._left:
            return None
        same = (i for i, t in enumerate(self._left) if last and needs(t.run) == needs(last.run))
        return self._left.pop(next(same, 0))

    def tell(self, trial: Trial, loss: float | None) -> None:
        """Ignore the loss: the list does not depend on it."""


class Searched:
    """Runs that Optuna chooses; runs.jsonl in the folder records them."""

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
        """First the runs that an earlier process left, then proposals."""
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
        """Report the loss, which the next proposals depend on."""
        if trial.number in self._tried_again:
            self._search.remember(trial.keys, loss)
        else:
            self._search.tell(trial.keys, loss)


def loss_of(trial: Trial, folder: SweepFolder) -> float | None:
    """A run's held-out loss; None if the run is not finished."""
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
    at_once = jobs or num_jobs(trials, num_runs, progress)
    source = Searched(folder) if base.sweep.search else Listed(trials)
    failed = _Work(folder, source, num_runs, progress).do(at_once)
    done = source.trials if isinstance(source, Searched) else trials
    folder.write_json("sweep.json", _result(folder, done, failed))
    finished = Sweep(folder.path)
    if base.report.page and len(failed) < len(done):
        finished.report()
    return finished


class _Work:
    """The running sweep: distributes its runs to processes, and collects failures."""

    def __init__(
        self, folder: SweepFolder, source: Source, num_runs: int, progress: Progress
    ) -> None:
        self.folder, self.source, self.progress = folder, source, progress
        self.num_runs = num_runs
        self.failed: dict[int, str] = {}
        self._lock = threading.Lock()

    def do(self, at_once: int) -> Mapping[int, str]:
        """Train all runs. Returns why some failed, by run number."""
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
            finally:  # after an error or a signal, do not wait for the other runs
                with self._lock:
                    self.source = Listed([])
                for worker in workers:
                    worker.stop()
        return self.failed

    def _follow(self, train: Callable[[Path], str | None]) -> None:
        """Train one run after another until there are no more."""
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
            name = f"{trial.run.data.scored_part} loss"
            words = f"no {name}" if loss is None else f"{name} {loss:.3f}"
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
        **({"scored": summary["scored"]} if "scored" in summary else {}),
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
