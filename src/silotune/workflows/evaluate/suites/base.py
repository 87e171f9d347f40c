"""What a benchmark suite is, and how its rows become items.

A suite names where its rows come from and which columns it can read; this file loads them, from the
hub or from a local file. It knows no model and no way of answering (scoring.py, leaderboard.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from silotune.core.errors import ConfigError, DataError
from silotune.core.wording import did_you_mean
from silotune.data.conversations import Row, list_columns
from silotune.data.files import PlacedRow, no_such_file, read_place

Kind = Literal["choice", "boolean", "sentiment"]

LETTERS = "ABCDE"

EXPORT = "refs/convert/parquet"
"""The branch where the hub keeps a copy, as plain files, of a set that is made by a script. Scripts
are remote code: they are never run, here or by `datasets` from version 4 on."""


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
    """The whole prompt of the FlowerTune protocol; empty where there is none for this item."""
    group: str = ""
    """A part of the suite that is reported on its own, such as a group of subjects."""


@dataclass(frozen=True)
class Hub:
    """Where rows lie on the Hugging Face hub."""

    path: str
    name: str | None
    split: str
    """"all" puts the splits behind each other."""
    revision: str | None = None
    exported: bool = False
    """Whether the set is made by a script, so that the hub's plain copy is read (`EXPORT`)."""
    columns: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns to add to every row: what the set says only by its name."""


@dataclass(frozen=True)
class Layout:
    """One way in which the rows of a suite are laid out."""

    columns: tuple[str, ...]
    """Required columns; others are ignored or optional."""
    read: Callable[[Row, str], Item]
    """(row, place for messages) -> item. Raises DataError."""


@dataclass(frozen=True)
class Suite:
    """A benchmark: where its rows are and how they are read."""

    name: str
    title: str
    hub: tuple[Hub, ...]
    """Read one after the other; usually one."""
    layouts: tuple[Layout, ...]
    """The hub's layout first. A row is read by the first whose columns are all there."""
    kind: Kind
    held_out: float | None = None
    """Share of the hub's rows that is the test part, drawn with seed 42; None: all of them. A local
    file is always used whole."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The required columns of the hub's layout."""
        return self.layouts[0].columns

    def read(self, row: Row, where: str) -> Item:
        """One row as an item.

        Raises:
            DataError: No layout fits, or a value cannot be used; the message names the place.
        """
        for layout in self.layouts:
            if all(column in row for column in layout.columns):
                return layout.read(row, where)
        raise missing_columns(self.name, [one.columns for one in self.layouts], row, where)


def find_suite(name: str, suites: Mapping[str, Suite]) -> Suite:
    """The suite of that name.

    Raises:
        ConfigError: There is none; the message offers the nearest and lists all.
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
        suite: Which.
        path: A local file with the suite's columns; without one the hub is asked.

    Raises:
        DataError: Rows cannot be found, read or understood.
    """
    rows = _hub_rows(suite) if path is None else read_file(Path(path).expanduser())
    return [suite.read(row.columns, row.where) for row in rows]


def read_file(path: Path) -> list[PlacedRow]:
    """The rows of one local file, with their places."""
    if not path.is_file():
        raise no_such_file(path)
    return read_place(path)[0].rows


def _hub_rows(suite: Suite) -> list[PlacedRow]:
    rows = [row for hub in suite.hub for row in read_hub(suite.name, hub, suite.columns)]
    return rows if suite.held_out is None else _test_part(rows, suite.held_out)


def read_hub(name: str, hub: Hub, columns: tuple[str, ...]) -> list[PlacedRow]:
    """The rows of one place on the hub; suite and columns are named in messages."""
    import datasets

    # Not files.read_hub: that one's messages speak of a recipe's [data], and it cannot name a
    # folder, which is what a config has become in an exported copy.
    try:
        found: Any = datasets.load_dataset(
            hub.path,
            name=None if hub.exported else hub.name,
            data_dir=hub.name if hub.exported else None,
            split=hub.split,
            revision=hub.revision or (EXPORT if hub.exported else None),
        )
        rows = [{**row, **hub.columns} for row in found]
    except Exception as error:  # the libraries below raise dozens of kinds, all meaning this
        raise DataError(
            f"suite '{name}': '{hub.path}' ({hub.name or 'default'}, split '{hub.split}') "
            f"could not be read from the hub ({type(error).__name__}).\n"
            f"  Check the network, or give a file with the columns {list_columns(columns)} by "
            "--data FILE."
        ) from error
    return [PlacedRow(f"{hub.path}, {hub.split}, row {n}", row) for n, row in enumerate(rows, 1)]


def _test_part(rows: list[PlacedRow], share: float) -> list[PlacedRow]:
    """The test part that `train_test_split` draws with seed 42; it depends on their number only."""
    import datasets

    numbers = datasets.Dataset.from_dict({"row": list(range(len(rows)))})
    return [rows[i] for i in numbers.train_test_split(test_size=share, seed=42)["test"]["row"]]


def missing_columns(
    suite: str, layouts: Sequence[tuple[str, ...]], row: Row, where: str
) -> DataError:
    """The error for a row that none of the layouts' columns fit."""
    # the layout that most columns fit is the one that was meant
    meant = max(layouts, key=lambda columns: sum(c in row for c in columns) / len(columns))
    missing = [column for column in meant if column not in row]
    ways = "; or ".join(list_columns(columns) for columns in layouts)
    return DataError(
        f"{where}: suite '{suite}' needs column {list_columns(missing)}, which is not there."
        f"{did_you_mean(missing[0], row)}\n"
        f"  The columns are {list_columns(row)}. Rename them to {ways}."
    )
