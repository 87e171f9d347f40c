"""Which recipe a folder was created from, and when: a comment in the first line of its recipe."""

import time

from silotune.core.safe_text import one_line

BEGIN = "# recipe: "


def origin_line(name: str) -> str:
    """The first line of a new folder's recipe, with today's date; empty without a name."""
    return f"{BEGIN}{one_line(name)}, {time.strftime('%Y-%m-%d')}\n" if name else ""


def origin_of(text: str) -> tuple[str, str] | None:
    """The name and the day in a recipe's text; None if it does not say.

    >>> origin_of("# recipe: hospitals, 2026-01-31")
    ('hospitals', '2026-01-31')
    """
    line = text.split("\n", 1)[0]
    if not line.startswith(BEGIN):
        return None
    name, _, day = line.removeprefix(BEGIN).rpartition(", ")
    return name, day
