"""Cut one data set into clients. For simulation only: real clients bring their own rows.

Works on values and row numbers; knows neither files nor what a row is, and looks into texts only to
find topics. Chance comes from the generator that is given.
"""

import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator

from silotune.core.errors import DataError
from silotune.core.types import Config

Shares = dict[str, list[int]]
"""Client name -> row numbers from 0, ascending. Names are sorted, no client is empty."""

MAX_DIRECTIONS = 100
"""Numbers that a text becomes when topics are sought; as many as scikit-learn advises."""


class PartitionConfig(Config):
    """How one data set becomes clients: by a column, at random, by length, topic or a library."""

    by: str | None = Field(default=None, min_length=1)
    """Column whose values name the clients, for instance "source"."""
    kind: Literal["iid", "dirichlet", "length", "cluster", "flwr-datasets"] | None = None
    """Cut otherwise: "iid" at random into equal parts, "dirichlet" so that labels are skewed,
    "length" from short rows to long ones, "cluster" by topic, "flwr-datasets" with a class of that
    library."""
    num_clients: int | None = Field(default=None, ge=1)
    """Number of clients that `kind` makes; "flwr-datasets" needs it where the class does."""
    alpha: float | None = Field(default=None, ge=1e-6, allow_inf_nan=False)
    """Evenness of "dirichlet": 0.1 gives each label to few clients, 100 is close to "iid"."""
    label: str | None = Field(default=None, min_length=1)
    """Column that "dirichlet" shares out unevenly."""
    only: tuple[str, ...] | None = None
    """Of the clients that `by` makes, only these; the others' rows are not used."""
    partitioner: str | None = Field(default=None, min_length=1)
    """flwr-datasets: a class of flwr_datasets.partitioner, as in "ShardPartitioner". Needs
    the extra partitioners."""
    options: dict[str, bool | int | float | str | list[int | float]] = Field(default={})
    """flwr-datasets: arguments of the class by their own names, as in options.shard_size = 20.
    partition_by names a column, or "num_characters", the length of a row."""

    @field_validator("options", mode="before")
    @classmethod
    def _only_options(cls, given: Any) -> Any:
        for key, value in cast(dict[str, Any], given).items() if isinstance(given, dict) else ():
            items = cast(list[Any], value) if isinstance(value, list) else [value]
            kinds = (int, float) if isinstance(value, list) else (int, float, str)
            if not all(isinstance(item, kinds) for item in items):
                raise ValueError(
                    f"'{key}' should be a number, a text, true, false or a list of numbers"
                )
            if any(isinstance(item, float) and not math.isfinite(item) for item in items):
                raise ValueError(f"'{key}' should be finite")
        return cast(Any, given)

    @model_validator(mode="after")
    def _no_contradiction(self) -> "PartitionConfig":
        mistakes: list[str] = []
        if self.by is not None and self.kind is not None:
            mistakes.append("give by or kind, not both")
        foreign = self.kind == "flwr-datasets"
        if self.kind is not None and not foreign and self.num_clients is None:
            mistakes.append(f'kind = "{self.kind}" needs num_clients')
        if self.kind is None and self.num_clients is not None:
            mistakes.append(
                "num_clients needs a kind; with by, the column's values are the clients"
            )
        if self.kind == "dirichlet" and (self.alpha is None or self.label is None):
            mistakes.append('kind = "dirichlet" needs alpha and label')
        if self.kind != "dirichlet" and (self.alpha is not None or self.label is not None):
            mistakes.append('alpha and label belong to kind = "dirichlet"')
        if foreign and self.partitioner is None:
            mistakes.append('kind = "flwr-datasets" needs partitioner, the name of a class')
        if not foreign and (self.partitioner is not None or self.options):
            mistakes.append('partitioner and options belong to kind = "flwr-datasets"')
        if self.num_clients is not None and "num_partitions" in self.options:
            mistakes.append("num_clients and options.num_partitions are the same; give one")
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
    return name_parts(parts)


def by_length(
    lengths: Sequence[int],
    num_clients: int,
    gen: torch.Generator,
    *,
    held: Sequence[int] | None = None,
    at_least: int = 1,
) -> tuple[Shares, Shares | None]:
    """Sort rows by length and cut into parts whose sizes differ by at most one.

    Rows of equal length are in an order drawn by chance: files are often sorted, and clients should
    differ by length alone. A held-out row goes to the client whose train rows are as long. Where
    several clients have rows of that length, held-out rows of it are shared out as the train rows
    are; a length that no train row has counts as the next longer one.

    Args:
        lengths: Of each row, in characters.
        num_clients: Number of clients; the first has the shortest rows.
        gen: Draws the order of rows of equal length.
        held: Lengths of the held-out rows, where they have a place of their own.
        at_least: Rows that every client needs.

    Returns:
        The train rows, and the held-out rows if there are any. Each of them once.

    Raises:
        DataError: There are fewer rows than `num_clients * at_least`, or a client gets no held-out
            row.

    Example:
        >>> gen = torch.Generator().manual_seed(17)
        >>> by_length([90, 10, 80, 20], 2, gen, held=[15, 300])
        ({'client-00': [1, 3], 'client-01': [0, 2]}, {'client-00': [0], 'client-01': [1]})
    """
    _check_enough(len(lengths), num_clients, at_least=at_least)
    order, ends = _by_size(lengths, gen), _even_ends(len(lengths), num_clients)
    shares = name_parts([order[a:b] for a, b in pairwise(ends)])
    if held is None:
        return shares, None
    ascending = [lengths[row] for row in order]
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for length, equal in groupby(_by_size(held, gen), key=held.__getitem__):
        rows = list(equal)
        first, end = bisect_left(ascending, length), bisect_right(ascending, length)
        for n, row in enumerate(rows):  # evenly over the places of the train rows as long
            place = first + (2 * n + 1) * (end - first) // (2 * len(rows))
            parts[bisect_right(ends, min(place, len(order) - 1)) - 1].append(row)
    return shares, _named_held(parts, "length")


