"""A conversation that knows which row of which file it came from, for errors after reading."""

from collections.abc import Iterable
from typing import Any

from silotune.data.conversations import Message


class PlacedConversation(tuple[Message, ...]):
    """The same turns, equal to a plain tuple of them, with a place for messages.

    Attributes:
        where: For example "data.csv:7". Parts and copies of the turns do not have it.
    """

    where: str

    def __new__(cls, turns: Iterable[Message], where: str) -> "PlacedConversation":
        """Keep the turns as they are."""
        made = super().__new__(cls, turns)
        made.where = where
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel to another process with the place."""
        return PlacedConversation, (tuple(self), self.where)


def place_of(row: object) -> str:
    """Where a row was read, or "" if that is not known."""
    return str(getattr(row, "where", ""))
