"""What a benchmark suite is, and how its rows become items.

A suite names where its rows come from and which columns it can read. This file loads them from the
hub or from a local file. It does not know models or ways of answering: see scoring.py and
leaderboard.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from silotune.core.errors import ConfigError, DataError
from silotune.core.hub import why_offline
from silotune.core.wording import did_you_mean
from silotune.data.conversations import Row, list_columns
from silotune.data.files import PlacedRow, no_such_file, read_place

Kind = Literal["choice", "boolean", "sentiment"]

LETTERS = "ABCDE"

EXPORT = "refs/convert/parquet"
"""The hub's branch with a plain copy of a data set that a script builds. Scripts are remote code:
neither silotune nor `datasets` from version 4 on runs them."""


@dataclass(frozen=True)
class Item:
    """One question of a suite."""

    id: str
    prompt: str
    """What the user asks, for the model's own chat template."""
    options: Mapping[str, str]
    """Label -> text: {"A": "Aspirin", ...} or {"yes": "yes", ...}. The label is the answer."""
    gold: str
    """The right label."""
    leaderboard: str = ""
    """The full prompt of the FlowerTune protocol; empty if it has none for this item."""
    group: str = ""
    """A part of the suite that is reported separately, such as a group of subjects."""


@dataclass(frozen=True)
class Hub:
    """Where rows are on the Hugging Face hub."""

    path: str
    name: str | None
    split: str
    """"all" concatenates the splits."""
    revision: str | None = None
    exported: bool = False
    """Whether a script builds the data set, so that the hub's plain copy is read (`EXPORT`)."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns to add to every row: facts that only the name of the data set states."""


@dataclass(frozen=True)
class Layout:
    """One layout of a suite's rows."""

    columns: tuple[str, ...]
    """Required columns; others are ignored or optional."""
    read: Callable[[Row, str], Item]
    """(row, location for messages) -> item. Raises DataError."""


@dataclass(frozen=True)
class Suite:
    """A benchmark: where its rows are and how to read them."""

    name: str
    title: str
    hub: tuple[Hub, ...]
    """Where to read rows; usually one place. Several are read in order."""
    layouts: tuple[Layout, ...]
    """The hub's layout first. A row is read by the first layout whose columns it has."""
    kind: Kind
    held_out: float | None = None
    """Share of the hub's rows that is the test part, drawn with seed 42; None: all of them. All
    rows of a local file are used."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The required columns of the hub's layout."""
        return self.layouts[0].columns

    def read(self, row: Row, where: str) -> Item:
        """One row as an item.

        Raises:
            DataError: No layout fits, or a value is invalid; the message names the location.
        """
        for layout in self.layouts:
            if all(column in row for column in layout.columns):
                return layout.read(row, where)
        raise missing_columns(self.name, [one.columns for one in self.layouts], row, where)


def find_suite(name: str, suites: Mapping[str, Suite]) -> Suite:
    """Return the suite with this name.

    Raises:
        ConfigError: There is none; the message suggests the closest and lists all.
    """
    if name in suites:
        return suites[name]
    raise ConfigError(
        f"'{name}' is not a benchmark suite.{did_you_mean(name, suites)}\n"
        f"  Suites: {', '.join(suites)}."
    )


def load_items(suite: Suite, path: str | Path | None = None) -> list[Item]:
    """The items of a suite, in the order of its rows.

    Args:
        suite: The suite.
        path: A local file with the suite's columns; by default the hub.

    Raises:
        DataError: Rows cannot be found, read or understood.
    """
    rows = _hub_rows(suite) if path is None else read_file(Path(path).expanduser())
    return [suite.read(row.columns, row.where) for row in rows]


def read_file(path: Path) -> list[PlacedRow]:
    """The rows of one local file, with their locations."""
    if not path.is_file():
        raise no_such_file(path)
    return read_place(path)[0].rows


def _hub_rows(suite: Suite) -> list[PlacedRow]:
    rows = [row for hub in suite.hub for row in read_hub(suite.name, hub, suite.columns)]
    return rows if suite.held_out is None else _test_part(rows, suite.held_out)


def read_hub(name: str, hub: Hub, columns: tuple[str, ...]) -> list[PlacedRow]:
    """The rows of one place on the hub. Suite and columns are for messages."""
    import datasets

    # Not files.read_hub: its messages mention a recipe's [data], and it cannot name a folder. In an
    # exported copy, a config is a folder.
    why_offline()  # if the hub does not answer, its library looks into its cache at once
    try:
        found: Any = datasets.load_dataset(
            hub.path,
            name=None if hub.exported else hub.name,
            data_dir=hub.name if hub.exported else None,
            split=hub.split,
            revision=hub.revision or (EXPORT if hub.exported else None),
        )
        rows = [{**row, **hub.columns} for row in found]
    except Exception as error:  # the libraries raise dozens of types, which all mean this
        raise DataError(
            f"suite '{name}': '{hub.path}' ({hub.name or 'default'}, split '{hub.split}') "
            f"could not be read from the hub ({type(error).__name__}).\n"
            f"  Check the network, or pass a file with the columns {list_columns(columns)} with "
            "--data FILE."
        ) from error
    return [PlacedRow(f"{hub.path}, {hub.split}, row {n}", row) for n, row in enumerate(rows, 1)]


def _test_part(rows: list[PlacedRow], share: float) -> list[PlacedRow]:
    """The test part that `train_test_split` draws with seed 42; depends only on the row count."""
    import datasets

    numbers = datasets.Dataset.from_dict({"row": list(range(len(rows)))})
    return [rows[i] for i in numbers.train_test_split(test_size=share, seed=42)["test"]["row"]]


def missing_columns(
    suite: str, layouts: Sequence[tuple[str, ...]], row: Row, where: str
) -> DataError:
    """The error for a row that no layout fits."""
    # probably the layout that shares most columns with the row was meant
    meant = max(layouts, key=lambda columns: sum(c in row for c in columns) / len(columns))
    missing = [column for column in meant if column not in row]
    ways = "; or ".join(list_columns(columns) for columns in layouts)
    return DataError(
        f"{where}: suite '{suite}' needs column {list_columns(missing)}, which is missing."
        f"{did_you_mean(missing[0], row)}\n"
        f"  The columns are {list_columns(row)}. Rename them to {ways}."
    )
