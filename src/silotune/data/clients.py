"""A client's files -> its checked rows, split into a train and a held-out part.

Every row is read and converted before a model is loaded, so a mistake in the last line of a file
costs seconds. Knows clients and their held-out rows; does not know how files are read, tokens or
models. Messages name file, line and column but no value of a row, except client names and labels,
which come from columns.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import counted
from silotune.data.client_rows import ClientRows, PartRows, assemble, rows_of
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
from silotune.data.preferences import is_bad_answer, is_pair
from silotune.data.reading import (
    DataConfig,
    TaskRow,
    convert_parts,
    convert_quietly,
    read_parts,
    seed_of_split,
)
from silotune.data.row_draws import row_digests
from silotune.data.server_rows import set_aside_server_rows


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
    own = PartRows(row_digests(train.rows), converted, shares, groups)
    apart = None
    if held is not None and held_converted is not None and held_shares is not None:
        apart = PartRows(row_digests(held.rows), held_converted, held_shares, groups)
    clients = assemble(own, apart, cfg, seed=seed, labels=labels)
    notes = [*_notes(everything, held)]
    notes += near_names("clients", {*shares, *(held_shares or ())})
    if task == "classify" and cfg.labels is None:
        every = [*converted, *(held_converted or ())]
        notes += near_names("labels", {row["label"] for row in every})
    unused = _unused(everything, held, len(train.rows), shares, partition, cfg=cfg, task=task)
    return clients, [*notes, *unused]


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
    own = rows_of(name, train, converted)
    apart = rows_of(name, held, held_converted) if held and held_converted is not None else None
    labels, seed = _labels(converted, train, cfg, None), seed_of_split(cfg, seed)
    found = assemble(own, apart, cfg, seed=seed, labels=labels)[name]
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
    own = rows_of(name, train, converted)
    apart = rows_of(name, held, held_converted) if held and held_converted is not None else None
    clients = assemble(own, apart, cfg, seed=seed_of_split(cfg, seed), labels=())
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
    *,
    cfg: DataConfig,
    task: str,
) -> list[str]:
    warnings: list[str] = []
    if empty := everything.num_empty + (held.num_empty if held else 0):
        verbs = ("lacks", "is") if empty == 1 else ("lack", "are")
        warnings.append(
            f"data.skip_empty: {counted(empty, 'row')} {verbs[0]} a text"
            f"{' or a difference' if task == 'prefer' else ''} and {verbs[1]} not used"
        )
    bad = sum(is_bad_answer(row.columns) for row in everything.rows) if task == "instruct" else 0
    if bad and cfg.prompt is None:
        warnings.append(
            f"column 'label' says that {counted(bad, 'answer')} of {len(everything.rows)} "
            f"{'is' if bad == 1 else 'are'} bad (unpaired feedback, as for KTO), and "
            'task = "instruct" learns all of them; remove the rows with bad answers'
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
    if converted and isinstance(converted[0], dict) and not is_pair(converted[0]):
        return [row["label"] for row in converted if isinstance(row, dict)]
    if cfg.label is not None:
        return names_in_column(*column_values(train, cfg.label, "data.label"))
    if partition is not None and partition.label is not None:
        return names_in_column(*column_values(train, partition.label, "partition.label"))
    return []
