"""Partition one data set into clients. For simulation only: real clients have their own rows.

Shuffles and shares depend on the number of rows, so one row more in the file may send others to
other clients. That is no contradiction to the promise of [privacy] about one row added or removed:
it is about the rows of one client, and a real client's file is never partitioned.
Works on values and row numbers; knows neither files nor what a row is. All randomness comes from
the generators that callers pass in.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator

from silotune.core.errors import DataError
from silotune.core.types import Config
from silotune.core.wording import counted

Shares = dict[str, list[int]]
"""Client name -> row numbers from 0, ascending. Names are sorted, no client is empty."""


EVERY_ROW_NEEDS_A_NAME = (
    "Every row needs a value there: fill it in, remove the row, or choose another column."
)


class PartitionConfig(Config):
    """How to split one data set into clients: by column, at random, by length, topic or library."""

    by: str | None = Field(default=None, min_length=1)
    """Column whose values name the clients, for example "source"."""
    kind: Literal["iid", "dirichlet", "length", "cluster", "flwr-datasets"] | None = None
    """How to partition without a column: "iid" into equal parts at random, "dirichlet" with skewed
    labels, "length" from short rows to long ones, "cluster" by topic, "flwr-datasets" with a class
    of that library."""
    num_clients: int | None = Field(default=None, ge=1)
    """Number of clients that `kind` makes; with "flwr-datasets", only if the class requires it."""
    alpha: float | None = Field(default=None, ge=1e-6, allow_inf_nan=False)
    """Evenness of "dirichlet": 0.1 concentrates each label on a few clients, 100 is close to
    "iid"."""
    label: str | None = Field(default=None, min_length=1)
    """Column whose values "dirichlet" distributes unevenly."""
    only: tuple[str, ...] | None = None
    """Use only these clients out of those that `by` makes; the rows of the others are not used."""
    partitioner: str | None = Field(default=None, min_length=1)
    """flwr-datasets: a class of flwr_datasets.partitioner, for example "ShardPartitioner". Needs
    the extra `partitioners`."""
    options: dict[str, bool | int | float | str | list[int | float]] = Field(default={})
    """flwr-datasets: arguments of the class by name, for example options.shard_size = 20.
    partition_by names a column, or is "num_characters", the length of a row."""

    @field_validator("options", mode="before")
    @classmethod
    def _only_options(cls, given: Any) -> Any:
        for key, value in cast(dict[str, Any], given).items() if isinstance(given, dict) else ():
            items = cast(list[Any], value) if isinstance(value, list) else [value]
            kinds = (int, float) if isinstance(value, list) else (int, float, str)
            if not all(isinstance(item, kinds) for item in items):
                raise ValueError(
                    f"'{key}' should be a number, a string, true, false or a list of numbers"
                )
            if any(isinstance(item, float) and not math.isfinite(item) for item in items):
                raise ValueError(f"'{key}' should be finite")
        return cast(Any, given)

    @model_validator(mode="after")
    def _no_contradiction(self) -> "PartitionConfig":
        mistakes: list[str] = []
        if self.by is not None and self.kind is not None:
            mistakes.append("give by or kind, not both")
        by_library = self.kind == "flwr-datasets"
        if self.kind is not None and not by_library and self.num_clients is None:
            mistakes.append(f'kind = "{self.kind}" needs num_clients')
        if self.kind is None and self.num_clients is not None:
            mistakes.append(
                "num_clients needs a kind; with by, the column's values are the clients"
            )
        if self.kind == "dirichlet" and (self.alpha is None or self.label is None):
            mistakes.append('kind = "dirichlet" needs alpha and label')
        if self.kind != "dirichlet" and (self.alpha is not None or self.label is not None):
            mistakes.append('alpha and label belong to kind = "dirichlet"')
        if by_library and self.partitioner is None:
            mistakes.append('kind = "flwr-datasets" needs partitioner, the name of a class')
        if not by_library and (self.partitioner is not None or self.options):
            mistakes.append('partitioner and options belong to kind = "flwr-datasets"')
        if self.num_clients is not None and "num_partitions" in self.options:
            mistakes.append("num_clients and options.num_partitions are the same; give one")
        if self.only is not None and self.by is None:
            mistakes.append("only selects from the clients that by makes; set by")
        if self.only is not None and len(set(self.only)) < max(1, len(self.only)):
            mistakes.append("only is empty or names a client twice")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


def by_column(values: Sequence[object], column: str, places: Sequence[str] | None = None) -> Shares:
    """One client for each value of a column.

    Args:
        values: The column, one value per row.
        column: Its name, for messages.
        places: Where each row is, for messages; "row 1", "row 2", ... if absent.

    Raises:
        DataError: A value is missing, empty or a list; the message names the places.

    Example:
        >>> by_column(["south", "north", "south"], "source")
        {'north': [1], 'south': [0, 2]}
    """
    return _group(names_in_column(values, column, places))


def iid(num_rows: int, num_clients: int, gen: torch.Generator, *, at_least: int = 1) -> Shares:
    """Shuffle, then split into parts whose sizes differ by at most one. Every row is used once.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`.
    """
    check_enough_rows(num_rows, num_clients, at_least=at_least)
    order = torch.randperm(num_rows, generator=gen).tolist()
    return name_parts([order[a:b] for a, b in pairwise(_even_ends(num_rows, num_clients))])


def dirichlet(
    labels: Sequence[str],
    num_clients: int,
    alpha: float,
    gen: torch.Generator,
    *,
    known: Collection[str] = (),
    at_least: int = 1,
) -> Shares:
    """Distribute each label's rows in proportions from Dirichlet(alpha). Every row is used once.

    A client with fewer than `at_least` rows then receives the last row of the largest client (the
    first by name if several are equally large) until it has enough.

    Args:
        labels: Label of each row.
        num_clients: Number of clients.
        alpha: Concentration, > 0; the smaller, the more skewed.
        gen: Draws the proportions of all labels first, then the order of rows.
        known: Labels that occur elsewhere. If two parts of a data set are partitioned with
            generators of the same seed, and each with the other's labels as `known`, every client
            gets the same proportions in both.
        at_least: Minimum number of rows per client.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`.

    Reference:
        Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification". arXiv:1909.06335. Differs from the paper, which draws a label mix
        for each client, all of equal size: here each label is distributed over the clients, so
        sizes differ too and no row is left over, as in Yurochkin et al. 2019, section 4.
        arXiv:1905.12022
    """
    check_enough_rows(len(labels), num_clients, at_least=at_least)
    rows_of = _group(labels)
    proportions = {
        label: _draw_dirichlet(num_clients, alpha, gen) for label in sorted({*rows_of, *known})
    }
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for label, rows in rows_of.items():
        order = torch.randperm(len(rows), generator=gen).tolist()
        ends = [0, *(proportions[label].cumsum(0) * len(rows)).round().long().tolist()]
        for part, (a, b) in zip(parts, pairwise(ends), strict=True):
            part.extend(rows[n] for n in order[a:b])
    parts = [sorted(part) for part in parts]
    for part in parts:
        while len(part) < at_least:
            part.append(max(parts, key=len).pop())
    return name_parts(parts)


def by_length(
    lengths: Sequence[int],
    num_clients: int,
    gen: torch.Generator,
    *,
    held: Sequence[int] | None = None,
    at_least: int = 1,
) -> tuple[Shares, Shares | None]:
    """Sort rows by length and split them into parts whose sizes differ by at most one.

    Rows of equal length are in random order: files are often sorted, and clients should differ by
    length alone. A held-out row goes to the client whose train rows are as long. If several clients
    have rows of that length, held-out rows of that length are distributed over them like the train
    rows. A length that no train row has counts as the next longer one.

    Args:
        lengths: Length of each row, in characters.
        num_clients: Number of clients; the first has the shortest rows.
        gen: Draws the order of rows of equal length.
        held: Lengths of the held-out rows, if these are stored separately.
        at_least: Minimum number of rows per client.

    Returns:
        The train rows, and the held-out rows if `held` is given. Each row appears once.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`, or a client gets no held-out
            row.

    Example:
        >>> gen = torch.Generator().manual_seed(17)
        >>> by_length([90, 10, 80, 20], 2, gen, held=[15, 300])
        ({'client-00': [1, 3], 'client-01': [0, 2]}, {'client-00': [0], 'client-01': [1]})
    """
    check_enough_rows(len(lengths), num_clients, at_least=at_least)
    order, ends = _by_size(lengths, gen), _even_ends(len(lengths), num_clients)
    shares = name_parts([order[a:b] for a, b in pairwise(ends)])
    if held is None:
        return shares, None
    ascending = [lengths[row] for row in order]
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for length, equal in groupby(_by_size(held, gen), key=held.__getitem__):
        rows = list(equal)
        first, end = bisect_left(ascending, length), bisect_right(ascending, length)
        for n, row in enumerate(rows):  # evenly over the positions of the train rows of this length
            place = first + (2 * n + 1) * (end - first) // (2 * len(rows))
            parts[bisect_right(ends, min(place, len(order) - 1)) - 1].append(row)
    return shares, name_held_parts(parts, "length")


def client_names(num_clients: int) -> list[str]:
    """'client-00', 'client-01', ...: padded so that they sort by number."""
    width = max(2, len(str(num_clients - 1)))
    return [f"client-{n:0{width}}" for n in range(num_clients)]


def name_parts(parts: Sequence[Sequence[int]]) -> Shares:
    """Row numbers in any order, part by part, as 'client-00', 'client-01', ..."""
    return dict(zip(client_names(len(parts)), map(sorted, parts), strict=True))


def names_in_column(
    values: Sequence[object], column: str, places: Sequence[str] | None = None
) -> list[str]:
    """The values as stripped strings, one per row. Arguments and errors as in `by_column`."""
    bad = [n for n, value in enumerate(values) if not is_name(value)]
    if bad:
        shown = ", ".join(places[n] if places else f"row {n + 1}" for n in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"column '{column}' is empty, or not a single value, at {shown}{more}.\n"
            f"  {EVERY_ROW_NEEDS_A_NAME}"
        )
    return list(map(_name, values))


def name_held_parts(parts: Sequence[Sequence[int]], quality: str) -> Shares:
    """Held-out rows by client.

    Args:
        parts: Row numbers of each client.
        quality: What the train and held-out rows of a client have in common, for the message.

    Raises:
        DataError: A client has no held-out rows; the message names it.
    """
    shares = name_parts(parts)
    lacks = [name for name, rows in shares.items() if not rows]
    if lacks:
        more = f" ({len(lacks)} clients lack them)" if len(lacks) > 1 else ""
        raise DataError(
            f"client '{lacks[0]}' has train rows, but no held-out rows of the same {quality}{more}."
            "\n  Use fewer clients, add held-out rows, or remove the held-out part so that each "
            "client holds out some of its own rows."
        )
    return shares


def check_enough_rows(num_rows: int, num_clients: int, *, at_least: int) -> None:
    """Refuse more clients than the rows can fill.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`.
    """
    if num_clients * at_least > num_rows:
        raise DataError(
            f"{counted(num_rows, 'row')} cannot be split into {counted(num_clients, 'client')} "
            f"with at least {counted(at_least, 'row')} each.\n"
            f"  Set partition.num_clients to {max(1, num_rows // at_least)} or less, or add rows."
        )


def _even_ends(num_rows: int, num_clients: int) -> list[int]:
    return [num_rows * n // num_clients for n in range(num_clients + 1)]


def _by_size(sizes: Sequence[int], gen: torch.Generator) -> list[int]:
    """Row numbers from the smallest row to the largest; rows of equal size in random order."""
    order = torch.randperm(len(sizes), generator=gen).tolist()
    return sorted(order, key=sizes.__getitem__)


def is_name(value: object) -> bool:
    """Whether a cell can name a client or a label."""
    # NaN, the one value that differs from itself, is how pandas writes a missing cell.
    return (
        value is not None
        and value == value
        and not isinstance(value, list | dict)
        and bool(str(value).strip())
    )


def _name(value: object) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # how a column of whole numbers is stored once a cell was missing
    return str(value).strip()


def _group(names: Sequence[str]) -> Shares:
    shares: Shares = {name: [] for name in sorted(set(names))}
    for row, name in enumerate(names):
        shares[name].append(row)
    return shares


def _draw_dirichlet(size: int, alpha: float, gen: torch.Generator) -> torch.Tensor:
    # In log space, using Gamma(a) = Gamma(a + 1) * U^(1/a): with a small alpha
    # torch._sample_dirichlet underflows and quietly returns equal proportions. torch.distributions
    # takes no generator, hence the private name.
    shape = torch.full((size,), alpha + 1.0, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, gen)  # pyright: ignore[reportPrivateImportUsage]
    uniform = torch.rand(size, dtype=torch.float64, generator=gen)
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=0)  # (size,)
