"""bfloat16: half the bytes. A number is off by at most 2^-8 of itself, or by 1e-40."""

import torch
from torch import Tensor

from silotune.compression.codec import Codec
from silotune.compression.config import WireConfig
from silotune.core.errors import UpdateError
from silotune.core.types import AdapterState, Layout, TensorSpec


def bf16(cfg: WireConfig) -> Codec:  # noqa: ARG001 - the signature of all codecs
    """Build the codec; it has no options."""
    return Codec(_encode, _decode, _layout)


def _encode(values: Tensor) -> AdapterState:
    limit = torch.finfo(torch.bfloat16).max  # rounding the largest float32 up would be infinite
    return {"values": values.clamp(-limit, limit).bfloat16()}


def _decode(payload: AdapterState, count: int) -> Tensor:  # noqa: ARG001 - as `Codec.decode`
    values = payload["values"].float()
    if not bool(values.isfinite().all()):
        raise UpdateError("a compressed change holds NaN or infinity.")
    return values


def _layout(count: int) -> Layout:
    return {"values": TensorSpec((count,), torch.bfloat16)}
