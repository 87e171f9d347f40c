"""A chat template is a program that may come from a server: it ends, and writes no more than texts.

transformers runs templates in Jinja's sandbox, which bounds what a template can reach, but neither
its time nor its output: five nested loops over a long text never end. Here every step of a template
is counted, in whatever thread it runs. A single step is not interrupted, so operations that can
take forever by themselves are refused before a template runs.
"""

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from silotune.core.errors import ConfigError

MAX_STEPS = 500_000
"""Most steps (lines and calls) of one rendering. A conversation of a hundred turns takes some
thousand."""
MAX_CPU_S = 2.0
"""Most processor time of one rendering."""
MAX_CHARACTERS = 4_000_000
"""Longest rendered text: several times what the longest contexts hold."""
MAX_TEMPLATE = 200_000
"""Longest template, in characters; the longest published ones have some ten thousand."""
MAX_INTEGER = 100_000
"""Largest number in a template."""
CHECK_EVERY = 32
SOURCE = "<template>"
"""What Jinja calls the file of a template that was given as text."""
SLOW = ("*", "**", "round")
"""Operators and filters of which one call can take hours, or all memory. Multiplying by a small
number that stands in the template is fine."""
SMALL = 1_000


class TemplateLimitError(ConfigError):
    """A chat template does not end, or writes too much."""


def check_operations(text: str) -> None:
    """Refuse a template that is too long or uses an operation that nothing could interrupt.

    Raises:
        TemplateLimitError: Names the operation.
    """
    from jinja2 import Environment, TemplateSyntaxError

    if len(text) > MAX_TEMPLATE:
        raise TemplateLimitError(
            f"data.template has {len(text)} characters, and {MAX_TEMPLATE} are allowed.\n"
            "  Shorten it."
        )
    try:
        tokens = [token for token in Environment().lex(text) if token[1] != "whitespace"]
    except TemplateSyntaxError:
        return  # whoever compiles it says where the mistake is
    for n, (line, kind, value) in enumerate(tokens):
        large = _integer(tokens[n]) > MAX_INTEGER
        slow = kind in ("operator", "name") and value in SLOW
        if value == "*" and any(0 <= _integer(near) <= SMALL for near in tokens[n - 1 : n + 2]):
            slow = False
        if large or slow:
            what = f"a number above {MAX_INTEGER}" if large else f"'{value}'"
            raise TemplateLimitError(
                f"data.template, line {line}: uses {what}, which could run for hours.\n"
                "  Write the template without it."
            )


def _integer(token: tuple[int, str, str]) -> int:
    """The value of an integer in a template; -1 for anything else."""
    _, kind, value = token
    return int(value.replace("_", ""), 0) if kind == "integer" else -1


def render_within_limits(render: Callable[[], str]) -> str:
    """Call a function that renders one conversation, and stop it if it goes on for too long.

    Raises:
        TemplateLimitError: It takes too many steps or too much time, or the text is too long.
    """
    deadline, count = time.thread_time() + MAX_CPU_S, 0

    def step(frame: FrameType, _event: str, _: Any) -> Any:
        nonlocal count
        count += 1
        # processor time, so that a busy machine stops no template
        if count > MAX_STEPS or (count % CHECK_EVERY == 0 and time.thread_time() > deadline):
            raise TemplateLimitError(
                f"data.template: one conversation takes more than {MAX_STEPS} steps or "
                f"{MAX_CPU_S:g} s.\n  Write a template without nested loops over texts."
            )
        return step if frame.f_code.co_filename == SOURCE else None

    before = sys.gettrace()
    sys.settrace(step)
    try:
        text = render()
    finally:
        sys.settrace(before)
    if len(text) > MAX_CHARACTERS:
        raise TemplateLimitError(
            f"data.template: one conversation becomes {len(text)} characters, and "
            f"{MAX_CHARACTERS} are allowed.\n  Write less text around the messages."
        )
    return text
