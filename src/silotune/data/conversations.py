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

Message = dict[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": ...}. If a row has both an
instruction and an input, its turn also contains them separately, under these names."""

Conversation = tuple[Message, ...]
"""What a row teaches: at least one assistant turn; every assistant turn is an answer to learn."""

Row = Mapping[str, Any]

FIX_EMPTY = "  Fill it in, remove the row, or skip all such rows: data.skip_empty = true."

CONVERSATIONS = (
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "input", "output"),
    ("question", "answer"),
)
"""The columns of the known formats, in the order in which they are tried; input is optional."""

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

    Without `prompt` and `completion`, the row has the first of these formats that fits its columns:
    `messages`; `prompt` and `completion` (texts, or lists of messages); `instruction`, `input`
    (optional) and `output`; `question` and `answer`.

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
        turns = [_turn("user", user), _turn("assistant", answer)]
    elif prompt is None and completion is None:
        turns = _by_format(row, where)
    else:
        raise ConfigError(
            "data.prompt and data.completion belong together, but one of them is missing.\n"
            "  Set both."
        )
    if system is not None and all(turn["role"] != "system" for turn in turns):
        turns = [_turn("system", system), *turns]
    return tuple(turns)


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
            if extra.strip():  # also separately, for templates that have a place for the input
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
            f"{where}: column '{column}' is not a list of messages, or is empty.\n"
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
            "  Add the answer as a message with the role assistant, or remove the row."
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
    # An empty system turn is a common way to switch off a model's own system text.
    may_be_empty = item["role"] == "system"
    content = _text(item["content"], where=where, what=what, may_be_empty=may_be_empty)
    # rows that were converted before keep their separate instruction and input
    separate = {
        key: item[key] for key in ("instruction", "input") if isinstance(item.get(key), str)
    }
    return {**_turn(item["role"], content), **(separate if len(separate) == 2 else {})}


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
        text = _text(row[column], where=where, what=f"column '{column}'", may_be_empty=True)
        filled, from_row = filled + text, from_row + text
    # The fixed part of "Answer: {answer}" must not hide that the row itself is empty.
    if not filled.strip() or (any(c for _, c in pieces) and not from_row.strip()):
        columns = list_columns(dict.fromkeys(c for _, c in pieces if c is not None))
        raise EmptyRowError(
            f"{where}: {setting} is empty in this row (from {columns}).\n{FIX_EMPTY}"
        )
    return filled


def is_missing(value: object) -> bool:
    """Whether a cell is absent: None, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def _text(value: object, *, where: str, what: str, may_be_empty: bool = False) -> str:
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
