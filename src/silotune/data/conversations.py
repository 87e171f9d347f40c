"""One row of any known format becomes a conversation.

Knows the usual formats of instruction data, and templates with {column} placeholders for all
others. Does not know files, clients or tokens. Error messages name the place and the column, never
a value.
"""

import string
from collections.abc import Iterable, Mapping
from typing import Any

from silotune.core.errors import ConfigError, DataError, EmptyRowError
from silotune.core.wording import did_you_mean
from silotune.data.cells import FIX_EMPTY, is_blank, is_missing, text_of
from silotune.data.messages import Message, turn, turns
from silotune.data.tool_turns import tools_of

Conversation = tuple[Message, ...]
"""What a row teaches: at least one assistant turn; every assistant turn is an answer to learn,
unless it says "train": False."""

Row = Mapping[str, Any]

CONVERSATIONS = (
    ("messages", "tools"),
    ("prompt", "completion", "tools"),
    ("instruction", "input", "output"),
    ("question", "answer"),
    ("conversations", "tools"),
)
"""The columns of the known formats, in the order in which they are tried."""

OPTIONAL = ("input", "tools")

TEXT = "text"
"""The column of a row that is only a text, and the role of its turn."""


def conversation(
    row: Row,
    *,
    where: str,
    prompt: str | None = None,
    completion: str | None = None,
    system: str | None = None,
) -> Conversation:
    """Turn one row into a conversation.

    Without `prompt` and `completion`, the row has the first of these formats whose columns it has
    and fills: `messages`; `prompt` and `completion` (texts, or lists of messages); `instruction`,
    `input` (optional) and `output`; `question` and `answer`; `conversations`. Lists of messages may
    have `tools` beside them.

    Args:
        row: Column names and values. Columns that no format uses are ignored.
        where: Place of the row for messages, for example "data.csv:7".
        prompt: Template with {column} placeholders for the user's turn. Goes with `completion`.
        completion: Template with {column} placeholders for the answer. Goes with `prompt`.
        system: Text of a system turn for a conversation that has none.

    Returns:
        The turns in order.

    Raises:
        DataError: No format fits, or a text is missing, empty or not a string.
        ConfigError: Only one of `prompt` and `completion` is given.

    Example:
        >>> row = {"question": "What is flu?", "answer": "An infection.", "source": "north"}
        >>> [turn["role"] for turn in conversation(row, where="data.csv:2", system="Be brief.")]
        ['system', 'user', 'assistant']
    """
    if prompt is not None and completion is not None:
        user = _fill(prompt, row, where=where, setting="data.prompt")
        answer = _fill(completion, row, where=where, setting="data.completion")
        found = [turn("user", user), turn("assistant", answer)]
    elif prompt is None and completion is None:
        found = _by_format(row, where)
    else:
        raise ConfigError(
            "data.prompt and data.completion belong together, but one of them is missing.\n"
            "  Set both."
        )
    return tuple(with_system(found, system))


def with_system(found: list[Message], system: str | None) -> list[Message]:
    """The same turns behind a system turn, if there is a text for one and they have none."""
    if system is None or any(one["role"] == "system" for one in found):
        return found
    first = dict(found[0])
    offered = {"tools": first.pop("tools")} if "tools" in first else {}
    return [{**turn("system", system), **offered}, first, *found[1:]]


def plain_text(row: Row, *, where: str, column: str) -> Message:
    """A row's text as a turn of nobody's, all of which is learned.

    Args:
        row: Column names and values. All other columns are ignored.
        where: Place of the row for messages.
        column: The column of the text.

    Raises:
        DataError: There is no such column, or its text is missing, empty or not a string.
    """
    if column not in row:
        raise DataError(
            f"{where}: there is no column '{column}' with a text.{did_you_mean(column, row)}\n"
            f"  Set data.text to the column that holds it; the columns are {list_columns(row)}.\n"
            '  For questions with answers, set task = "instruct".'
        )
    return turn(TEXT, text_of(row[column], where=where, what=f"column '{column}'"))


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs: literal text, and the {column} after it or None.

    `{{` and `}}` are literal braces. A placeholder is a plain column name: anything more could
    reach beyond the row.

    Raises:
        ValueError: A brace is not closed, or a placeholder is more than a column name.

    Example:
        >>> parse_template("Q: {question}")
        [('Q: ', 'question')]
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError:
        raise ValueError("has a single brace; write {{ or }} for a literal brace") from None
    for _, column, spec, conversion in pieces:
        if column is None:
            continue
        if not column.strip() or spec or conversion or any(sign in column for sign in ".[]"):
            raise ValueError(
                "has a placeholder that is not a plain column name; write {column} "
                "without '.', '[', '!' or ':', and rename columns that contain them"
            )
    return [(literal, column) for literal, column, _, _ in pieces]


