"""A client's files -> checked, split rows.

Every row is read and converted before a model is loaded, so that a mistake in the last line of a
file costs seconds. Knows clients and the held-out part; not how files are read, tokens or models.
Messages name file, line and column, never a value of a row; client names and labels, which come
from columns, are the exceptions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from silotune.core.errors import ConfigError, DataError
from silotune.core.seeds import generator
from silotune.core.wording import did_you_mean
from silotune.data.conversations import is_missing, list_columns
from silotune.data.files import Part, PlacedRow
from silotune.data.flwr_partition import by_partitioner, partitioner_of
from silotune.data.partition import (
    PartitionConfig,
    Shares,
    by_column,
    by_length,
    by_topic,
    dirichlet,
    iid,
    names_in_column,
)
from silotune.data.reading import (
    DataConfig,
    TaskRow,
    convert,
    convert_parts,
    read_all,
    read_parts,
    without_empty,
)


@dataclass(frozen=True)
class ClientRows:
    """One client's rows, in file order. Neither part is empty."""

    name: str
    train: tuple[TaskRow, ...]
    evaluation: tuple[TaskRow, ...]
    """Held out: scored, never trained on."""
    labels: tuple[str, ...] = ()
    """What data.label, or else partition.label, says of each train row; empty without one."""


def load_clients(
    cfg: DataConfig,
    partition: PartitionConfig | None,
    *,
    seed: int,
    task: str = "instruct",
    server_fraction: float = 0.0,
) -> dict[str, ClientRows]:
    """Read the rows of all clients of a simulation, check them, and hold out each client's part.

    A client's split depends on the seed, its name and its own rows alone: a new client changes no
    other.

    Args:
        cfg: Where the rows are and what they look like.
        partition: How one data set becomes clients; absent when there is one file per client.
        seed: The run's seed.
        task: What rows become: conversations for "instruct", labelled texts for "classify".
        server_fraction: Share of the train rows that the server owns, see `load_server_rows`. They
            go to no client.

    Returns:
        The clients, sorted by name.

    Raises:
        DataError: Files, rows or columns cannot be used.
        ConfigError: The settings do not fit the layout of the files.
    """
    return cut_clients(cfg, partition, seed=seed, task=task, server_fraction=server_fraction)[0]


def cut_clients(
    cfg: DataConfig,
    partition: PartitionConfig | None,
    *,
    seed: int,
    task: str = "instruct",
    server_fraction: float = 0.0,
) -> tuple[dict[str, ClientRows], list[str]]:
    """As `load_clients`, and a warning for every kind of row that is not used.

    Those that partition.only or a maximum leave out are not told: that is what was asked for.
    """
    seed = cfg.split_seed if cfg.split_seed is not None else seed
    if partition is not None and partition.kind == "flwr-datasets":
        partitioner_of(partition)  # its mistakes cost no reading
    everything, held = read_parts(cfg, task)
    train, _ = _set_aside(everything, server_fraction, cfg, seed=seed)
    talks, held_talks = convert_parts(train, held, cfg, task)
    cut = partition is not None and (partition.by is not None or partition.kind is not None)
    if train.files and cut:
        raise ConfigError(
            f"'{cfg.path}' holds one file per client, so [partition] has nothing to cut.\n"
            "  Remove [partition], or set data.path to one file."
        )
    if train.files:
        shares, held_shares = train.files, held.files if held else None
    elif partition is not None and cut:
        shares, held_shares = _cut(train, held, talks, held_talks, partition, seed=seed)
    else:
        raise _partition_is_needed(cfg, train.rows)
    if partition is not None and partition.by is not None:
        _check_nobody_lost(everything, partition.by, partition.only, shares)
    labels = _labels(talks, train, cfg, partition)
    clients = _assemble(talks, shares, held_talks, held_shares, cfg, seed=seed, labels=labels)
    return clients, _unused(everything, held, len(train.rows), shares, partition)


