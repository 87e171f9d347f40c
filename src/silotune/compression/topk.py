"""The largest numbers of each block, as int8: two bytes each, and two bytes a block.

Aji & Heafield 2017, arXiv:1704.05021. Differs from the paper: the largest of each block and not of
the whole change. So a place is one byte, and the size is known before anything is trained.

With k of a block of b numbers, what is left over has at most (1 - k/b) of the block's squared
length, plus k times the square of half a step (0.4 % of its largest).
"""

import math

import torch
from torch import Tensor

from silotune.compression.codec import Codec, check_scales, in_blocks, num_blocks, steps
from silotune.compression.config import WireConfig
from silotune.compression.int8 import MOST
from silotune.core.errors import UpdateError
from silotune.core.types import AdapterState, Layout, TensorSpec


def topk(cfg: WireConfig) -> Codec:
    """Build the codec, with blocks of 256 unless the recipe says otherwise."""
    block = cfg.block or 256
    k = math.ceil(cfg.share * block)

    def encode(values: Tensor) -> AdapterState:
        blocks = in_blocks(values, block)
        # a stable order, so that equal numbers give equal bytes on every machine
        order = blocks.abs().sort(dim=1, descending=True, stable=True).indices
        places = order[:, :k].sort(dim=1).values
        multiples, scales = steps(blocks.gather(1, places), MOST)
        return {
            "codes": multiples.to(torch.int8).reshape(-1),
            "places": places.to(torch.uint8).reshape(-1),
            "scales": scales,
        }

    def decode(payload: AdapterState, count: int) -> Tensor:
        places = payload["places"].reshape(-1, k).long()
        if bool((places >= block).any()) or bool((places.diff(dim=1) <= 0).any()):
            raise UpdateError(
                "a compressed change lists its places twice, or outside of a block.\n"
                "  Install the same version of silotune on both sides."
            )
        kept = payload["codes"].reshape(-1, k).float() * check_scales(payload["scales"])
        return torch.zeros(len(places), block).scatter(1, places, kept).reshape(-1)[:count]

    def layout(count: int) -> Layout:
        blocks = num_blocks(count, block)
        return {
            "codes": TensorSpec((blocks * k,), torch.int8),
            "places": TensorSpec((blocks * k,), torch.uint8),
            "scales": TensorSpec((blocks,), torch.bfloat16),
        }

    return Codec(encode, decode, layout)
