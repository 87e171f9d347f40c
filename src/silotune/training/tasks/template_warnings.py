"""What a chat template does to rows that nobody asked for: it leaves texts out, or has no end.

Knows rows as conversations and a tokenizer. Says how many rows, never which words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from silotune.core.safe_text import one_line
from silotune.core.wording import counted
from silotune.data.conversations import Conversation, Message
from silotune.data.template_traits import TemplateError, traits_of
from silotune.training.tasks.answer_spans import full_text, is_learned

THOUGHTS = re.compile(r"</?think>")
"""Marks around reasoning. Templates put other line breaks around them."""


def template_warnings(tokenizer: Any, rows: Iterable[Conversation]) -> list[str]:
    """What the template leaves out of these rows, moves in them, or takes for control tokens.

    Rows that the template refuses are passed over: preparing them says where they are.

    Args:
        tokenizer: With its chat template.
        rows: Conversations to learn or to score.
    """
    counts: Counter[str] = Counter()
    rendered: list[Conversation] = []
    for row in rows:
        try:
            text = full_text(tokenizer, row)
        except TemplateError:
            continue
        counts.update(set(_left_out(row, text)))
        has_system = any(m["role"] == "system" and m["content"].strip() for m in row)
        counts["moved"] += traits_of(tokenizer).refuses_system and has_system
        rendered.append(row)
    return [*_as_warnings(counts), *control_warnings(tokenizer, rendered)]


def control_warnings(tokenizer: Any, rows: Iterable[Conversation]) -> list[str]:
    """A warning if texts of rows contain what the model takes for control tokens."""
    count, named = 0, Counter[str]()
    control = [token for token in tokenizer.all_special_tokens if token.strip()]
    for row in rows:
        found = {t for t in control if any(t in m["content"] for m in row)}
        count += bool(found)
        named.update(found)
    if not count:
        return []
    names = ", ".join(f"'{one_line(token, longest=40)}'" for token, _ in named.most_common(3))
    verb = "contains" if count == 1 else "contain"
    return [
        f"{counted(count, 'row')} {verb} control tokens of the model as text ({names}), which the "
        "model reads as the end of a turn or the like; remove them"
    ]


def _left_out(row: Conversation, text: str) -> Iterator[str]:
    """Which kinds of text of a row are not in its rendering."""
    for message in row:
        for n, part in enumerate(_parts(message)):
            if part in text:
                continue
            if message["role"] != "assistant":
                yield message["role"]
            elif not is_learned(message):
                yield "context"
            else:
                yield "reasoning" if n < len(_parts(message)) - 1 else "assistant"


def _parts(message: Message) -> list[str]:
    """The pieces of a turn that a template may write with other blank space around them."""
    if "instruction" in message and "input" in message:
        pieces = [message["instruction"], message["input"]]
    else:
        pieces = THOUGHTS.split(message["content"])
    return [piece.strip() for piece in pieces if piece.strip()]


def _as_warnings(counts: Counter[str]) -> Iterator[str]:
    lost = {
        "reasoning": "the reasoning in the answers of {}, so it is not learned",
        "assistant": "an answer or a part of it in {}, so it is not learned",
        "context": "an answer that is only context in {}",
        "user": "a question or a part of it in {}",
        "system": "the system text of {}",
    }
    for kind, words in lost.items():
        if counts[kind]:
            left_out = words.format(counted(counts[kind], "row"))
            yield f"the chat template leaves out or changes {left_out}"
    if counts["moved"]:
        yield (
            "the chat template takes no system text, so it is put in front of the first question "
            f"({counted(counts['moved'], 'row')})"
        )
