"""A real client: its own configuration decides what a recipe means here."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from silotune.client_config import (
    ClientConfig,
    check_steps,
    load_client_config,
    own_recipe,
    own_rows,
)
from silotune.config import RunConfig
from silotune.errors import UpdateError
from silotune.ledger import FILE as LEDGER
from silotune.memory import folder_name
from silotune.own_privacy import Ledger
from silotune.runtime.parcel import Parcel
from silotune.runtime.station import Place, Station, guarded


class Deployed:
    """One client's station, kept as long as recipe and own configuration stay the same."""

    def __init__(self, config: Path) -> None:
        self.config = config
        self.name = load_client_config(config).name
        self._now: tuple[str, str, ClientConfig] | None = None
        self._station: Station | None = None

    def answer(self, asked: Parcel) -> Parcel:
        """Answer one message. The own configuration is read anew each time: its limits count."""

        def work() -> Parcel:
            own = load_client_config(self.config)
            with _turn(own.runtime.turn):
                station = self._open(asked.about["recipe"], asked.about["run"], own)
                parcel = Parcel(asked.about["parcel"], asked.values)
                return station.answer(asked.about["kind"], self.name, parcel)

        round_ = int(asked.about["parcel"].get("round", 0))
        return guarded(work, client=self.name, round_=round_)

    def _open(self, recipe: str, run_id: str, own: ClientConfig) -> Station:
        if self._station is None or self._now != (recipe, run_id, own):
            self._station = None  # frees the old model before the new one is loaded
            run = RunConfig.model_validate_json(recipe)
            here = own_recipe(run, own)
            rows = own_rows(run, own)
            check_steps(run, own, len(rows.train))
            if not run_id.isalnum():
                raise UpdateError("the run's id is not a plain word")
            kept = Path(own.state) / "runs" / run_id / folder_name(own.name)
            limits = own.limits
            ledger = Ledger(
                Path(own.state) / LEDGER, run_id, epsilon=limits.epsilon, delta=limits.delta or 0.0
            )
            private = here.privacy.unit != "none"
            place = Place(here, lambda _: rows, lambda _: kept, ledger=ledger, withholds=private)
            self._station = Station(place)
            self._now = (recipe, run_id, own)
        return self._station


@contextlib.contextmanager
def _turn(path: str | None) -> Iterator[None]:
    """Clients that share a machine train one at a time: together they would only slow down."""
    if path is None:
        yield
        return
    import fcntl

    with Path(path).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