def list_columns(columns: Iterable[str]) -> str:
    """Column names for a message: at most twenty.

    Of a name with more than 40 characters, only the length is shown: in a file without a header
    line, the name is the text of a row.
    """
    names = [f"'{c}'" if len(c) <= 40 else f"(a name of {len(c)} characters)" for c in columns]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) + more) or "none"


def _by_format(row: Row, where: str) -> list[Message]:
    there = [names for names in CONVERSATIONS if {*names} - {*OPTIONAL} <= row.keys()]
    # a table in which rows of several formats meet has the columns of all of them in every row
    filled = [n for n in there if not any(is_blank(row[c]) for c in n if c not in OPTIONAL)]
    match next(iter(filled or there), None):
        case ("messages", _) | ("conversations", _) as names:
            found = turns(row[names[0]], where=where, column=names[0], needs_answer=True)
            return _with_tools(found, row, where)
        case ("prompt", "completion", _):
            found = [
                *_text_or_turns(row["prompt"], where=where, column="prompt", role="user"),
                *_text_or_turns(row["completion"], where=where, column="completion"),
            ]
            is_talk = isinstance(row["prompt"], list) or isinstance(row["completion"], list)
            return _with_tools(found, row, where) if is_talk else found
        case ("instruction", "input", "output"):
            asked, answer = _texts(row, "instruction", "output", where=where)
            return [user_turn(asked, row.get("input"), where), turn("assistant", answer)]
        case ("question", "answer"):
            asked, answer = _texts(row, "question", "answer", where=where)
            return [turn("user", asked), turn("assistant", answer)]
        case _:
            raise _no_format(row, where)


def _with_tools(found: list[Message], row: Row, where: str) -> list[Message]:
    """The same turns; the first of them says which tools the row offers, if it does."""
    tools = tools_of(row.get("tools"), where=where)
    return [{**found[0], "tools": tools}, *found[1:]] if tools else found


def _no_format(row: Row, where: str) -> DataError:
    text_only = (
        '\n  To learn whole texts, set task = "text"; to learn them as answers, set data.prompt = '
        '"Write a note."\n  and data.completion = "{text}".'
    )
    if {"chosen", "rejected"} <= row.keys():
        return DataError(
            f"{where}: no known format fits the columns {list_columns(row)}.\n"
            '  To learn that chosen is better than rejected, set task = "prefer". To learn the '
            "chosen answers\n  alone, set data.prompt and data.completion, for example "
            '"{prompt}" and "{chosen}".'
        )
    return DataError(
        f"{where}: no known format fits the columns {list_columns(row)}.\n"
        "  Accepted: messages; prompt and completion; instruction, input (optional) and output; "
        "question and answer; conversations.\n"
        '  For other columns set data.prompt = "{a column}" and data.completion = "{a column}".'
        + (TEXT in row)
        * text_only
    )


def user_turn(asked: str, extra: object, where: str) -> Message:
    """An instruction with its input, which may be missing, as a turn of the user."""
    if is_missing(extra):
        return turn("user", asked)
    extra = text_of(extra, where=where, what="column 'input'", may_be_empty=True)
    if not extra.strip():
        return turn("user", asked)
    # also separately, for templates that have a place for the input
    return {**turn("user", f"{asked}\n\n{extra}"), "instruction": asked, "input": extra}


def _texts(row: Row, *columns: str, where: str) -> list[str]:
    """The texts of some columns. What cannot be fixed by skipping empty rows is said first."""
    found: list[str] = []
    empty: EmptyRowError | None = None
    for column in columns:
        try:
            found.append(text_of(row[column], where=where, what=f"column '{column}'"))
        except EmptyRowError as error:
            empty = empty or error
    if empty is not None:
        raise empty
    return found


def _text_or_turns(
    value: object, *, where: str, column: str, role: str = "assistant"
) -> list[Message]:
    if isinstance(value, list):
        answers = role == "assistant"
        return turns(value, where=where, column=column, needs_answer=answers)
    return [turn(role, text_of(value, where=where, what=f"column '{column}'"))]


def _fill(template: str, row: Row, *, where: str, setting: str) -> str:
    filled, from_row = "", ""
    pieces = parse_template(template)
    for literal, column in pieces:
        filled += literal
        if column is None:
            continue
        if column not in row:
            raise DataError(
                f"{where}: {setting} uses column '{column}', which does not exist."
                f"{did_you_mean(column, row)}\n  The columns are {list_columns(row)}."
            )
        text = text_of(row[column], where=where, what=f"column '{column}'", may_be_empty=True)
        filled, from_row = filled + text, from_row + text
    # The fixed part of "Answer: {answer}" must not hide that the row itself is empty.
    if not filled.strip() or (any(c for _, c in pieces) and not from_row.strip()):
        columns = list_columns(dict.fromkeys(c for _, c in pieces if c is not None))
        raise EmptyRowError(
            f"{where}: {setting} is empty in this row (from {columns}).\n{FIX_EMPTY}"
        )
    return filled
