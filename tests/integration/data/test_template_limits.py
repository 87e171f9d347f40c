"""A chat template from a server ends within seconds, in any thread, and writes no endless text."""

import signal
import threading
import time

import pytest

from silotune.core.errors import ConfigError
from silotune.data import template_limits
from silotune.data.chat_templates import TEMPLATES, render, resolve_template
from silotune.data.template_limits import (
    MAX_CHARACTERS,
    TemplateLimitError,
    check_operations,
    render_within_limits,
)
from tests.conftest import CHATML, build_tokenizer

TALK = (
    {"role": "user", "content": "a question " * 500},
    {"role": "assistant", "content": "an answer " * 500},
)
TEXT, LIST = "messages[0]['content']", "messages[0]['content'].split()"


def loops(over: str, body: str = "") -> str:
    """Five loops, one inside the other; a text of 5,500 letters makes 5e18 steps of them."""
    names = "abcde"
    begin = "".join(f"{{% for {name} in {over} %}}" for name in names)
    return begin + body + "{% endfor %}" * len(names)


ENDLESS = {
    "over a text": loops(TEXT),
    "over a text, with output": loops(TEXT, "x"),
    "over a list": loops(LIST),
    "over ranges": loops("range(99999)"),
    "one loop that calls filters": (
        "{% for a in range(99999) %}{% set b = range(99999) | map('string') | list %}{% endfor %}"
    ),
    "a condition of a loop": (
        "{% for a in range(99999) if range(99999) | select | list %}{% endfor %}"
    ),
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a loop that calls itself": (
        "{% for a in [1, 2] recursive %}{{ loop([1, 2]) if loop.depth < 90 }}{% endfor %}"
    ),
}


def stops(work) -> float:
    """Processor seconds until work is stopped by the limit, and by nothing else."""
    began = time.thread_time()
    with pytest.raises(TemplateLimitError):
        work()
    return time.thread_time() - began


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_template_is_stopped(kind):
    """Regression: a nested loop in a recipe's template hung the worker until it was killed."""
    tokenizer = build_tokenizer(ENDLESS[kind])
    assert stops(lambda: render(tokenizer, TALK, ask=False)) < 10


def test_it_is_stopped_in_another_thread_too():
    tokenizer, found = build_tokenizer(ENDLESS["over a text"]), []
    work = threading.Thread(
        target=lambda: found.append(stops(lambda: render(tokenizer, TALK, ask=False))), daemon=True
    )
    work.start()
    work.join(60)
    assert found


def test_a_template_that_is_endless_for_any_row_is_refused_with_the_recipe():
    assert stops(lambda: resolve_template(CHATML + ENDLESS["over ranges"])) < 10


@pytest.mark.parametrize(
    "operation",
    [
        "{{ 10 ** 10 ** 9 }}",
        "{{ messages | length ** 99 }}",
        "{{ 3.5 | round(99, 'floor') }}",
        "{% set n = messages | length %}{{ 'a' * n }}",
        "{{ 'a' * 1001 }}",
        "{{ 'a'.center(9999999999) }}",
        "{{ 'a'.center(0xFFFFFFFF) }}",
        "{{ 'a' }}" * 30_000,
    ],
    ids=lambda text: text[:40],
)
def test_an_operation_that_nothing_could_interrupt_is_refused(operation):
    with pytest.raises(TemplateLimitError, match=r"data\.template"):
        check_operations(operation)
    with pytest.raises(ConfigError):
        resolve_template(CHATML + operation)


@pytest.mark.parametrize(
    "text",
    [
        *(template for template in TEMPLATES.values() if template),
        CHATML,
        "{{ '=' * 40 }}{{ 2 * loop.index }}{{ 1_000 }}{{ 7 % 2 }}{{ messages[-1] }}",
        "{# 9999999999 ** round #} 9999999999 ** round is only text",
    ],
    ids=lambda text: text[:40],
)
def test_ordinary_templates_are_not_refused(text):
    check_operations(text)


