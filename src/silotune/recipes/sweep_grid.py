"""What a sweep tries: keys with several values, listed runs, or ranges to search.

Texts in, texts out: the recipe checks whether a key exists and whether a value fits it.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from silotune.core.errors import ConfigError

NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
RANGE = re.compile(rf"\s*({NUMBER})\s*\.\.\s*({NUMBER})\s*")


@dataclass(frozen=True)
class Range:
    """Numbers between two bounds, both included."""

    low: float
    high: float
    log: bool
    """Whether they are drawn on a logarithmic scale."""

    @property
    def whole(self) -> bool:
        """Whether they are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)


@dataclass(frozen=True)
class Axis:
    """A key, and the values to try for it."""

    key: str
    values: tuple[str, ...] | Range


def is_swept(override: str) -> bool:
    """Whether an override has more than one value.

    >>> [is_swept(text) for text in ("a=1,2", "a=1", "a=[1, 2]", "a='1, 2'", "a=1..9")]
    [True, False, False, False, True]
    """
    _, _, text = override.partition("=")
    return len(split_values(text)) > 1 or RANGE.fullmatch(text) is not None


def split_values(text: str) -> list[str]:
    """Split a list at its commas, except those inside brackets, braces and quotes.

    >>> split_values('1, [2, 3], "a,b"')
    ['1', '[2, 3]', '"a,b"']
    """
    return _split(text, ",")


def split_keys(text: str) -> list[str]:
    """Split a run that is written as one text into its overrides.

    >>> split_keys('train.lr=1e-3  adapter.targets=["q_proj", "v_proj"]')
    ['train.lr=1e-3', 'adapter.targets=["q_proj", "v_proj"]']
    """
    return [part for part in _split(text, " ") if part]


def _split(text: str, mark: str) -> list[str]:
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{":
            depth += 1
        elif letter in "]}":
            depth -= 1
        elif letter == mark and depth <= 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]


def read_axes(texts: Iterable[str], *, search: bool) -> list[Axis]:
    """The keys of a sweep.

    Args:
        texts: As in `SweepConfig.keys`.
        search: Whether ranges are allowed.

    Raises:
        ConfigError: A key has no values, appears twice, or has an invalid range.
    """
    axes: list[Axis] = []
    for text in texts:
        key, equals, given = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"'{text}': write key=value,value, for example train.lr=1e-4,1e-3.")
        axis = Axis(key.strip(), _values(key.strip(), given, search=search))
        if axis.key in [other.key for other in axes]:
            raise ConfigError(f"{axis.key} appears twice.\n  Give all its values in one place.")
        axes.append(axis)
    return axes


def _values(key: str, given: str, *, search: bool) -> tuple[str, ...] | Range:
    first, *more = values = split_values(given)
    if found := RANGE.fullmatch(first):
        if not search:
            raise ConfigError(
                f"{key}={given}: a range needs a search.\n"
                "  Give the values themselves, or the number of runs to try: --search 20."
            )
        low, high = (float(n) if re.search(r"[.eE]", n) else int(n) for n in found.groups())
        if more not in ([], ["log"]) or low >= high or ("log" in more and low <= 0):
            raise ConfigError(
                f"{key}={given}: is not a range.\n  Write low..high, or low..high,log for numbers "
                "above 0 on a logarithmic scale, such as learning rates: train.lr=1e-5..1e-3,log."
            )
        return Range(low, high, bool(more))
    if "" in values:
        raise ConfigError(f"{key}={given}: a value is empty.\n  Remove the comma, or quote it.")
    if len(set(values)) < len(values):
        raise ConfigError(f"{key}={given}: a value appears twice.\n  Remove one.")
    return tuple(values)


def combinations(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Every combination of values as overrides; the last key changes fastest.

    >>> combinations([Axis("a", ("1", "2")), Axis("b", ("x",))])
    [('a=1', 'b=x'), ('a=2', 'b=x')]
    """
    lists: list[list[str]] = []
    for axis in axes:
        assert not isinstance(axis.values, Range), "ranges are searched"
        lists.append([f"{axis.key}={value}" for value in axis.values])
    return list(itertools.product(*lists))
