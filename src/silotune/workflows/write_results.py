"""What a finished run leaves in its folder: adapter, samples, model card, summary and page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from silotune.algorithms.fedex import drift_warning
from silotune.compression.changes import travels
from silotune.core.atomic_files import write_atomically
from silotune.core.errors import RunFolderError
from silotune.core.lora import joined
from silotune.core.tree import layout_bytes, layout_of, size_bytes
from silotune.core.types import AdapterState, ServerState
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows
from silotune.federation.budget import read_spent
from silotune.federation.own_steps import personal
from silotune.federation.privacy_statement import statement
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for
from silotune.federation.run_folder import RunFolder
from silotune.federation.run_record import extensions
from silotune.models.loading import (
    LoadedModel,
    base_only,
    read_adapter,
    save_adapter,
    write_adapter,
)
from silotune.recipes.personal import kept_by
from silotune.recipes.schema import RunConfig
from silotune.results.budget_texts import budget_warnings
from silotune.results.card import model_card
from silotune.results.run import Run
from silotune.results.saved_adapter import read_result
from silotune.results.summary import summarise
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.job import Job, Measured
from silotune.training.generate import Answer, answers
from silotune.training.tasks import build_task
from silotune.workflows.check import Checked
from silotune.workflows.data_overview import MEASURED, describe_split
from silotune.workflows.evaluate.text_scores import question_of
from silotune.workflows.finish import finish
from silotune.workflows.plan.outcome import compare_with_prediction
from silotune.workflows.provenance import file_sha256

NOT_MET = {"num_train": 0, "num_eval": 0}
"""Rows of a client that never answered."""


@dataclass(frozen=True)
class Spent:
    """What a run has taken from its machine."""

    rounds_s: float
    """Seconds of all parts of the run until the last score, without the measured step."""
    total_s: Callable[[], float]
    """Seconds of all parts of the run so far."""
    num_base_loads: Callable[[], int]
    """How often this process has loaded a base for this part of the run so far."""


def write_results(
    job: Job,
    checked: Checked,
    measured: Measured,
    spent: Spent,
    *,
    planned: Mapping[str, Any],
    provenance: dict[str, Any],
) -> Run:
    """Save the result, and write what people and programs read about a run.

    Args:
        job: The run, its rounds done.
        checked: Its recipe and rows.
        measured: What the training processes know.
        spent: What the run has taken.
        planned: plan.json.
        provenance: provenance.json.

    Raises:
        RunFolderError: What is on the disk is not what was trained.
    """
    run, folder = job.run, job.folder
    budget = _budget(run, folder)
    for text in budget_warnings(budget):
        job.progress.note(f"warning: {text}")
    job.progress.doing("saving the adapter")
    loaded = job.loaded or load_for(run)
    result = _result(run, folder)
    finished = finish(job, result, loaded)  # before the result is put on the base to be saved
    adapter = _save_result(loaded, run, result, folder)
    rows = folder.metrics()
    if text := drift_warning([row["residual_ratio"] for row in rows if "residual_ratio" in row]):
        job.progress.note(f"warning: {text}")
    head = {n: t for n, t in result.adapter.items() if n in loaded.head - job.local}
    summary = summarise(
        run,
        rows,
        # clients of a consortium may have joined since the run began
        {n: measured.num_rows.get(n, NOT_MET) for n in sorted({*job.names, *measured.num_rows})},
        result_round=result.round,
        measured={
            **_measured(job, measured, spent, planned),
            **budget,
            **({"finish": finished} if finished else {}),
            **({"extended": longer} if (longer := extensions(folder.path)) else {}),
            "adapter_sha256": file_sha256(adapter),
        },
        head_bytes={
            "bytes_up": layout_bytes(travels(run.wire, layout_of(head))),
            "bytes_down": size_bytes(head),
        },
    )
    split = _write_rows(run, folder, checked.rows, loaded, job.progress)
    job.progress.doing("writing the report")
    card = model_card(run, summary, rows, provenance, split=split)
    write_atomically(folder.path / "README.md", card.encode())
    # last but for the page, which is made of it: its presence says that the run is done
    folder.clear_away()
    folder.list_record()
    folder.write_json("summary.json", summary)
    done = Run(folder.path)
    if run.report.page:
        done.report()
    return done


def _measured(
    job: Job, measured: Measured, spent: Spent, planned: Mapping[str, Any]
) -> dict[str, Any]:
    """The part of the summary that only this run of the recipe knows."""
    privacy = statement(job.run, job.folder)
    predicted = compare_with_prediction(
        job.run,
        planned,
        job.folder.metrics(),
        peak_bytes=measured.peak_memory_bytes or 0,
        seconds=spent.rounds_s,
    )
    return {
        "runtime": job.run.runtime.name,
        "seconds_total": spent.total_s(),
        "base_model_loads": spent.num_base_loads() + measured.base_model_loads,
        "peak_memory_bytes": measured.peak_memory_bytes,
        "predicted": predicted,
        **({} if privacy is None else {"privacy": privacy}),
    }


def _write_rows(
    run: RunConfig,
    folder: RunFolder,
    rows: Mapping[str, ClientRows],
    loaded: LoadedModel,
    progress: Progress,
) -> dict[str, Any]:
    """split.json and samples.json. Real clients' rows are not the server's to read."""
    if run.runtime.name == "flower":
        return {}
    task = build_task(run.task, run.data.labels, run.prefer)
    split = describe_split(rows, loaded.tokenizer, task, at_most=MEASURED)
    folder.write_json("split.json", split)
    samples = _sample(run, folder, rows, loaded, progress) if run.task == "instruct" else []
    folder.write_json("samples.json", samples)
    return split


def _budget(run: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """The part of the summary about budgets; empty without any."""
    if (spent := read_spent(folder)) is None:
        return {}
    rounds = [row["seconds"] for row in folder.metrics() if row["event"] == "round"]
    found = {
        "bytes": run.budget.bytes,
        "hours": run.budget.hours,
        "stop": run.stop.model_dump(),
        "ended_by": spent["ended_by"],
        "rounds": len(rounds),
        "planned_rounds": run.rounds,
        "seconds": spent["seconds"],
        "longest_round_seconds": max(rounds),
    }
    return {"budget": found}


def _sample(
    run: RunConfig,
    folder: RunFolder,
    rows: Mapping[str, ClientRows],
    loaded: LoadedModel,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Held-out questions of the first clients, answered by the base and by the result.

    A client that keeps a part of the adapter is answered with its own.
    """
    asked = {name: question_of(rows[name].scored[0]) for name in sorted(rows)[: run.report.samples]}
    talks, limit = [talk for talk, _ in asked.values()], run.report.max_new_tokens
    said: dict[str, list[Answer]] = {}
    if talks:
        progress.doing(f"answering {counted(len(talks), 'held-out question')}")
    if loaded.has_adapter:  # else the base is another model
        with base_only(loaded):
            said["base"] = answers(loaded, talks, max_new_tokens=limit)
    if kept_by(run):
        shared, said["federated"] = read_adapter(loaded), []
        for name, talk in zip(asked, talks, strict=True):
            write_adapter(loaded, {**shared, **personal(folder, name)})
            said["federated"] += answers(loaded, [talk], max_new_tokens=limit)
    else:
        said["federated"] = answers(loaded, talks, max_new_tokens=limit)
    return [
        {
            "client": name,
            "question": talk[-1]["content"],
            "reference": reference,
            "answers": {arm: own[i].text.strip() for arm, own in said.items()},
            "cut": [arm for arm, own in said.items() if not own[i].ended],
        }
        for i, (name, (talk, reference)) in enumerate(asked.items())
    ]


def _save_result(
    loaded: LoadedModel, run: RunConfig, result: ServerState, folder: RunFolder
) -> Path:
    write_adapter(loaded, result.adapter)
    place = folder.install("adapter", lambda part: save_adapter(loaded, part, base=run.model))
    if loaded.has_adapter:
        _check_saved(place, joined(result.adapter))
    return place


def _check_saved(place: Path, adapter: AdapterState) -> None:
    """Read the result back: what is on disk has to be what was trained and scored.

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


def _result(run: RunConfig, folder: RunFolder) -> ServerState:
    """The state that becomes the result: the last, or with keep = "best" the best."""
    best = folder.best_round() if run.checkpoint.keep == "best" else None
    result = folder.load_state(best)
    assert result is not None, "the last round is always a checkpoint"
    return replace(result, adapter=algorithm_of(run.algorithm).result(result))
