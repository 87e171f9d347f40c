"""Answers messages where the rows are: one process, one base model, any number of clients.

In Flower's simulation every actor has one station; in deployment every client has one, in its
resident worker. An error becomes a code and a place: an exception's text may hold a client's rows,
so it goes to the log on this side and never to the server.
"""

import contextlib
import functools
import secrets
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import silotune
from silotune.core.algorithm import keep_local
from silotune.core.errors import AwaitsConsent, BudgetSpent, Declined, SilotuneError, UpdateError
from silotune.core.installed import code_sha256, version
from silotune.core.tree import sha256
from silotune.core.types import AWAITS_CONSENT, BUDGET_SPENT, AdapterState, Broadcast, Failure
from silotune.data.client_rows import ClientRows
from silotune.federation.client import (
    ClientData,
    Worker,
    score,
    take_part,
    withheld,
)
from silotune.federation.client_data import SILENT
from silotune.federation.client_memory import load_memory
from silotune.federation.client_privacy import Ledger
from silotune.federation.consent import is_large_enough
from silotune.federation.downlink import HELD, held, hold, is_made_by_clients, with_news
from silotune.federation.first_adapter import find_start, needs_start
from silotune.federation.prepared_rows import prepare_client
from silotune.federation.progress import Progress
from silotune.federation.recipe_model import load_for, local_tensors
from silotune.federation.secure_sum import CUT, num_numbers
from silotune.federation.team import Team
from silotune.models.allocator import release_memory
from silotune.models.base import folder_of_base
from silotune.models.devices import peak_memory_bytes
from silotune.models.loading import num_base_loads, read_adapter
from silotune.models.sources import content_hash
from silotune.privacy.secure_sum.member import Refused
from silotune.recipes.schema import RunConfig
from silotune.runtime import wire
from silotune.runtime.client_sums import ClientSums
from silotune.runtime.flower.strategy import algorithm_of
from silotune.runtime.payload import Parcel, round_of
from silotune.runtime.sum_wire import STEPS
from silotune.training.loop import pick_optimizer
from silotune.training.tasks import build_task

PACKAGE = Path(silotune.__file__).parent
FAILED = ("failed", "at this client", "the reason is in this client's log")
"""All that a client says about a failure that could depend on its rows."""


@dataclass(frozen=True)
class Place:
    """Where a process finds what its clients own."""

    run: RunConfig
    """The recipe as it runs here."""
    rows: Callable[[str], ClientRows]
    """A client's rows, by its name."""
    folder: Callable[[str], Path]
    """The folder of what a client keeps, by its name."""
    ledger: Ledger | None = None
    """Where a real client records what it releases, over all runs on its rows."""
    withholds: bool = False
    """Whether values that are about single clients stay here: for real clients under [privacy] or
    with secure sums. The number of rows is still reported."""
    quiet: bool = False
    """See `Worker.quiet`."""
    min_count: int | None = None
    """A client's `limits.min_count`."""
    sums: Callable[[str], ClientSums] | None = None
    """With secure sums: a client's half of them, by its name."""
    holds_adapters: bool = False
    """Whether adapters that arrive are kept, so that the next ones may come as news."""
    progress: Progress = SILENT
    """Told what a client is doing, on its own machine."""


