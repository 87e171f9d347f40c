"""Signs: one bit a number, and two bytes a block for the mean size. A thirtieth of float32.

Bernstein et al. 2018, arXiv:1802.04434, with the size per block as in Karimireddy et al. 2019,
arXiv:1901.09847, section 4 (their Algorithm 2 takes one per layer).

What is left over is never longer than the block itself, and shorter by the mean size squared per
number: `|x - x'|^2 <= |x|^2 - (1 - 2^-16) n mean(|x|)^2`.
"""

import torch
from torch import Tensor

from silotune.compression.codec import Codec, check_scales, in_blocks, num_blocks
from silotune.compression.config import WireConfig
from silotune.core.types import AdapterState, Layout, TensorSpec

WEIGHTS = (1, 2, 4, 8, 16, 32, 64, 128)


def sign(cfg: WireConfig) -> Codec:
    """Build the codec, with blocks of 256 unless the recipe says otherwise."""
    block = cfg.block or 256

    def encode(values: Tensor) -> AdapterState:
        count = values.numel()
        # zeros that fill the last block up do not count in its mean
        sizes = torch.full((num_blocks(count, block),), float(block))
        sizes[-1:] -= -count % block
        means = in_blocks(values.abs(), block).sum(dim=1) / sizes
        bits = in_blocks((values >= 0).to(torch.uint8), 8)
        codes = (bits * torch.tensor(WEIGHTS, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)
        return {"codes": codes, "scales": means.bfloat16()}

    def decode(payload: AdapterState, count: int) -> Tensor:
        weights = torch.tensor(WEIGHTS, dtype=torch.uint8)
        bits = (payload["codes"][:, None] & weights) > 0
        signs = bits.reshape(-1)[:count].float() * 2 - 1
        return (in_blocks(signs, block) * check_scales(payload["scales"])).reshape(-1)[:count]

    def layout(count: int) -> Layout:
        return {
            "codes": TensorSpec((num_blocks(count, 8),), torch.uint8),
            "scales": TensorSpec((num_blocks(count, block),), torch.bfloat16),
        }

    return Codec(encode, decode, layout)
