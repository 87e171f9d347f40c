"""Which rows are held out, kept or given to the server: every row is decided by its own content.

A row's place in a draw is a keyed hash of the row, and neither the number of rows nor the order of
a file has a say. So one row more or less changes nothing for the others, and equal rows, which have
equal places, stay together. The hash covers all columns as they are in the file, used or not: no
recipe can move a row by another template, and a CSV file and a JSON file with the same cells are
split alike.

Which rows may change when a file gains or loses one row:

- `hold_out`: the train part gains or loses at most one row. It is the same row, unless a client has
  a single held-out row and that one goes, or another one comes: then one row changes sides. The one
  exception is a client whose rows would all be held out. It trains on a single row, which may be
  replaced by another; under record-level privacy, `plan_of_client` refuses a single row.
- `keep_at_most`: once there are more rows than the limit, one row may come in and push another out.
  Privacy for single rows is about one row more or less, so recipes with both are refused.

Knows rows and numbers; does not know clients, nor what rows become.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

from silotune.core.seeds import derive
from silotune.data.cells import is_missing
from silotune.data.placed_rows import PlacedRow

Row = TypeVar("Row")

RULE = "keyed hash of each row"
"""Recorded with a run: its rows cannot be split again by another rule."""


def row_digests(rows: Sequence[PlacedRow]) -> list[str]:
    """SHA-256 of each row's columns, whatever their order. Missing and empty cells do not count."""
    return [hashlib.sha256(_text(row.columns).encode()).hexdigest() for row in rows]


def places(digests: Sequence[str], seed: int, purpose: str) -> list[float]:
    """Each row's place in the draw that `purpose` names, from 0 to 1. Equal rows have equal places.

    The client's name has no part in it, so no client trains on a row that another one holds out.
    """
    return [derive(seed, purpose, digest) / 2**63 for digest in digests]


def hold_out(
    rows: Sequence[int], fraction: float, places: Sequence[float]
) -> tuple[list[int], list[int]]:
    """Split rows into those to train on and those to hold out, in their original order.

    A row is held out if its place is below the fraction. If that is no row, the row with the lowest
    place is held out, and if it is every row, the one with the highest place is trained on; of
    equal rows only one.

    Args:
        rows: Row numbers, at least two.
        fraction: Expected share to hold out, above 0 and below 1.
        places: The place of every row of the file.
    """
    held = {row for row in rows if places[row] < fraction}
    if not held:
        held = {min(rows, key=places.__getitem__)}
    elif len(held) == len(rows):
        held -= {max(rows, key=places.__getitem__)}
    return [row for row in rows if row not in held], [row for row in rows if row in held]


def keep_at_most(rows: Sequence[int], limit: int, places: Sequence[float]) -> list[int]:
    """The `limit` rows with the lowest places, or all if there are fewer, in their original order.

    A larger limit keeps these rows, and more.
    """
    kept = set(sorted(rows, key=places.__getitem__)[:limit])
    return [row for row in rows if row in kept]


def evenly(rows: Sequence[Row], at_most: int | None) -> list[Row]:
    """At most this many of the rows, evenly spaced, the first among them; all for None.

    Example:
        >>> evenly("abcdefg", 3)
        ['a', 'c', 'e']
    """
    if at_most is None or len(rows) <= at_most:
        return list(rows)
    return [rows[n * len(rows) // at_most] for n in range(at_most)]


def _text(columns: dict[str, Any]) -> str:
    cells = {
        # as a CSV file would have it
        name: str(value) if isinstance(value, int | float) else value
        for name, value in columns.items()
        if not is_missing(value) and value != ""
    }
    return json.dumps(cells, sort_keys=True, default=_plain)


def _plain(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    return type(value).__name__  # its text could hold an address in memory
