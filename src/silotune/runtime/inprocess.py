"""All clients in this process, one after the other, on one base model: demo, tests, laptops.

A plain loop without a network, and the specification of the other runtimes: they must give the same
adapter, bit for bit. What a real client would keep on its own disk is kept in the run folder, apart
for each client.
"""

import time
from collections.abc import Iterator, Mapping, Sequence

from silotune.client import ClientData, Worker, prepare_client, score, train_round
from silotune.data import ClientRows
from silotune.errors import ClientTimeout, UpdateError
from silotune.memory import load_memory, save_memory
from silotune.progress import Progress
from silotune.store import RunFolder
from silotune.tree import size_bytes
from silotune.types import Arrival, Broadcast, Failure, Score


class InProcessClients:
    """Fulfils `Clients` with a for loop."""

    def __init__(
        self,
        worker: Worker,
        rows: Mapping[str, ClientRows],
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        """Tokenise every client's rows, once for the run.

        Raises:
            DataError: A client has no usable row.
        """
        self.worker = worker
        self.data: dict[str, ClientData] = {
            name: prepare_client(rows[name], worker) for name in sorted(rows)
        }
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
            if data.num_cut:
                lost = f", {data.num_dropped} of them with the whole answer: these are left out"
                yield (
                    f"{data.name}: {data.num_cut} rows are longer than train.max_length and lose "
                    f"their end{lost if data.num_dropped else ''}"
                )

    def train(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Arrival]:
        """Train one client after the other; one whose turn comes after the deadline is named."""
        run = self.worker.run
        began, limit = time.monotonic(), run.sampling.timeout_s
        for name in cohort:
            if limit is not None and time.monotonic() - began > limit:
                late = ClientTimeout(
                    f"client '{name}', round {broadcast.round}: not begun within {limit:g} s.\n"
                    "  Raise sampling.timeout_s or ask fewer clients."
                )
                yield Failure(name, broadcast.round, "timeout", str(late))
                continue
            self.progress.client_begins(name)
            own = self.folder.client_folder(name)
            memory = load_memory(own, broadcast.round)
            try:
                update, memory = train_round(self.worker, self.data[name], broadcast, memory)
            except UpdateError as error:
                yield Failure(name, broadcast.round, "training failed", str(error))
                continue
            # before the update counts: asked again after a crash, the client starts from the older
            # memory
            oldest = broadcast.round - run.checkpoint.every
            save_memory(own, broadcast.round, memory, keep_from=oldest)
            yield update

    def evaluate(self, cohort: Sequence[str], broadcast: Broadcast) -> Iterator[Score | Failure]:
        """Score one client after the other."""
        for name in cohort:
            memory = load_memory(self.folder.client_folder(name), broadcast.round)
            result = score(self.worker, self.data[name], broadcast, memory)
            yield Score(**{**vars(result), "size_bytes": size_bytes(broadcast.adapter)})
