"""Whether a chat template writes the tools of a row, every call and every result.

Many templates pass over them: a conversation without its calls would teach something else. Found by
rendering the row once more, with stand-ins in place of names, arguments and results.
"""

from collections.abc import Iterator
from typing import Any

from silotune.core.errors import DataError
from silotune.data.chat_templates import render
from silotune.data.conversations import Conversation, Message
from silotune.data.template_traits import TemplateError
from silotune.data.tool_turns import Tool

OFFERED, CALLS, RESULTS = "the tools that a row offers", "calls of tools", "what tools returned"


def check_tools(tokenizer: Any, messages: Conversation) -> None:
    """Refuse a row with tools that the template leaves out.

    Raises:
        DataError: Says what is left out.
    """
    pieces: list[tuple[str, str]] = []
    changed = tuple(_stand_ins(messages, pieces))
    if not pieces:
        return
    text = _text(tokenizer, changed)
    left_out = [
        what for what in (CALLS, RESULTS) if any(p not in text for k, p in pieces if k == what)
    ]
    if "tools" in changed[0]:
        bare = {key: value for key, value in changed[0].items() if key != "tools"}
        if any(p not in text for k, p in pieces if k == OFFERED) or text == _text(
            tokenizer, (bare, *changed[1:])
        ):
            left_out.insert(0, OFFERED)
    if left_out:
        raise DataError(
            f"the chat template does not write {' and '.join(left_out)}, so this row would teach "
            "something else.\n"
            "  Use a model whose chat template knows tools, or set data.template to a file with a "
            "template that does.\n  Otherwise remove the row, or write the call as text in the "
            "assistant's turn and the result as text in a user's turn."
        )


def _text(tokenizer: Any, messages: Conversation) -> str:
    try:
        return render(tokenizer, messages, ask=False)
    except TemplateError:
        return ""


def _stand_ins(messages: Conversation, pieces: list[tuple[str, str]]) -> Iterator[Message]:
    """The same turns with other names, arguments and results, which are added to `pieces`."""
    names: dict[str, str] = {}

    def another(kind: str) -> str:
        pieces.append((kind, f"x{len(pieces)}x"))
        return pieces[-1][1]

    def renamed(tool: Tool, kind: str) -> Tool:
        name = tool["function"]["name"]
        # a call has the name of its tool: a template may look for it
        names[name] = names[name] if name in names else another(kind)
        pieces.append((kind, names[name]))
        return {**tool, "function": {**tool["function"], "name": names[name]}}

    for message in messages:
        changed = dict(message)
        if "tools" in message:
            changed["tools"] = [renamed(tool, OFFERED) for tool in message["tools"]]
        if "tool_calls" in message:
            calls = [renamed(call, CALLS) for call in message["tool_calls"]]
            for call in calls:
                call["function"]["arguments"] = {another(CALLS): another(CALLS)}
            changed["tool_calls"] = calls
        if message["role"] == "tool":
            changed["content"] = another(RESULTS)
            if message.get("name") in names:
                changed["name"] = names[message["name"]]
        yield changed
