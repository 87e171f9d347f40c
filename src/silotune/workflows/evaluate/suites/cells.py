"""Read the cells of a suite's rows: valid texts, numbers and labels, or an error.

Messages name the location and the column, never a value.
"""

from collections.abc import Mapping
from pathlib import Path

from silotune.core.errors import DataError
from silotune.data.conversations import Row, is_missing


def text_of(row: Row, column: str, where: str) -> str:
    """A non-empty text."""
    value = row[column]
    if is_missing(value) or not str(value).strip():
        raise DataError(f"{where}: column '{column}' is empty.\n  Fill it, or remove the row.")
    if isinstance(value, list | Mapping):
        raise DataError(
            f"{where}: column '{column}' is of type {type(value).__name__}, but must be text.\n"
            "  Write the text itself."
        )
    try:
        str(value).encode()
    except UnicodeEncodeError:  # JSON lets half a character through; tokenizers do not
        raise DataError(
            f"{where}: column '{column}' contains half a character (a lone surrogate).\n"
            "  Write the file again as UTF-8, or remove the row."
        ) from None
    return str(value)


def texts_of(row: Row, column: str, where: str) -> list[str]:
    """A list of texts; it may be empty."""
    value = row[column]
    listed: list[object] = list(value) if isinstance(value, list | tuple) else [None]
    if not all(isinstance(one, str) for one in listed):
        raise DataError(
            f"{where}: column '{column}' is not a list of texts.\n"
            "  Write it as in the published file, in JSON or Parquet."
        )
    return [text_of({column: one}, column, where) for one in listed]


def number_of(row: Row, column: str, where: str) -> float:
    """A number; in CSV files it is text."""
    try:
        return float(text_of(row, column, where))
    except ValueError:
        raise DataError(
            f"{where}: column '{column}' is not a number.\n  Fix it, or remove the row."
        ) from None


def pick(labels: Mapping[int, str], row: Row, column: str, where: str) -> str:
    """The label for a number."""
    number = number_of(row, column, where)
    if number in labels:
        return labels[int(number)]
    known = ", ".join(f"{i} ({label})" for i, label in labels.items())
    raise DataError(f"{where}: column '{column}' is none of {known}.\n  Fix it, or remove the row.")


def check_gold(gold: str, options: Mapping[str, str], column: str, where: str) -> str:
    """The gold label, if it is an option."""
    if gold not in options:
        raise DataError(
            f"{where}: column '{column}' is none of the options {', '.join(options)}.\n"
            "  Fix it, or remove the row."
        )
    return gold


def id_of(row: Row, where: str) -> str:
    """The row's own id, or its location."""
    own = row.get("id")
    return Path(where).name if is_missing(own) or not str(own).strip() else str(own)
