"""A path -> rows with their places.

Reads one file, a folder of files or a data set on the Hugging Face hub, and decides which of them a
path means. Does not know what a row means or how rows become clients. Every row carries its place
(`tickets.csv:7`), which messages show instead of its values.
"""

import importlib.resources
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from silotune.core.errors import DataError, HubUnreachable
from silotune.core.hub import why_offline
from silotune.core.safe_text import one_line
from silotune.core.wording import did_you_mean
from silotune.data.file_formats import is_readable, names_in, no_such_file, read_file
from silotune.data.folders import layout_of
from silotune.data.partition import Shares
from silotune.data.placed_rows import FileRows, Part, PlacedRow, joined, moved, refuse

_EXAMPLES = Path(str(importlib.resources.files("silotune.data"))) / "examples"
EXAMPLES: dict[str, Path] = {name: _EXAMPLES / name for name in ("medquad_mini", "medquad_pairs")}
"""Data sets inside the package, by the name that `data.path` uses."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of one file of a known format, in file order.

    Raises:
        DataError: The file is missing, empty or damaged; the message names the lines.
    """
    found = read_file(Path(path).expanduser())
    refuse(found.mistakes)
    return [row.columns for row in found.rows]


def locate(path: str) -> Path | None:
    """The example, file or folder that a path means; None for a data set on the hub.

    Raises:
        DataError: It can only be a file, folder or example, and none has that name.
    """
    if path in EXAMPLES:
        return EXAMPLES[path]
    place = Path(path).expanduser()
    if place.is_file() or place.is_dir():
        return place
    if path[0] in "./~" or path.count("/") > 1 or is_readable(place):
        raise no_such_file(place)
    near = "" if "/" in path else did_you_mean(path, EXAMPLES)
    if near:  # querying the hub for a misspelt example would take half a minute
        raise DataError(
            f"'{path}' is neither a named example nor a local file or folder.{near}\n"
            f"  Named examples: {', '.join(EXAMPLES)}."
        )
    return None


def read_place(place: Path) -> tuple[Part, Part | None]:
    """Read a file or a folder: the train part, and the held-out part if the folder has one.

    Raises:
        DataError: A file or a row cannot be read, or the folder's layout is ambiguous.
    """
    train, held = search_place(place)
    refuse([*train.mistakes, *moved(held.mistakes if held else (), len(train.rows))])
    return train, held


def search_place(
    place: Path, *, held_out: str | None = None, alone: bool = False, complete: bool = True
) -> tuple[Part, Part | None]:
    """Like `read_place`, but mistakes of single rows come with the parts.

    Args:
        place: A file or a folder.
        held_out: For a folder, as in `layout_of`.
        alone: For a folder, as in `layout_of`.
        complete: As in `read_file`.
    """

    def read(files: Sequence[Path]) -> FileRows:
        return joined(read_file(path, complete=complete) for path in files)

    if place.is_file():
        return _part(read([place])), None
    layout = layout_of(place, held_out=held_out, alone=alone)
    if layout.train:
        held = _part(read(layout.held_out)) if layout.held_out else None
        return _part(read(layout.train), notes=layout.notes), held
    shares: Shares = {}
    every: list[FileRows] = []
    start = 0
    for name, files in layout.clients.items():
        own = read(files)
        shares[name] = list(range(start, start := start + len(own.rows)))
        every.append(own)
    return _part(joined(every), shares), None


def _part(found: FileRows, shares: Shares | None = None, notes: tuple[str, ...] = ()) -> Part:
    return Part(found.rows, shares or {}, 0, found.mistakes, (*notes, *found.notes))


def read_hub(path: str, *, name: str | None, split: str, revision: str | None) -> list[PlacedRow]:
    """Read one split of a data set on the hub.

    Raises:
        DataError: It cannot be read, for any reason, or the split is empty.
    """
    reason = why_offline()
    try:
        import datasets

        found: Iterable[Any] = datasets.load_dataset(path, name, split=split, revision=revision)
        rows = [PlacedRow(f"{path}, {split}, row {n}", dict(r)) for n, r in enumerate(found, 1)]
    except Exception as error:  # the libraries raise dozens of types, which all mean this
        is_missing = isinstance(error, ConnectionError | FileNotFoundError)  # from the cache too
        if reason is not None and is_missing and "/" in path:
            raise unreachable(path, reason) from error
        raise DataError(
            f"'{path}' is neither a named example nor a local file or folder, and its split "
            f"'{split}' could not be read from the hub ({type(error).__name__})."
            f"{did_you_mean(path, [*EXAMPLES, *names_in(Path())])}\n"
            f"  Named examples: {', '.join(EXAMPLES)}. For a hub data set, check the network, "
            "data.path, data.name, data.split, data.eval_split and data.revision."
        ) from error
    if not rows:
        raise DataError(
            f"{path}: the split '{split}' has no rows.\n"
            "  Choose another data.split (or data.eval_split)."
        )
    return rows


def unreachable(path: str, reason: str) -> HubUnreachable:
    """The error for a data set that is on the hub, as far as its name tells."""
    return HubUnreachable(
        f"'{path}' is no local file or folder, and the hub cannot be reached: {one_line(reason)}."
        f"{did_you_mean(path, names_in(Path()))}\n"
        "  Connect this machine to the network (a data set that was fetched before is in the hub "
        "library's cache), or set data.path to a local file or folder."
    )
