"""What a run may spend: the bytes that it sends."""

from dataclasses import dataclass

from pydantic import Field

from silotune.types import Config


class BudgetConfig(Config):
    """Ceilings. The run ends before the round that would go beyond one."""

    bytes: int | None = Field(default=None, ge=1)
    """Of all messages with tensors, both ways, of all clients that answer. The last adapter below
    the ceiling is the result."""


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
