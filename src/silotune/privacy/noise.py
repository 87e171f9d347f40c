"""Sources of noise: the operating system, or a seed for tests and paired experiments.

Reference:
    Holohan and Braghin 2021, "Secure Random Sampling in Differential Privacy". arXiv:2107.10138:
    a sum of several Gaussians hides what the rounding of a single one reveals (Mironov 2012, "On
    Significance of the Least Significant Bits for Differential Privacy").
"""

import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Noise = Callable[[Sequence[int], float], Tensor]
"""(shape, standard deviation) -> fresh Gaussian noise, float64."""

NUM_SUMMED = 4
"""Gaussians summed for each number: an attack on the rounding has to guess all four."""


def secure_noise(shape: Sequence[int], std: float) -> Tensor:
    """Gaussian noise from the system's cryptographic source (getrandom); no seed, no state."""
    count = math.prod(shape)
    total = np.zeros(count)
    for _ in range(NUM_SUMMED):
        total += _box_muller(count)
    return torch.as_tensor(total * (std / math.sqrt(NUM_SUMMED))).reshape(tuple(shape))


def secure_uniform(count: int) -> Tensor:
    """Numbers in (0, 1) from the same source, float64, which nobody can predict."""
    return torch.as_tensor(_uniform(count))


def secure_seeds(count: int) -> list[int]:
    """Seeds from the same source, for generators whose draws nobody else sees."""
    return (np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(1)).tolist()


def _uniform(count: int) -> np.ndarray:
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53  # never 0


def _box_muller(count: int) -> np.ndarray:
    """Standard Gaussians from uniform numbers with 53 bits (Box and Muller 1958)."""
    pairs = (count + 1) // 2
    uniform = _uniform(2 * pairs)
    radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
    angle = 2.0 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


def seeded_uniform(generator: torch.Generator) -> Callable[[int], Tensor]:
    """The same numbers in [0, 1) for the same generator: for simulations only."""

    def draw(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    return draw


def seeded_seeds(generator: torch.Generator) -> Callable[[int], list[int]]:
    """The same seeds for the same generator: for simulations only."""

    def draw(count: int) -> list[int]:
        return [int(n) for n in torch.randint(2**63 - 1, (count,), generator=generator)]

    return draw


def seeded_noise(generator: torch.Generator) -> Noise:
    """The same noise for the same generator: for simulations only."""

    def draw(shape: Sequence[int], std: float) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * std

    return draw
