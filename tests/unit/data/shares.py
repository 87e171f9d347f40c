"""What tests of partitions check."""

from collections import Counter


def sizes_of(shares):
    return [len(rows) for rows in shares.values()]


def check_every_row_once(shares, num_rows):
    assert sorted(row for rows in shares.values() for row in rows) == list(range(num_rows))
    assert list(shares) == sorted(shares)
    assert all(rows == sorted(rows) for rows in shares.values())
    assert all(shares.values()), "a client is empty"


def label_shares(labels, shares):
    return [Counter(labels[row] for row in rows) for rows in shares.values()]
