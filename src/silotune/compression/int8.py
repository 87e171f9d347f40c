"""int8 in blocks: one byte a number, and two bytes a block for its step. A quarter of float32.

A number is off by at most half its block's step, which is 0.4 % of the block's largest.
"""

import torch
from torch import Tensor

from silotune.compression.codec import Codec, check_scales, in_blocks, num_blocks, steps
from silotune.compression.config import WireConfig
from silotune.core.types import AdapterState, Layout, TensorSpec

MOST = 127


def int8(cfg: WireConfig) -> Codec:
    """Build the codec, with blocks of 256 unless the recipe says otherwise."""
    block = cfg.block or 256

    def encode(values: Tensor) -> AdapterState:
        multiples, scales = steps(in_blocks(values, block), MOST)
        return {"codes": multiples.to(torch.int8).reshape(-1)[: values.numel()], "scales": scales}

    def decode(payload: AdapterState, count: int) -> Tensor:
        codes = in_blocks(payload["codes"].float(), block)
        return (codes * check_scales(payload["scales"])).reshape(-1)[:count]

    def layout(count: int) -> Layout:
        return {
            "codes": TensorSpec((count,), torch.int8),
            "scales": TensorSpec((num_blocks(count, block),), torch.bfloat16),
        }

    return Codec(encode, decode, layout)
