"""`silotune run`: a recipe in, a finished run out. Open, drive the rounds, write the results."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from silotune.core.algorithm import keep_local, starting_state
from silotune.core.errors import ConfigError, SilotuneError
from silotune.core.public_call import public
from silotune.core.types import ServerState
from silotune.data.client_rows import ClientRows
from silotune.data.files import locate
from silotune.federation.budget import begin_part, has_ceiling, keep_spent
from silotune.federation.client import ClientData
from silotune.federation.client_memory import check_memories
from silotune.federation.live_writer import LiveFile
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Both, Progress
from silotune.federation.recipe_model import LOOKED_AT, load_for, local_tensors, warn_of_template
from silotune.federation.roster import is_consortium
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import server_rows
from silotune.federation.trackers import Tracker
from silotune.models.loading import LoadedModel, num_base_loads, read_adapter
from silotune.models.sources import resolve
from silotune.recipes.schema import RunConfig
from silotune.results.run import Run
from silotune.runtime import inprocess
from silotune.runtime.flower import consortium_run
from silotune.runtime.flower import engine as flower_engine
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.job import Job, Measured
from silotune.workflows.check import Checked
from silotune.workflows.extend import extend, open_to_extend
from silotune.workflows.folders import dotted_values, open_folder
from silotune.workflows.in_memory import keep_beside
from silotune.workflows.plan.outcome import measure_first, write_prediction
from silotune.workflows.provenance import provenance_of
from silotune.workflows.write_results import Spent, write_results

RUNTIMES = {
    "in-process": inprocess.drive,
    "flower-simulation": flower_engine.drive,
    "flower": consortium_run.drive,
}
"""What runs a job's rounds, by `runtime.name`."""


@public
def run(
    recipe: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
    rows: Any = None,
    model: Any = None,
) -> Run:
    """Run a recipe, resume an interrupted run, or extend a run by more rounds.

    Args:
        recipe: A shipped name, a TOML file or a config; optional with `resume`.
        overrides: Dotted `key=value` texts on top of it. With `resume`, only `rounds`: the run goes
            on until it has that many. If its learning rate is not constant, also `train.schedule`,
            which the added rounds follow.
        out: The run folder to create; by default `runs/<time>-<recipe>`. Never overwritten.
        resume: A run folder to resume, with the recipe that is stored in it.
        progress: Told what happens; silent by default.
        rows: Rows in memory, instead of data.path: a list of dicts, a data set, a data frame, an
            iterator, or {client: rows}. They are written beside the run folder.
        model: A transformers model and its tokenizer in memory, instead of model.name. It is saved
            like the rows and not changed.

    Returns:
        The finished run.

    Raises:
        SilotuneError: The run cannot be done. Whatever was finished stays in its folder.
    """
    began = time.perf_counter()
    overrides = keep_beside(out, rows, model, overrides, resume)
    if resume is not None and recipe is None and out is None and overrides:
        folder, checked = open_to_extend(Path(resume), overrides)
    else:
        folder, checked = open_folder(RunFolder, recipe, overrides, out=out, resume=resume)
    progress = progress or Progress()
    live = LiveFile(folder.path)
    progress = Both(progress, live)
    progress.note(f"run folder: {folder.path}")
    if checked.chosen:
        progress.note(checked.chosen)
    with folder.locked():
        if checked.run.rounds > folder.run.rounds:
            progress.note(f"extended from {folder.run.rounds} to {checked.run.rounds} rounds")
            folder = extend(folder, checked.run)
        with live.writing():
            try:
                return run_in(folder, checked, progress, began=began)
            except BaseException as error:  # errors and signals alike are let through
                if resume is None and _is_a_mistake(error) and not folder.has_begun():
                    # a resumed run keeps its recipe, so it would stop at the same mistake
                    progress.note("nothing was trained, so the run folder is removed")
                    folder.remove()
                else:
                    progress.note(f"to continue: silotune run --resume {folder.path}")
                raise


def _is_a_mistake(error: BaseException) -> bool:
    return isinstance(error, SilotuneError) and error.exit_code == ConfigError.exit_code


def run_in(
    folder: RunFolder,
    checked: Checked,
    progress: Progress,
    *,
    began: float,
    loaded: LoadedModel | None = None,
    data: Mapping[str, ClientData] | None = None,
    drive: Callable[[Job], Measured] | None = None,
) -> Run:
    """Do what is left of a run in its folder, which the caller has locked.

    Args:
        folder: The run's.
        checked: Its recipe and rows.
        progress: Told what happens.
        began: When this part of the run began, by `time.perf_counter`.
        loaded: The base with the recipe's first adapter, if it is in memory already.
        data: The rows as tokens, if they have been tokenized already.
        drive: What runs the rounds; by default what `RUNTIMES` has for the recipe.
    """
    if folder.read_json("summary.json") is not None:
        return Run(folder.path)  # finished before: nothing is left to do
    loads_before = num_base_loads()
    opened = open_run(folder, checked, progress, began=began, loaded=loaded, data=data)
    measured = drive_rounds(opened.job, drive or RUNTIMES[checked.run.runtime.name])
    # scoring is part of the rounds; writing answers and the report is not
    scored_s = opened.earlier_s + time.perf_counter() - began
    spent = Spent(
        rounds_s=scored_s - opened.measuring_s,
        total_s=lambda: opened.earlier_s + time.perf_counter() - began,
        num_base_loads=lambda: num_base_loads() - loads_before,
    )
    return write_results(
        opened.job, checked, measured, spent, planned=opened.planned, provenance=opened.provenance
    )