def test_a_long_conversation_is_within_the_limits():
    """A hundred turns of 10,000 characters are more than the longest contexts hold."""
    turns = [dict(TALK[n % 2], content="a " * 5000) for n in range(200)]
    for template in [CHATML, *filter(None, TEMPLATES.values())]:
        assert len(render(build_tokenizer(template), turns, ask=False)) > 10**6


def test_an_endless_text_is_refused():
    with pytest.raises(TemplateLimitError, match="becomes 4000001 characters"):
        render_within_limits(lambda: "x" * (MAX_CHARACTERS + 1), template="x")


# --- a moment without counting --------------------------------------------------------------------

HIDDEN = CHATML + (
    "{% if messages[0]['content'] == 'now' %}" + loops("range(99999)") + "{% endif %}"
)
"""Does no harm until a row asks for it."""
ORDINARY = ({"role": "user", "content": "later"}, {"role": "assistant", "content": "yes"})
NOW = ({"role": "user", "content": "now"}, {"role": "assistant", "content": "yes"})


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """An entry for each rendering that was counted."""
    found, counting = [], template_limits._counting
    monkeypatch.setattr(template_limits, "_COUNTED", set())
    # a collection of garbage can take longer than the real moment
    monkeypatch.setattr(template_limits, "MOMENT_CPU_S", 0.25)
    monkeypatch.setattr(
        template_limits, "_counting", lambda render: found.append(1) or counting(render)
    )
    return found


def test_a_template_is_counted_once_and_again_when_it_takes_long(counted):
    tokenizer = build_tokenizer(HIDDEN)
    first, second = (render(tokenizer, ORDINARY, ask=False) for _ in range(2))
    assert first == second
    assert len(counted) == 1
    for _ in range(3):
        assert stops(lambda: render(tokenizer, NOW, ask=False)) < 10
    assert len(counted) == 4
    assert render(tokenizer, ORDINARY, ask=False) == first
    assert len(counted) == 4


def test_what_takes_longer_than_a_moment_is_rendered_all_the_same(counted, monkeypatch):
    long = ({"role": "user", "content": "a " * 500}, ORDINARY[1]) * 2_000
    tokenizer = build_tokenizer(CHATML)
    render(tokenizer, ORDINARY, ask=False)
    monkeypatch.setattr(template_limits, "MOMENT_CPU_S", 0.001)
    assert render(tokenizer, long, ask=False).count("yes") == 2_000
    assert len(counted) == 2


def test_in_another_thread_every_rendering_is_counted(counted):
    tokenizer = build_tokenizer(HIDDEN)
    render(tokenizer, ORDINARY, ask=False)
    found = []

    def work() -> None:
        render(tokenizer, ORDINARY, ask=False)
        found.append(stops(lambda: render(tokenizer, NOW, ask=False)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert found
    assert len(counted) == 3


def test_a_signal_that_somebody_else_uses_is_left_alone(counted):
    tokenizer, heard = build_tokenizer(HIDDEN), []
    before = signal.signal(signal.SIGVTALRM, lambda *_: heard.append(1))
    try:
        render(tokenizer, ORDINARY, ask=False)  # which looks at the template, too
        counted.clear()
        render(tokenizer, ORDINARY, ask=False)
        stops(lambda: render(tokenizer, NOW, ask=False))
        assert len(counted) == 2
        assert not heard
    finally:
        signal.signal(signal.SIGVTALRM, before)


def test_a_signal_that_comes_late_ends_nothing(counted):
    tokenizer = build_tokenizer(CHATML)
    for _ in range(2):
        render(tokenizer, ORDINARY, ask=False)
    assert len(counted) == 1
    signal.raise_signal(signal.SIGVTALRM)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_debugger_or_a_coverage_tool_goes_on_as_before():
    import sys

    def mine(*_):
        return mine

    before = sys.gettrace()
    sys.settrace(mine)
    try:
        render(build_tokenizer(), TALK, ask=False)
        assert sys.gettrace() is mine
        stops(lambda: render(build_tokenizer(ENDLESS["over a text"]), TALK, ask=False))
        assert sys.gettrace() is mine
    finally:
        sys.settrace(before)
