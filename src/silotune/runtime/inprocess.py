"""All clients in this process, one at a time, on one base model: for demos, tests and laptops.

A plain loop without a network, and the specification for the other runtimes: they must produce the
same adapter, bit for bit. What a real client would keep on its own disk is kept in the run folder,
separately for each client. With `runtime.together`, groups of clients share their batches.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from silotune.core.algorithm import Algorithm, keep_local
from silotune.core.errors import BudgetSpent, ClientTimeout, UpdateError
from silotune.core.types import Arrival, Broadcast, Failure, Score, Update
from silotune.data.client_rows import ClientRows
from silotune.federation.client import (
    ClientData,
    Worker,
    score,
    take_part,
)
from silotune.federation.client_memory import load_memory
from silotune.federation.downlink import Holdings, bytes_of, with_known_first
from silotune.federation.early_checks import check_before_rounds
from silotune.federation.encrypted_sum import SimulatedEncryption, encrypted
from silotune.federation.mixed_ranks import with_client_ranks
from silotune.federation.prepared_rows import cut_note, prepare_client
from silotune.federation.privacy_guarantee import with_privacy
from silotune.federation.progress import Progress
from silotune.federation.rounds import run_rounds
from silotune.federation.run_folder import RunFolder
from silotune.federation.secure_sum import num_numbers, summed
from silotune.federation.server_scores import open_server_side
from silotune.federation.team import Team, team_of
from silotune.federation.together import ROWS, UNUSABLE, Asked, failed, take_part_together
from silotune.models.allocator import release_memory
from silotune.models.devices import peak_memory_bytes
from silotune.recipes.schema import RunConfig
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.groups import Groups, plan_groups
from silotune.runtime.job import Job, Measured
from silotune.runtime.simulated_sums import SimulatedSums
from silotune.training.tasks import build_task


def drive(job: Job) -> Measured:
    """Run a job's rounds in this process, and in its helpers if the recipe asks for any."""
    with team_of(job.run) as team:
        return _drive(job, team)


def _drive(job: Job, team: Team | None) -> Measured:
    assert job.loaded is not None, "this runtime trains on the model it is given"
    torch.set_num_threads(job.run.runtime.threads)  # the base may be another recipe's, shared
    run = job.run
    plain = keep_local(algorithm_of(run.algorithm), job.local)
    unguarded = Worker(job.loaded, build_task(run.task, run.data.labels, run.prefer), run, plain)
    data = job.data or open_clients(job.rows, unguarded)
    # where [privacy] needs these numbers, all rows count, so no token is needed for them
    num_rows = {name: own.num_rows["num_train"] for name, own in data.items()}
    algorithm = with_client_ranks(with_privacy(plain, run, job.folder, num_rows), run)
    worker = replace(unguarded, algorithm=algorithm, progress=job.progress, team=team)
    sums, algorithm = _hidden(run, list(data), algorithm)
    if sums is not None:
        job.folder.spool(job.state.round + 1).remove()  # hidden with keys that are gone
    server = open_server_side(
        run, job.folder, algorithm=algorithm, progress=job.progress, loaded=job.loaded
    )
    groups = plan_groups(worker, data)
    if groups.note is not None:
        job.progress.note(groups.note)
    clients = InProcessClients(
        worker,
        data,
        job.folder,
        job.progress,
        train_group=in_one_batch(groups),
        group_size=groups.size,
        sums=sums,
    )
    job.folder.rewind(job.state.round)
    job.progress.begin(job.run.rounds, job.state.round + 1)
    server.begin(job.state)
    job.progress.has_clients(len(data))
    last = run_rounds(
        job.run,
        with_known_first(job.run, algorithm, job.state),
        algorithm=algorithm,
        clients=clients,
        folder=job.folder,
        progress=job.progress,
        improve=server.improve,
    )
    server.end(last)
    # the caller loaded the base, in this process
    return Measured(clients.num_rows(), base_model_loads=0, peak_memory_bytes=peak_memory_bytes())


def _hidden(
    run: RunConfig, names: Sequence[str], algorithm: Algorithm
) -> tuple[SimulatedSums | SimulatedEncryption | None, Algorithm]:
    """What hides single updates, and the algorithm that learns their sum only."""
    if run.secure_sum.kind == "masks":
        masks = SimulatedSums(run, names)
        return masks, summed(algorithm, run, masks)
    if run.secure_sum.kind == "ckks":
        keys = SimulatedEncryption(run, len(names))
        return keys, encrypted(algorithm, run, keys)
    return None, algorithm


def prepare_clients(rows: Mapping[str, ClientRows], worker: Worker) -> dict[str, ClientData]:
    """Tokenize every client's rows, once per process.

    Raises:
        DataError: A client has no usable row.
    """
    data = {name: prepare_client(rows[name], worker) for name in sorted(rows)}
    for own in data.values():
        _ = own.train, own.scored
    return data


def open_clients(rows: Mapping[str, ClientRows], worker: Worker) -> dict[str, ClientData]:
    """Every client's rows, to be tokenized when it is asked; see `check_before_rounds`.

    Raises:
        DataError: A few rows of each client were enough to see that it has no usable row.
    """
    data = {name: prepare_client(rows[name], worker) for name in sorted(rows)}
    check_before_rounds(rows, data, worker)
    return data


TrainGroup = Callable[[Worker, Sequence[Asked]], Iterator[Arrival]]
"""Trains several clients that are handed over together, for example in one batch."""


