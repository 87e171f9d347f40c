"""The rows that the server owns: to train on itself, or to score. No client has them.

Reads the server's own file, or chooses a share of the train rows. Knows no clients and no models.
"""

from dataclasses import replace

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import counted
from silotune.data.placed_rows import Part, PlacedRow, refuse
from silotune.data.reading import (
    DataConfig,
    TaskRow,
    convert,
    read_all,
    read_parts,
    seed_of_split,
    without_empty,
)
from silotune.data.row_draws import places, row_digests


def load_server_rows(
    cfg: DataConfig, *, seed: int, task: str, fraction: float, path: str | None
) -> tuple[TaskRow, ...]:
    """Read the rows that the server owns and trains on itself. No client has them.

    Args:
        cfg: Where the rows are and what they look like.
        seed: The run's seed.
        task: As in `load_clients`.
        fraction: Expected share of the train rows; ignored if `path` is given.
        path: The server's own file or folder, with the same columns.

    Raises:
        DataError: Files, rows or columns cannot be used, or the share is no row or all of them.
        ConfigError: A share is requested of data that belongs to the clients.
    """
    if path is not None:
        return read_own_rows(cfg, task=task, path=path)
    everything, _ = read_parts(cfg, task)
    refuse(everything.mistakes)
    rows = set_aside_server_rows(everything, fraction, cfg, seed=seed_of_split(cfg, seed))[1]
    return tuple(convert(rows, cfg, task))


def read_own_rows(cfg: DataConfig, *, task: str, path: str) -> tuple[TaskRow, ...]:
    """Read a file or folder of the server's, with the same columns as the clients' rows.

    Raises:
        DataError: Files, rows or columns cannot be used.
    """
    rows = without_empty(Part(read_all(path)), cfg, task).rows
    return tuple(convert(rows, cfg, task))


def set_aside_server_rows(
    train: Part, fraction: float, cfg: DataConfig, *, seed: int
) -> tuple[Part, list[PlacedRow]]:
    """Choose the server's share of the train rows, row by row as in `row_draws`.

    The number of its rows varies around the share, and one row more changes nothing for the others.

    Args:
        train: All train rows.
        fraction: Expected share; 0 for none.
        cfg: Where the rows are, for messages.
        seed: Seed of the split.

    Returns:
        The train rows without the server's, and the server's, both in file order.

    Raises:
        DataError: The server or the clients would have no rows.
        ConfigError: There is one file per client.
    """
    if fraction == 0:
        return train, []
    if train.files:
        raise ConfigError(
            f"server.data_fraction: '{cfg.path}' holds one file per client, and those rows belong "
            "to the clients.\n  Give the server its own rows: server.data_path."
        )
    draw = places(row_digests(train.rows), seed, "server-rows")
    own = [row for row, place in zip(train.rows, draw, strict=True) if place < fraction]
    rest = [row for row, place in zip(train.rows, draw, strict=True) if place >= fraction]
    if not own or not rest:
        raise DataError(
            f"server.data_fraction = {fraction:g} of {counted(len(train.rows), 'row')} leaves the "
            "server or the clients without rows.\n  Choose another fraction, or add rows."
        )
    return replace(train, rows=rest), own
