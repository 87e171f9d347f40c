"""Foreign text made safe: names, codes, labels and answers that others chose.

The only place that knows which characters act on a terminal, forge a line of a log, or are markup.
Text is kept as it came in files that programs read (JSON escapes it), and made safe where it is
shown: in terminals, logs, errors, cards and pages.
"""

import re
import unicodedata
from hashlib import sha256

_SEQUENCES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor movement
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\)"  # titles, links, the clipboard
    r"|\x1b[ -/]*[0-~]",
    re.DOTALL,
)
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that make a terminal show letters in another order than they are in."""
_BREAKS = "\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"
"""What `str.splitlines`, a terminal or a viewer takes for the end of a line."""
_MARKUP = re.compile(r"([\\`*_\[\]<>|&~$])")
LONGEST = 1000
"""Most characters of one foreign text in a line."""


def plain(text: str) -> str:
    """Remove what controls a terminal: escape sequences, control characters, reordering.

    Line breaks and tabs stay: for texts of several lines. What a model says or somebody pastes is
    shown and never obeyed.
    """
    text = text.replace("\r\n", "\n").replace("\u2028", " ").replace("\u2029", " ")
    text = _SEQUENCES.sub("", text)
    return "".join(
        c
        for c in text
        if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _REORDERING)
    )


def one_line(text: str, *, longest: int = LONGEST) -> str:
    r"""A foreign text as part of a line: as `plain`, with line breaks as spaces, and not too long.

    >>> one_line("north\n2026-01-01 12:00:00 south: ok")
    'north 2026-01-01 12:00:00 south: ok'
    """
    for separator in _BREAKS:
        text = text.replace(separator, " ")
    text = plain(text.replace("\t", " "))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def visible(text: str) -> str:
    """A row's text with its control characters as codes: a preview shows what a model is given."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def shortened(text: str, *, longest: int = LONGEST) -> str:
    """An error's text, cut in the middle if it is too long: its last line says how to fix it."""
    if len(text) <= longest:
        return text
    _, _, fix = text.rpartition("\n")
    fix = fix[:300]
    return f"{text[: longest - len(fix) - 5]} ...\n{fix}"


def markdown(text: str) -> str:
    r"""A foreign text as a part of Markdown that is shown as it is written.

    >>> print(markdown("<img src=x> [a](b)"))
    \<img src=x\> \[a\](b)
    """
    return _MARKUP.sub(r"\\\1", one_line(text))


def folder_name(client: str) -> str:
    """A file name for a client: its name if that is safe, else a part of it with a fingerprint."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,60}", client):
        return client
    readable = re.sub(r"[^A-Za-z0-9]+", "-", client).strip("-")[:40]
    return f"{readable or 'client'}-{sha256(client.encode()).hexdigest()[:8]}"
