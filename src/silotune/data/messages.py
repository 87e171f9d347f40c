"""A cell with a list of messages becomes turns: the spellings of OpenAI's format and of ShareGPT.

{"role": "user", "content": ...} and {"from": "human", "value": ...} are the same turn, and content
may be a list of parts that are text. What cannot be kept is refused: a conversation without its
images would teach something else. Knows no files and no tokens.
"""

import json
from collections.abc import Mapping
from typing import Any

from silotune.core.errors import DataError, EmptyRowError
from silotune.data.cells import FIX_EMPTY, is_blank, is_missing, text_of
from silotune.data.tool_turns import CALLER, CALLS, RESULTS, calls_of, tools_of

Message = dict[str, Any]
"""One turn: {"role": "system" | "user" | "assistant" | "tool", "content": ...}. If a row has both
an instruction and an input, its turn also contains them separately, under these names. An assistant
turn with "train": False is context: it is read, and not learned. An assistant turn may have
"tool_calls". The tools that a row offers are in its first turn, under "tools"."""

ROLES = ("system", "user", "assistant", "tool")
SPELLINGS = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    CALLER: "assistant",
    **dict.fromkeys(RESULTS, "tool"),
}
"""What data sets call a role, in small letters -> the role."""
WEIGHTS = ("weight", "train", "trainable")
"""Keys that say of an assistant turn whether it is learned: 0 or false, 1 or true."""
OF_A_RESULT = ("name", "tool_call_id")
"""Keys of a tool's turn that some templates write."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which some data sets keep the reasoning of an answer."""
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
    if isinstance(value[0], Mapping) and (tools := tools_of(value[0].get("tools"), where=where)):
        found[0]["tools"] = tools
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
    name = _first(item, "role", "from")
    role, content = _role(name, where=where, what=what), _first(item, "content", "value")
    calls = next((item[key] for key in CALLS if item.get(key)), None)
    if name.strip().lower() == CALLER:
        calls, content = content, None
    if calls is not None and role != "assistant":
        raise DataError(
            f"{where}: {what} calls a tool, but is not the assistant's.\n"
            "  Give it the role assistant, or remove the call."
        )
    if role == "assistant":
        _check_reasoning(item, where=where, what=what)
    if isinstance(content, list):
        content = _joined(content, where=where, what=what)
    if is_missing(content) and (calls is not None or role == "tool"):
        content = ""
    # An empty system turn is a common way to switch off a model's own system text.
    may_be_empty = role in ("system", "tool") or calls is not None
    content = text_of(content, where=where, what=what, may_be_empty=may_be_empty)
    # rows that were converted before keep their separate instruction and input
    separate = {
        key: item[key] for key in ("instruction", "input") if isinstance(item.get(key), str)
    }
    found = {**turn(role, content), **(separate if len(separate) == 2 else {})}
    if calls is not None:
        found["tool_calls"] = calls_of(calls, where=where, what=what)
    if role == "tool":
        found |= {key: item[key] for key in OF_A_RESULT if isinstance(item.get(key), str)}
    if role == "assistant" and not _is_learned(item, where=where, what=what):
        found["train"] = False
    return found


def _first(item: Mapping[Any, Any], *keys: str) -> Any:
    """The first of these values that is there: a table has all columns in every row."""
    return next((item[key] for key in keys if not is_missing(item.get(key))), None)


def _role(value: object, *, where: str, what: str) -> str:
    name = value.strip().lower() if isinstance(value, str) else ""
    if name not in SPELLINGS:
        raise DataError(f"{where}: {what} has an unknown role.\n  Use one of: {', '.join(ROLES)}.")
    return SPELLINGS[name]


def _check_reasoning(item: Mapping[Any, Any], *, where: str, what: str) -> None:
    """Refuse reasoning beside the content: models write it in different ways, or in none."""
    beside = [key for key in REASONING if isinstance(item.get(key), str) and item[key].strip()]
    if beside:
        raise DataError(
            f"{where}: {what} has its reasoning under '{beside[0]}', which is not read.\n"
            "  Write it into the content (<think>, the reasoning, </think>, the answer), or remove "
            "the key to learn answers alone."
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
