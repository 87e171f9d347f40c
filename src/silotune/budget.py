"""What a run may spend: the bytes that it sends."""

from dataclasses import dataclass

from pydantic import Field

from silotune.errors import ConfigError
from silotune.types import Config


class BudgetConfig(Config):
    """Ceilings. The run ends before the round that would go beyond one."""

    bytes: int | None = Field(default=None, ge=1)
    """Of all messages with tensors, both ways, of all clients that answer. The last adapter below
    the ceiling is the result."""


@dataclass(frozen=True)
class RoundCost:
    """Bytes of the messages of one round, from what is known before it, if every client answers."""

    down: int
    """Bytes to one client: the adapter, and what the algorithm sends beside it."""
    up: int
    """Bytes from one client."""
    num_asked: int
    """Clients that train."""
    num_scoring: int
    """Other clients, which receive the adapter only to score it."""
    num_last: int
    """Clients that score the adapter after this round, if it is the last."""

    @property
    def bytes_down(self) -> int:
        """To all clients, without the scoring after the last round."""
        return (self.num_asked + self.num_scoring) * self.down

    @property
    def bytes_up(self) -> int:
        """From all clients."""
        return self.num_asked * self.up

    @property
    def last_bytes(self) -> int:
        """Of the scoring after the last round."""
        return self.num_last * self.down

    @property
    def size_bytes(self) -> int:
        """Of all messages, if this round is the last."""
        return self.bytes_down + self.bytes_up + self.last_bytes


def is_within(limit: int | None, spent: int, cost: RoundCost, *, first: bool) -> bool:
    """Whether a round, and the scoring of what comes of it, fit below a run's ceiling.

    Args:
        limit: `budget.bytes`.
        spent: Bytes of the rounds before.
        cost: Of the round.
        first: Whether there is no round before it.

    Raises:
        ConfigError: Not even the first round does.
    """
    if limit is None or spent + cost.size_bytes <= limit:
        return True
    if first:
        raise ConfigError(
            f"budget.bytes = {limit}, but one round sends {cost.size_bytes} bytes.\n"
            "  Raise it, or send less: a lower adapter.rank or sampling.fraction."
        )
    return False
