"""One file of any known format -> rows with their places.

Knows file endings, text encodings and compression; does not know folders, nor what a row means.
"""

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from silotune.core.errors import DataError
from silotune.core.wording import did_you_mean, human_bytes
from silotune.data.csv_files import read_csv
from silotune.data.placed_rows import FileRows, Mistake, PlacedRow

MOST_TIMES = 100
"""How many times its size on disk a compressed file may expand to."""
ALWAYS = 64 * 2**20
"""Bytes that a compressed file may always expand to."""
_CHUNK = 2**20
_GZIP = b"\x1f\x8b"


def ending_of(path: Path) -> str:
    """A file's ending in small letters; that of a compressed file with what is inside.

    >>> ending_of(Path("a.b.JSONL.gz"))
    '.jsonl.gz'
    """
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() + last if last == ".gz" else last


def stem_of(path: Path) -> str:
    """A file's name without its ending.

    >>> stem_of(Path("a.b.jsonl.gz"))
    'a.b'
    """
    return path.name[: len(path.name) - len(ending_of(path))]


def is_readable(path: Path) -> bool:
    """Whether the file's ending is one that can be read."""
    ending = ending_of(path)
    return ending in READERS or (
        ending.endswith(".gz") and ending.removesuffix(".gz") in TEXT_READERS
    )


def unreadable(path: Path, also: str = "") -> DataError:
    """The error for a file with an unknown ending."""
    hint = ""
    if path.suffix.lower() in (".xlsx", ".xls", ".ods"):
        hint = " In Excel or LibreOffice, save the sheet as CSV in UTF-8."
    return DataError(
        f"{path}: files ending in '{path.suffix}' cannot be read.\n"
        f"  Save it as one of {', '.join(READERS)}{also}.{hint}"
    )


def read_file(path: Path, *, complete: bool = True) -> FileRows:
    """The rows of one file, and what in it cannot be read.

    Args:
        path: The file.
        complete: Whether a row that lacks a column which other rows of the file have gets it,
            without a value. A missing key then is an empty cell, but no longer is a row read
            without a look at the others.

    Raises:
        DataError: It does not exist, is damaged as a whole, or has no rows.
    """
    if not path.is_file():
        raise no_such_file(path)
    if not is_readable(path):
        raise unreadable(path)
    ending = ending_of(path)
    try:
        found = READERS[ending.removesuffix(".gz")](path)
    except OSError as error:
        raise DataError(
            f"{path}: the file cannot be read ({type(error).__name__}).\n  Check its permissions."
        ) from error
    if not found.rows and not found.mistakes:
        raise DataError(f"{path}: the file has no rows.\n  Add rows, or remove the file.")
    return replace(found, rows=_with_all_columns(found.rows)) if complete else found


def no_such_file(path: Path) -> DataError:
    """The error for a path that does not exist, with the closest name in its folder."""
    folder = path.parent
    near = did_you_mean(path.name, names_in(folder))
    lacks = "" if folder.is_dir() else f", and no folder '{folder}'"
    return DataError(
        f"{path}: there is no such file or folder{lacks}.{near}\n"
        "  Give a path relative to the current folder, or an absolute path."
    )


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _with_all_columns(rows: list[PlacedRow]) -> list[PlacedRow]:
    """The rows, each with every column of the file."""
    columns = dict.fromkeys(name for row in rows for name in row.columns)
    empty: dict[str, Any] = dict.fromkeys(columns)
    return [
        row if len(row.columns) == len(columns) else PlacedRow(row.where, {**empty, **row.columns})
        for row in rows
    ]


# --- text -----------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    data = _expanded(path) if path.suffix.lower() == ".gz" else path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            f"{path}:1: the text is UTF-16, not UTF-8.\n"
            '  Save the file as UTF-8; in Excel, choose "CSV UTF-8", not "Unicode text".'
        )
    if data.startswith(_GZIP):
        raise DataError(
            f"{path}: the file is compressed with gzip, which its name does not say.\n"
            f"  Rename it to {path.name}.gz."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: the text is not UTF-8.\n"
            '  Save the file as UTF-8: in Excel as "CSV UTF-8", in LibreOffice with the character '
            'set "Unicode (UTF-8)", in R with fileEncoding = "UTF-8".'
        ) from None


