"""Tables: at every width, no word, number or client's name is broken, and nothing is left out."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections import Counter
from contextlib import redirect_stdout
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from silotune.cli.tables import GAP, print_table

COMPARISON = [
    ("client", "train rows", "held-out rows", "base", "local", "federated", "federated: fedprox"),
    ("university-hospital-north", "1200", "250", "2.153", "1.853", "1.753", "1.743"),
    ("St. Mary", "90", "25", "2.211", "1.953", "1.853", "1.843"),
    ("mean over clients", "", "", "2.182", "1.903", "1.803", "1.793"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(rows, *, terminal: bool, columns: int = 80) -> list[str]:
    """The lines that a table takes, without colours."""
    stream = Terminal() if terminal else io.StringIO()
    env = {"COLUMNS": str(columns), "TERM": "xterm", "NO_COLOR": "1", "FORCE_COLOR": ""}
    with mock.patch.dict("os.environ", env), redirect_stdout(stream):
        print_table(rows)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()


def words_of(lines) -> Counter[str]:
    return Counter(word for line in lines for word in line.split())


def test_a_pipe_gets_every_row_on_one_line():
    # it was 240 characters wide, and a wider table was folded inside words
    wide = [(*row, *(f"federated: {n} {'x' * 40}" for n in range(8))) for row in COMPARISON]
    lines = shown(wide, terminal=False)
    assert len(lines) == len(wide)
    assert min(map(len, lines)) > 400


def test_headers_wrap_at_spaces_where_a_terminal_is_narrow():
    # "held-out" was broken into "held-o" and "ut", and names in the middle
    lines = shown(COMPARISON[:3], terminal=True, columns=79)
    assert [line.rstrip() for line in lines] == [
        "                           train  held-out                           federated:",
        "client                      rows      rows   base  local  federated     fedprox",
        "university-hospital-north   1200       250  2.153  1.853      1.753       1.743",
        "St. Mary                      90        25  2.211  1.953      1.853       1.843",
    ]


def test_a_real_terminal_of_80_columns_is_not_overrun():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    code = f"from silotune.cli.tables import print_table; print_table({COMPARISON!r})"
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    env |= {"TERM": "xterm"}
    subprocess.run([sys.executable, "-c", code], stdout=theirs, env=env, check=True)
    os.close(theirs)
    seen = ""
    try:
        while part := os.read(ours, 4096):
            seen += part.decode()
    except OSError:  # Linux reports the end of a terminal in this way
        pass
    os.close(ours)
    assert "\x1b[1m" in seen  # the header is bold
    lines = re.sub(r"\x1b\[[0-9;]*m", "", seen).splitlines()
    assert len(lines) == len(COMPARISON) + 1  # the header takes two lines
    assert max(map(len, lines)) <= 80


def test_columns_that_do_not_fit_follow_below_with_the_names_repeated():
    lines = [line.rstrip() for line in shown(COMPARISON, terminal=True, columns=60)]
    first, second = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert len(first) >= len(COMPARISON) <= len(second)
    for name, *_ in COMPARISON:
        assert sum(line.startswith(name) for line in first) == 1
        assert sum(line.startswith(name) for line in second) == 1


def test_a_long_text_beside_a_name_wraps_at_spaces():
    why = "its job ended with exit status 1; see consortium/runs/2026-11-21-hospitals/job.log"
    lines = shown([("run", "waiting for"), ("first", why)], terminal=True, columns=60)
    assert max(map(len, lines)) <= 60
    assert words_of(lines) == words_of(["run waiting for first", why])


TEXT = st.text("abcß界-.[]0123", min_size=1, max_size=9)
NAME = st.lists(TEXT, min_size=1, max_size=4).map(" ".join)
CELL = st.lists(TEXT, max_size=4).map(" ".join)


@given(
    rows=st.integers(1, 6).flatmap(
        lambda width: st.lists(
            st.tuples(NAME, *(CELL for _ in range(width - 1))), min_size=1, max_size=5
        )
    ),
    columns=st.integers(10, 120),
)
def test_at_every_width_all_words_are_whole_and_fit_unless_one_alone_does_not(rows, columns):
    lines = shown(rows, terminal=True, columns=columns)
    names = max(cell_len(row[0]) for row in rows[1:]) if len(rows) > 1 else 0
    names = max([names, *(cell_len(word) for word in rows[0][0].split())])
    rest = [word for row in rows for cell in row[1:] for word in cell.split()]
    longest = max(map(cell_len, rest), default=0)
    if names + GAP + longest <= columns:
        assert max(map(cell_len, lines), default=0) <= columns
    found, wanted = words_of(lines), words_of(cell for row in rows for cell in row[1:])
    assert set(found) == set(wanted) | set(words_of(row[0] for row in rows))
    assert all(found[word] >= times for word, times in wanted.items())
    for name, *_ in rows[1:]:  # a name is never on two lines
        assert any(line.startswith(name) for line in lines)


def test_what_a_name_holds_cannot_act_on_the_terminal():
    rows = [("client",), ("\x1b]52;c;c2VjcmV0\x07north",)]
    assert shown(rows, terminal=True) == ["client", "north "]
