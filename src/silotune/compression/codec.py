"""What a codec is, and what blockwise codecs share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from silotune.core.errors import UpdateError
from silotune.core.types import AdapterState, Layout


@dataclass(frozen=True)
class Codec:
    """Numbers as fewer bytes, and back. The same input gives the same bytes in every process."""

    encode: Callable[[Tensor], AdapterState]
    """(n finite float32 numbers, 1-D) -> the payload."""
    decode: Callable[[AdapterState, int], Tensor]
    """(a payload of this layout from anybody, n) -> n finite float32 numbers; or an UpdateError."""
    layout: Callable[[int], Layout]
    """n -> names, shapes and dtypes of a payload."""


def in_blocks(values: Tensor, block: int) -> Tensor:
    """Shape [number of blocks, block], with zeros at the end."""
    return F.pad(values, (0, -values.numel() % block)).reshape(-1, block)


def num_blocks(count: int, block: int) -> int:
    """Blocks that hold this many numbers."""
    return -(-count // block)


def rounded_up(sizes: Tensor) -> Tensor:
    """As bfloat16, never smaller than given and at most 2^-6 larger.

    A number of 8 bits is off by 2^-8 at most, so 2^-7 more before rounding is enough.
    """
    return (sizes * (1 + 2**-7)).bfloat16()


def steps(blocks: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each number as a multiple, -most to most, of its block's step.

    Returns:
        The multiples, shape as `blocks`, and the steps, bfloat16. No number is off by more than
        half a step, which is at most (1 + 2^-6) / (2 most) of the block's largest.
    """
    scale = rounded_up(blocks.abs().amax(dim=1) / most)
    step = scale.float()[:, None]
    # a block of zeros, or of numbers below what float32 divides by
    multiples = torch.where(step > 0, blocks / step, 0).round().clamp(-most, most)
    return multiples, scale


def check_scales(scales: Tensor) -> Tensor:
    """As float32, shape [blocks, 1].

    Raises:
        UpdateError: One is negative, or so large that a number could be infinite.
    """
    found = scales.float()
    if not bool(((found >= 0) & (found <= LARGEST_SCALE)).all()):
        raise UpdateError(
            "a compressed change has an impossible scale.\n"
            "  Install the same version of silotune on both sides."
        )
    return found[:, None]


LARGEST_SCALE = 1e30
"""Times 128 still finite, and far beyond any change that is accepted."""