@dataclass(frozen=True)
class OpenedRun:
    """A run that is ready for its rounds."""

    job: Job
    provenance: dict[str, Any]
    planned: dict[str, Any]
    """plan.json: what the run is expected to cost."""
    earlier_s: float
    """Seconds of the rounds that earlier parts of the run have finished."""
    measuring_s: float
    """Seconds of the measured step, which is not part of the run."""


def open_run(
    folder: RunFolder,
    checked: Checked,
    progress: Progress,
    *,
    began: float,
    loaded: LoadedModel | None = None,
    data: Mapping[str, ClientData] | None = None,
) -> OpenedRun:
    """Load the base, record what the run depends on and is expected to cost, and find its state.

    Args:
        folder: As in `run_in`; so are the others.
        checked: Its recipe and rows.
        progress: Told what happens.
        began: When this part of the run began.
        loaded: The base with the recipe's first adapter, if it is in memory already.
        data: The rows as tokens, if they have been tokenized already.

    Raises:
        RunFolderError: The base or the rows have changed since the run began.
    """
    run = checked.run
    for text in checked.warnings:
        progress.note(f"warning: {text}")
    if has_ceiling(run):
        begin_part(folder, began)
    found, measuring_s = "a comparison does not measure", 0.0
    if run.adapter.start is not None:
        progress.note(f"training starts from {run.adapter.start}; its scores are called base")
    if loaded is None:
        before = time.perf_counter()
        found = measure_first(run, folder, progress)
        measuring_s = time.perf_counter() - before
        progress.doing(f"loading {run.model.name}")
        loaded = load_for(run, progress)
    if data is None:  # otherwise whoever prepared it has said this
        own = server_rows(run)
        for text in warn_of_template(loaded.tokenizer, run, checked.rows, own, at_most=LOOKED_AT):
            progress.note(f"warning: {text}")
    provenance = provenance_of(folder, checked, loaded)
    state = folder.load_state() or _first_state(run, loaded, folder, checked.rows)
    if run.runtime.name != "flower":  # there, clients keep their memory themselves
        spooled = folder.spool(state.round + 1).names()
        check_memories(folder.metrics(), spooled, at=state.round, folder_of=folder.client_folder)
    local = local_tensors(run, loaded)
    algorithm = keep_local(algorithm_of(run.algorithm), local)
    num_clients = len(checked.rows)
    planned = write_prediction(
        folder, run, state, algorithm, num_clients=num_clients, measured=found
    )
    job = Job(run, state, checked.rows, folder, progress, provenance["base"]["sha256"], local)
    place = locate(run.data.path)
    if place is not None and is_consortium(place):
        job = replace(job, consortium=place)
    if run.runtime.name == "in-process":  # elsewhere the engine's processes need the memory
        job = replace(job, loaded=loaded, data=data)
    earlier_s = sum(row["seconds"] for row in folder.metrics() if row["event"] == "round")
    return OpenedRun(job, provenance, planned, earlier_s, measuring_s)


def _first_state(
    run: RunConfig, loaded: LoadedModel, folder: RunFolder, rows: Mapping[str, ClientRows]
) -> ServerState:
    adapter = read_adapter(loaded)
    num_examples = {name: len(own.train) for name, own in rows.items()}
    algorithm = with_privacy(algorithm_of(run.algorithm), run, folder, num_examples)
    return starting_state(algorithm, adapter, len(rows))


def drive_rounds(job: Job, drive: Callable[[Job], Measured]) -> Measured:
    """Run the rounds that are left, and report them to the recipe's tracker too."""
    run, folder, tracker = job.run, job.folder, None
    if run.report.tracker != "none":
        settings = dotted_values(run)
        tracker = Tracker(run.report.tracker, folder=folder.path, settings=settings)
        job = replace(job, progress=Both(job.progress, tracker))
    try:
        measured = drive(job)
        if tracker is not None:
            rows = folder.metrics()
            done = max(row["round"] for row in rows)
            tracker.log_scores([row for row in rows if row["round"] == done])
        return measured
    finally:
        job.progress.end()
        keep_spent(folder, time.perf_counter)  # also of a round that was not finished


@public
def base_folder(name: str) -> str | Path:
    """Where a `model.name` is found: the folder of a named source (fetched once), or the name.

    Raises:
        ModelError: There is no such model, or a named source cannot be fetched.
    """
    return resolve(name)
