"""A recipe in, a run out. What the commands do, Python does by these names."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from silotune.core.algorithm import keep_local
from silotune.core.atomic_files import free_place, write_atomically, write_json
from silotune.core.errors import ConfigError, RunFolderError, SilotuneError
from silotune.core.tree import size_bytes
from silotune.core.types import AdapterState, ServerState
from silotune.data.clients import ClientRows
from silotune.data.files import locate
from silotune.federation.budget import begin_part, keep_spent, read_spent
from silotune.federation.client import ClientData
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.privacy_statement import statement
from silotune.federation.progress import Both, Progress
from silotune.federation.recipe_model import load_for, local_tensors
from silotune.federation.roster import is_consortium
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import is_pretrained, pretrain, server_rows
from silotune.federation.trackers import Tracker
from silotune.models.loading import (
    LoadedModel,
    base_only,
    num_base_loads,
    read_adapter,
    save_adapter,
    write_adapter,
)
from silotune.models.sources import resolve
from silotune.recipes.schema import RunConfig
from silotune.results.card import model_card
from silotune.results.run import Run, read_result
from silotune.results.summary import budget_warnings, summarise
from silotune.runtime import inprocess
from silotune.runtime.flower import consortium_run
from silotune.runtime.flower import engine as flower_engine
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.job import Job, Measured
from silotune.training.generate import Answer, answers
from silotune.training.tasks import build_task
from silotune.workflows.check import Checked, check
from silotune.workflows.data_overview import describe_split
from silotune.workflows.evaluate.text_scores import question_of
from silotune.workflows.plan.outcome import compare_with_prediction, measure_first, write_prediction
from silotune.workflows.provenance import file_sha256, provenance_of

RUNTIMES = {
    "in-process": inprocess.drive,
    "flower-simulation": flower_engine.drive,
    "flower": consortium_run.drive,
}
"""What runs a job's rounds, by `runtime.name`."""
F = TypeVar("F", bound=RunFolder)
NOT_MET = {"num_train": 0, "num_eval": 0}
"""Rows of a client that never answered."""


def run(
    recipe: str | Path | RunConfig | None = None,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    resume: Path | str | None = None,
    progress: Progress | None = None,
) -> Run:
    """Run a recipe, or go on with an interrupted run.

    Args:
        recipe: A shipped name, a TOML file or a config; with `resume` it may be left out.
        overrides: Dotted `key=value` texts on top of it.
        out: The run folder to create; by default runs/<time>-<recipe>. Never overwritten.
        resume: A run folder to go on with. Its own recipe counts.
        progress: Told what happens; silent by default.

    Returns:
        The finished run.

    Raises:
        SilotuneError: See errors.py. Whatever was finished stays in the run folder.
    """
    began = time.perf_counter()
    folder, checked = open_folder(RunFolder, recipe, overrides, out=out, resume=resume)
    progress = progress or Progress()
    progress.note(f"run folder: {folder.path}")
    with folder.locked():
        try:
            return run_in(folder, checked, progress, began=began)
        except BaseException as error:  # errors and signals alike are let through
            if resume is None and _is_a_mistake(error) and not folder.has_begun():
                # a resumed run keeps its recipe, so it would stop at the same mistake
                progress.note("nothing was trained, so the run folder is removed")
                folder.remove()
            else:
                progress.note(f"go on with: silotune run --resume {folder.path}")
            raise


