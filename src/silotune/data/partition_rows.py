"""[partition] applied to rows that have been read: which rows belong to which client.

Finds the columns, lengths and texts that the functions in `partition`, `topics` and
`flwr_partition` work on. Knows rows and their columns; does not know files, nor what is held out.
"""

from collections.abc import Sequence

import torch

from silotune.core.errors import ConfigError, DataError
from silotune.core.seeds import generator
from silotune.core.wording import did_you_mean
from silotune.data.cells import is_missing
from silotune.data.conversations import TEXT, list_columns
from silotune.data.flwr_partition import by_partitioner
from silotune.data.partition import (
    EVERY_ROW_NEEDS_A_NAME,
    PartitionConfig,
    Shares,
    by_column,
    by_length,
    dirichlet,
    iid,
    is_name,
    names_in_column,
)
from silotune.data.placed_rows import Mistake, Part, PlacedRow
from silotune.data.preferences import is_pair
from silotune.data.reading import DataConfig, TaskRow
from silotune.data.row_draws import row_digests
from silotune.data.topics import by_topic


def partition_rows(
    train: Part,
    held: Part | None,
    converted: Sequence[TaskRow],
    held_converted: Sequence[TaskRow] | None,
    partition: PartitionConfig,
    *,
    seed: int,
) -> tuple[Shares, Shares | None]:
    """Split the train rows, and the held-out rows if these are stored separately, into clients.

    Args:
        train: The train rows as read.
        held: The held-out rows as read, or None.
        converted: What the train rows become for the task, in the same order.
        held_converted: The same for the held-out rows, or None.
        partition: Sets by or kind.
        seed: Seed of the split.

    Raises:
        DataError: A column or a client is missing, or a client gets too few rows.
        ConfigError: The class of flwr-datasets cannot be used.
    """
    if partition.by is not None:
        shares = _by_column(train, partition.by)
        held_shares = _by_column(held, partition.by) if held else None
        return (
            _only(shares, partition.only),
            None if held_shares is None else _only(held_shares, partition.only),
        )
    count = partition.num_clients or 1
    at_least = 1 if held else 2  # each client needs a row to train on and one to hold out
    gen = generator(seed, "partition")
    if partition.kind == "length":
        lengths = [_num_characters(row) for row in converted]
        held_lengths = (
            None if held_converted is None else list(map(_num_characters, held_converted))
        )
        return by_length(lengths, count, gen, held=held_lengths, at_least=at_least)
    if partition.kind == "cluster":
        texts = [_prompt(row) for row in converted]
        held_texts = None if held_converted is None else [_prompt(row) for row in held_converted]
        return by_topic(texts, count, gen, held=held_texts, at_least=at_least)
    if partition.kind == "flwr-datasets":
        return _by_partitioner(train, held, converted, partition, gen), None
    if partition.label is None or partition.alpha is None:
        return (
            iid(len(train.rows), count, gen, at_least=at_least),
            iid(len(held.rows), count, generator(seed, "partition", "held-out")) if held else None,
        )
    labels = _names(train, partition.label)
    if held is None:
        return dirichlet(labels, count, partition.alpha, gen, at_least=at_least), None
    held_labels = _names(held, partition.label)
    # The same generator name for both parts: a client is scored on the label mix it trains on.
    return (
        dirichlet(labels, count, partition.alpha, gen, known=held_labels),
        dirichlet(held_labels, count, partition.alpha, generator(seed, "partition"), known=labels),
    )


def column_values(part: Part, column: str, setting: str) -> tuple[Sequence[object], str, list[str]]:
    """A column as the arguments of `names_in_column` and `by_column`: values, name and places.

    Raises:
        DataError: No row has this column; `setting` is the recipe key that names it.
    """
    columns = dict.fromkeys(name for row in part.rows for name in row.columns)
    if column not in columns:
        raise DataError(
            f"{setting} = '{column}': {part.rows[0].where} and the rows after it have no such "
            f"column.{did_you_mean(column, columns)}\n  The columns are {list_columns(columns)}."
        )
    values = [row.columns.get(column) for row in part.rows]
    return values, column, [row.where for row in part.rows]


