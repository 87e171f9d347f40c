"""A chat template is a program that may come from a server: it ends, and writes no more than texts.

transformers runs templates in Jinja's sandbox, which bounds what a template can reach, but neither
its time nor its output: five nested loops over a long text never end. Here every step of a template
is counted, in whatever thread it runs. A single step is not interrupted, so operations that can
take forever by themselves are refused before a template runs.

Counting takes three quarters of a rendering. So a template that has been counted once is given a
moment without it, in which no machine takes as many steps as are allowed; only a rendering that
needs longer is begun again and counted. Refused is the same either way.
"""

import signal
import sys
import threading
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
MOMENT_CPU_S = 0.005
"""Processor time in which fewer than MAX_STEPS are taken: 10 ns for each, and Python needs more."""
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


def render_within_limits(render: Callable[[], str], *, template: str) -> str:
    """Call a function that renders one conversation, and stop it if it goes on for too long.

    Args:
        render: Called once or twice.
        template: What it renders.

    Raises:
        TemplateLimitError: It takes too many steps or too much time, or the text is too long.
    """
    text = _in_a_moment(render) if template in _COUNTED else None
    if text is None:
        text = _counting(render)
        _COUNTED.add(template)  # it is compiled now: a moment would often end while it is
    if len(text) > MAX_CHARACTERS:
        raise TemplateLimitError(
            f"data.template: one conversation becomes {len(text)} characters, and "
            f"{MAX_CHARACTERS} are allowed.\n  Write less text around the messages."
        )
    return text


_COUNTED: set[str] = set()


class _MomentOverError(BaseException):
    """Raised inside a rendering; nothing that catches an Exception takes it for its own."""


class _Moment:
    """A rendering that a signal ends. The handler stays: one signal may still be on its way."""

    is_running = False

    def end(self, _signal: int, _frame: FrameType | None) -> None:
        if self.is_running:
            raise _MomentOverError


_MOMENT = _Moment()


def _in_a_moment(render: Callable[[], str]) -> str | None:
    """The text; None if it takes longer than `MOMENT_CPU_S`, or if no signal could end it."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        return None
    handler = signal.getsignal(signal.SIGVTALRM)
    if handler == signal.SIG_DFL and not any(signal.getitimer(signal.ITIMER_VIRTUAL)):
        signal.signal(signal.SIGVTALRM, _MOMENT.end)
    elif handler != _MOMENT.end:  # somebody else's
        return None
    began = time.thread_time()
    _MOMENT.is_running = True
    try:
        # again and again, should an interruption be lost in a finalizer
        signal.setitimer(signal.ITIMER_VIRTUAL, MOMENT_CPU_S, MOMENT_CPU_S)
        text = render()
    except _MomentOverError:
        return None
    finally:
        _MOMENT.is_running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return text if time.thread_time() - began < MOMENT_CPU_S else None


def _counting(render: Callable[[], str]) -> str:
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
        return render()
    finally:
        sys.settrace(before)
