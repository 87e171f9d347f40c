"""Cut one data set into clients. For simulation only: real clients bring their own rows.

Works on values and row numbers; knows neither files nor texts. Chance comes from the generator that
is given.
"""

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field, model_validator

from silotune.errors import DataError
from silotune.types import Config

Shares = dict[str, list[int]]
"""Client name -> row numbers from 0, ascending. Names are sorted, no client is empty."""


class PartitionConfig(Config):
    """How one data set becomes clients: by a column, evenly at random, or with skewed labels."""

    by: str | None = Field(default=None, min_length=1)
    """Column whose values name the clients, for instance "source"."""
    kind: Literal["iid", "dirichlet"] | None = None
    """Cut at random instead: "iid" into equal parts, "dirichlet" so that labels are skewed."""
    num_clients: int | None = Field(default=None, ge=1)
    """Number of clients that `kind` makes."""
    alpha: float | None = Field(default=None, ge=1e-6, allow_inf_nan=False)
    """Evenness of "dirichlet": 0.1 gives each label to few clients, 100 is close to "iid"."""
    label: str | None = Field(default=None, min_length=1)
    """Column that "dirichlet" shares out unevenly."""
    only: tuple[str, ...] | None = None
    """Of the clients that `by` makes, only these; the others' rows are not used."""

    @model_validator(mode="after")
    def _no_contradiction(self) -> "PartitionConfig":
        mistakes: list[str] = []
        if self.by is not None and self.kind is not None:
            mistakes.append("give by or kind, not both")
        if self.kind is not None and self.num_clients is None:
            mistakes.append(f'kind = "{self.kind}" needs num_clients')
        if self.kind is None and self.num_clients is not None:
            mistakes.append(
                "num_clients needs a kind; with by, the column's values are the clients"
            )
        if self.kind == "dirichlet" and (self.alpha is None or self.label is None):
            mistakes.append('kind = "dirichlet" needs alpha and label')
        if self.kind != "dirichlet" and (self.alpha is not None or self.label is not None):
            mistakes.append('alpha and label belong to kind = "dirichlet"')
        if self.only is not None and self.by is None:
            mistakes.append("only chooses among the clients that by makes; set by")
        if self.only is not None and len(set(self.only)) < max(1, len(self.only)):
            mistakes.append("only names no client, or one twice")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self


def by_column(values: Sequence[object], column: str, places: Sequence[str] | None = None) -> Shares:
    """One client for each value of a column.

    Args:
        values: The column, one value a row.
        column: Its name, for messages.
        places: Where each row stands, for messages; "row 1", "row 2", ... without.

    Raises:
        DataError: A value is missing, empty or a list; the message names the places.

    Example:
        >>> by_column(["south", "north", "south"], "source")
        {'north': [1], 'south': [0, 2]}
    """
    return _group(names_in_column(values, column, places))


def iid(num_rows: int, num_clients: int, gen: torch.Generator, *, at_least: int = 1) -> Shares:
    """Shuffle, then cut into parts whose sizes differ by at most one. Every row is used once.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`.
    """
    _check_enough(num_rows, num_clients, at_least=at_least)
    order = torch.randperm(num_rows, generator=gen).tolist()
    ends = [num_rows * n // num_clients for n in range(num_clients + 1)]
    parts = [sorted(order[a:b]) for a, b in pairwise(ends)]
    return dict(zip(client_names(num_clients), parts, strict=True))


def dirichlet(
    labels: Sequence[str],
    num_clients: int,
    alpha: float,
    gen: torch.Generator,
    *,
    known: Collection[str] = (),
    at_least: int = 1,
) -> Shares:
    """Share out each label's rows in proportions from Dirichlet(alpha). Every row is used once.

    A client with fewer than `at_least` rows then receives the last row of the largest client (the
    first by name of equals), until it has enough.

    Args:
        labels: Label of each row.
        num_clients: Number of clients.
        alpha: Concentration, > 0; the smaller, the more skewed.
        gen: Draws the proportions of all labels first, then the order of rows.
        known: Labels that occur elsewhere. Two parts of one data set that are cut with generators
            of equal seed and with each other's labels known give each client the same proportions
            in both.
        at_least: Rows that every client needs.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`.

    Reference:
        Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
        Visual Classification". arXiv:1909.06335. Differs from the paper: it draws a mix of labels
        for each client, of equal sizes; here each label is shared out over the clients, so that
        sizes differ too and no row is left over, as in Yurochkin et al. 2019, section 4.
        arXiv:1905.12022
    """
    _check_enough(len(labels), num_clients, at_least=at_least)
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
    return dict(zip(client_names(num_clients), map(sorted, parts), strict=True))


def client_names(num_clients: int) -> list[str]:
    """'client-00', 'client-01', ...: padded so that they sort by number."""
    width = max(2, len(str(num_clients - 1)))
    return [f"client-{n:0{width}}" for n in range(num_clients)]


def names_in_column(
    values: Sequence[object], column: str, places: Sequence[str] | None = None
) -> list[str]:
    """The values as stripped texts, one a row. Arguments and errors as in `by_column`."""
    bad = [n for n, value in enumerate(values) if not _is_name(value)]
    if bad:
        shown = ", ".join(places[n] if places else f"row {n + 1}" for n in bad[:5])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DataError(
            f"column '{column}' is empty, or not a single value, at {shown}{more}.\n"
            "  Every row needs a value there: fill it, remove the row, or choose another column."
        )
    return [str(value).strip() for value in values]


def _is_name(value: object) -> bool:
    # NaN, the one value that differs from itself, is how pandas writes a missing cell.
    return (
        value is not None
        and value == value
        and not isinstance(value, list | dict)
        and bool(str(value).strip())
    )


def _group(names: Sequence[str]) -> Shares:
    shares: Shares = {name: [] for name in sorted(set(names))}
    for row, name in enumerate(names):
        shares[name].append(row)
    return shares


def _check_enough(num_rows: int, num_clients: int, *, at_least: int) -> None:
    if num_clients * at_least > num_rows:
        raise DataError(
            f"{num_rows} rows cannot be cut into {num_clients} clients of at least {at_least} "
            f"each.\n  Set partition.num_clients to {max(1, num_rows // at_least)} or less, or "
            "bring more rows."
        )


def _draw_dirichlet(size: int, alpha: float, gen: torch.Generator) -> torch.Tensor:
    # In logarithms, by Gamma(a) = Gamma(a + 1) * U^(1/a): with a small alpha
    # torch._sample_dirichlet underflows and quietly returns equal proportions. torch.distributions
    # takes no generator, hence the private name.
    shape = torch.full((size,), alpha + 1.0, dtype=torch.float64)
    gamma = torch._standard_gamma(shape, gen)  # pyright: ignore[reportPrivateImportUsage]
    uniform = torch.rand(size, dtype=torch.float64, generator=gen)
    return torch.softmax(gamma.log() + uniform.log() / alpha, dim=0)  # (size,)
