"""A real client: its own configuration decides what a recipe means here."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from silotune.core.errors import Declined, SilotuneError
from silotune.core.safe_text import one_line
from silotune.data.reading import chooses_rows
from silotune.federation import operator_log
from silotune.federation.approval import check_approved
from silotune.federation.client_config import ClientConfig, load_client_config
from silotune.federation.client_memory import check_memory, check_split_rule, folder_name
from silotune.federation.client_privacy import Ledger
from silotune.federation.client_recipe import (
    check_base,
    check_hours,
    check_steps,
    check_version,
    is_quiet,
    own_recipe,
    own_rows,
    read_recipe,
)
from silotune.federation.ledger import FILE as LEDGER
from silotune.federation.live_writer import LiveFile
from silotune.federation.outbound_log import FILE as OUTBOUND
from silotune.federation.outbound_log import OWN_REASONS, Outbound
from silotune.runtime.client_host import Place, Station, guarded
from silotune.runtime.client_sums import ClientSums
from silotune.runtime.identity import identity_of
from silotune.runtime.payload import Parcel, round_of
from silotune.runtime.recipe_hash import named_sha256
from silotune.runtime.sum_wire import STEPS


class Deployed:
    """One client's station, kept while the recipe and the client's configuration stay the same."""

    def __init__(self, config: Path) -> None:
        self.config, own = config, load_client_config(config)
        self.name, self.live = own.name, LiveFile(Path(own.state))
        self._now: tuple[str, str, ClientConfig] | None = None
        self._station: Station | None = None
        self._quiet = False
        self._told: set[tuple[object, ...]] = set()

    def close(self) -> None:
        """Free the model, and end the processes that train with this one."""
        if self._station is not None:
            self._station.close()
        self._station = None

    def answer(self, asked: Parcel) -> Parcel:
        """Answer one message. Reads the client's configuration again: its present limits apply."""
        about, began = asked.about, time.monotonic()
        kind, round_ = about["kind"], round_of(about["parcel"])
        self._quiet = False  # until a recipe and this client's configuration have been read

        def work() -> Parcel:
            own = load_client_config(self.config)
            with _turn(own.runtime.turn):
                self._check_consent(about, own)
                station = self._open(about["recipe"], about["run"], own)
                self._begin(kind, round_, station.worker.run.rounds, about["run"])
                check_base(own, station.base_sha256, servers=about.get("base_sha256", ""))
                if kind == "train":
                    outbound = self._outbound(about["run"], own)
                    check_hours(own, outbound.seconds_training())
                    if (trained := outbound.last_update(before=round_)) is not None:
                        check_memory(station.place.folder(self.name), trained)
                return station.answer(kind, self.name, Parcel(about["parcel"], asked.values))

        def let_out() -> Parcel:
            outbound = self._outbound(about["run"], load_client_config(self.config))
            seconds = time.monotonic() - began
            outbound.let_out(
                *(reply.about, reply.values),
                asked=kind,
                seconds=seconds,
                recipe=about["recipe"],
            )
            return reply

        reply = guarded(work, client=self.name, round_=round_, quiet=lambda: self._quiet)
        answer = guarded(let_out, client=self.name, round_=round_)
        failure = answer.about.get("failure", {})
        if failure.get("code") in OWN_REASONS:
            self._tell(operator_log.REFUSED, run=about["run"], why=failure["place"])
        self.live.wait("waiting for the server")
        return answer

    def _tell(self, what: str, **facts: Any) -> None:
        """Write a line into the log of operators; refusals once, however often the server asks."""
        key = (what, *facts.values())
        if what != operator_log.ASKS and key in self._told:
            return
        self._told.add(key)
        safe = {k: one_line(v, longest=500) if isinstance(v, str) else v for k, v in facts.items()}
        try:
            operator_log.record(self.config.parent, what, **safe)
        except SilotuneError as error:  # refused all the same
            sys.stderr.write(f"{error}\n")

    def _begin(self, kind: str, round_: int, rounds: int, run_id: str) -> None:
        """Say on this machine what the server asks for."""
        self.live.more = {"run": run_id}
        if kind == "query":
            self.live.wait("reporting the number of rows")
        elif kind in STEPS:
            self.live.wait(f"secure sum of round {round_}: {STEPS[kind]}")
        else:
            self.live.begin(rounds, round_)
            self.live.begin_round(round_, [self.name])

    def _check_consent(self, about: Mapping[str, Any], own: ClientConfig) -> None:
        """Before anything of a run starts, and at every message: consent can be withdrawn."""
        run = read_recipe(about["recipe"])
        check_version(own, str(about.get("version", "")))
        own_recipe(run, own)  # nobody is asked about what the limits refuse
        folder = self.config.parent
        check_approved(own, run, about, lambda name: named_sha256(name, folder), self._tell)

    def _outbound(self, run_id: str, own: ClientConfig) -> Outbound:
        return Outbound(Path(own.state) / OUTBOUND, run_id, own.limits.max_bytes)

    def _open(self, recipe: str, run_id: str, own: ClientConfig) -> Station:
        run = read_recipe(recipe)
        self._quiet = is_quiet(run, own)
        if self._station is None or self._now != (recipe, run_id, own):
            self.close()  # frees the old model before the new one is loaded
            self.live.wait(f"loading {run.model.name}")
            if not run_id.isalnum():
                raise Declined("the run's id must consist of letters and digits")
            here = own_recipe(run, own)
            rows = own_rows(run, own)
            check_steps(run, own, len(rows.train) + rows.num_unused)
            for note in rows.notes:  # the log stays on this side
                sys.stderr.write(f"warning: {note}\n")
            kept = Path(own.state) / "runs" / run_id / folder_name(own.name)
            if chooses_rows(here.data):
                check_split_rule(kept)
            limits = own.limits
            ledger = Ledger(
                Path(own.state) / LEDGER, run_id, epsilon=limits.epsilon, delta=limits.delta or 0.0
            )
            sums = None
            if here.secure_sum.is_on:
                identity = identity_of(self.config, own)  # before anything is loaded
                smallest = max(own.secure_sum.min_cohort, here.secure_sum.min_cohort)
                sums = ClientSums(own.name, here, run_id, kept, identity, smallest)
            place = Place(
                *(here, lambda _: rows, lambda _: kept),
                ledger=ledger,
                withholds=here.privacy.unit != "none" or here.secure_sum.is_on,
                quiet=self._quiet,
                min_count=limits.min_count,
                holds_adapters=True,
                sums=None if sums is None else lambda _: sums,
                progress=self.live,
            )
            self._station = Station(place)
            self._now = (recipe, run_id, own)
        return self._station


@contextlib.contextmanager
def _turn(path: str | None) -> Iterator[None]:
    """Clients on the same machine train one at a time: in parallel, each would be slower."""
    if path is None:
        yield
        return
    import fcntl

    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