def _unused(
    everything: Part,
    held: Part | None,
    num_train: int,
    shares: Shares,
    partition: PartitionConfig | None,
) -> list[str]:
    warnings: list[str] = []
    if empty := everything.num_empty + (held.num_empty if held else 0):
        warnings.append(f"data.skip_empty: {empty} rows lack a text and are not used")
    lost = num_train - sum(map(len, shares.values()))
    if lost and partition is not None and partition.kind is not None:  # a foreign class may
        warnings.append(
            f"partition.partitioner: '{partition.partitioner}' leaves {lost} of the rows to no "
            "client; change [partition.options] if they matter"
        )
    return warnings


def _check_nobody_lost(
    train: Part, column: str, only: Sequence[str] | None, shares: Shares
) -> None:
    """A small client's rows may all have become the server's, which would not be told otherwise."""
    everyone = set(names_in_column(*_column(train, column, "partition.by")))
    lost = sorted((everyone if only is None else everyone & set(only)) - shares.keys())
    if lost:
        raise DataError(
            f"server.data_fraction leaves client '{lost[0]}' no row ({len(lost)} such clients).\n"
            "  Choose a smaller share, or give the server its own rows: server.data_path."
        )


def _labels(
    talks: Sequence[TaskRow], train: Part, cfg: DataConfig, partition: PartitionConfig | None
) -> list[str]:
    if talks and isinstance(talks[0], dict):
        return [row["label"] for row in talks if isinstance(row, dict)]
    if cfg.label is not None:
        return names_in_column(*_column(train, cfg.label, "data.label"))
    if partition is not None and partition.label is not None:
        return names_in_column(*_column(train, partition.label, "partition.label"))
    return []


def load_server_rows(
    cfg: DataConfig, *, seed: int, task: str, fraction: float, path: str | None
) -> tuple[TaskRow, ...]:
    """Read the rows that the server owns and trains on itself. No client has them.

    Args:
        cfg: Where the rows are and what they look like.
        seed: The run's seed.
        task: As in `load_clients`.
        fraction: Share of the train rows, drawn with the seed.
        path: The server's own file, of the same columns, instead.

    Raises:
        DataError: Files, rows or columns cannot be used, or the share comes to no row.
        ConfigError: A share is asked of data that lies at the clients.
    """
    seed = cfg.split_seed if cfg.split_seed is not None else seed
    if path is not None:
        rows = without_empty(Part(read_all(path)), cfg, task).rows
    else:
        rows = _set_aside(read_parts(cfg, task)[0], fraction, cfg, seed=seed)[1]
    return tuple(convert(rows, cfg, task))


def _set_aside(
    train: Part, fraction: float, cfg: DataConfig, *, seed: int
) -> tuple[Part, list[PlacedRow]]:
    """The train rows without the server's, and the server's: drawn, as files are often sorted."""
    if fraction == 0:
        return train, []
    if train.files:
        raise ConfigError(
            f"server.data_fraction: '{cfg.path}' holds one file per client, and these are theirs.\n"
            "  Give the server its own rows: server.data_path."
        )
    size = round(fraction * len(train.rows))
    if not 0 < size < len(train.rows):
        raise DataError(
            f"server.data_fraction = {fraction:g} of {len(train.rows)} rows leaves the server or "
            "the clients without any.\n  Choose another share, or bring more rows."
        )
    everything = list(range(len(train.rows)))
    drawn, rest = _draw(everything, size, generator(seed, "server-rows"))
    return Part([train.rows[n] for n in rest]), [train.rows[n] for n in drawn]


def load_client(cfg: DataConfig, name: str, *, seed: int, task: str = "instruct") -> ClientRows:
    """Read the rows of one real client, to which the whole data set belongs.

    The held-out part is drawn as in `load_clients`, so a real client gets the split of its
    simulation.

    Raises:
        DataError: Files, rows or columns cannot be used.
        ConfigError: The settings do not fit the layout of the files.
    """
    seed = cfg.split_seed if cfg.split_seed is not None else seed
    train, held = read_parts(cfg, task)
    talks, held_talks = convert_parts(train, held, cfg, task)
    shares = {name: list(range(len(talks)))}
    held_shares = None if held_talks is None else {name: list(range(len(held_talks)))}
    labels = _labels(talks, train, cfg, None)
    return _assemble(talks, shares, held_talks, held_shares, cfg, seed=seed, labels=labels)[name]


