"""A path -> rows with their places.

Reads one file, a folder of files or a data set on the Hugging Face hub, and decides which of them a
path means. Knows file endings and folder layouts; does not know what a row means or how rows become
clients. Every row carries its place (`tickets.csv:7`), which messages show instead of its values.
"""

import csv
import importlib.resources
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from silotune.core.errors import DataError, HubUnreachable
from silotune.core.hub import why_offline
from silotune.core.safe_text import one_line
from silotune.core.wording import counted, did_you_mean
from silotune.data.conversations import list_columns
from silotune.data.partition import Shares

EXAMPLES: dict[str, Path] = {
    "medquad_mini": Path(str(importlib.resources.files("silotune.data")))
    / "examples"
    / "medquad_mini",
}
"""Data sets inside the package, by the name that `data.path` uses."""


@dataclass(frozen=True)
class PlacedRow:
    """A row as read."""

    where: str
    """Its place for messages, for example "tickets.csv:7"."""
    columns: dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Rows of the train part or of the held-out part, of all clients."""

    rows: list[PlacedRow]
    files: Shares = field(default_factory=dict[str, list[int]])
    """Client -> its rows if there is one file per client; otherwise empty."""
    num_empty: int = 0
    """Rows that were left out because they lack a text."""


# --- reading --------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read the rows of one .jsonl, .json, .csv or .parquet file, in file order.

    Raises:
        DataError: The file is missing, empty or damaged; the message names the line.
    """
    return [row.columns for row in _read_file(Path(path).expanduser())]


def _read_file(path: Path) -> list[PlacedRow]:
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        raise no_such_file(path)
    if reader is None:
        raise DataError(
            f"{path}: files ending in '{path.suffix}' cannot be read.\n"
            f"  Save it as one of {', '.join(READERS)}."
        )
    try:
        rows = reader(path)
    except OSError as error:
        raise DataError(
            f"{path}: the file cannot be read ({type(error).__name__}).\n  Check its permissions."
        ) from error
    if not rows:
        raise DataError(f"{path}: the file has no rows.\n  Add rows, or remove the file.")
    return rows


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: the text is not UTF-8.\n  Save the file as UTF-8."
        ) from None


def _read_jsonl(path: Path) -> list[PlacedRow]:
    rows: list[PlacedRow] = []
    # Not splitlines(): U+2028 and similar characters are allowed inside a JSON string.
    for line, text in enumerate(_read_text(path).split("\n"), start=1):
        if text.strip():
            where = f"{path}:{line}"
            rows.append(PlacedRow(where, _object(_parse_json(text, path, line=line), where)))
    return rows


def _read_json(path: Path) -> list[PlacedRow]:
    text = _read_text(path)
    if not text.strip():
        return []
    items = _parse_json(text, path)
    if not isinstance(items, list):
        raise DataError(
            f"{path}: the file does not contain a list of objects.\n"
            '  Write [{"question": "...", "answer": "..."}, ...], or one object per line as .jsonl.'
        )
    places = [f"{path}, row {n}" for n in range(1, len(items) + 1)]
    return [PlacedRow(p, _object(item, p)) for p, item in zip(places, items, strict=True)]


def _parse_json(text: str, path: Path, *, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{line + error.lineno - 1}: not valid JSON at character {error.colno}.\n"
            "  Fix the line. A .jsonl file holds one object per line, a .json file one list."
        ) from None
    except (ValueError, RecursionError):
        raise DataError(
            f"{path}:{line}: a number is too long, or lists are nested too deeply.\n  Fix the row."
        ) from None