def _expanded(path: Path) -> bytes:
    """The content of a compressed file, in memory that is in proportion to its size on disk."""
    most = max(ALWAYS, MOST_TIMES * path.stat().st_size)
    data = bytearray()
    try:
        with gzip.open(path) as file:
            while chunk := file.read(_CHUNK):
                data += chunk
                if len(data) > most:
                    raise DataError(
                        f"{path}: the file expands to more than {human_bytes(most)}, over "
                        f"{MOST_TIMES} times its size.\n"
                        "  If it is meant to, decompress it and point data.path to the result."
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: not a complete gzip file ({type(error).__name__}).\n"
            "  Compress or copy it again."
        ) from None
    return bytes(data)


def _read_csv(path: Path) -> FileRows:
    return read_csv(_read_text(path), path)


def _read_tsv(path: Path) -> FileRows:
    return read_csv(_read_text(path), path, ("\t",))


# --- JSON -----------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> FileRows:
    text = _read_text(path)
    if text.lstrip()[:1] == "[":
        try:
            items = json.loads(text)
        except (ValueError, RecursionError):
            pass  # said below, with its line
        else:
            return _listed(items, path)
    return _lines(text, path)


def _read_json(path: Path) -> FileRows:
    text = _read_text(path)
    if not text.strip():
        return FileRows([])
    if _is_lines(text):
        return _lines(text, path)
    items = _parse_json(text, path)
    if isinstance(items, dict):
        lists = [value for value in items.values() if _is_list_of_objects(value)]
        others = [value for value in items.values() if isinstance(value, list)]
        # not the messages of a single row
        known = {"messages", "conversations", "prompt", "completion"}
        if len(lists) == 1 and len(others) == 1 and not known & items.keys():
            items = lists[0]
    if not isinstance(items, list):
        raise DataError(
            f"{path}: the file does not contain a list of objects.\n"
            '  Write [{"question": "...", "answer": "..."}, ...], or one object per line as .jsonl;'
            '\n  in pandas: rows.to_json(path, orient="records").'
        )
    return _listed(items, path)


def _is_list_of_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(i, dict) for i in value)


def _is_lines(text: str) -> bool:
    """Whether the first of several lines is an object by itself."""
    first, _, rest = text.strip().partition("\n")
    if not first.startswith("{") or not rest.strip():
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _lines(text: str, path: Path) -> FileRows:
    rows: list[PlacedRow] = []
    mistakes: list[Mistake] = []
    # Not splitlines(): U+2028 and similar characters are allowed inside a JSON string.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        where = f"{path}:{line}"
        try:
            rows.append(PlacedRow(where, _object(_parse_json(content, path, line=line), where)))
        except DataError as error:
            mistakes.append(Mistake(len(rows), str(error)))
    return FileRows(rows, tuple(mistakes))


def _listed(items: list[Any], path: Path) -> FileRows:
    rows: list[PlacedRow] = []
    mistakes: list[Mistake] = []
    for n, item in enumerate(items, start=1):
        where = f"{path}, row {n}"
        try:
            rows.append(PlacedRow(where, _object(item, where)))
        except DataError as error:
            mistakes.append(Mistake(len(rows), str(error)))
    return FileRows(rows, tuple(mistakes))


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


# --- tables ---------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> FileRows:
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
    return FileRows([PlacedRow(f"{path}, row {n}", item) for n, item in enumerate(items, start=1)])


TEXT_READERS: dict[str, Callable[[Path], FileRows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
"""Ending of a text file -> the function that reads it; also with .gz behind it."""
READERS: dict[str, Callable[[Path], FileRows]] = {**TEXT_READERS, ".parquet": _read_parquet}
"""File ending -> the function that reads such a file."""