def fingerprint(clients: Mapping[str, ClientRows]) -> str:
    """SHA-256 over all rows in order, as 64 hex digits: what a run really saw."""
    digest = hashlib.sha256()
    for name in sorted(clients):
        rows = clients[name]
        digest.update(json.dumps([name, rows.train, rows.evaluation], sort_keys=True).encode())
    return digest.hexdigest()


# --- cutting ------------------------------------------------------------------------------------


def _cut(
    train: Part,
    held: Part | None,
    talks: Sequence[TaskRow],
    held_talks: Sequence[TaskRow] | None,
    partition: PartitionConfig,
    *,
    seed: int,
) -> tuple[Shares, Shares | None]:
    if partition.by is not None:
        shares = by_column(*_column(train, partition.by, "partition.by"))
        held_shares = by_column(*_column(held, partition.by, "partition.by")) if held else None
        return (
            _only(shares, partition.only),
            None if held_shares is None else _only(held_shares, partition.only),
        )
    count = partition.num_clients or 1
    at_least = 1 if held else 2  # each client needs a row to learn and one to hold out
    gen = generator(seed, "partition")
    if partition.kind == "length":
        lengths = [_num_characters(row) for row in talks]
        held_lengths = None if held_talks is None else [_num_characters(row) for row in held_talks]
        return by_length(lengths, count, gen, held=held_lengths, at_least=at_least)
    if partition.kind == "cluster":
        texts = [_prompt(row) for row in talks]
        held_texts = None if held_talks is None else [_prompt(row) for row in held_talks]
        return by_topic(texts, count, gen, held=held_texts, at_least=at_least)
    if partition.kind == "flwr-datasets":
        return _cut_by_partitioner(train, held, talks, partition, gen), None
    if partition.label is None or partition.alpha is None:
        return (
            iid(len(train.rows), count, gen, at_least=at_least),
            iid(len(held.rows), count, generator(seed, "partition", "held-out")) if held else None,
        )
    labels = names_in_column(*_column(train, partition.label, "partition.label"))
    if held is None:
        return dirichlet(labels, count, partition.alpha, gen, at_least=at_least), None
    held_labels = names_in_column(*_column(held, partition.label, "partition.label"))
    # One generator name for both: a client is to be scored on the mix of labels that it learns.
    return (
        dirichlet(labels, count, partition.alpha, gen, known=held_labels),
        dirichlet(held_labels, count, partition.alpha, generator(seed, "partition"), known=labels),
    )


def _cut_by_partitioner(
    train: Part,
    held: Part | None,
    talks: Sequence[TaskRow],
    partition: PartitionConfig,
    gen: torch.Generator,
) -> Shares:
    if held is not None:
        raise ConfigError(
            'partition.kind = "flwr-datasets": the held-out rows have a place of their own, and '
            "two cuts would not give a client the same kind of rows.\n"
            "  Remove data.eval_path or data.eval_split, or set data.path to the train file alone: "
            "each client then holds out its own."
        )
    values, places = None, [row.where for row in train.rows]
    if "partition_by" in partition.options:
        column = str(partition.options["partition_by"])
        if column == "num_characters" and all(column not in row.columns for row in train.rows):
            values = [_num_characters(row) for row in talks]
        else:
            values, _, _ = _column(train, column, "partition.options.partition_by")
    return by_partitioner(partition, len(train.rows), gen, values=values, places=places, at_least=2)


def _num_characters(row: TaskRow) -> int:
    """Length of all that the model reads and answers: every turn, or the text and its pair."""
    if isinstance(row, dict):
        return len(row["text"]) + len(row.get("text_pair", ""))
    return sum(len(turn["content"]) for turn in row)


def _prompt(row: TaskRow) -> str:
    """What a row is about: the user's turns, or the text."""
    if isinstance(row, dict):
        return row["text"]
    return "\n".join(turn["content"] for turn in row if turn["role"] == "user")