def _object(item: object, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(
            f"{where}: expected an object, but the type is {type(item).__name__}.\n"
            '  Write {"question": "...", "answer": "..."}.'
        )
    return item


def _read_csv(path: Path) -> list[PlacedRow]:
    # strict: otherwise an unclosed quote swallows the rest of the file into one cell
    lines = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[PlacedRow] = []
    before = 0
    try:
        header = next(lines, [])
        _check_header(header, path)
        before = lines.line_num
        for cells in lines:
            where = f"{path}:{before + 1}"  # a row may span several lines: this is the first
            before = lines.line_num
            if len(cells) > len(header):
                raise DataError(
                    f"{where}: the row has {counted(len(cells), 'cell')}, the header has "
                    f"{len(header)}.\n  Put quotes around cells that contain commas."
                )
            if cells:
                rows.append(PlacedRow(where, dict(zip(header, cells, strict=False))))
    except csv.Error:
        raise DataError(
            f"{path}:{before + 1}: not valid CSV: a quote is misplaced or not closed, or a cell "
            f"has more than {csv.field_size_limit():,} characters.\n"
            "  Double the quotes inside cells, or save the file as .jsonl."
        ) from None
    return rows


def _check_header(header: list[str], path: Path) -> None:
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(
            f"{path}:1: column names occur more than once: {list_columns(repeated)}.\n"
            "  Give each column a different name."
        )
    if len(header) == 1 and any(sign in header[0] for sign in ";\t"):
        raise DataError(
            f"{path}:1: the columns seem to be separated by semicolons or tabs.\n"
            "  Save the file with commas between the columns."
        )


def _read_parquet(path: Path) -> list[PlacedRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table, which turns folders named "key=value" into columns.
        with pyarrow.parquet.ParquetFile(path) as file:
            items = file.read().to_pylist()
    except (pyarrow.ArrowException, ValueError, OSError) as error:  # OSError: a truncated file
        raise DataError(
            f"{path}: not a readable parquet file ({type(error).__name__}).\n"
            "  Create it again, or save the rows as .jsonl."
        ) from None
    return [PlacedRow(f"{path}, row {n}", item) for n, item in enumerate(items, start=1)]


READERS: dict[str, Callable[[Path], list[PlacedRow]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""File ending -> the function that reads such a file."""


# --- finding --------------------------------------------------------------------------------------


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
    if path[0] in "./~" or path.count("/") > 1 or place.suffix.lower() in READERS:
        raise no_such_file(place)
    near = "" if "/" in path else did_you_mean(path, EXAMPLES)
    if near:  # querying the hub for a misspelt example would take half a minute
        raise DataError(
            f"'{path}' is neither a named example nor a local file or folder.{near}\n"
            f"  Named examples: {', '.join(EXAMPLES)}."
        )
    return None


def no_such_file(path: Path) -> DataError:
    """The error for a path that does not exist, with the closest name in its folder."""
    folder = path.parent
    near = did_you_mean(path.name, _names_in(folder))
    lacks = "" if folder.is_dir() else f", and no folder '{folder}'"
    return DataError(
        f"{path}: there is no such file or folder{lacks}.{near}\n"
        "  Give a path relative to the current folder, or an absolute path."
    )


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def read_place(place: Path) -> tuple[Part, Part | None]:
    """Read a file or a folder: the train part, and the held-out part if the folder has one.

    Raises:
        DataError: A file cannot be read, or the folder's layout is ambiguous.
    """
    if place.is_file():
        return Part(_read_file(place)), None
    files = _files_by_stem(place)
    if "train" in files:
        others = sorted(path.name for stem, path in files.items() if stem not in ("train", "eval"))
        if others:
            raise DataError(
                f"{place}: '{others[0]}' is neither the train nor the eval file.\n"
                "  Remove it, or set data.path (and data.eval_path) to single files."
            )
        held = Part(_read_file(files["eval"])) if "eval" in files else None
        return Part(_read_file(files["train"])), held
    if "eval" in files:
        raise DataError(
            f"{place}: there is an eval file, but no train file.\n"
            "  Add train.jsonl, or rename the eval file if it belongs to a client."
        )
    rows: list[PlacedRow] = []
    shares: Shares = {}
    for stem in sorted(files):
        own = _read_file(files[stem])
        shares[stem.strip()] = list(range(len(rows), len(rows) + len(own)))
        rows.extend(own)
    return Part(rows, shares), None


def _files_by_stem(folder: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = path.suffix.lower()
        # Texts about the data may be next to it. Anything else could be a client, which would be
        # lost silently.
        if path.is_dir() or path.name.startswith(".") or ending in ("", ".md", ".txt"):
            continue
        if ending not in READERS:
            raise DataError(
                f"{path}: files ending in '{path.suffix}' cannot be read.\n"
                f"  Save it as one of {', '.join(READERS)}, or move it out of the folder."
            )
        if path.stem in files:
            raise DataError(
                f"{folder}: '{files[path.stem].name}' and '{path.name}' would be the same client.\n"
                "  Keep one of them, or rename one."
            )
        files[path.stem] = path
    if not files:
        raise DataError(
            f"{folder}: the folder contains no data file ({', '.join(READERS)}).\n"
            "  Put a train file (and an eval file) there, or one file per client."
        )
    return files


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
            f"{did_you_mean(path, [*EXAMPLES, *_names_in(Path())])}\n"
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
        f"{did_you_mean(path, _names_in(Path()))}\n"
        "  Connect this machine to the network (a data set that was fetched before is in the hub "
        "library's cache), or set data.path to a local file or folder."
    )
