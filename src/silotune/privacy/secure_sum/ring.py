"""Numbers in fixed point, in the ring of 32-bit integers: what can be masked and summed exactly."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silotune.core.errors import ConfigError

BITS = 30
"""All clients together stay within 2**30, so that their sum has a sign of its own and can be told
from one that has gone around the ring."""

Words = NDArray[np.uint32]
Uniform = Callable[[int], NDArray[np.float64]]
"""count -> that many numbers in [0, 1)."""


@dataclass(frozen=True)
class Ring:
    """How numbers between -limit and limit become integers whose sum over all clients fits."""

    limit: float
    """Largest absolute value of a number; larger ones are cut to it. Above 0."""
    num_clients: int
    """Most clients whose numbers are summed."""

    def __post_init__(self) -> None:
        if not (0 < self.limit < math.inf and self.num_clients >= 1 and self.bits >= 1):
            raise ConfigError(
                f"numbers up to {self.limit:g} of {self.num_clients} clients do not fit into the "
                f"ring of 32-bit integers.\n  Use a smaller range, or fewer clients per round."
            )

    @property
    def bits(self) -> int:
        """Of one client's numbers, without their sign."""
        return BITS - math.ceil(math.log2(self.num_clients))

    @property
    def step(self) -> float:
        """Distance between neighbouring numbers."""
        return self.limit / 2**self.bits

    def encode(self, values: NDArray[np.float64], uniform: Uniform) -> tuple[Words, int]:
        """Numbers as words, and how many had to be cut.

        Rounding is stochastic, up with the probability of the remainder, so its error has mean 0
        and does not grow with the number of clients as that of a common rounding would.

        Args:
            values: Finite.
            uniform: Where the chances come from.
        """
        outside = int(np.count_nonzero(np.abs(values) > self.limit))
        scaled = np.clip(values, -self.limit, self.limit) / self.step
        return np.floor(scaled + uniform(len(values))).astype(np.int64).astype(np.uint32), outside

    def decode(self, total: Words) -> NDArray[np.float64]:
        """A sum of words as a sum of numbers, exactly."""
        return total.view(np.int32).astype(np.float64) * self.step
