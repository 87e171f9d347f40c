"""Shares of a secret: any `threshold` of them rebuild it, and fewer say nothing about it.

Shamir 1979, "How to Share a Secret", doi 10.1145/359168.359176. The only cryptography here that no
library is left to do. Python's integers do not take constant time: whoever can measure a client's
nanoseconds is not the adversary here.
"""

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**521 - 1
"""A Mersenne prime: the field holds every secret of 32 bytes."""
SHARE_BYTES = 66
SECRET_BYTES = 32


def split(secret: bytes, points: Sequence[int], threshold: int) -> list[bytes]:
    """One share for each point.

    Args:
        secret: 32 bytes.
        points: Different numbers from 1 on.
        threshold: Number of shares that rebuild it; at most as many as points.
    """
    assert len(secret) == SECRET_BYTES
    assert len(set(points)) == len(points) >= threshold >= 1 <= min(points)
    others = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "big"), *others]
    shares: list[bytes] = []
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def rebuild(shares: Mapping[int, bytes]) -> bytes | None:
    """The secret of at least `threshold` shares, by point; None if they do not fit together.

    Which share is wrong cannot be seen. Too few shares give another secret, or None.
    """
    points = list(shares)
    values = [int.from_bytes(share, "big") for share in shares.values()]
    total = 0
    for i, own in enumerate(points):
        above, below = 1, 1
        for other in points:
            if other != own:
                above = above * other % PRIME
                below = below * (other - own) % PRIME
        total += values[i] * above * pow(below, -1, PRIME)
    total %= PRIME
    fits = total < 2 ** (8 * SECRET_BYTES)
    return total.to_bytes(SECRET_BYTES, "big") if fits else None
