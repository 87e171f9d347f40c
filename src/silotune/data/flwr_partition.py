"""Cut one data set into clients with a class of flwr-datasets. For simulation only.

The class is foreign code: its options are checked before rows are read, and whatever it raises is
explained. Knows row numbers and the values of one column; neither files nor what a row is.
"""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import did_you_mean
from silotune.data.partition import PartitionConfig, Shares, name_parts, names_in_column

UNFIT = {
    "Partitioner": "is what the others have in common",
    "VerticalEvenPartitioner": "shares out columns, not rows",
    "VerticalSizePartitioner": "shares out columns, not rows",
    "IdToSizeFncPartitioner": "takes a function, which a recipe cannot hold",
    "DistributionPartitioner": "takes a table of numbers, which a recipe cannot hold",
}
"""Classes of flwr_datasets.partitioner that a recipe cannot name."""

ROW = "silotune: row number"
"""Name of the column by which rows are found again; no data set has one of that name."""


def partitioner_of(cfg: PartitionConfig) -> tuple[type[Any], dict[str, Any]]:
    """The class that a recipe names, and its arguments but for a seed. Reads no rows.

    Raises:
        ConfigError: The library or the class is missing, or the options are not those of the class.
    """
    try:
        from flwr_datasets import partitioner as library
    except ImportError as error:
        raise ConfigError(
            'partition.kind = "flwr-datasets" needs the library flwr-datasets.\n'
            "  Install it: make env EXTRAS=partitioners"
        ) from error
    name = str(cfg.partitioner)
    there = [known for known in library.__all__ if known not in UNFIT]
    if name not in there:
        why = UNFIT.get(name) or f"is not there.{did_you_mean(name, there)}"
        raise _refused(cfg, why, f"There are: {', '.join(there)}")
    cls: type[Any] = getattr(library, name)
    known = inspect.signature(cls).parameters
    for key in cfg.options:
        if key not in known:
            why = f"has no option '{key}'.{did_you_mean(key, known)}"
            raise _refused(cfg, why, f"It has: {', '.join(known)}")
    given: dict[str, Any] = dict(cfg.options)
    if cfg.num_clients is not None and "num_partitions" not in known:
        mend = "Remove partition.num_clients"
        raise _refused(cfg, "says itself how many clients there are", mend)
    if cfg.num_clients is not None:
        given["num_partitions"] = cfg.num_clients
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        keys = [
            "partition.num_clients" if key == "num_partitions" else f"partition.options.{key}"
            for key in missing
        ]
        raise _refused(cfg, f"needs {', '.join(missing)}", f"Set {', '.join(keys)}")
    return cls, given


def by_partitioner(
    cfg: PartitionConfig,
    num_rows: int,
    gen: torch.Generator,
    *,
    values: Sequence[object] | None = None,
    places: Sequence[str] | None = None,
    at_least: int = 1,
) -> Shares:
    """Let a class of flwr-datasets cut. It may leave rows to no one, as its options say.

    The class sees row numbers and one column, no other value of a row.

    Args:
        cfg: Names the class and its options.
        num_rows: Number of rows.
        gen: Seeds the class, if it takes a seed and the options have none.
        values: The column that its option partition_by names, if it has that option.
        places: Where each row stands, for messages.
        at_least: Rows that every client needs.

    Raises:
        ConfigError: As `partitioner_of`; or the class fails with these rows.
        DataError: A value is missing, or a client gets too few rows.
    """
    from datasets import Dataset

    cls, options = partitioner_of(cfg)
    if "seed" in inspect.signature(cls).parameters:
        options.setdefault("seed", int(torch.randint(2**31, (1,), generator=gen)))
    columns: dict[str, Sequence[Any]] = {ROW: range(num_rows)}
    if values is not None:
        column = str(options["partition_by"])
        # Classes as 0, 1, ...: InnerDirichletPartitioner takes no others, the rest does not mind.
        as_numbers = _numbers if cls.__name__ == "ContinuousPartitioner" else _codes
        columns[column] = as_numbers(values, column, places)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # libraries among themselves
            cut = cls(**options)
            cut.dataset = Dataset.from_dict(columns)
            parts = [list(cut.load_partition(n)[ROW]) for n in range(cut.num_partitions)]
    except Exception as error:  # foreign code: whatever it raises is explained
        text = f"{error}".partition("\n")[0].rstrip(". ")
        why = f"cannot cut these {num_rows} rows: {type(error).__name__}: {text}"
        raise _refused(cfg, why, "Change [partition.options] or partition.num_clients") from error
    used = [row for part in parts for row in part]
    if len(set(used)) < len(used):
        raise _refused(cfg, "gives a row to two clients", "Choose another")
    shares = name_parts(parts)
    for name, rows in shares.items():
        if len(rows) < at_least:
            raise DataError(
                f"partition.partitioner: '{cfg.partitioner}' leaves '{name}' with {len(rows)} of "
                f"{num_rows} rows, but each client needs {at_least}.\n"
                "  Change [partition.options], cut into fewer clients, or bring more rows."
            )
    return shares


def _codes(values: Sequence[object], column: str, places: Sequence[str] | None) -> list[int]:
    names = names_in_column(values, column, places)
    numbers = {name: n for n, name in enumerate(sorted(set(names)))}
    return [numbers[name] for name in names]


def _numbers(values: Sequence[object], column: str, places: Sequence[str] | None) -> list[float]:
    found: list[float] = []
    for n, text in enumerate(names_in_column(values, column, places)):
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            where = places[n] if places else f"row {n + 1}"
            raise DataError(
                f"column '{column}' holds no finite number at {where}.\n"
                "  Mend it, remove the row, or choose another column."
            )
        found.append(number)
    return found


def _refused(cfg: PartitionConfig, why: str, mend: str) -> ConfigError:
    end = "" if why.endswith("?") else "."
    return ConfigError(
        f"partition.partitioner: '{cfg.partitioner}' {why.rstrip('.')}{end}\n  {mend}."
    )
