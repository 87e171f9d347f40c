"""int4 in blocks: two numbers a byte, and two bytes a block for its step. An eighth of float32.

A number is off by at most half its block's step, which is 7.3 % of the block's largest.
"""

import torch
from torch import Tensor

from silotune.compression.codec import Codec, check_scales, in_blocks, num_blocks, steps
from silotune.compression.config import WireConfig
from silotune.core.types import AdapterState, Layout, TensorSpec

MOST = 7


def int4(cfg: WireConfig) -> Codec:
    """Build the codec, with blocks of 64 unless the recipe says otherwise."""
    block = cfg.block or 64

    def encode(values: Tensor) -> AdapterState:
        multiples, scales = steps(in_blocks(values, block), MOST)
        low, high = (multiples + MOST).to(torch.uint8).reshape(-1, 2).unbind(dim=1)
        return {"codes": (low | high << 4)[: num_blocks(values.numel(), 2)], "scales": scales}

    def decode(payload: AdapterState, count: int) -> Tensor:
        pairs = payload["codes"]
        codes = torch.stack([pairs & 15, pairs >> 4], dim=1).reshape(-1)[:count].float() - MOST
        return (in_blocks(codes, block) * check_scales(payload["scales"])).reshape(-1)[:count]

    def layout(count: int) -> Layout:
        return {
            "codes": TensorSpec((num_blocks(count, 2),), torch.uint8),
            "scales": TensorSpec((num_blocks(count, block),), torch.bfloat16),
        }

    return Codec(encode, decode, layout)
