"""After the last round of a simulation: every client takes its own steps from the result.

Real clients would do this where their rows are, with the same `take_own_steps`. Here, what each of
them would keep is written into its folder inside the run folder.
"""

from typing import Any

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.errors import UpdateError, first_line
from silotune.core.lora import joined
from silotune.core.types import AdapterState, ServerState
from silotune.core.wording import counted
from silotune.federation.client import ClientData, Worker
from silotune.federation.client_memory import load_memory
from silotune.federation.own_steps import (
    FILE,
    best_share,
    interpolated,
    keep_own,
    personal,
    take_own_steps,
)
from silotune.models.loading import LoadedModel, write_adapter
from silotune.runtime.inprocess import prepare_clients
from silotune.runtime.job import Job
from silotune.training.own_functions import own_metric
from silotune.training.scoring import evaluate, metrics
from silotune.training.tasks import build_task


def finish(job: Job, result: ServerState, loaded: LoadedModel) -> dict[str, Any]:
    """Let every client take its own steps, as [finish] says; does nothing without.

    Args:
        job: The run, its rounds done.
        result: What the federation has arrived at.
        loaded: The base; its adapter tensors are overwritten.

    Returns:
        By client: num_steps, num_examples, num_tokens, seconds, `share`, and `scores` on the rows
        that the run scores, of the result ("federated"), after its steps ("own steps") and with
        the chosen share of them ("interpolated"). Or `failed`: why it keeps the result as it is.
    """
    run, found = job.run, dict[str, Any]()
    if not run.finish.local_steps:
        return found
    task = build_task(run.task, run.data.labels, run.prefer)
    worker = Worker(loaded, task, run, fedavg(FedAvgConfig()))
    data = job.data or prepare_clients(job.rows, worker)
    steps = counted(run.finish.local_steps, "step")
    job.progress.note(f"{counted(len(data), 'client')}: {steps} of their own, from the result")
    for name, own in data.items():
        start = {**joined(result.adapter), **personal(job.folder, name)}
        try:
            found[name] = _finish_one(worker, own, job, start)
        except UpdateError as error:
            why = first_line(str(error))
            job.progress.note(f"warning: {name} keeps the result as it is: {why}")
            (job.folder.client_folder(name) / FILE).unlink(missing_ok=True)
            found[name] = {"failed": why}
    return found


def _finish_one(worker: Worker, data: ClientData, job: Job, start: AdapterState) -> dict[str, Any]:
    """One client's steps, their scores, and what it keeps."""
    run, folder = job.run, job.folder.client_folder(data.name)
    done = take_own_steps(
        worker,
        data,
        start,
        position=load_memory(folder, run.rounds + 1).position,
        num_steps=run.finish.local_steps,
        lr=run.finish.lr or run.train.lr,
    )
    found: dict[float, dict[str, Any]] = {}

    def scores_of(share: float) -> dict[str, Any]:
        """Computed once: the ends are shares, too."""
        if share not in found:
            found[share] = _scores(worker, data, interpolated(start, done.adapter, share))
        return found[share]

    share, scores = 1.0, dict[str, Any]()
    if shares := run.finish.interpolate:
        share, _ = best_share(shares, lambda each: scores_of(each)["loss"])
    if run.evaluate.every:
        scores = {"federated": scores_of(0.0), "own steps": scores_of(1.0)}
        if shares:
            scores["interpolated"] = scores_of(share)
    keep_own(folder, done.adapter, share=share)
    return {
        "num_steps": done.num_steps,
        "num_examples": done.num_examples,
        "num_tokens": done.num_tokens,
        "seconds": done.seconds,
        "share": share,
        "scores": scores,
    }


def _scores(worker: Worker, data: ClientData, adapter: AdapterState) -> dict[str, Any]:
    """An adapter's scores on the client's scored rows."""
    write_adapter(worker.loaded, adapter)
    found = evaluate(
        worker.loaded,
        data.scored.batches,
        worker.task,
        client=data.name,
        num_examples=data.scored.num_rows,
        metric=own_metric(worker.run.evaluate.metric),
    )
    return {key: value for key, value in metrics([found]).items() if key != "label_counts"}
