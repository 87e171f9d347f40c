"""Clipping: no client's change moves the sum by more than a bound.

Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping". arXiv:1905.03871.
"""

import math

from torch import Tensor

from silotune.core.tree import check_finite, l2_norm
from silotune.core.types import AdapterState
from silotune.core.wording import counted


def clip_by_global_norm(
    delta: AdapterState, *, clip_norm: float, who: str
) -> tuple[dict[str, Tensor], float]:
    """Scale a change so that its L2 norm over all tensors together is at most `clip_norm`.

    Args:
        delta: Change of one client; tensors of any shape. Not modified.
        clip_norm: Bound, > 0, in the units of the weights.
        who: Whose change it is, for the error.

    Returns:
        The scaled copy in float64, where the bound holds up to rounding, and the norm before.

    Raises:
        UpdateError: A tensor contains NaN or infinity; the message names it.
    """
    check_finite(delta, who=who)
    norm = l2_norm(delta)
    factor = 1.0 if norm <= clip_norm else clip_norm / norm  # a change of zeros passes
    return {name: tensor.double() * factor for name, tensor in delta.items()}, norm


def next_clip_norm(clip_norm: float, *, share_within: float, quantile: float, lr: float) -> float:
    """The norm of the next round: `C exp(-lr (b - quantile))`.

    Args:
        clip_norm: C, of this round.
        share_within: b, the noised share of clients whose norm was at most C, where half of those
            that did not answer count. If more of them fit than wanted, C shrinks.
        quantile: The target share.
        lr: How fast C moves.
    """
    return clip_norm * math.exp(-lr * (share_within - quantile))


def split_noise(noise_multiplier: float, *, num_clients: int) -> tuple[float, float]:
    """Split one release's noise between the sum of changes and the sum of bits.

    A bit is 1/2 for a client whose change is within the norm, -1/2 for one whose change is not, and
    0 for one that does not answer. So a client that answers, or not, moves the first sum by at most
    the clip norm and the second by exactly 1/2; one that is replaced moves each by at most twice as
    much.

    Args:
        noise_multiplier: z, of the entire release.
        num_clients: Number of clients that a round plans to ask.

    Returns:
        The noise multiplier of the change, `(z^-2 - (2 s)^-2)^-1/2`, and the standard deviation s
        of the sum of bits, a twentieth of the planned clients. Together they cost as much as
        `noise_multiplier` alone.

    Raises:
        ValueError: There is too much noise to split: z >= 2 s.

    Reference:
        Andrew et al. 2021, Theorem 1. arXiv:1905.03871
    """
    std_bits = num_clients / 20
    if noise_multiplier == 0:
        return 0.0, 0.0
    if noise_multiplier >= 2 * std_bits:
        raise ValueError(
            f"adaptive clipping with {counted(num_clients, 'client')} per round needs a noise "
            f"multiplier below {2 * std_bits:g}, got {noise_multiplier:g}.\n"
            "  Set clipping = 'fixed', ask more clients in a round, or use less noise."
        )
    return (noise_multiplier**-2 - (2 * std_bits) ** -2) ** -0.5, std_bits
