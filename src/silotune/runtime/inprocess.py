"""All clients in this process, one after the other, on one base model: demo, tests, laptops.

A plain loop without a network, and the specification of the other runtimes: they must give the same
adapter, bit for bit. What a real client would keep on its own disk is kept in the run folder, apart
for each client.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from silotune.core.algorithm import keep_local
from silotune.core.errors import BudgetSpent, ClientTimeout, UpdateError
from silotune.core.tree import size_bytes
from silotune.core.types import BUDGET_SPENT, Arrival, Broadcast, Failure, Score
from silotune.data.clients import ClientRows
from silotune.federation.client import (
    ClientData,
    Worker,
    cut_note,
    prepare_client,
    score,
    take_part,
)
from silotune.federation.client_memory import load_memory
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.federation.server_work import open_server_work
from silotune.models.devices import peak_memory_bytes
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.job import Job, Measured
from silotune.training.tasks import build_task


def drive(job: Job) -> Measured:
    """Run a job's rounds in this process."""
    assert job.loaded is not None, "this runtime trains on the model it is given"
    torch.set_num_threads(job.run.runtime.threads)
    run = job.run
    plain = keep_local(algorithm_of(run.algorithm), job.local)
    unguarded = Worker(job.loaded, build_task(run.task, run.data.labels), run, plain)
    data = job.data or prepare_clients(job.rows, unguarded)
    num_rows = {name: len(own.examples) for name, own in data.items()}
    algorithm = with_privacy(plain, run, job.folder, num_rows)
    worker = replace(unguarded, algorithm=algorithm)
    server = open_server_work(
        run, job.folder, algorithm=algorithm, progress=job.progress, loaded=job.loaded
    )
    clients = InProcessClients(worker, data, job.folder, job.progress)
    for text in clients.notes():
        job.progress.note(text)
    job.folder.rewind(job.state.round)
    job.progress.begin(job.run.rounds, job.state.round + 1)
    run_rounds(
        job.run,
        job.state,
        algorithm=algorithm,
        clients=clients,
        folder=job.folder,
        progress=job.progress,
        improve=server and server.improve,
    )
    # the base was loaded by whoever gave it, in this process
    return Measured(clients.num_rows(), base_model_loads=0, peak_memory_bytes=peak_memory_bytes())


def prepare_clients(rows: Mapping[str, ClientRows], worker: Worker) -> dict[str, ClientData]:
    """Tokenise every client's rows, once for the process.

    Raises:
        DataError: A client has no usable row.
    """
    return {name: prepare_client(rows[name], worker) for name in sorted(rows)}


class InProcessClients:
    """Fulfils `Clients` with a for loop."""

    def __init__(
        self,
        worker: Worker,
        data: Mapping[str, ClientData],
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.worker = worker
        self.data = data
        self.folder = folder
        self.progress = progress

    def names(self) -> Sequence[str]:
        """All clients, sorted."""
        return list(self.data)

    def num_rows(self) -> dict[str, dict[str, int]]:
        """Usable train and held-out rows of every client."""
        return {
            name: {"num_train": len(d.examples), "num_eval": d.num_eval}
            for name, d in self.data.items()
        }

    def notes(self) -> Iterator[str]:
        """What became of rows that are longer than `train.max_length`, one line per client."""
        for data in self.data.values():
            note = cut_note(data.name, num_cut=data.num_cut, num_dropped=data.num_dropped)
            if note is not None:
                yield note

    def train(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Arrival]:
        """Train one client after the other; one whose turn comes after the deadline is named."""
        began, limit = time.monotonic(), self.worker.run.sampling.timeout_s
        for name in cohort:
            if time.monotonic() - began > limit:
                late = ClientTimeout(
                    f"client '{name}', round {broadcast.round}: not begun within {limit:g} s.\n"
                    "  Raise sampling.timeout_s or ask fewer clients."
                )
                yield Failure(name, broadcast.round, "timeout", str(late))
                continue
            self.progress.client_begins(name)
            own = self.folder.client_folder(name)
            try:
                yield take_part(self.worker, self.data[name], broadcast, own)
            except UpdateError as error:
                yield Failure(name, broadcast.round, "training failed", str(error))
            except BudgetSpent as error:
                yield Failure(name, broadcast.round, BUDGET_SPENT, str(error))

    def evaluate(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Score | Failure]:
        """Score one client after the other."""
        for name in cohort:
            memory = load_memory(self.folder.client_folder(name), broadcast.round)
            result = score(self.worker, self.data[name], broadcast, memory)
            yield Score(**{**vars(result), "size_bytes": size_bytes(broadcast.adapter)})
