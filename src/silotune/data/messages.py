"""A cell with a list of messages becomes turns: the spellings of OpenAI's format and of ShareGPT.

{"role": "user", "content": ...} and {"from": "human", "value": ...} are the same turn, and content
may be a list of parts that are text. What cannot be kept is refused: a conversation without its
tool calls or its images would teach something else. Knows no files and no tokens.
"""

import json
from collections.abc import Mapping
from typing import Any

from silotune.core.errors import DataError, EmptyRowError
from silotune.data.cells import FIX_EMPTY, is_blank, is_missing, text_of

Message = dict[str, Any]
"""One turn: {"role": "system" | "user" | "assistant", "content": ...}. If a row has both an
instruction and an input, its turn also contains them separately, under these names. An assistant
turn with "train": False is context: it is read, and not learned."""

ROLES = ("system", "user", "assistant")
SPELLINGS = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
}
"""What data sets call a role, in small letters -> the role."""
TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
"""Roles of calls and of what they return."""
CALLS = ("tool_calls", "function_call")
"""Keys of an assistant turn that calls something."""
WEIGHTS = ("weight", "train", "trainable")
"""Keys that say of an assistant turn whether it is learned: 0 or false, 1 or true."""
PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""


def turn(role: str, content: str) -> Message:
    """One turn."""
    return {"role": role, "content": content}


def turns(value: object, *, where: str, column: str, needs_answer: bool) -> list[Message]:
    """The turns of a list of messages, or of such a list as JSON text.

    Args:
        value: The cell.
        where: Place of the row for messages.
        column: Its column.
        needs_answer: Whether an assistant turn that is learned must be among them.

    Raises:
        EmptyRowError: The cell is empty, or a message is.
        DataError: The cell or one of its messages cannot be used.
    """
    if is_blank(value):
        raise EmptyRowError(f"{where}: column '{column}' is missing.\n{FIX_EMPTY}")
    if isinstance(value, str):
        value = _from_json(value)
    if not isinstance(value, list) or not value:
        raise DataError(
            f"{where}: column '{column}' is not a list of messages, or is empty.\n"
            '  Write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}];'
            "\n  in a CSV file as JSON text (json.dumps)."
        )
    found = [
        _message(item, where=where, what=f"column '{column}', message {n}")
        for n, item in enumerate(value, start=1)
    ]
    answers = [one for one in found if one["role"] == "assistant"]
    if needs_answer and not answers:
        raise DataError(
            f"{where}: column '{column}' has no assistant turn, so there is nothing to learn.\n"
            "  Add the answer as a message with the role assistant, or remove the row."
        )
    if needs_answer and not any(one.get("train", True) for one in answers):
        raise DataError(
            f"{where}: no assistant turn of column '{column}' is learned: all have weight 0.\n"
            "  Set the weight of an answer to 1, or remove the row."
        )
    return found


def _from_json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _message(item: object, *, where: str, what: str) -> Message:
    keys = item.keys() if isinstance(item, Mapping) else ()
    if not isinstance(item, Mapping) or not (
        {"role", "from"} & {*keys} and {"content", "value", *CALLS} & {*keys}
    ):
        raise DataError(
            f"{where}: {what} is not an object with role and content.\n"
            '  Write each message as {"role": "user", "content": "..."}.'
        )
    role = _role(_first(item, "role", "from"), where=where, what=what)
    if any(item.get(key) for key in CALLS):
        raise _tools(where, what)
    content = _first(item, "content", "value")
    if isinstance(content, list):
        content = _joined(content, where=where, what=what)
    # An empty system turn is a common way to switch off a model's own system text.
    content = text_of(content, where=where, what=what, may_be_empty=role == "system")
    # rows that were converted before keep their separate instruction and input
    separate = {
        key: item[key] for key in ("instruction", "input") if isinstance(item.get(key), str)
    }
    found = {**turn(role, content), **(separate if len(separate) == 2 else {})}
    if role == "assistant" and not _is_learned(item, where=where, what=what):
        found["train"] = False
    return found


def _first(item: Mapping[Any, Any], *keys: str) -> Any:
    """The first of these values that is there: a table has all columns in every row."""
    return next((item[key] for key in keys if not is_missing(item.get(key))), None)


def _role(value: object, *, where: str, what: str) -> str:
    name = value.strip().lower() if isinstance(value, str) else ""
    if name in TOOLS:
        raise _tools(where, what)
    if name not in SPELLINGS:
        raise DataError(f"{where}: {what} has an unknown role.\n  Use one of: {', '.join(ROLES)}.")
    return SPELLINGS[name]


def _tools(where: str, what: str) -> DataError:
    return DataError(
        f"{where}: {what} calls a tool or holds what it returned; this cannot be learned yet.\n"
        "  Remove the row, or write the call as text in the assistant's turn and the result as "
        "text in a user's turn."
    )


def _joined(parts: list[Any], *, where: str, what: str) -> str:
    """The texts of a content that is a list of parts, one after another."""
    texts: list[str] = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in PARTS:
            raise DataError(
                f"{where}: {what} has a part that is not text.\n"
                '  Only {"type": "text", "text": "..."} can be learned. Remove the part or the row.'
            )
        texts.append(text_of(part.get("text"), where=where, what=what, may_be_empty=True))
    return "".join(texts)


def _is_learned(item: Mapping[Any, Any], *, where: str, what: str) -> bool:
    given = {key: item[key] for key in WEIGHTS if not is_missing(item.get(key))}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(
                f"{where}: {what} has a '{key}' that is neither 0 nor 1.\n"
                "  Write 0 (or false) for an answer that is only read, 1 (or true) for one that is "
                "learned."
            )
    return all(given.values())
