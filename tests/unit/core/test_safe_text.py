"""Foreign text never acts on a terminal, forges a line or becomes markup."""

import ast
import unicodedata
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import silotune
from silotune.core.safe_text import LONGEST, markdown, one_line, plain, shortened

SOURCE = Path(silotune.__file__).parent
HOSTILE = (
    "\x1b]0;title\x07\x1b[31mred\x1b[0m\n2026-01-01 00:00:00 north: FAKE LINE\r\v\x85\u2028\x00"
    "\u202egnp.exe\u2066<img src=x onerror=alert(1)>"
)


def acts(text: str) -> list[str]:
    """The characters of a line that would do something."""
    return [
        c
        for c in text
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(c)
        in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    ]


@given(st.text() | st.text(alphabet=st.characters(categories=["Cc", "Cs", "Cf", "Zl", "Zp"])))
def test_one_line_is_one_line_that_acts_on_nothing(text):
    shown = one_line(text)
    assert not acts(shown)
    assert len(shown.splitlines()) <= 1
    assert len(shown) <= LONGEST
    assert one_line(shown) == shown


@given(st.text(alphabet=st.characters(categories=["L", "N"]), max_size=LONGEST))
def test_letters_and_digits_of_any_script_stay(text):
    assert plain(text) == one_line(text) == text


def test_a_hostile_text_is_shown_as_words():
    assert one_line(HOSTILE).startswith("red 2026-01-01 00:00:00 north: FAKE LINE")
    assert "<img" not in markdown(HOSTILE).replace("\\<", "")


def test_a_long_error_keeps_its_fix():
    text = shortened("x" * 1_500_000 + "\n  Use the same recipe at this client.")
    assert len(text) <= LONGEST
    assert text.endswith("\n  Use the same recipe at this client.")
    assert shortened("short\n  fix") == "short\n  fix"


def test_nobody_else_decides_which_characters_are_safe():
    """Whoever filters characters alone forgets some of them."""
    for path in SOURCE.rglob("*.py"):
        if path.name in ("safe_text.py",):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"isprintable", "bidirectional"}, path
        texts = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not any("\x1b" in t or "\\x1b" in t or "\u202e" in t for t in texts), path
