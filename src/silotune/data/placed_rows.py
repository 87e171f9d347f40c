"""Rows with their places, and the mistakes that were found on the way.

Knows neither files nor what a row means. A mistake does not stop the reading: whoever has a messy
file gets all its mistakes at once, in the order of the file.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from silotune.core.errors import DataError
from silotune.core.wording import counted
from silotune.data.partition import Shares

MOST_SHOWN = 20
"""Mistakes of rows that one error lists; the others are counted."""


@dataclass(frozen=True)
class PlacedRow:
    """A row as read."""

    where: str
    """Its place for messages, for example "tickets.csv:7"."""
    columns: dict[str, Any]


@dataclass(frozen=True)
class Mistake:
    """Something in a file that cannot be used."""

    row: int
    """Number of rows before it, so that mistakes can be listed in the order of the files."""
    text: str
    """The place, what is wrong, and in further lines how to fix it."""


@dataclass(frozen=True)
class FileRows:
    """What one file holds."""

    rows: list[PlacedRow]
    mistakes: tuple[Mistake, ...] = ()
    notes: tuple[str, ...] = ()
    """What is read but may not be meant so."""


@dataclass(frozen=True)
class Part:
    """Rows of the train part or of the held-out part, of all clients."""

    rows: list[PlacedRow]
    files: Shares = field(default_factory=dict[str, list[int]])
    """Client -> its rows if there is one file per client; otherwise empty."""
    num_empty: int = 0
    """Rows that were left out because they lack a text."""
    mistakes: tuple[Mistake, ...] = ()
    """What could not be read. A part with mistakes must not be used, only searched for more."""
    notes: tuple[str, ...] = ()
    """What is read but may not be meant so."""


def joined(files: Iterable[FileRows]) -> FileRows:
    """The rows of several files as if they were one."""
    rows: list[PlacedRow] = []
    mistakes: list[Mistake] = []
    notes: list[str] = []
    for file in files:
        mistakes += moved(file.mistakes, len(rows))
        rows += file.rows
        notes += file.notes
    return FileRows(rows, tuple(mistakes), tuple(notes))


def moved(mistakes: Iterable[Mistake], num_rows: int) -> list[Mistake]:
    """The same mistakes, behind further rows."""
    return [Mistake(mistake.row + num_rows, mistake.text) for mistake in mistakes]


def refuse(mistakes: Sequence[Mistake], num_rows: int | None = None) -> None:
    """Raise one error with all mistakes, if there are any.

    Args:
        mistakes: In any order.
        num_rows: Of all rows, if each of them was looked at. A mistake that all of them have, such
            as a missing column, is then said once.

    Raises:
        DataError: At most `MOST_SHOWN` of them in the order of the files, some of every kind; then
            how many more there are, and each distinct fix once.
    """
    if not mistakes:
        return
    ordered = sorted(mistakes, key=lambda mistake: mistake.row)
    if (
        num_rows is not None
        and num_rows == len(ordered) > 1
        and len({_without_place(m.text) for m in ordered}) == 1
    ):
        head, _, fix = ordered[0].text.partition("\n")
        others = "the other row" if num_rows == 2 else f"all {num_rows - 1} other rows"
        raise DataError(f"{head}\nand the same in {others}\n{fix}")
    shown = _choose([mistake.text for mistake in ordered])
    parts = [text.partition("\n") for text in shown]
    heads = [head for head, _, _ in parts]
    if len(ordered) > len(shown):
        heads.append(f"and {counted(len(ordered) - len(shown), 'more row')}")
    raise DataError("\n".join([*heads, *dict.fromkeys(fix for _, _, fix in parts)]))


def _choose(texts: Sequence[str]) -> list[str]:
    """Some mistakes of every kind: a hundred empty cells must not hide the one bad quote."""
    by_kind: dict[str, list[int]] = {}
    for n, text in enumerate(texts):
        by_kind.setdefault(_kind(text), []).append(n)
    each = max(1, MOST_SHOWN // len(by_kind))
    first = [n for places in by_kind.values() for n in places[:each]][:MOST_SHOWN]
    rest = sorted({*range(len(texts))} - {*first})[: MOST_SHOWN - len(first)]
    return [texts[n] for n in sorted(first + rest)]


def _kind(text: str) -> str:
    """What is wrong and how to fix it, without the place and its numbers."""
    return re.sub(r"\d+", "0", _without_place(text))


def _without_place(text: str) -> str:
    return text.partition(": ")[2]