def by_topic(
    texts: Sequence[str],
    num_clients: int,
    gen: torch.Generator,
    *,
    held: Sequence[str] | None = None,
    at_least: int = 1,
) -> tuple[Shares, Shares | None]:
    """Cluster texts by the words that they use; each cluster is a client.

    TF-IDF of words, its `MAX_DIRECTIONS` largest directions at unit length, k-means. Sizes differ
    as topics do. A client with fewer than `at_least` rows then receives the rows nearest to it, one
    by one, from clients that can spare them. Clients are numbered by their first row. The number of
    threads has no influence.

    Args:
        texts: Of each row.
        num_clients: Number of clients.
        gen: Seeds the decomposition and the ten starts of k-means.
        held: Texts of the held-out rows, where they have a place of their own: each goes to the
            nearest cluster. They have no say in words and clusters.
        at_least: Rows that every client needs.

    Returns:
        The train rows, and the held-out rows if there are any. Each of them once.

    Raises:
        DataError: There are too few rows, no words, or fewer topics than clients; or a client gets
            no held-out row.

    Reference:
        Deerwester et al. 1990, "Indexing by Latent Semantic Analysis"; Arthur and Vassilvitskii
        2007, "k-means++: The Advantages of Careful Seeding". Both as in scikit-learn.
    """
    import numpy as np
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    _check_enough(len(texts), num_clients, at_least=at_least)
    state = int(torch.randint(2**31, (1,), generator=gen))
    # One thread: sums in another order would move rows between clients, and Flower's actors, which
    # cut anew, may have another number of threads.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of too few topics, which are refused below
        points, held_points = _topic_points(texts, held, state)
        means = KMeans(num_clients, n_init=cast(Any, 10), random_state=state).fit(points)
        distances = means.transform(points)  # (rows, clients)
        nearest = None if held_points is None else means.predict(held_points)
    owner = np.array(means.labels_)
    sizes = np.bincount(owner, minlength=num_clients)
    num_topics = int(np.count_nonzero(sizes))
    if num_topics < num_clients:
        raise DataError(
            f"the rows have {num_topics} different topics, fewer than {num_clients} clients.\n"
            f"  Set partition.num_clients to {num_topics} or less, or bring more rows."
        )
    while sizes.min() < at_least:
        small = int(sizes.argmin())
        row = int(np.where(sizes[owner] > at_least, distances[:, small], np.inf).argmin())
        sizes[owner[row]] -= 1
        sizes[small] += 1
        owner[row] = small
    names = list(dict.fromkeys(owner.tolist()))  # in the order of first rows
    shares = name_parts([np.flatnonzero(owner == name).tolist() for name in names])
    if nearest is None:
        return shares, None
    return shares, _named_held(
        [np.flatnonzero(nearest == name).tolist() for name in names], "topic"
    )


def _topic_points(texts: Sequence[str], held: Sequence[str] | None, state: int) -> tuple[Any, Any]:
    """Texts as points of unit length; words and directions are those of `texts`.

    Returns:
        (rows, at most MAX_DIRECTIONS), and (held-out rows, the same) if there are any.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words: Any = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        counts = words.fit_transform(texts)
    except ValueError:  # an empty vocabulary
        raise DataError(
            "the rows' texts hold no words, so they have no topics.\n"
            '  Cut them otherwise, for instance by partition.kind = "length".'
        ) from None
    if counts.shape[1] <= MAX_DIRECTIONS:  # also for a single word, which cannot be decomposed
        return counts.toarray(), None if held is None else words.transform(held).toarray()
    directions = TruncatedSVD(MAX_DIRECTIONS, random_state=state)
    points = normalize(directions.fit_transform(counts))
    if held is None:
        return points, None
    return points, normalize(directions.transform(words.transform(held)))


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


def _named_held(parts: Sequence[Sequence[int]], quality: str) -> Shares:
    """Held-out rows by client; each client needs one of the quality of its train rows."""
    shares = name_parts(parts)
    lacks = [name for name, rows in shares.items() if not rows]
    if lacks:
        more = f" ({len(lacks)} clients lack them)" if len(lacks) > 1 else ""
        raise DataError(
            f"client '{lacks[0]}' has train rows, but no held-out rows of their {quality}{more}.\n"
            "  Cut into fewer clients, bring more held-out rows, or leave them out so that each "
            "client holds out its own."
        )
    return shares


def _even_ends(num_rows: int, num_clients: int) -> list[int]:
    return [num_rows * n // num_clients for n in range(num_clients + 1)]


def _by_size(sizes: Sequence[int], gen: torch.Generator) -> list[int]:
    """Row numbers from small to large; those of equal size in an order drawn by chance."""
    order = torch.randperm(len(sizes), generator=gen).tolist()
    return sorted(order, key=sizes.__getitem__)


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
