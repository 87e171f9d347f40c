"""A client's files -> its checked rows, split into a train and a held-out part.

Every row is read and converted before a model is loaded, so a mistake in the last line of a file
costs seconds. Knows clients and their held-out rows; does not know how files are read, tokens or
models. Messages name file, line and column but no value of a row, except client names and labels,
which come from columns.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import counted
from silotune.data.flwr_partition import partitioner_of
from silotune.data.near_names import near_names
from silotune.data.partition import PartitionConfig, Shares, names_in_column
from silotune.data.partition_rows import (
    column_values,
    group_names,
    partition_is_missing,
    partition_rows,
    unnamed_rows,
)
from silotune.data.placed_rows import Mistake, Part, moved, refuse
from silotune.data.reading import (
    DataConfig,
    TaskRow,
    convert_parts,
    convert_quietly,
    read_parts,
    seed_of_split,
)
from silotune.data.row_draws import hold_out, keep_at_most, places, row_digests
from silotune.data.server_rows import set_aside_server_rows


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


def load_clients(
    cfg: DataConfig,
    partition: PartitionConfig | None,
    *,
    seed: int,
    task: str = "instruct",
    server_fraction: float = 0.0,
    group: str | None = None,
) -> dict[str, ClientRows]:
    """Read and check the rows of all clients of a simulation, and hold out a part of each client's.

    Each row is held out or not by its own content and the seed, see `row_draws`: other rows and
    other clients have no say. A [partition], which only simulations have, is the exception: it
    distributes the rows of one file, so that one row more may send others to other clients.

    Args:
        cfg: Where the rows are and what they look like.
        partition: How to split one data set into clients; None if there is one file per client.
        seed: The run's seed.
        task: What rows become: conversations for "instruct", labelled texts for "classify".
        server_fraction: Share of the train rows that the server owns, see `load_server_rows`. They
            go to no client.
        group: A column; held-out rows with the same value belong together.

    Returns:
        The clients, sorted by name.

    Raises:
        DataError: Files, rows or columns cannot be used.
        ConfigError: The settings do not fit the layout of the files.
    """
    return cut_clients(
        cfg, partition, seed=seed, task=task, server_fraction=server_fraction, group=group
    )[0]


def cut_clients(
    cfg: DataConfig,
    partition: PartitionConfig | None,
    *,
    seed: int,
    task: str = "instruct",
    server_fraction: float = 0.0,
    group: str | None = None,
) -> tuple[dict[str, ClientRows], list[str]]:
    """Like `load_clients`, and also return warnings: rows that are not used, names almost equal.

    There is no warning for rows that partition.only or a maximum leaves out, because the recipe
    asks for that.
    """
    seed = seed_of_split(cfg, seed)
    if partition is not None and partition.kind == "flwr-datasets":
        partitioner_of(partition)  # reports wrong options before any row is read
    everything, held = read_parts(cfg, task)
    train, _ = set_aside_server_rows(everything, server_fraction, cfg, seed=seed)
    has_partition = partition is not None and (
        partition.by is not None or partition.kind is not None
    )
    unnamed = _unnamed(train, held, partition)
    converted, held_converted = convert_parts(train, held, cfg, task, unnamed)
    if train.files and has_partition:
        raise ConfigError(
            f"'{cfg.path}' holds one file per client, so [partition] has nothing to split.\n"
            "  Remove [partition], or set data.path to one file."
        )
    if train.files:
        shares, held_shares = train.files, held.files if held else None
    elif partition is not None and has_partition:
        shares, held_shares = partition_rows(
            train, held, converted, held_converted, partition, seed=seed
        )
    else:
        raise partition_is_missing(cfg, train.rows)
    if partition is not None and partition.by is not None:
        _check_no_client_lost(everything, partition.by, partition.only, shares)
    labels = _labels(converted, train, cfg, partition)
    groups = [] if group is None else group_names(held or train, group)
    own = _Rows(row_digests(train.rows), converted, shares, groups)
    apart = None
    if held is not None and held_converted is not None and held_shares is not None:
        apart = _Rows(row_digests(held.rows), held_converted, held_shares, groups)
    clients = _assemble(own, apart, cfg, seed=seed, labels=labels)
    notes = [*_notes(everything, held)]
    notes += near_names("clients", {*shares, *(held_shares or ())})
    if task == "classify" and cfg.labels is None:
        every = [*converted, *(held_converted or ())]
        notes += near_names("labels", {row["label"] for row in every})
    return clients, [*notes, *_unused(everything, held, len(train.rows), shares, partition)]


def load_client(
    cfg: DataConfig,
    name: str,
    *,
    seed: int,
    task: str = "instruct",
    columns: Collection[str] | None = None,
) -> ClientRows:
    """Read the rows of one real client, which owns the entire data set.

    The held-out rows are chosen as in `load_clients`, so rows with the same columns are split as in
    a simulation.

    Args:
        cfg: Where the rows are and what they look like.
        name: The client.
        seed: Seed of the split.
        task: What rows become.
        columns: The only columns that anything may see; None for all.

    Raises:
        DataError: Files, rows or columns cannot be used.
        ConfigError: The settings do not fit the layout of the files.
    """
    train, held = read_parts(cfg, task, columns)
    converted, held_converted = convert_parts(train, held, cfg, task)
    own = _rows_of(name, train, converted)
    apart = _rows_of(name, held, held_converted) if held and held_converted is not None else None
    labels, seed = _labels(converted, train, cfg, None), seed_of_split(cfg, seed)
    found = _assemble(own, apart, cfg, seed=seed, labels=labels)[name]
    return replace(found, notes=_notes(train, held))


def load_client_quietly(
    cfg: DataConfig,
    name: str,
    *,
    seed: int,
    task: str = "instruct",
    columns: Collection[str] | None = None,
) -> tuple[ClientRows, str]:
    """Like `load_client`, but rows are counted and split before anything looks into them.

    What a recipe makes of the rows then decides neither their number nor whether this succeeds: a
    row that cannot be used is left out, and counts.

    Args:
        cfg: Where the rows are and what they look like. `skip_empty` has no effect.
        name: The client.
        seed: Seed of the split.
        task: What rows become.
        columns: The only columns that anything may see; None for all.

    Returns:
        The rows, and what is wrong with the first one that cannot be used; "" if nothing is.

    Raises:
        DataError: Files cannot be read, or hold too few rows.
        ConfigError: The settings do not fit the layout of the files.
    """
    plain = cfg.model_copy(update={"skip_empty": False})
    train, held = read_parts(plain, task, columns, complete=False)
    refuse([*train.mistakes, *moved(held.mistakes if held else (), len(train.rows))])
    converted, problem = convert_quietly(train.rows, cfg, task)
    held_converted, other = convert_quietly(held.rows, cfg, task) if held else (None, "")
    own = _rows_of(name, train, converted)
    apart = _rows_of(name, held, held_converted) if held and held_converted is not None else None
    clients = _assemble(own, apart, cfg, seed=seed_of_split(cfg, seed), labels=())
    every = clients[name]
    usable = tuple(row for row in every.train if row is not None)
    held_out = tuple(row for row in every.evaluation if row is not None)
    validation = tuple(row for row in every.validation if row is not None)
    num_scored = len(validation if every.validation else held_out)
    unused = len(every.train) - len(usable), len(every.scored) - num_scored
    notes = _notes(train, held)
    found = ClientRows(name, usable, held_out, (), *unused, notes, validation)
    return found, problem or other


def fingerprint(clients: Mapping[str, ClientRows]) -> str:
    """SHA-256 over all rows in order, as 64 hex digits: what a run really saw."""
    digest = hashlib.sha256()
    for name in sorted(clients):
        rows = clients[name]
        parts = [rows.train, rows.evaluation, *([rows.validation] if rows.validation else [])]
        digest.update(json.dumps([name, *parts], sort_keys=True).encode())
    return digest.hexdigest()


def _unnamed(train: Part, held: Part | None, partition: PartitionConfig | None) -> list[Mistake]:
    """The rows whose client has no name, if a column names the clients of one data set."""
    if partition is None or partition.by is None or train.files:
        return []
    found = unnamed_rows(train, partition.by)
    return [*found, *moved(unnamed_rows(held, partition.by) if held else (), len(train.rows))]


def _notes(train: Part, held: Part | None) -> tuple[str, ...]:
    return (*train.notes, *(held.notes if held else ()))


def _unused(
    everything: Part,
    held: Part | None,
    num_train: int,
    shares: Shares,
    partition: PartitionConfig | None,
) -> list[str]:
    warnings: list[str] = []
    if empty := everything.num_empty + (held.num_empty if held else 0):
        verbs = ("lacks", "is") if empty == 1 else ("lack", "are")
        warnings.append(
            f"data.skip_empty: {counted(empty, 'row')} {verbs[0]} a text and {verbs[1]} not used"
        )
    lost = num_train - sum(map(len, shares.values()))
    if lost and partition is not None and partition.kind is not None:  # only flwr-datasets may
        warnings.append(
            f"partition.partitioner: '{partition.partitioner}' assigns {counted(lost, 'row')} to "
            "no client; change [partition.options] if you need them"
        )
    return warnings


def _check_no_client_lost(
    train: Part, column: str, only: Sequence[str] | None, shares: Shares
) -> None:
    """All rows of a small client may have gone to the server, and nothing else would report it."""
    everyone = set(names_in_column(*column_values(train, column, "partition.by")))
    lost = sorted((everyone if only is None else everyone & set(only)) - shares.keys())
    if lost:
        others = f" and {counted(len(lost) - 1, 'other')}" if len(lost) > 1 else ""
        raise DataError(
            f"server.data_fraction leaves client '{lost[0]}'{others} without rows.\n"
            "  Choose a smaller fraction, or give the server its own rows: server.data_path."
        )


def _labels(
    converted: Sequence[TaskRow], train: Part, cfg: DataConfig, partition: PartitionConfig | None
) -> list[str]:
    if converted and isinstance(converted[0], dict):
        return [row["label"] for row in converted if isinstance(row, dict)]
    if cfg.label is not None:
        return names_in_column(*column_values(train, cfg.label, "data.label"))
    if partition is not None and partition.label is not None:
        return names_in_column(*column_values(train, partition.label, "partition.label"))
    return []


# --- holding out --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """The rows of one part, of all clients."""

    digests: Sequence[str]
    converted: Sequence[TaskRow]
    shares: Shares
    groups: Sequence[str] = ()
    """Each row's group, if these were asked for."""