def group_names(part: Part, column: str) -> list[str]:
    """A name for the group of each row, by order of appearance: it does not tell the value.

    A hash of the value would: whoever guesses a value can check it. A row without a value is a
    group of its own.
    """
    values, _, _ = column_values(part, column, "compare.group")
    given = [
        ("row", digest) if is_missing(value) or value == "" else ("value", str(value))
        for value, digest in zip(values, row_digests(part.rows), strict=True)
    ]
    numbers = {name: n for n, name in enumerate(dict.fromkeys(given), start=1)}
    return [str(numbers[name]) for name in given]


def unnamed_rows(part: Part, column: str) -> list[Mistake]:
    """The rows in which the column that names the clients has no name; none if it is absent."""
    if all(column not in row.columns for row in part.rows):
        return []
    return [
        Mistake(
            n,
            f"{row.where}: column '{column}' is empty, or not a single value.\n"
            f"  {EVERY_ROW_NEEDS_A_NAME}",
        )
        for n, row in enumerate(part.rows)
        if not is_name(row.columns.get(column))
    ]


def partition_is_missing(cfg: DataConfig, rows: Sequence[PlacedRow]) -> DataError:
    """The error for one data set without [partition], with the columns that could name clients."""
    fitting = _columns_for_clients(rows)
    columns = f" (candidates: {list_columns(fitting)})" if fitting else ""
    return DataError(
        f"'{cfg.path}' is one data set, and the recipe does not say how to split it into clients.\n"
        f'  Set [partition] by = "a column"{columns}, or kind = "iid" with num_clients,\n'
        "  or set data.path to a folder with one file per client."
    )


def _by_partitioner(
    train: Part,
    held: Part | None,
    converted: Sequence[TaskRow],
    partition: PartitionConfig,
    gen: torch.Generator,
) -> Shares:
    if held is not None:
        raise ConfigError(
            'partition.kind = "flwr-datasets" cannot be used when the held-out rows are stored '
            "separately: train and held-out rows would be partitioned independently, so a client "
            "could get different kinds of rows in each.\n"
            "  Remove data.eval_path or data.eval_split, or set data.path to the train file alone; "
            "each client then holds out some of its own rows."
        )
    values, places = None, [row.where for row in train.rows]
    if "partition_by" in partition.options:
        column = str(partition.options["partition_by"])
        if column == "num_characters" and all(column not in row.columns for row in train.rows):
            values = [_num_characters(row) for row in converted]
        else:
            values, _, _ = column_values(train, column, "partition.options.partition_by")
    return by_partitioner(partition, len(train.rows), gen, values=values, places=places, at_least=2)


def _num_characters(row: TaskRow) -> int:
    """Length of all that the model reads and answers: every turn, or the text and its pair."""
    if is_pair(row):
        return sum(len(turn["content"]) for part in row.values() for turn in part)
    if isinstance(row, dict):
        return len(row["text"]) + len(row.get("text_pair", ""))
    return sum(len(turn["content"]) for turn in row)


def _prompt(row: TaskRow) -> str:
    """What a row is about: the user's turns, or its text."""
    if is_pair(row):
        row = row["prompt"]
    if isinstance(row, dict):
        return row["text"]
    return "\n".join(turn["content"] for turn in row if turn["role"] in ("user", TEXT))


def _names(part: Part, label: str) -> list[str]:
    return names_in_column(*column_values(part, label, "partition.label"))


def _by_column(part: Part, column: str) -> Shares:
    return by_column(*column_values(part, column, "partition.by"))


def _only(shares: Shares, names: Sequence[str] | None) -> Shares:
    if names is None:
        return shares
    for name in names:
        if name not in shares:
            raise DataError(
                f"partition.only: no rows belong to '{name}'.{did_you_mean(name, shares)}\n"
                f"  The clients are {list_columns(shares)}."
            )
    return {name: rows for name, rows in shares.items() if name in names}


def _columns_for_clients(rows: Sequence[PlacedRow]) -> list[str]:
    """Columns with 2 to 100 distinct values and two rows per value on average.

    Each client needs at least two rows.
    """
    values: dict[str, set[str]] = {}
    for row in rows:
        for column, value in row.columns.items():
            values.setdefault(column, set()).add("" if is_missing(value) else str(value).strip())
    most = min(100, len(rows) // 2)
    return [c for c, seen in values.items() if 2 <= len(seen) <= most and "" not in seen]
