"""What a run may spend: the bytes that it sends, and the hours that it takes."""

from dataclasses import dataclass

from pydantic import Field

from silotune.errors import ConfigError
from silotune.types import Config


class BudgetConfig(Config):
    """Ceilings. The run ends before the round that would go beyond one."""

    bytes: int | None = Field(default=None, ge=1)
    """Of all messages with tensors, both ways, of all clients that answer. The last adapter below
    the ceiling is the result."""
    hours: float | None = Field(default=None, gt=0)
    """Of the whole run until its last score, by the clock of its machine; a resumed run goes on
    counting, and the time between its parts does not count. Judged before each round by the longest
    one so far, so the first is always done; a round that has begun is not cut."""


class PlanConfig(Config):
    """What is found out before the first round."""

    measure: bool = False
    """Train one step on the widest batch in a process of its own, as `silotune plan` does; the
    report then shows predicted memory and time beside the actual ones. Runs only: a comparison
    takes no notice of it."""


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


def has_time(hours: float | None, spent_s: float, *, round_s: float, last_s: float) -> bool:
    """Whether one more round, and the scoring of what comes of it, fit below a run's ceiling.

    Args:
        hours: `budget.hours`.
        spent_s: Seconds of the run so far.
        round_s: What the round is expected to take.
        last_s: What the scoring after it is expected to take.
    """
    return hours is None or spent_s + round_s + last_s <= 3600 * hours
