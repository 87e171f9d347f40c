"""Tools, calls of them and what they returned, as chat templates of transformers take them.

OpenAI's spellings (`tool_calls`, `function_call`, arguments as JSON text) and ShareGPT's become the
same turns. Knows no files, no templates and no tokens.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from silotune.core.errors import DataError
from silotune.data.cells import is_blank

Tool = dict[str, Any]
"""A tool that a model may call, or a call: {"type": "function", "function": {"name": ..., ...}}."""

RESULTS = ("tool", "function", "function_response", "observation", "ipython")
"""What data sets call the role of a turn with what a tool returned, in small letters."""
CALLER = "function_call"
"""ShareGPT's role for an assistant turn that is a call, written as JSON text."""
CALLS = ("tool_calls", "function_call")
"""Keys of an assistant turn that calls something."""
DEEPEST = 50


def calls_of(value: object, *, where: str, what: str) -> list[Tool]:
    """The calls of one turn: a list of them, a single one, or either as JSON text.

    Returns:
        Calls as in transformers' templates, with their arguments as an object and with further keys
        such as "id" as they were. Keys whose value is null are left out: in a table, every call has
        the arguments of all calls.

    Raises:
        DataError: It is not a call, or its arguments are not an object.
    """
    try:
        found = _plain(_parsed(value))
        return [_call(one) for one in (found if isinstance(found, list) else [found])]
    except ValueError:
        raise DataError(
            f"{where}: {what} has a tool call without a name, or with arguments that are not an "
            'object.\n  Write {"type": "function", "function": {"name": "...", "arguments": '
            '{"...": ...}}}.'
        ) from None


def tools_of(value: object, *, where: str) -> list[Tool]:
    """The tools that a row offers: a list of schemas, or such a list as JSON text.

    Raises:
        DataError: It is something else, or a tool has no name.
    """
    if is_blank(value):
        return []
    try:
        found = _plain(_parsed(value))
        if not isinstance(found, list):
            raise ValueError
        return [_named(tool) for tool in cast(list[Any], found)]
    except ValueError:
        raise DataError(
            f"{where}: column 'tools' is not a list of tools with names.\n"
            '  Write [{"type": "function", "function": {"name": "...", "description": "...", '
            '"parameters": {...}}}],\n  in a CSV file as JSON text (json.dumps).'
        ) from None


def _call(given: Any) -> Tool:
    whole = _named(given)
    arguments = _plain(_parsed(whole["function"].get("arguments", {})))
    if isinstance(arguments, str) and not arguments.strip():
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError
    return {**whole, "function": {**whole["function"], "arguments": arguments}}


def _named(given: Any) -> Tool:
    """A tool or a call in the form that templates expect; it may be given by its function alone."""
    is_whole = isinstance(given, dict) and "function" in given
    whole = cast(Tool, given if is_whole else {"type": "function", "function": given})
    function = whole["function"]
    name = cast(Tool, function).get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError
    return whole


def _parsed(value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else value
    except RecursionError:
        raise ValueError from None


def _plain(value: Any, depth: int = 0) -> Any:
    """A value as JSON has it, without the keys whose value is null.

    Raises:
        ValueError: JSON has no such value, or text holds half a character.
    """
    if depth > DEEPEST:
        raise ValueError
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {_plain(k): _plain(v, depth + 1) for k, v in items if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in cast(list[Any], value)]
    if isinstance(value, str):
        value.encode()
    elif value is not None and not isinstance(value, bool | int | float):
        raise ValueError
    return value
