"""Partition one data set into clients with a class of flwr-datasets. For simulation only.

The class is third-party code: its options are checked before rows are read, and any error that it
raises is explained. Knows row numbers and the values of one column; knows neither files nor what a
row is.
"""

import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import counted, did_you_mean
from silotune.data.partition import PartitionConfig, Shares, name_parts, names_in_column

UNFIT = {
    "Partitioner": "is the base class of the others",
    "VerticalEvenPartitioner": "splits columns, not rows",
    "VerticalSizePartitioner": "splits columns, not rows",
    "IdToSizeFncPartitioner": "needs a function, which a recipe cannot contain",
    "DistributionPartitioner": "needs a table of numbers, which a recipe cannot contain",
}
"""Classes of flwr_datasets.partitioner that a recipe cannot use, and why."""

ROW = "silotune: row number"
"""Column that identifies rows in the result; no data set has a column of that name."""


def partitioner_of(cfg: PartitionConfig) -> tuple[type[Any], dict[str, Any]]:
    """The class that a recipe names, and its arguments except a seed. Reads no rows.

    Raises:
        ConfigError: The library or the class is missing, or the class does not accept the options.
    """
    try:
        from flwr_datasets import partitioner as library
    except ImportError as error:
        raise ConfigError(
            'partition.kind = "flwr-datasets" needs the flwr-datasets library.\n'
            "  Install it: make env EXTRAS=partitioners"
        ) from error
    name = str(cfg.partitioner)
    usable = [known for known in library.__all__ if known not in UNFIT]
    if name not in usable:
        why = UNFIT.get(name) or f"does not exist.{did_you_mean(name, usable)}"
        raise _refused(cfg, why, f"Choose one of: {', '.join(usable)}")
    cls: type[Any] = getattr(library, name)
    known = inspect.signature(cls).parameters
    for key in cfg.options:
        if key not in known:
            why = f"has no option '{key}'.{did_you_mean(key, known)}"
            raise _refused(cfg, why, f"Its options are: {', '.join(known)}")
    given: dict[str, Any] = dict(cfg.options)
    if cfg.num_clients is not None and "num_partitions" not in known:
        fix = "Remove partition.num_clients"
        raise _refused(cfg, "determines the number of clients itself", fix)
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
    """Partition with a class of flwr-datasets. Depending on its options, some rows go to no client.

    The class sees row numbers and one column, no other values of the rows.

    Args:
        cfg: Names the class and its options.
        num_rows: Number of rows.
        gen: Seeds the class, if it takes a seed and the options have none.
        values: The column that the option partition_by names, if the class has that option.
        places: Where each row is, for messages.
        at_least: Minimum number of rows per client.

    Raises:
        ConfigError: As in `partitioner_of`; or the class fails on these rows.
        DataError: A value is missing, or a client gets too few rows.
    """
    from datasets import Dataset

    cls, options = partitioner_of(cfg)
    if "seed" in inspect.signature(cls).parameters:
        options.setdefault("seed", int(torch.randint(2**31, (1,), generator=gen)))
    columns: dict[str, Sequence[Any]] = {ROW: range(num_rows)}
    if values is not None:
        column = str(options["partition_by"])
        # Classes as 0, 1, ...: InnerDirichletPartitioner accepts nothing else, others do not care.
        as_numbers = _numbers if cls.__name__ == "ContinuousPartitioner" else _codes
        columns[column] = as_numbers(values, column, places)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # raised by libraries among themselves
            partitioner = cls(**options)
            partitioner.dataset = Dataset.from_dict(columns)
            numbers = range(partitioner.num_partitions)
            parts = [list(partitioner.load_partition(n)[ROW]) for n in numbers]
    except Exception as error:  # third-party code: any error that it raises is explained
        text = f"{error}".partition("\n")[0].rstrip(". ")
        why = f"failed on {counted(num_rows, 'row')}: {type(error).__name__}: {text}"
        raise _refused(cfg, why, "Change [partition.options] or partition.num_clients") from error
    used = [row for part in parts for row in part]
    if len(set(used)) < len(used):
        raise _refused(cfg, "assigns a row to two clients", "Choose another class")
    shares = name_parts(parts)
    for name, rows in shares.items():
        if len(rows) < at_least:
            raise DataError(
                f"partition.partitioner: '{cfg.partitioner}' leaves '{name}' with {len(rows)} of "
                f"{counted(num_rows, 'row')}, but each client needs {at_least}.\n"
                "  Change [partition.options], use fewer clients, or add rows."
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
                f"column '{column}' does not hold a finite number at {where}.\n"
                "  Fix it, remove the row, or choose another column."
            )
        found.append(number)
    return found


def _refused(cfg: PartitionConfig, why: str, fix: str) -> ConfigError:
    end = "" if why.endswith("?") else "."
    return ConfigError(
        f"partition.partitioner: '{cfg.partitioner}' {why.rstrip('.')}{end}\n  {fix}."
    )
