"""The rules of the FlowerTune LLM leaderboard's tracks, for recipes that claim to follow one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TrackName = Literal["general", "finance", "medical", "code"]


@dataclass(frozen=True)
class Track:
    """What a track of the leaderboard prescribes."""

    data: str
    """Hub id of the data set."""
    num_clients: int
    max_bytes: int = 200_000 * 1_000_000
    """Limit for all messages of a run. The track says 200,000 MB and counts in 1024 * 1024 bytes;
    this is the stricter reading."""


TRACKS: Mapping[str, Track] = {
    "general": Track("flwrlabs/alpaca-gpt4", 20),
    "finance": Track("flwrlabs/fingpt-sentiment-train", 50),
    "medical": Track("flwrlabs/medical-meadow-medical-flashcards", 20),
    "code": Track("flwrlabs/code-alpaca-20k", 10),
}
"""The four tracks by name."""