class Station:
    """One loaded model, and the tokens of every client served so far."""

    def __init__(self, place: Place) -> None:
        """Load the base model.

        Raises:
            ModelError: It cannot be loaded here.
        """
        run = place.run
        self.place = place
        loaded = load_for(run)
        algorithm = keep_local(algorithm_of(run.algorithm), local_tensors(run, loaded))
        task = build_task(run.task, run.data.labels, run.prefer)
        team = Team(run) if run.runtime.client_processes > 1 else None
        self.worker = Worker(
            *(loaded, task, run, algorithm, place.ledger, place.quiet, place.progress), team=team
        )
        self.base_sha256 = content_hash(folder_of_base(run.model))
        first = algorithm.begin(read_adapter(loaded))
        self.first_sha256 = sha256(first)
        keeps = place.holds_adapters and is_made_by_clients(run, algorithm)
        self._first = first if keeps else None
        self.data: dict[str, ClientData] = {}

    def close(self) -> None:
        """End the processes that train with this one, if there are any."""
        if self.worker.team is not None:
            self.worker.team.close()

    def answer(self, kind: str, client: str, parcel: Parcel) -> Parcel:
        """Do what a message asks for. Raises whatever goes wrong; see `guarded`."""
        if kind == "query":
            return self._report(self._data(client))
        sums = None if self.place.sums is None else self.place.sums(client)
        if kind in STEPS:
            return self._step(kind, sums, parcel)
        shares = None
        if kind == "train" and sums is not None:  # before training: nothing else may be sent
            parcel, shares = sums.taken_from(parcel)
        own = self.place.folder(client)
        broadcast = self._whole(wire.decode_broadcast(parcel), own)
        self._know_start(client, broadcast, own)
        data = self._data(client)
        if kind == "train":
            if self.place.withholds:
                broadcast = replace(broadcast, score=False)
            update = take_part(self.worker, data, broadcast, own)
            release_memory()  # this client rests until the next round
            if sums is not None:
                update = sums.hide(update, shares)
            else:  # a client that is protected as a whole gets its noise where words are made
                assert not self.worker.run.secure_sum.is_on, "only masked words may leave"
            if self.place.withholds:
                if cut := update.metrics.get(CUT):
                    sys.stderr.write(f"{cut} numbers were beyond secure_sum.range and were cut\n")
                update = withheld(update)
            if update.score and not is_large_enough(update.score, self.place.min_count):
                update = replace(update, score=None)
            return self._signed(wire.encode_update(update))
        if self.place.withholds:
            raise Declined(
                f"client '{client}' does not send scores: under [privacy] they carry no noise, and "
                "with secure sums only sums are sent.\n  Set evaluate.every = 0."
            )
        memory = load_memory(own, broadcast.round)
        if data.scored.num_rows == 0:
            raise Declined(f"client '{client}' has no held-out row that this recipe can use")
        result = score(self.worker, data, broadcast, memory)
        if not is_large_enough(result, self.place.min_count):
            raise Declined(
                f"client '{client}' does not send this score: it is about fewer rows, or counts "
                f"fewer of one kind, than limits.min_count = {self.place.min_count}"
            )
        return self._signed(wire.encode_score(result, broadcast.round))

    def _whole(self, broadcast: Broadcast, own: Path) -> Broadcast:
        """The broadcast with the adapter that news are about; kept, if more news may come."""
        if broadcast.news is not None:
            adapter = with_news(
                self.worker.run.wire, self._held(own, broadcast.news.base), broadcast.news
            )
            broadcast = replace(broadcast, adapter=adapter, news=None)
        if self.place.holds_adapters:
            hold(own, broadcast)
            self._first = None
        return broadcast

    def _held(self, own: Path, base: int) -> AdapterState:
        """The adapter that news are about: kept in the client's folder, or this model's first."""
        if base == 0 and self._first is not None and not (own / HELD).exists():
            return self._first
        return held(own, base)

    def _know_start(self, client: str, broadcast: Broadcast, own: Path) -> None:
        """Take the reference of preferences from a message or from the client's folder."""
        if self.worker.loaded.start is not None or not needs_start(self.worker.run):
            return
        start = find_start(self.worker.run, client, broadcast, own)
        self.worker = replace(self.worker, loaded=replace(self.worker.loaded, start=start))
        self.data.clear()  # tokens that were counted for the report, without a reference

    def _step(self, kind: str, sums: ClientSums | None, parcel: Parcel) -> Parcel:
        """Answer a message that only secure sums have."""
        if sums is None:
            raise UpdateError(f"a message '{kind}', but the recipe has no secure sums.")
        adapter, algorithm = read_adapter(self.worker.loaded), self.worker.algorithm
        said = sums.answer(
            kind, parcel.about, lambda round_: num_numbers(algorithm, adapter, round_)
        )
        return Parcel({**said, "round": round_of(parcel.about)})

    def _data(self, client: str) -> ClientData:
        if client not in self.data:
            worker = self.worker
            if needs_start(worker.run) and worker.loaded.start is None:
                # before the first adapter has come: how many rows there are shows without it
                worker = replace(worker, task=replace(worker.task, reference=None))
            self.data[client] = prepare_client(self.place.rows(client), worker)
        return self.data[client]

    def _report(self, data: ClientData) -> Parcel:
        """What the server needs to know before the first round."""
        run, quiet = self.worker.run, self.place.withholds or self.place.quiet
        num_eval = data.scored.num_rows + data.scored.num_unused
        about = {
            "num_train": data.num_train,
            "num_eval": num_eval if num_eval >= (self.place.min_count or 0) else 0,
            # they reveal how long rows are
            "num_cut": 0 if quiet else data.num_cut,
            "num_dropped": 0 if quiet else data.num_dropped,
            "base_sha256": self.base_sha256,
            "dtype": str(self.worker.loaded.dtype),
            "quantization": self.worker.loaded.quantization,
            "optimizer": pick_optimizer(run.train.optimizer, self.worker.loaded.device)[0],
            "threads": torch.get_num_threads(),
            "rank": run.adapter.rank_of(data.name) if run.adapter.kind == "lora" else 0,
            "version": version(),
            "code_sha256": code_sha256(),
            "first_sha256": self.first_sha256,
        }
        return self._signed(Parcel({"report": about}))

    def _signed(self, parcel: Parcel) -> Parcel:
        """Say which process answered: the run's summary adds up loads and memory."""
        about: dict[str, Any] = {
            "id": process_id(),
            "base_loads": num_base_loads(),
            # it depends on the longest rows of a step
            "peak_memory_bytes": 0 if self.place.withholds else peak_memory_bytes(),
        }
        return Parcel({**parcel.about, "process": about}, parcel.values)


