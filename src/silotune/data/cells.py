"""One cell becomes a text, or an error that names its place and its column, never its value."""

from silotune.core.errors import DataError, EmptyRowError

FIX_EMPTY = "  Fill it in, remove the row, or skip all such rows: data.skip_empty = true."


def is_missing(value: object) -> bool:
    """Whether a cell is absent: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def is_blank(value: object) -> bool:
    """Whether a cell is absent, or a text without a letter."""
    return is_missing(value) or (isinstance(value, str) and not value.strip())


def text_of(value: object, *, where: str, what: str, may_be_empty: bool = False) -> str:
    """A cell as text; numbers are written out.

    Args:
        value: The cell.
        where: Place of the row for messages.
        what: The cell in words, for example "column 'answer'".
        may_be_empty: Whether a text without a letter is accepted.

    Raises:
        EmptyRowError: It is missing or empty.
        DataError: It is not a text.
    """
    if is_missing(value):
        raise EmptyRowError(f"{where}: {what} is missing.\n{FIX_EMPTY}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {what} has the type {type(value).__name__}, but must be text.\n"
            "  Put the text there, or build it from columns with data.prompt and "
            "data.completion."
        )
    if not may_be_empty and not value.strip():
        raise EmptyRowError(f"{where}: {what} is empty.\n{FIX_EMPTY}")
    check_characters(value, where=where, what=what)
    return value


def check_characters(text: str, *, where: str, what: str) -> None:
    """Refuse half a character: JSON accepts it, tokenizers do not.

    Raises:
        DataError: The text contains one; the message names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {what} contains half a character (a lone surrogate).\n"
            "  Save the file again as UTF-8, or remove the row."
        ) from None
