"""One row of a classification data set becomes a labelled text.

Knows the usual columns of such data. Does not know files, clients or tokens. Error messages name
the place and the column. The only values they show are labels, because these are classes, not what
a row says.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.errors import DataError, EmptyRowError
from silotune.core.wording import did_you_mean
from silotune.data.cells import FIX_EMPTY, check_characters, is_missing
from silotune.data.conversations import list_columns

LabelledText = dict[str, str]
"""{"text": ..., "label": ...}, and for a pair of texts also "text_pair"."""

FORMATS = (
    ("text",),
    ("sentence",),
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
)
"""Names of the text column, and of the second one for pairs, in public data sets."""

LONGEST = 40
"""Longest unknown label that a message shows, in characters. Anything longer is a text."""

HIDDEN = "-1"
"""Label of the rows of public test sets whose real labels are not published."""


def labelled_text(
    row: Mapping[str, Any],
    *,
    where: str,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    labels: Sequence[str] | None = None,
) -> LabelledText:
    """Turn one row into a labelled text.

    Args:
        row: Column names and values.
        where: Place of the row for messages, for example "data.csv:7".
        text: Column of the text; if absent, the longest of `FORMATS` that fits the columns.
        text_pair: Column of the second text of a pair; goes with `text`.
        label: Column of the label; "label" if absent. Numbers are read as text.
        labels: The valid labels; any label is valid if absent.

    Raises:
        DataError: A column is missing, a text is empty, or the label is not one of `labels`.

    Example:
        >>> labelled_text({"sentence": "Fine.", "label": 1}, where="data.csv:2")
        {'text': 'Fine.', 'label': '1'}
    """
    columns = (text, text_pair) if text is not None else _columns(row, where)
    found: LabelledText = {}
    for key, column in zip(("text", "text_pair"), columns, strict=False):
        if column is not None:
            found[key] = _text(row, column, where=where, setting=f"data.{key}")
    found["label"] = _label(row, label or "label", where=where, labels=labels)
    return found


def check_all_pairs(rows: Sequence[LabelledText], places: Sequence[str]) -> None:
    """Refuse a data set in which some rows are pairs and others are not.

    Raises:
        DataError: Names the first row that differs from the first row of all.
    """
    for row, where in zip(rows, places, strict=True):
        if ("text_pair" in row) != ("text_pair" in rows[0]):
            kinds = ("one text", "a pair") if "text_pair" in rows[0] else ("a pair", "one text")
            raise DataError(
                f"{where}: the row has {kinds[0]}, but the rows before it have {kinds[1]}.\n"
                "  Give every row the same columns, or name them: data.text, data.text_pair."
            )


def sorted_labels(rows: Sequence[LabelledText]) -> tuple[str, ...]:
    """All labels of the rows, each once: sorted by size if all are numbers, otherwise by name."""
    found = {row["label"] for row in rows}
    by_size = all(label.removeprefix("-").isdecimal() for label in found)
    # the order is the same in every process: "1" before "01"
    return tuple(sorted(found, key=lambda n: (int(n), len(n), n) if by_size else (0, 0, n)))


def _columns(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    fitting = [names for names in FORMATS if all(name in row for name in names)]
    if not fitting:
        known = "; ".join(" and ".join(names) for names in FORMATS)
        raise DataError(
            f"{where}: no known format fits the columns {list_columns(row)}.\n"
            f"  Accepted, in addition to a label: {known}.\n"
            '  For other columns set data.text = "a column", and for pairs also data.text_pair.'
        )
    return max(fitting, key=len)


def _text(row: Mapping[str, Any], column: str, *, where: str, setting: str) -> str:
    if column not in row:
        raise DataError(
            f"{where}: {setting} = '{column}': there is no such column."
            f"{did_you_mean(column, row)}\n  The columns are {list_columns(row)}."
        )
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        if is_missing(value) or isinstance(value, str):
            raise EmptyRowError(f"{where}: column '{column}' is empty.\n{FIX_EMPTY}")
        raise DataError(
            f"{where}: column '{column}' does not hold text.\n"
            "  Put the text there, or remove the row."
        )
    check_characters(value, where=where, what=f"column '{column}'")
    return value


def _label(row: Mapping[str, Any], column: str, *, where: str, labels: Sequence[str] | None) -> str:
    value = row.get(column)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # how pandas writes a column of integers with a gap
    if not isinstance(value, str | int | bool) or not str(value).strip():
        why = f"does not exist.{did_you_mean(column, row)}"
        if column in row:
            empty = is_missing(value) or isinstance(value, str)
            why = (
                "has no value." if empty else "has a value that is neither text nor a whole number."
            )
        raise DataError(
            f"{where}: the label column '{column}' {why}\n"
            "  Every row needs one label, which is text or a whole number. Set data.label to the "
            "column that holds it, or remove the row."
        )
    check_characters(str(value), where=where, what=f"column '{column}'")
    label = re.sub(r"^(-?\d+)\.0$", r"\1", str(value).strip())
    if labels is not None and label not in labels:
        shown = f"'{label}'" if len(label) <= LONGEST else f"(a text of {len(label)} characters)"
        known = ", ".join(f"'{name}'" for name in labels[:20])
        hint = " It marks rows without a public label: use another split." * (label == HIDDEN)
        raise DataError(
            f"{where}: column '{column}' has the unknown label {shown}.{hint}\n"
            f"  data.labels contains {known}. Add the label there, or remove the row."
        )
    if labels is None and label == HIDDEN:
        raise DataError(
            f"{where}: the label '{HIDDEN}' marks rows without a public label.\n"
            '  Use another split, for example data.eval_split = "validation". If it is a '
            'label like the others, list all labels: data.labels = ["-1", "1"].'
        )
    return label