@functools.cache
def process_id() -> str:
    """A random name for this process: a server tells processes from one another, and no more."""
    return secrets.token_hex(8)


def guarded(
    work: Callable[[], Parcel],
    *,
    client: str,
    round_: int,
    quiet: Callable[[], bool] = lambda: False,
) -> Parcel:
    """The answer, or a failure instead of it. No exception leaves a client.

    Args:
        work: What may fail.
        client: The client that answers.
        round_: The round that it is asked about.
        quiet: Asked after a failure: whether its kind and place could depend on the client's rows.
    """
    try:
        parcel = work()
    except Exception as error:  # whatever it is, it is this client's failure
        with contextlib.suppress(OSError):  # the disk may be full, and the log is on it
            if isinstance(error, AwaitsConsent):  # every 20 s, for days
                sys.stderr.write(f"{error}\n")
            else:
                traceback.print_exc(file=sys.stderr)
        failure = failure_from(error, client=client, round_=round_)
        if quiet() and not isinstance(error, Declined | BudgetSpent | Refused):
            failure = Failure(client, round_, *FAILED)
        parcel = wire.encode_failure(failure)
    return Parcel({**parcel.about, "client": client}, parcel.values)


def failure_from(error: BaseException, *, client: str, round_: int) -> Failure:
    """An error's code and place. Its text is passed on only if it holds just names and shapes."""
    told = {
        UpdateError: "training failed",
        Declined: "declined",
        AwaitsConsent: AWAITS_CONSENT,
        BudgetSpent: BUDGET_SPENT,
        Refused: "refused by the client",
    }
    if type(error) in told:
        return Failure(client, round_, told[type(error)], str(error)[:1000])
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(PACKAGE)] or frames
    where = "unknown place"
    if ours:
        last = ours[-1]
        where = f"{Path(last.filename).name}:{last.lineno} in {last.name}"
    known = "the reason is in this client's log" if isinstance(error, SilotuneError) else ""
    return Failure(client, round_, type(error).__name__[:100], where[:1000], known)
