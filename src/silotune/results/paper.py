"""For papers: the charts of a page as files, and tables as CSV and LaTeX.

This file does not know what a chart or a table is about. It writes beside the page, into `charts/`
and `tables/` of the folder, and replaces what an earlier call wrote there in the same format.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from silotune.core.atomic_files import make_folder, write_atomically
from silotune.core.errors import ConfigError
from silotune.core.safe_text import one_line
from silotune.core.wording import counted, did_you_mean
from silotune.results.svg import ChartKind, Saved

if TYPE_CHECKING:
    from pandas import DataFrame

TableKind = Literal["csv", "latex"]
TextTable = Sequence[tuple[str, ...]]
"""A header and the rows below it, as people read them."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a cell begins that spreadsheets would compute."""


def check_kinds(charts: str | None, tables: str | None) -> None:
    """Refuse kinds that do not exist, before anything is drawn.

    Raises:
        ConfigError: Names the kinds that do.
    """
    for given, what, known in (
        (charts, "charts", get_args(ChartKind)),
        (tables, "tables", get_args(TableKind)),
    ):
        if given is not None and given not in known:
            raise ConfigError(
                f"{what} = '{given}' is unknown.{did_you_mean(given, known)}\n"
                f"  Choose one of: {', '.join(known)}."
            )


def write_charts(folder: Path, saved: Sequence[Saved]) -> Path | None:
    """Write charts as files named after what they show; None if there are none.

    Returns:
        Their folder.
    """
    if not saved:
        return None
    if boxes := [chart.label for chart in saved if chart.lacks_glyphs]:
        sys.stderr.write(
            f"note: {counted(len(boxes), 'chart')} with letters that the PDF's font lacks: they "
            f"show as boxes, and are right as svg ({one_line('; '.join(boxes))})\n"
        )

    made: dict[str, bytes] = {}
    for number, chart in enumerate(saved, start=1):
        words = re.sub(r"[^a-z0-9]+", "-", chart.label.lower()).strip("-")[:60].strip("-")
        made[f"{number:02d}-{words}.{chart.kind}"] = chart.data
    return _replace(folder / "charts", saved[0].kind, made)


def write_tables(
    folder: Path,
    kind: TableKind | None,
    *,
    numbers: Callable[[], Mapping[str, "DataFrame"]],
    texts: Callable[[], Mapping[str, TextTable]],
) -> Path | None:
    """Write tables: CSV holds the numbers unrounded, LaTeX what the page shows.

    Args:
        folder: The folder of a run, a comparison or a sweep.
        kind: None: nothing is written.
        numbers: The tables as data frames, by name.
        texts: The tables as text, by name; empty ones are left out.

    Returns:
        Their folder, or None.
    """
    if kind is None:
        return None
    if kind == "csv":
        made = {f"{name}.csv": as_csv(found).encode() for name, found in numbers().items()}
        return _replace(folder / "tables", "csv", made)
    made = {f"{name}.tex": as_latex(found).encode() for name, found in texts().items() if found}
    return _replace(folder / "tables", "tex", made)


def _replace(place: Path, ending: str, files: Mapping[str, bytes]) -> Path:
    """Write files with one ending into a folder in place of those that it has."""
    make_folder(place)
    for old in place.glob(f"*.{ending}"):
        old.unlink()
    for name, data in files.items():
        write_atomically(place / name, data)
    return place


def as_csv(table: "DataFrame") -> str:
    """A data frame as CSV; a text that a spreadsheet would compute gets an apostrophe in front."""
    safe = table.map(_cell)
    return safe.to_csv(index=False, lineterminator="\n")


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(_FORMULA) else text


def as_latex(rows: TextTable) -> str:
    """A table for LaTeX with the package booktabs; numbers are aligned on the right."""
    import pandas as pd

    header, *body = [[one_line(cell) for cell in row] for row in rows]
    table = pd.DataFrame(body, columns=header)
    return table.to_latex(index=False, escape=True, column_format="l" + "r" * (len(header) - 1))