class InProcessClients:
    """Implements `Clients` with a loop over groups of clients."""

    def __init__(
        self,
        worker: Worker,
        data: Mapping[str, ClientData],
        folder: RunFolder,
        progress: Progress,
        *,
        train_group: TrainGroup | None = None,
        group_size: int = 1,
        sums: SimulatedSums | SimulatedEncryption | None = None,
    ) -> None:
        """Nothing is trained yet.

        Args:
            worker: The process's model.
            data: Every client's rows.
            folder: The run's folder; it holds a folder for each client's memory.
            progress: Told which client starts.
            train_group: How a group is trained; by default one client after another.
            group_size: Clients that are handed over together.
            sums: Hides single updates, if the recipe asks for secure sums.
        """
        self.worker = worker
        self.data = data
        self.folder = folder
        self.progress = progress
        self.train_group = train_group or one_by_one
        self.group_size = group_size
        self.sums = sums
        start = worker.loaded.start if worker.task.reference else None
        # clients of their own would draw what this process has drawn
        self.holdings = Holdings(start, makes_first=lambda client, first: True)
        self._num_rows = {name: own.num_rows for name, own in data.items()}
        for row in folder.metrics():  # of earlier parts of the run
            if row["event"] == "train" and row.get("num_examples") and row["client"] in data:
                self._num_rows[row["client"]]["num_train"] = row["num_examples"]
        self._told: dict[str, tuple[int, int]] = {}

    def names(self) -> Sequence[str]:
        """All clients, sorted."""
        return list(self.data)

    def num_rows(self) -> dict[str, dict[str, int]]:
        """Train and held-out rows of every client; see `ClientData.num_rows`."""
        return self._num_rows

    def _note_tokens(self, client: str) -> None:
        """After a client was asked: what its tokens tell about its rows, each thing once."""
        data = self.data[client]
        self._num_rows[client] = data.num_rows
        now, before = (data.num_cut, data.num_dropped), self._told.get(client, (0, 0))
        self._told[client] = now
        cut, dropped = now[0] - before[0], now[1] - before[1]
        if (note := cut_note(client, num_cut=cut, num_dropped=dropped)) is not None:
            self.progress.note(note)

    def train(self, messages: Mapping[str, Broadcast]) -> Iterator[Arrival]:
        """Train the clients in groups; those whose turn comes after the deadline fail."""
        if self.sums is None or not messages:
            yield from self._counted(messages)
            return
        one = next(iter(messages.values()))  # a linear algorithm sends all clients the same
        count = num_numbers(self.worker.algorithm, one.adapter, one.round)
        self.sums.begin(one.round, list(messages), count)
        for arrival in self._counted(messages):
            yield self.sums.hide(arrival) if isinstance(arrival, Update) else arrival

    def _counted(self, messages: Mapping[str, Broadcast]) -> Iterator[Arrival]:
        """Count what would come down to clients of their own; nothing travels here."""
        for arrival in self._trained(messages):
            self._note_tokens(arrival.client)
            asked, arrived = messages[arrival.client], isinstance(arrival, Update)
            if isinstance(arrival, Update):
                told = self.holdings.tell(arrival.client, asked)
                arrival = replace(arrival, bytes_down=bytes_of(told))
            self.holdings.note(arrival.client, asked, answered=arrived)
            yield arrival

    def _trained(self, messages: Mapping[str, Broadcast]) -> Iterator[Arrival]:
        began, limit = time.monotonic(), self.worker.run.sampling.timeout_s
        waiting = list(messages.items())
        for at in range(0, len(waiting), self.group_size):
            group = waiting[at : at + self.group_size]
            if time.monotonic() - began > limit:
                yield from (_late(name, broadcast.round, limit) for name, broadcast in group)
                continue
            if len(group) == 1:  # clients of a group begin and end together: none has its own time
                self.progress.client_begins(group[0][0])
            yield from self.train_group(
                self.worker,
                [
                    Asked(self.data[name], broadcast, self.folder.client_folder(name))
                    for name, broadcast in group
                ],
            )
        release_memory()  # what the server does now is other work

    def evaluate(self, messages: Mapping[str, Broadcast]) -> Iterator[Score | Failure]:
        """Score one client after another."""
        for name, broadcast in messages.items():
            memory = load_memory(self.folder.client_folder(name), broadcast.round)
            try:
                result = score(self.worker, self.data[name], broadcast, memory)
            except ROWS as error:
                yield Failure(name, broadcast.round, UNUSABLE, str(error))
                continue
            self._note_tokens(name)
            self.progress.client_scored(name)
            told = self.holdings.tell(name, broadcast)
            self.holdings.note(name, broadcast, answered=True)
            yield replace(result, size_bytes=bytes_of(told))


def one_by_one(worker: Worker, group: Sequence[Asked]) -> Iterator[Arrival]:
    """Train the clients of a group one after another."""
    for asked in group:
        try:
            yield take_part(worker, asked.data, asked.broadcast, asked.own)
        except (UpdateError, BudgetSpent, *ROWS) as error:
            yield failed(asked, error)


def in_one_batch(groups: Groups) -> TrainGroup:
    """Train the clients of a group together; a client without others as in the loop."""

    def train_group(worker: Worker, group: Sequence[Asked]) -> Iterator[Arrival]:
        if len(group) == 1:
            return one_by_one(worker, group)
        return take_part_together(worker, group, most_tokens=groups.most_tokens)

    return train_group


def _late(name: str, round_: int, limit_s: float) -> Failure:
    late = ClientTimeout(
        f"client '{name}', round {round_}: did not start within {limit_s:g} s.\n"
        "  Raise sampling.timeout_s, or ask fewer clients per round."
    )
    return Failure(name, round_, "timeout", str(late))
