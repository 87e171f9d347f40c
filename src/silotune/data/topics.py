"""Partition one data set into clients by topic: k-means over the words of its texts.

For simulation only. Knows texts and row numbers; knows neither files nor what a row is.
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch

from silotune.core.errors import DataError
from silotune.core.wording import counted
from silotune.data.partition import Shares, check_enough_rows, name_held_parts, name_parts

MAX_DIRECTIONS = 100
"""Dimensions that a text is reduced to; as many as scikit-learn recommends."""


def by_topic(
    texts: Sequence[str],
    num_clients: int,
    gen: torch.Generator,
    *,
    held: Sequence[str] | None = None,
    at_least: int = 1,
) -> tuple[Shares, Shares | None]:
    """Cluster texts by the words that they use; each cluster becomes a client.

    TF-IDF over words, its `MAX_DIRECTIONS` largest directions at unit length, k-means. Client sizes
    differ as cluster sizes do. A client with fewer than `at_least` rows then receives the rows
    nearest to it, one by one, from clients that can spare them. Clients are numbered by their first
    row. The number of threads does not affect the result.

    Args:
        texts: Text of each row.
        num_clients: Number of clients.
        gen: Seeds the decomposition and the ten starts of k-means.
        held: Texts of the held-out rows, if these are stored separately: each goes to the nearest
            cluster. They do not influence words or clusters.
        at_least: Minimum number of rows per client.

    Returns:
        The train rows, and the held-out rows if `held` is given. Each row appears once.

    Raises:
        DataError: There are too few rows, no words, or fewer topics than clients; or a client gets
            no held-out row.

    Reference:
        Deerwester et al. 1990, "Indexing by Latent Semantic Analysis"; Arthur and Vassilvitskii
        2007, "k-means++: The Advantages of Careful Seeding". Both as in scikit-learn.
    """
    check_enough_rows(len(texts), num_clients, at_least=at_least)
    state = int(torch.randint(2**31, (1,), generator=gen))
    clusters, held_clusters, distances = _cluster(texts, held, num_clients, state)
    clusters = _fill_small_clusters(clusters, distances, at_least=at_least)
    numbers = list(dict.fromkeys(clusters.tolist()))  # in the order of first rows
    shares = name_parts(_rows_by_cluster(clusters, numbers))
    if held_clusters is None:
        return shares, None
    return shares, name_held_parts(_rows_by_cluster(held_clusters, numbers), "topic")


def _cluster(
    texts: Sequence[str], held: Sequence[str] | None, num_clusters: int, state: int
) -> tuple[Any, Any, Any]:
    """Run k-means on `texts` and assign `held` to the clusters found.

    Returns:
        The cluster of each row (rows,), that of each held-out row or None, and the distance of each
        row from each cluster's centre (rows, clusters).
    """
    import numpy as np
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # One thread: another order of summation would move rows between clients, and Flower's actors,
    # which repeat the partition, may have another number of threads.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about too few topics, which are refused below
        points, held_points = _topic_points(texts, held, state)
        means = KMeans(num_clusters, n_init=cast(Any, 10), random_state=state).fit(points)
        distances = means.transform(points)
        held_clusters = None if held_points is None else means.predict(held_points)
    clusters = np.array(means.labels_)
    num_topics = len(np.unique(clusters))
    if num_topics < num_clusters:
        raise DataError(
            f"the rows have {counted(num_topics, 'different topic')}, fewer than "
            f"{counted(num_clusters, 'client')}.\n"
            f"  Set partition.num_clients to {num_topics} or less, or add rows."
        )
    return clusters, held_clusters, distances


def _fill_small_clusters(clusters: Any, distances: Any, *, at_least: int) -> Any:
    """Move the nearest rows that others can spare to clusters with fewer than `at_least` rows."""
    import numpy as np

    filled = clusters.copy()
    sizes = np.bincount(filled, minlength=distances.shape[1])
    while sizes.min() < at_least:
        small = int(sizes.argmin())
        row = int(np.where(sizes[filled] > at_least, distances[:, small], np.inf).argmin())
        sizes[filled[row]] -= 1
        sizes[small] += 1
        filled[row] = small
    return filled


def _rows_by_cluster(clusters: Any, numbers: Sequence[int]) -> list[list[int]]:
    """Row numbers of each cluster, in the order of `numbers`."""
    import numpy as np

    return [np.flatnonzero(clusters == number).tolist() for number in numbers]


def _topic_points(texts: Sequence[str], held: Sequence[str] | None, state: int) -> tuple[Any, Any]:
    """Texts as points of unit length. Words and directions come from `texts` alone.

    Returns:
        (rows, at most MAX_DIRECTIONS), and (held-out rows, the same) or None.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words: Any = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    try:
        counts = words.fit_transform(texts)
    except ValueError:  # an empty vocabulary
        raise DataError(
            "the texts of the rows contain no words, so they have no topics.\n"
            '  Partition them another way, for example with partition.kind = "length".'
        ) from None
    if counts.shape[1] <= MAX_DIRECTIONS:  # also for a single word, which cannot be decomposed
        return counts.toarray(), None if held is None else words.transform(held).toarray()
    directions = TruncatedSVD(MAX_DIRECTIONS, random_state=state)
    points = normalize(directions.fit_transform(counts))
    if held is None:
        return points, None
    return points, normalize(directions.transform(words.transform(held)))
