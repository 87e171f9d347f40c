"""What a run must keep to: the bytes that it may send, and the rules of a leaderboard's track."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from silotune.types import Config

MB = 1_000_000
"""Bytes in a megabyte. Flower's trackers count in 1024 * 1024, so this ceiling is the lower one."""


class LimitsConfig(Config):
    """What the run must keep to."""

    communication_mb: float | None = Field(default=None, gt=0)
    """Megabytes (10^6 bytes) that all messages with tensors may come to, both ways and over all
    clients. The run ends before the round that would go beyond; its last adapter is the result."""
    track: Literal["general", "finance", "medical", "code"] | None = None
    """Keep to the rules of this track of the FlowerTune LLM leaderboard: its data set, its number
    of clients, its ceiling for communication."""


@dataclass(frozen=True)
class Track:
    """What a track of the leaderboard prescribes."""

    data: str
    """Hub id of the data set."""
    num_clients: int
    communication_mb: float = 200_000.0


TRACKS: Mapping[str, Track] = {
    "general": Track("flwrlabs/alpaca-gpt4", 20),
    "finance": Track("flwrlabs/fingpt-sentiment-train", 50),
    "medical": Track("flwrlabs/medical-meadow-medical-flashcards", 20),
    "code": Track("flwrlabs/code-alpaca-20k", 10),
}
"""The four tracks by name."""


@dataclass(frozen=True)
class RoundCost:
    """Bytes of the messages of one round, from what is known before it."""

    down: int
    """Bytes to one client: the adapter, and what the algorithm sends beside it."""
    up: int
    """Bytes from one client."""
    num_asked: int
    """Clients that train."""
    num_scoring: int
    """Clients that receive the adapter to score it, in this round or at the end."""

    @property
    def size_bytes(self) -> int:
        """Of all messages, if every client answers."""
        return self.num_asked * (self.down + self.up) + self.num_scoring * self.down