def _rows_of(name: str, part: Part, converted: Sequence[TaskRow]) -> _Rows:
    """A part that belongs to one client."""
    return _Rows(row_digests(part.rows), converted, {name: list(range(len(converted)))})


def _assemble(
    own: _Rows, apart: _Rows | None, cfg: DataConfig, *, seed: int, labels: Sequence[str]
) -> dict[str, ClientRows]:
    """Every client's rows; `apart` are the held-out rows if these are stored separately."""
    if apart is not None:
        _check_same_clients(own.shares, apart.shares)
    held_places = places(own.digests, seed, "held-out")
    validation_places = places(own.digests, seed, "validation")
    own_eval_places = places(own.digests, seed, "max-eval-rows")
    train_places = places(own.digests, seed, "max-rows")
    source = apart or own
    eval_places = places(source.digests, seed, "max-eval-rows")
    clients: dict[str, ClientRows] = {}
    for name, train in sorted(own.shares.items()):
        if apart is None:
            _check_enough_rows(train, name)
            train, held = hold_out(train, cfg.eval_fraction, held_places)
        else:
            held = apart.shares[name]
        validation: list[int] = []
        if cfg.validation_fraction > 0:
            _check_enough_to_validate(train, name)
            train, validation = hold_out(train, cfg.validation_fraction, validation_places)
        if cfg.max_rows is not None:
            train = keep_at_most(train, cfg.max_rows, train_places)
        if cfg.max_eval_rows is not None:
            held = keep_at_most(held, cfg.max_eval_rows, eval_places)
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
