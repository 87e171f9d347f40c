"""Text with separators -> rows: CSV as spreadsheets, R and databases write it.

Commas, semicolons, tabs or bars; the quotes are those of RFC 4180. What stands between the columns
is found by reading, never by guessing from a few lines. Knows no files: a caller passes the text.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from silotune.core.errors import DataError
from silotune.core.wording import counted
from silotune.data.conversations import list_columns
from silotune.data.placed_rows import FileRows, Mistake, PlacedRow

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
"""What may stand between columns. If several fit a file, the first is meant."""
STAND_INS = ("NA", "#N/A", "#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#NULL!", "#NUM!")
"""What R and spreadsheets write in a cell without a value."""
_LONGEST_CELL = 2**31 - 1  # Python's own limit of 131,072 characters is too short for documents
_DECLARED = re.compile(r'"?sep=(.)"?\r?(?:\n|$)')
"""The first line with which Excel is told what stands between the columns."""


@dataclass(frozen=True)
class _Table:
    """A text as cells, for one separator."""

    header: list[str]
    header_line: int
    records: list[tuple[int, list[str]]]
    """(first line, cells) of every record that is not blank; a record may have several lines."""
    broken: list[tuple[int, int]]
    """(first line, number of records before it) of every record whose quotes are wrong."""

    @property
    def fits(self) -> bool:
        """Whether every record can be read and has no more cells than the header."""
        return not self.broken and all(len(cells) <= self.width for _, cells in self.records)

    @property
    def is_even(self) -> bool:
        """Whether, moreover, every record has as many cells as the header."""
        return self.fits and all(len(cells) == self.width for _, cells in self.records)

    @property
    def width(self) -> int:
        return len(self.header)


def read_csv(text: str, path: Path, separators: Sequence[str] = tuple(SEPARATORS)) -> FileRows:
    """The rows of a text with a header line.

    Blank lines do not count, nor lines of separators only, nor columns without a name and a value.
    Cells that a short row lacks are empty.

    Args:
        text: The text of the file.
        path: Its place, for messages.
        separators: What may stand between columns; a first line `sep=;` overrides it.

    Raises:
        DataError: Two columns have the same name, or `sep=` names something odd.
    """
    declared = _DECLARED.match(text)
    if declared and (declared[1].isalnum() or declared[1] in "\"' "):
        raise DataError(
            f"{path}:1: 'sep=' is followed by a character that cannot separate columns.\n"
            "  Write sep=, or sep=; or remove the line."
        )
    with _long_cells():
        if declared:
            sign, skipped = declared[1], 1
            table = _parse(text[declared.end() :], sign, skipped)
        else:
            sign, table = _parsed(text, separators)
    return _rows(table, path, SEPARATORS.get(sign, f"'{sign}'"))


@contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parsed(text: str, separators: Sequence[str]) -> tuple[str, _Table]:
    """The separator that fits the whole text, and the text as cells.

    A separator must occur in the header. The first that fits every record is meant, unless another
    one gives every record all its cells.
    """
    possible = [sign for sign in separators if _num_columns(text, sign) > 1]
    if not possible:
        return separators[0], _parse(text, separators[0], 0)
    first = _parse(text, possible[0], 0)
    if first.is_even:
        return possible[0], first
    others = [(sign, _parse(text, sign, 0)) for sign in possible[1:]]
    for sign, table in others:
        if table.is_even and table.records:
            return sign, table
    if not first.fits:
        for sign, table in others:
            if table.fits:
                return sign, table
    return possible[0], first


def _num_columns(text: str, sign: str) -> int:
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=sign)
    try:
        header = next((cells for cells in lines if any(c.strip() for c in cells)), [])
    except csv.Error:
        return 0
    return len(header)


def _parse(text: str, sign: str, before: int) -> _Table:
    """A text as cells. `before` is the number of lines above it."""
    # strict: otherwise an unclosed quote swallows the rest of the file into one cell
    lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=sign)
    header, header_line = [], before + 1
    records: list[tuple[int, list[str]]] = []
    broken: list[tuple[int, int]] = []
    last = before
    while True:
        try:
            cells = next(lines, None)
        except csv.Error:  # reading goes on with the next line
            cells = []
            broken.append((last + 1, len(records)))
        if cells is None:
            return _Table(header, header_line, records, broken)
        line, last = last + 1, lines.line_num + before  # a record may span lines: this is the first
        if not "".join(cells).strip():
            continue
        if not header:
            header, header_line = cells, line
        else:
            records.append((line, cells))


def _rows(table: _Table, path: Path, between: str) -> FileRows:
    mistakes = [
        Mistake(
            num_before,
            f"{path}:{line}: not valid CSV: a quote is misplaced or not closed.\n"
            "  Double the quotes inside cells, or save the file as .jsonl.",
        )
        for line, num_before in table.broken
    ]
    if _has_row_names(table):
        where = f"{path}:{table.header_line}"
        text = (
            f"{where}: every row has one cell more than the header.\n"
            "  Name all columns. In R, write.csv(rows, file, row.names = FALSE) does."
        )
        return FileRows([], (*mistakes, Mistake(0, text)))
    columns = _columns(table, path, mistakes)
    places, names = [n for n, _ in columns], [name for _, name in columns]
    is_whole = len(places) == table.width
    rows: list[PlacedRow] = []
    for line, cells in table.records:
        if len(cells) > table.width and "".join(cells[table.width :]).strip():
            mistakes.append(
                Mistake(
                    len(rows),
                    f"{path}:{line}: the row has {counted(len(cells), 'cell')}, the header has "
                    f"{table.width}.\n  Put quotes around cells that contain {between}.",
                )
            )
            continue
        filled = cells + [""] * (table.width - len(cells))
        kept = filled if is_whole else [filled[n] for n in places]
        rows.append(PlacedRow(f"{path}:{line}", dict(zip(names, kept, strict=False))))
    return FileRows(rows, tuple(mistakes), tuple(_notes(rows, path)))


def _has_row_names(table: _Table) -> bool:
    """Whether R has written the names of the rows, but no name for their column."""
    return (
        len(table.records) > 1
        and all(len(cells) == table.width + 1 for _, cells in table.records)
        and any(cells[-1].strip() for _, cells in table.records)
    )


def _columns(table: _Table, path: Path, mistakes: list[Mistake]) -> list[tuple[int, str]]:
    """(position, name) of the columns. Those without a name and without a value do not count."""
    unnamed = [n for n, name in enumerate(table.header) if not name.strip()]
    used = [n for n in unnamed if any("".join(c[n : n + 1]).strip() for _, c in table.records)]
    where = f"{path}:{table.header_line}"
    if len(used) > 1:
        mistakes.append(
            Mistake(
                0,
                f"{where}: {len(used)} columns have values, but no name: number "
                f"{', '.join(str(n + 1) for n in used[:20])}.\n"
                "  Name them in the header, or delete them.",
            )
        )
    dropped = {*unnamed} - {*used[:1]}
    columns = [(n, name) for n, name in enumerate(table.header) if n not in dropped]
    repeated = sorted(name for name, count in Counter(c for _, c in columns).items() if count > 1)
    if repeated:
        raise DataError(
            f"{where}: column names occur more than once: {list_columns(repeated)}.\n"
            "  Give each column a different name."
        )
    return columns


def _notes(rows: Sequence[PlacedRow], path: Path) -> Iterator[str]:
    found = Counter(
        (name, cell)
        for row in rows
        for name, cell in row.columns.items()
        if len(cell) < 8 and cell in STAND_INS
    )
    for (name, cell), count in found.items():
        yield (
            f"{path}: {counted(count, 'cell')} of column {list_columns([name])} read '{cell}', "
            "which R and spreadsheets write where a value is missing; if so, leave them empty"
        )
