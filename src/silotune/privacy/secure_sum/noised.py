"""A client's change as whole numbers with noise of its own, ready for masks.

Order: scale to the norm, round, add discrete Gaussian noise, and let the ring take the rest. What
is released is a sum of integers modulo 2^32, and that is what the guarantee is about: neither
rounding nor going around the ring has to be an approximation.

Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning
with Secure Aggregation", Algorithm 1. arXiv:2102.06387. Differs from the paper: no rotation, which
pays off in rings of few bits; a vector that rounds beyond the norm is rounded towards zero instead
of again; the norm that is accounted for is the one that the recipe names, because the change is
scaled to slightly less before it is rounded.
"""

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from silotune.core.errors import UpdateError
from silotune.privacy.discrete_gaussian import Integers, Words64, discrete_gaussian
from silotune.privacy.secure_sum.ring import Ring, Uniform, Words

RARE = 2.0**-30
"""How often, at most, a vector has to be rounded towards zero."""
TAIL = 8
"""Standard deviations of noise for which a ring has room, if nothing is to be cut."""


def encode_noised(
    values: NDArray[np.float64],
    ring: Ring,
    *,
    clip_norm: float,
    noise_multiplier: float,
    uniform: Uniform,
    draw: Words64,
) -> tuple[Words, int]:
    """A change as words with noise, and how many of its numbers were cut.

    Args:
        values: (count,), finite.
        ring: Where it is summed.
        clip_norm: What no client's change exceeds once it is rounded, in units of the values.
        noise_multiplier: Standard deviation of the noise, in units of `clip_norm`.
        uniform: Chances of rounding.
        draw: Chances of the noise.

    Raises:
        UpdateError: The ring's steps are too coarse for `clip_norm`.
    """
    most = Fraction(clip_norm) / Fraction(ring.step)
    whole = round_within(values / ring.step, norm=most, uniform=uniform)
    variance = math.ceil((Fraction(noise_multiplier) * most) ** 2)
    whole += discrete_gaussian(len(whole), variance=variance, draw=draw)
    limit, cut = 2**ring.bits, 0
    if not has_room(ring.limit, clip_norm=clip_norm, std=noise_multiplier * clip_norm):
        cut = int(np.count_nonzero(np.abs(whole) > limit))
        whole = np.clip(whole, -limit, limit)
    return whole.astype(np.uint32), cut


def has_room(limit: float, *, clip_norm: float, std: float) -> bool:
    """Whether a number with its noise stays within the range, except with next to no probability.

    Then nothing is cut, and the sum is that of all numbers and all noise.
    """
    return clip_norm + TAIL * std <= limit


def round_within(values: NDArray[np.float64], *, norm: Fraction, uniform: Uniform) -> Integers:
    """Round at random without a bias, to a vector whose L2 norm is at most `norm`, exactly.

    Rounding lengthens a vector by a little, so it is first scaled to a norm from which that rarely
    goes too far: the bound of the paper's conditional rounding, solved for the norm before.

    Raises:
        UpdateError: The norm is so small that rounding alone would exceed it.
    """
    count, spread = len(values), math.sqrt(2 * math.log(1 / RARE))
    room = float(norm) ** 2 - count / 4 - spread * math.sqrt(count) / 2
    if room <= 0:
        raise UpdateError(
            f"secure_sum.range has steps that are too coarse: rounding {count:,} numbers would "
            f"move a change by more than privacy.clip_norm, which is {float(norm):.3g} steps.\n"
            "  Set a smaller secure_sum.range, or ask fewer clients per round."
        )
    before = (math.sqrt(spread**2 + 4 * room) - spread) / 2
    own = float(np.linalg.norm(values))
    scaled = values * (before / own) if own > before else values
    rounded = np.floor(scaled + uniform(count)).astype(np.int64)
    if squared_norm(rounded) > norm**2:
        rounded = np.trunc(scaled).astype(np.int64)
    assert squared_norm(rounded) <= norm**2
    return rounded


def squared_norm(values: Integers) -> int:
    """The sum of squares, exactly: in 64 bits it could overflow."""
    high, low = values >> 16, values & 0xFFFF
    parts = (int(np.dot(high, high)), int(np.dot(high, low)), int(np.dot(low, low)))
    return (parts[0] << 32) + (parts[1] << 17) + parts[2]