def pretrain_teacher(
    recipe: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Let a recipe's teacher learn the task on the server's own rows, before any run.

    Args:
        recipe: A shipped name, a TOML file or a config, with `distill.teacher`, rows of the server
            and `distill.pretrain_epochs`.
        overrides: Dotted `key=value` texts on top of it.
        out: The model folder to create; by default runs/<time>-<recipe>-teacher.
        progress: Told what happens; silent by default.

    Returns:
        A plain model folder, for `distill.teacher` of later runs. Its teacher.json says how it was
        made and, where the clients' rows are at hand, how well it does on those held out.

    Raises:
        SilotuneError: See errors.py; nothing half-written is left.
    """
    checked = check(recipe, overrides)
    run, distill = checked.run, checked.run.distill
    own = server_rows(run)
    if distill.teacher is None or distill.pretrain_epochs == 0 or not own:
        raise ConfigError(
            "a teacher is pre-trained with distill.teacher, distill.pretrain_epochs of at least 1, "
            "and rows of the server (server.data_fraction or server.data_path).\n"
            "  Set what is missing, for instance distill.pretrain_epochs=3."
        )
    if is_pretrained(distill.teacher):
        raise ConfigError(
            f"distill.teacher = '{distill.teacher}' has learned the task already.\n"
            "  Name the model that it began as."
        )
    place = place_for(recipe, out, "-teacher")
    held_out = [row for client in checked.rows.values() for row in client.evaluation]
    pretrain(
        run,
        place,
        progress or Progress(),
        rows=own,
        # a student that cannot be loaded had better show now
        tokenizer=load_for(run).tokenizer,
        held_out=held_out,
    )
    return place


def open_folder(
    kind: type[F],
    recipe: str | Path | RunConfig | None,
    overrides: Sequence[str],
    *,
    out: Path | str | None,
    resume: Path | str | None,
) -> tuple[F, Checked]:
    """A new folder of this kind, or the one to resume, and its recipe, checked.

    Raises:
        ConfigError, ModelError, DataError, RunFolderError: See `check`, and the folder's.
    """
    if resume is not None:
        if out is not None:
            raise ConfigError("give out or resume, not both.")
        folder = kind.open(Path(resume))
        if recipe is not None:
            _check_same_recipe(check(recipe, overrides).run, folder)
        elif overrides:
            raise ConfigError(
                "a resumed run keeps its recipe, so overrides have no place.\n"
                "  Start a new run for other settings."
            )
        return folder, check(folder.run)
    if recipe is None:
        raise ConfigError("give a recipe, or a run folder to resume.")
    checked = check(recipe, overrides)
    return kind.create(place_for(recipe, out), checked.run), checked


def place_for(recipe: str | Path | RunConfig, out: Path | str | None, ending: str = "") -> Path:
    """Where a new folder goes: `out`, else runs/<time>-<recipe><ending>, where nothing is yet."""
    if out is not None:
        return Path(out)
    name = "run" if isinstance(recipe, RunConfig) else Path(recipe).stem
    return free_place(Path("runs") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}{ending}")


def _dotted(run: RunConfig) -> dict[str, Any]:
    """All values of a recipe by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in run.model_dump(serialize_as_any=True).items():
        inner = value if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat


def _is_a_mistake(error: BaseException) -> bool:
    return isinstance(error, SilotuneError) and error.exit_code == ConfigError.exit_code


def _check_same_recipe(given: RunConfig, folder: RunFolder) -> None:
    old, new = _dotted(folder.run), _dotted(given)
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if different:
        raise ConfigError(
            f"the recipe differs from that of {folder.path} in: {', '.join(different)}.\n"
            "  Leave the recipe out to go on with the run's own, or start a new run."
        )


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
        loaded: The base with the recipe's first adapter, where it is in memory already.
        data: The rows as tokens, where they have been made already.
        drive: What runs the rounds; by default what `RUNTIMES` has for the recipe.
    """
    if folder.read_json("summary.json") is not None:
        return Run(folder.path)  # finished before: nothing is left to do
    run, loads_before = checked.run, num_base_loads()
    for text in checked.warnings:
        progress.note(f"warning: {text}")
    if run.budget.bytes is not None or run.budget.hours is not None:
        begin_part(folder, began)
    found, seconds_measuring = "a comparison does not measure", 0.0
    if loaded is None:
        before = time.perf_counter()
        found = measure_first(run, folder, progress)
        seconds_measuring = time.perf_counter() - before
        progress.note(f"loading {run.model.name}")
        loaded = load_for(run, progress)
    provenance = provenance_of(folder, checked, loaded)
    state = folder.load_state() or _first_state(run, loaded, folder, checked.rows)
    earlier = sum(r["seconds"] for r in folder.metrics() if r["event"] == "round")
    trains_here = run.runtime.name == "in-process"
    base_sha256 = provenance["base"]["sha256"]
    local = local_tensors(run, loaded)
    planned = write_prediction(
        folder,
        run,
        state,
        keep_local(algorithm_of(run.algorithm), local),
        num_clients=len(checked.rows),
        measured=found,
    )
    job = Job(run, state, checked.rows, folder, progress, base_sha256, local)
    place = locate(run.data.path)
    if place is not None and is_consortium(place):
        job = replace(job, consortium=place)
    if trains_here:
        job = replace(job, loaded=loaded, data=data)
    else:
        loaded = None  # the engine's processes need the memory
    tracker = _tracker(run, folder)
    if tracker is not None:
        job = replace(job, progress=Both(progress, tracker))
    try:
        measured = (drive or RUNTIMES[run.runtime.name])(job)
        if tracker is not None:
            rows = folder.metrics()
            done = max(row["round"] for row in rows)
            tracker.log_scores([row for row in rows if row["round"] == done])
    finally:
        job.progress.end()
        keep_spent(folder, time.perf_counter)  # also of a round that was not finished
    seconds_scored = earlier + time.perf_counter() - began
    budget = _budget(run, folder)
    for text in budget_warnings(budget):
        progress.note(f"warning: {text}")
    loaded = loaded or load_for(run)
    result = _result(run, folder)
    adapter = _save_result(loaded, run, result, folder)
    summary = summarise(
        run,
        folder.metrics(),
        # clients of a consortium may have joined since the run began
        {n: measured.num_rows.get(n, NOT_MET) for n in sorted({*job.names, *measured.num_rows})},
        result_round=result.round,
        measured={
            "runtime": run.runtime.name,
            "seconds_total": earlier + time.perf_counter() - began,
            "base_model_loads": num_base_loads() - loads_before + measured.base_model_loads,
            "peak_memory_bytes": measured.peak_memory_bytes,
            "adapter_sha256": file_sha256(adapter),
            **budget,
            **({} if (told := statement(run, folder)) is None else {"privacy": told}),
            "predicted": compare_with_prediction(
                run,
                planned,
                folder.metrics(),
                peak_bytes=measured.peak_memory_bytes or 0,
                seconds=seconds_scored - seconds_measuring,
            ),
        },
        head_bytes=size_bytes(
            {n: t for n, t in result.adapter.items() if n in loaded.head - local}
        ),
    )
    split: dict[str, Any] = {}
    if run.runtime.name != "flower":  # there, rows are the clients' own, also to look at
        split = describe_split(checked.rows, loaded.tokenizer, build_task(run.task))
        write_json(folder.path / "split.json", split)
        samples = _sample(run, checked.rows, loaded) if run.task == "instruct" else []
        write_json(folder.path / "samples.json", samples)
    card = model_card(run, summary, folder.metrics(), provenance, split=split)
    write_atomically(folder.path / "README.md", card.encode())
    # last but for the page, which is made of it: its presence says that the run is done
    write_json(folder.path / "summary.json", summary)
    done = Run(folder.path)
    if run.report.page:
        done.report()
    return done


def _budget(run: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """The part of the summary that tells of ceilings; empty without any."""
    if (spent := read_spent(folder)) is None:
        return {}
    rounds = [row["seconds"] for row in folder.metrics() if row["event"] == "round"]
    found = {
        "bytes": run.budget.bytes,
        "hours": run.budget.hours,
        "ended_by": spent["ended_by"],
        "rounds": len(rounds),
        "planned_rounds": run.rounds,
        "seconds": spent["seconds"],
        "longest_round_seconds": max(rounds),
    }
    return {"budget": found}


def _tracker(run: RunConfig, folder: RunFolder) -> Tracker | None:
    name = run.report.tracker
    return None if name == "none" else Tracker(name, folder=folder.path, settings=_dotted(run))


def _sample(
    run: RunConfig, rows: Mapping[str, ClientRows], loaded: LoadedModel
) -> list[dict[str, Any]]:
    """Held-out questions of the first clients, answered by the base and by the result."""
    asked = {
        name: question_of(rows[name].evaluation[0]) for name in sorted(rows)[: run.report.samples]
    }
    talks, limit = [talk for talk, _ in asked.values()], run.report.max_new_tokens
    said: dict[str, list[Answer]] = {}
    if loaded.has_adapter:  # else the base is another model
        with base_only(loaded):
            said["base"] = answers(loaded, talks, max_new_tokens=limit)
    said["federated"] = answers(loaded, talks, max_new_tokens=limit)
    return [
        {
            "client": name,
            "question": talk[-1]["content"],
            "reference": reference,
            "answers": {arm: own[i].text.strip() for arm, own in said.items()},
        }
        for i, (name, (talk, reference)) in enumerate(asked.items())
    ]


def _save_result(
    loaded: LoadedModel, run: RunConfig, result: ServerState, folder: RunFolder
) -> Path:
    write_adapter(loaded, result.adapter)
    name = run.model.name
    place = folder.install("adapter", lambda part: save_adapter(loaded, part, base_name=name))
    if loaded.has_adapter:
        _check_saved(place, result.adapter)
    return place


def _check_saved(place: Path, adapter: AdapterState) -> None:
    """Read the result again: what is on the disk has to be what was trained and scored.

    Raises:
        RunFolderError: It is not; the tensor is named.
    """
    saved = read_result(place)
    for name, tensor in adapter.items():
        if name not in saved or not torch.equal(saved[name].to(tensor.dtype), tensor):
            raise RunFolderError(
                f"{place}: '{name}' is not there as it was trained.\n"
                "  The checkpoint has it: free the disk of faults, and resume the run."
            )


def _first_state(
    run: RunConfig, loaded: LoadedModel, folder: RunFolder, rows: Mapping[str, ClientRows]
) -> ServerState:
    adapter = read_adapter(loaded)
    num_examples = {name: len(own.train) for name, own in rows.items()}
    algorithm = with_privacy(algorithm_of(run.algorithm), run, folder, num_examples)
    return ServerState(0, adapter, algorithm.init(adapter, len(rows)))


def _result(run: RunConfig, folder: RunFolder) -> ServerState:
    """The state that becomes the result: the last, or with keep = "best" the best."""
    best = folder.best_round() if run.checkpoint.keep == "best" else None
    result = folder.load_state(best)
    assert result is not None, "the last round is always a checkpoint"
    return result


def base_folder(name: str) -> str | Path:
    """Where a `model.name` is found: the folder of a named source (fetched once), or the name."""
    return resolve(name)
