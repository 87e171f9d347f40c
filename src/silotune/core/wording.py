"""Sizes, durations, counts and near names, in words."""

import difflib
from collections.abc import Iterable


def human_bytes(size: float) -> str:
    """1 843 200 -> '1.8 MB'. Decimal units, as on a bill."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def human_seconds(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def shortened(text: str, most: int = 80) -> str:
    """A text for an error message: its beginning, if it is long.

    >>> shortened("a" * 100, most=3)
    'aaa...'
    """
    return text if len(text) <= most else f"{text[:most]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' with the known name closest to `name`; empty if none is close."""
    if len(name) > 200:
        return ""  # no name of ours is so long, and comparing takes long
    by_folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" Did you mean '{by_folded[near[0]]}'?" if near else ""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun, singular or plural.

    >>> counted(1, "client"), counted(3, "client"), counted(0, "reply", "replies")
    ('1 client', '3 clients', '0 replies')
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
