"""Print a table so that neither a word nor a number is ever broken.

What a table contains is decided where its result is made. This file only fits it into a terminal.
Outside a terminal, lines are as long as they need to be.
"""

import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from silotune.cli.frame import print_line
from silotune.core.safe_text import one_line

Rows = Sequence[tuple[str, ...]]
"""A header and the rows below it, all of the same length."""

GAP = 2
"""Characters between two columns."""


def print_table(rows: Rows) -> None:
    """Print a header and rows on stdout, with numbers aligned.

    If a terminal is too narrow, headers wrap at spaces. Columns that still do not fit follow below,
    with the first column repeated: it holds names, and never wraps.
    """
    rows = [tuple(one_line(cell) for cell in row) for row in rows]
    edge = Console().width if sys.stdout.isatty() else None
    for n, columns in enumerate(_parts(rows, edge)):
        part = [tuple(row[i] for i in columns) for row in rows]
        if n:
            print_line()
        _print_part(part, column_widths(part, edge))


def _print_part(rows: Rows, widths: Sequence[int]) -> None:
    header, *body = rows
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, (title, width) in enumerate(zip(header, widths, strict=True)):
        side = "left" if i == 0 else "right"
        # "fold" breaks only words that are wider than the column, and there are none. The default
        # replaces a wide letter before a space by an ellipsis (rich 14.3)
        table.add_column(title, justify=side, width=width, overflow="fold")
    for row in body:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=_total(widths)).print(table)


def column_widths(rows: Rows, edge: int | None) -> list[int]:
    """The width of each column, within `edge` characters in total if wrapping allows that.

    Headers wrap first, then cells, both only at spaces. Cells of the first column never wrap.
    """
    widths = [_longest(cells) for cells in zip(*rows, strict=True)]
    for narrowest in (_with_wrapped_headers(rows), _with_wrapped_cells(rows)):
        while edge is not None and _total(widths) > edge and widths != narrowest:
            _, widest = max((w, i) for i, w in enumerate(widths) if w > narrowest[i])
            widths[widest] -= 1
    return widths


def _parts(rows: Rows, edge: int | None) -> list[list[int]]:
    """The columns to print side by side, as indices. The first column is in every part."""
    narrowest = _with_wrapped_headers(rows)
    parts = [[0]]
    for i in range(1, len(narrowest)):
        wider = _total([narrowest[j] for j in (*parts[-1], i)])
        if edge is not None and wider > edge and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(i)
    return parts


def _with_wrapped_headers(rows: Rows) -> list[int]:
    return [
        max(_longest(title.split()), _longest(cells)) for title, *cells in zip(*rows, strict=True)
    ]


def _with_wrapped_cells(rows: Rows) -> list[int]:
    _, *others = zip(*rows, strict=True)
    words = [_longest(word for cell in cells for word in cell.split()) for cells in others]
    return [_with_wrapped_headers(rows)[0], *words]


def _longest(texts: Iterable[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)
