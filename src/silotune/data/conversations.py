"""One row of any known format becomes a conversation.

Knows the formats that instruction data comes in, and texts with {column} holes for all others. Does
not know files, clients or tokens. Messages name the place and the column, never a value.
"""

import string
from collections.abc import Iterable, Mapping
from typing import Any

from silotune.core.errors import ConfigError, DataError, EmptyRowError
from silotune.core.wording import did_you_mean

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": ...}. Where a row has both, its
instruction and its input also stand apart, under these names."""

Conversation = tuple[Message, ...]
"""What a row teaches: at least one assistant turn; every assistant turn is an answer to learn."""

Row = Mapping[str, Any]

MEND_EMPTY = "  Fill it, remove the row, or leave out all such rows: data.skip_empty = true."

ROLES = ("system", "user", "assistant")


def conversation(
    row: Row,
    *,
    where: str,
    prompt: str | None = None,
    completion: str | None = None,
    system: str | None = None,
) -> Conversation:
    """Turn one row into a conversation.

    Without `prompt` and `completion` the row's columns tell its format, the first that fits:
    `messages`; `prompt` and `completion` (texts, or lists of messages); `instruction`, `input`
    (optional) and `output`; `question` and `answer`.

    Args:
        row: Column names and values. Columns that no format uses are ignored.
        where: Place of the row for messages, for instance "data.csv:7".
        prompt: Text with {column} holes that becomes the user's turn. Goes with `completion`.
        completion: Text with {column} holes that becomes the answer. Goes with `prompt`.
        system: Text of a system turn for a conversation that has none.

    Returns:
        The turns in order.

    Raises:
        DataError: No format fits, or a text is missing, empty or not a text.
        ConfigError: Only one of `prompt` and `completion` is given.

    Example:
        >>> row = {"question": "What is flu?", "answer": "An infection.", "source": "north"}
        >>> [turn["role"] for turn in conversation(row, where="data.csv:2", system="Be brief.")]
        ['system', 'user', 'assistant']
    """
    if prompt is not None and completion is not None:
        user = _fill(prompt, row, where=where, setting="data.prompt")
        answer = _fill(completion, row, where=where, setting="data.completion")
        turns = [_turn("user", user), _turn("assistant", answer)]
    elif prompt is None and completion is None:
        turns = _by_format(row, where)
    else:
        raise ConfigError(
            "data.prompt and data.completion belong together, one of them is missing.\n  Set both."
        )
    if system is not None and all(turn["role"] != "system" for turn in turns):
        turns = [_turn("system", system), *turns]
    return tuple(turns)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Cut a text with {column} holes into pairs of literal text and the column after it, or None.

    `{{` and `}}` stand for braces. A hole is a plain column name: anything more could reach beyond
    the row.

    Raises:
        ValueError: A brace is left open, or a hole is more than a column name.

    Example:
        >>> parse_template("Q: {question}")
        [('Q: ', 'question')]
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError:
        raise ValueError("has a single brace; write {{ or }} for a brace of the text") from None
    for _, column, spec, conversion in pieces:
        if column is None:
            continue
        if not column.strip() or spec or conversion or any(sign in column for sign in ".[]"):
            raise ValueError(
                "has a hole that is not a plain column name; write {column}, "
                "without '.', '[', '!' and ':', and rename columns that hold them"
            )
    return [(literal, column) for literal, column, _, _ in pieces]


def list_columns(columns: Iterable[str]) -> str:
    """Column names for a message: at most twenty.

    A name of more than 40 characters is only counted: in a file without a header line it is a row's
    own text.
    """
    names = [f"'{c}'" if len(c) <= 40 else f"(a name of {len(c)} characters)" for c in columns]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) + more) or "none"


def _by_format(row: Row, where: str) -> list[Message]:
    if "messages" in row:
        return _turns(row["messages"], where=where, column="messages", needs_answer=True)
    if "prompt" in row and "completion" in row:
        return [
            *_text_or_turns(row["prompt"], where=where, column="prompt", role="user"),
            *_text_or_turns(row["completion"], where=where, column="completion", role="assistant"),
        ]
    if "instruction" in row and "output" in row:
        asked = _text(row["instruction"], where=where, what="column 'instruction'")
        turn, extra = _turn("user", asked), row.get("input")
        if not is_missing(extra):
            extra = _text(extra, where=where, what="column 'input'", may_be_empty=True)
            if extra.strip():  # apart too, for templates that give the input a place of its own
                joined = _turn("user", f"{asked}\n\n{extra}")
                turn = {**joined, "instruction": asked, "input": extra}
        answer = _text(row["output"], where=where, what="column 'output'")
        return [turn, _turn("assistant", answer)]
    if "question" in row and "answer" in row:
        asked = _text(row["question"], where=where, what="column 'question'")
        answer = _text(row["answer"], where=where, what="column 'answer'")
        return [_turn("user", asked), _turn("assistant", answer)]
    raise DataError(
        f"{where}: no known format fits the columns {list_columns(row)}.\n"
        "  Accepted: messages; prompt and completion; instruction, input (optional) and output; "
        "question and answer.\n"
        '  For other columns set data.prompt = "{a column}" and data.completion = "{a column}".'
    )


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text_or_turns(value: object, *, where: str, column: str, role: str) -> list[Message]:
    if isinstance(value, list):
        answers = role == "assistant"
        return _turns(value, where=where, column=column, needs_answer=answers)
    return [_turn(role, _text(value, where=where, what=f"column '{column}'"))]


def _turns(value: object, *, where: str, column: str, needs_answer: bool) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: column '{column}' is not a list of messages, or an empty one.\n"
            '  Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}] '
            "in a .jsonl, .json or .parquet file."
        )
    turns = [
        _message(item, where=where, what=f"column '{column}', message {n}")
        for n, item in enumerate(value, start=1)
    ]
    if needs_answer and all(turn["role"] != "assistant" for turn in turns):
        raise DataError(
            f"{where}: column '{column}' has no assistant turn, so there is nothing to learn.\n"
            "  Add the answer as a message of role assistant, or remove the row."
        )
    return turns


def _message(item: object, *, where: str, what: str) -> Message:
    if not isinstance(item, Mapping) or not {"role", "content"} <= item.keys():
        raise DataError(
            f"{where}: {what} is not an object with role and content.\n"
            '  Write each message as {"role": "user", "content": "..."}.'
        )
    if item["role"] not in ROLES:
        raise DataError(f"{where}: {what} has an unknown role.\n  Use one of: {', '.join(ROLES)}.")
    # An empty system turn is a known way to switch off a model's own system text.
    may_be_empty = item["role"] == "system"
    content = _text(item["content"], where=where, what=what, may_be_empty=may_be_empty)
    # rows that were converted before keep their instruction and input apart
    apart = {key: item[key] for key in ("instruction", "input") if isinstance(item.get(key), str)}
    return {**_turn(item["role"], content), **(apart if len(apart) == 2 else {})}


def _fill(template: str, row: Row, *, where: str, setting: str) -> str:
    filled, from_row = "", ""
    pieces = parse_template(template)
    for literal, column in pieces:
        filled += literal
        if column is None:
            continue
        if column not in row:
            raise DataError(
                f"{where}: {setting} asks for column '{column}', which is not there."
                f"{did_you_mean(column, row)}\n  The columns are {list_columns(row)}."
            )
        text = _text(row[column], where=where, what=f"column '{column}'", may_be_empty=True)
        filled, from_row = filled + text, from_row + text
    # The fixed part of "Answer: {answer}" must not hide that the row itself says nothing.
    if not filled.strip() or (any(c for _, c in pieces) and not from_row.strip()):
        columns = list_columns(dict.fromkeys(c for _, c in pieces if c is not None))
        raise EmptyRowError(
            f"{where}: {setting} is empty in this row (from {columns}).\n{MEND_EMPTY}"
        )
    return filled


def is_missing(value: object) -> bool:
    """Whether a cell is absent: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def _text(value: object, *, where: str, what: str, may_be_empty: bool = False) -> str:
    if is_missing(value):
        raise EmptyRowError(f"{where}: {what} is missing.\n{MEND_EMPTY}")
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {what} is of type {type(value).__name__}, text is needed.\n"
            "  Write the text itself there, or build it from columns with data.prompt and "
            "data.completion."
        )
    if not may_be_empty and not value.strip():
        raise EmptyRowError(f"{where}: {what} is empty.\n{MEND_EMPTY}")
    check_whole(value, where=where, what=what)
    return value


def check_whole(text: str, *, where: str, what: str) -> None:
    """Refuse half of a character: JSON lets it through, tokenizers do not.

    Raises:
        DataError: Names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {what} holds half of a character (a lone surrogate).\n"
            "  Write the file again as UTF-8, or remove the row."
        ) from None
