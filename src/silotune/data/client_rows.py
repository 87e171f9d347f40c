"""The parts of each client's rows: what it trains on, chooses by, and holds out.

Each row is decided by its own content, see `row_draws`. Knows neither files nor how rows are shared
out among clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from silotune.core.errors import DataError
from silotune.core.wording import counted
from silotune.data.partition import Shares
from silotune.data.placed_rows import Part
from silotune.data.reading import DataConfig, TaskRow
from silotune.data.row_draws import hold_out, keep_at_most, places, row_digests


@dataclass(frozen=True)
class ClientRows:
    """One client's rows, in file order. Neither part is empty."""

    name: str
    train: tuple[TaskRow, ...]
    evaluation: tuple[TaskRow, ...]
    """Held out: scored, never trained on."""
    labels: tuple[str, ...] = ()
    """The label of each train row: its class, or its value in the column that data.label, or else
    partition.label, names. Empty if there is none."""
    num_unused: int = 0
    """Train rows that cannot be used but count, see `load_client`."""
    num_unused_eval: int = 0
    """The same for the rows that are scored, see `scored`."""
    notes: tuple[str, ...] = ()
    """Of a real client: what is read from its files but may not be meant so."""
    validation: tuple[TaskRow, ...] = ()
    """Set aside from the train rows, for choices: neither trained on nor in the held-out part."""
    groups: tuple[str, ...] = ()
    """The group of each held-out row, if these were asked for; names that tell no value."""

    @property
    def scored(self) -> tuple[TaskRow, ...]:
        """What a run scores: the validation rows if there are any, otherwise those held out."""
        return self.validation or self.evaluation

    @property
    def every(self) -> tuple[TaskRow, ...]:
        """All rows of all parts."""
        return (*self.train, *self.validation, *self.evaluation)


@dataclass(frozen=True)
class PartRows:
    """The rows of one part, of all clients."""

    digests: Sequence[str]
    converted: Sequence[TaskRow]
    shares: Shares
    groups: Sequence[str] = ()
    """Each row's group, if these were asked for."""


def rows_of(name: str, part: Part, converted: Sequence[TaskRow]) -> PartRows:
    """A part that belongs to one client."""
    return PartRows(row_digests(part.rows), converted, {name: list(range(len(converted)))})


def assemble(
    own: PartRows, apart: PartRows | None, cfg: DataConfig, *, seed: int, labels: Sequence[str]
) -> dict[str, ClientRows]:
    """Every client's rows; `apart` are the held-out rows if these are stored separately."""
    if apart is not None:
        _check_same_clients(own.shares, apart.shares)
    source, validates, cuts = apart or own, cfg.validation_fraction > 0, cfg.max_eval_rows

    def drawn(part: PartRows, purpose: str, *, is_used: bool) -> Sequence[float]:
        return places(part.digests, seed, purpose) if is_used else ()  # a hash for every row

    held_places = drawn(own, "held-out", is_used=apart is None)
    validation_places = drawn(own, "validation", is_used=validates)
    own_eval_places = drawn(own, "max-eval-rows", is_used=validates and cuts is not None)
    train_places = drawn(own, "max-rows", is_used=cfg.max_rows is not None)
    eval_places = drawn(source, "max-eval-rows", is_used=cuts is not None)
    clients: dict[str, ClientRows] = {}
    for name, train in sorted(own.shares.items()):
        if apart is None:
            _check_enough_rows(train, name)
            train, held = hold_out(train, cfg.eval_fraction, held_places)
        else:
            held = apart.shares[name]
        validation: list[int] = []
        if validates:
            _check_enough_to_validate(train, name)
            train, validation = hold_out(train, cfg.validation_fraction, validation_places)
        if cfg.max_rows is not None:
            train = keep_at_most(train, cfg.max_rows, train_places)
        if cfg.max_eval_rows is not None:
            held = keep_at_most(held, cfg.max_eval_rows, eval_places)
        if validates and cfg.max_eval_rows is not None:
            validation = keep_at_most(validation, cfg.max_eval_rows, own_eval_places)
        clients[name] = ClientRows(
            name,
            tuple(own.converted[n] for n in train),
            tuple(source.converted[n] for n in held),
            tuple(labels[n] for n in train) if labels else (),
            validation=tuple(own.converted[n] for n in validation),
            groups=tuple(source.groups[n] for n in held) if source.groups else (),
        )
    return clients


def _check_same_clients(shares: Shares, held_shares: Shares) -> None:
    only_train = sorted(shares.keys() - held_shares.keys())
    only_held = sorted(held_shares.keys() - shares.keys())
    for names, has, lacks in (
        (only_train, "train", "held-out"),
        (only_held, "held-out", "train"),
    ):
        if names:
            more = f" ({len(names)} clients lack them)" if len(names) > 1 else ""
            raise DataError(
                f"client '{names[0]}' has {has} rows, but no {lacks} rows{more}.\n"
                "  Give each client both, or remove data.eval_path so that each client holds out "
                "some of its own rows."
            )


def _check_enough_rows(rows: Sequence[int], name: str) -> None:
    if len(rows) < 2:
        raise DataError(
            f"client '{name}' has {counted(len(rows), 'row')}, but needs at least 2: one to train "
            "on and one to hold out.\n"
            "  Add rows for it, split the data into fewer clients, or set data.eval_path."
        )


def _check_enough_to_validate(rows: Sequence[int], name: str) -> None:
    if len(rows) < 2:
        raise DataError(
            f"client '{name}' has {counted(len(rows), 'row')} besides the held-out ones, but with "
            "data.validation_fraction needs at least 2: one to train on and one to choose by.\n"
            "  Add rows for it, split the data into fewer clients, or remove "
            "data.validation_fraction."
        )
