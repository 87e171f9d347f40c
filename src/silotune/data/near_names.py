"""Names that a person would take for one: 'TRUE' and 'True', or two spellings of one accent.

Labels and client names come from columns, and two files may write the same one differently. They
stay separate, because only their owner knows; but somebody is told.
"""

import unicodedata
from collections.abc import Iterable, Iterator

from silotune.core.safe_text import one_line

LONGEST = 40
"""Longest name that a warning shows, in characters."""


def near_names(what: str, names: Iterable[str]) -> Iterator[str]:
    """A warning for each group of names that differ in capitals, blanks or Unicode form only.

    Args:
        what: What they name, in the plural.
        names: The names, each once.

    Example:
        >>> list(near_names("labels", ["True", "False", "TRUE"]))
        ["labels 'TRUE' and 'True' differ in capitals, blanks or Unicode form only, and count as \
different; if they are one, write them alike"]
    """
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(_folded(name), []).append(name)
    for group in groups.values():
        if len(group) > 1:
            *most, last = map(_shown, group)
            yield (
                f"{what} {', '.join(most)} and {last} differ in capitals, blanks or Unicode form "
                "only, and count as different; if they are one, write them alike"
            )


def _folded(name: str) -> str:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join(folded.split())


def _shown(name: str) -> str:
    """The name in quotes; with codes where its characters would look like others."""
    if len(name) > LONGEST:
        return f"(a text of {len(name)} characters)"
    looks_plain = unicodedata.normalize("NFKC", name) == name == one_line(name)
    return f"'{name}'" if looks_plain else ascii(name)