def _only(shares: Shares, names: Sequence[str] | None) -> Shares:
    if names is None:
        return shares
    for name in names:
        if name not in shares:
            raise DataError(
                f"partition.only: there are no rows of '{name}'.{did_you_mean(name, shares)}\n"
                f"  The clients are {list_columns(shares)}."
            )
    return {name: rows for name, rows in shares.items() if name in names}


def _column(part: Part, column: str, setting: str) -> tuple[Sequence[object], str, list[str]]:
    columns = dict.fromkeys(name for row in part.rows for name in row.columns)
    if column not in columns:
        raise DataError(
            f"{setting} = '{column}': {part.rows[0].where} and the rows after it have no such "
            f"column.{did_you_mean(column, columns)}\n  The columns are {list_columns(columns)}."
        )
    values = [row.columns.get(column) for row in part.rows]
    return values, column, [row.where for row in part.rows]


def _partition_is_needed(cfg: DataConfig, rows: Sequence[PlacedRow]) -> DataError:
    fitting = _columns_for_clients(rows)
    columns = f" (of these: {list_columns(fitting)})" if fitting else ""
    return DataError(
        f"'{cfg.path}' is one data set, and nothing says how it becomes clients.\n"
        f'  Set [partition] by = "a column"{columns}, or kind = "iid" with num_clients,\n'
        "  or set data.path to a folder with one file per client."
    )


def _columns_for_clients(rows: Sequence[PlacedRow]) -> list[str]:
    """Columns with 2 to 100 values and at least two rows a value, as each client needs."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for column, value in row.columns.items():
            values.setdefault(column, set()).add("" if is_missing(value) else str(value).strip())
    most = min(100, len(rows) // 2)
    return [c for c, seen in values.items() if 2 <= len(seen) <= most and "" not in seen]


def _assemble(
    talks: Sequence[TaskRow],
    shares: Shares,
    held_talks: Sequence[TaskRow] | None,
    held_shares: Shares | None,
    cfg: DataConfig,
    *,
    seed: int,
    labels: Sequence[str],
) -> dict[str, ClientRows]:
    if held_shares is not None:
        _check_same_clients(shares, held_shares)
    clients: dict[str, ClientRows] = {}
    for name in sorted(shares):
        own = shares[name]
        if held_talks is None or held_shares is None:
            own, aside = _hold_out(own, name, cfg.eval_fraction, generator(seed, "held-out", name))
            held = [talks[n] for n in aside]
        else:
            held = [held_talks[n] for n in held_shares[name]]
        if cfg.max_rows is not None:
            own, _ = _draw(own, cfg.max_rows, generator(seed, "max-rows", name))
        if cfg.max_eval_rows is not None:
            gen = generator(seed, "max-eval-rows", name)
            kept, _ = _draw(list(range(len(held))), cfg.max_eval_rows, gen)
            held = [held[n] for n in kept]
        clients[name] = ClientRows(
            name,
            tuple(talks[n] for n in own),
            tuple(held),
            tuple(labels[n] for n in own) if labels else (),
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
                "  Give each client both, or remove data.eval_path so that each holds out its own."
            )


def _hold_out(
    own: list[int], name: str, fraction: float, gen: torch.Generator
) -> tuple[list[int], list[int]]:
    if len(own) < 2:
        raise DataError(
            f"client '{name}' has {len(own)} row, but needs at least 2: one to learn, one to hold "
            "out.\n  Bring more rows for it, cut into fewer clients, or give data.eval_path."
        )
    # at least one, and never all: round(0.9 * 2) is 2
    size = min(len(own) - 1, max(1, round(fraction * len(own))))
    aside, rest = _draw(own, size, gen)
    return rest, aside


def _draw(rows: list[int], size: int, gen: torch.Generator) -> tuple[list[int], list[int]]:
    """Draw `size` rows, or all if there are fewer. Both parts keep the order of the file."""
    order = torch.randperm(len(rows), generator=gen).tolist()
    chosen = set(order[:size])
    drawn = [row for n, row in enumerate(rows) if n in chosen]
    return drawn, [row for n, row in enumerate(rows) if n not in chosen]
