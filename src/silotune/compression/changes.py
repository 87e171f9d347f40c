"""Whole changes through a codec: all numbers in name order, and what is left for the next one."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from silotune.compression.bf16 import bf16
from silotune.compression.codec import Codec
from silotune.compression.config import WireConfig
from silotune.compression.int4 import int4
from silotune.compression.int8 import int8
from silotune.compression.sign import sign
from silotune.compression.topk import topk
from silotune.core.types import AdapterState, Layout

CODECS: Mapping[str, Callable[[WireConfig], Codec]] = {
    "bf16": bf16,
    "int8": int8,
    "int4": int4,
    "sign": sign,
    "topk": topk,
}
"""float32 is none of them: it travels as it is."""


def codec_of(name: str, cfg: WireConfig) -> Codec | None:
    """The codec of one direction; None for float32."""
    return None if name == "float32" else CODECS[name](cfg)


def outgoing(
    cfg: WireConfig, change: AdapterState, unsent: AdapterState
) -> tuple[AdapterState, AdapterState]:
    """A client's change as it travels, and what the client adds to its next one.

    Args:
        cfg: The recipe's.
        change: Float32 tensors of any shape, finite.
        unsent: What earlier rounds returned.
    """
    codec = codec_of(cfg.up, cfg)
    if codec is None:
        return change, {}
    payload, left = encode_change(codec, change, unsent if cfg.error_feedback else {})
    return payload, left if cfg.error_feedback else {}


def incoming(cfg: WireConfig, payload: AdapterState, layout: Layout) -> AdapterState:
    """The change that a client's payload stands for.

    Args:
        cfg: The recipe's.
        payload: Of the layout that `travels` gives.
        layout: Of the change.

    Raises:
        UpdateError: It holds something that the codec never writes.
    """
    codec = codec_of(cfg.up, cfg)
    return payload if codec is None else decode_change(codec, payload, layout)


def travels(cfg: WireConfig, layout: Layout) -> Layout:
    """The layout of what a client sends for a change of this layout."""
    codec = codec_of(cfg.up, cfg)
    return layout if codec is None else payload_layout(codec, layout)


def encode_change(
    codec: Codec, change: AdapterState, unsent: AdapterState | None = None
) -> tuple[AdapterState, dict[str, Tensor]]:
    """What travels instead of a change, and what it leaves out.

    Args:
        codec: How numbers are written.
        change: Float32 tensors of any shape, finite.
        unsent: What was left out of earlier changes, by tensor; it is added before. Tensors that
            are not in this change stay for later.

    Returns:
        The payload, and all that has not been sent so far: change + unsent - decoded payload.
    """
    before = unsent or {}
    wanted = {n: t + before[n] if n in before else t for n, t in change.items()}
    payload = codec.encode(_flat(wanted))
    arrived = _split(codec.decode(payload, _count(wanted)), {n: t.shape for n, t in change.items()})
    return payload, {**before, **{n: wanted[n] - arrived[n] for n in wanted}}


def decode_change(codec: Codec, payload: AdapterState, layout: Layout) -> AdapterState:
    """The change that a payload stands for.

    Args:
        codec: How numbers were written.
        payload: Of the layout that `payload_layout` gives; its contents may be anybody's.
        layout: Of the change.

    Raises:
        UpdateError: It holds something that the codec never writes.
    """
    shapes = _shapes(layout)
    return _split(codec.decode(payload, sum(map(math.prod, shapes.values()))), shapes)


def payload_layout(codec: Codec, layout: Layout) -> Layout:
    """Names, shapes and dtypes of the payload of a change with this layout."""
    return codec.layout(sum(map(math.prod, _shapes(layout).values())))


def _shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, spec in layout.items():
        shapes[name] = tuple(size for size in spec.shape if size is not None)
        assert len(shapes[name]) == len(spec.shape), "a payload needs to know how many numbers"
    return shapes


def _count(state: AdapterState) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _flat(state: AdapterState) -> Tensor:
    parts = [state[name].detach().cpu().float().reshape(-1) for name in sorted(state)]
    return torch.cat(parts) if parts else torch.zeros(0)


def _split(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    names = sorted(shapes)
    parts = flat.split([math.prod(shapes[name]) for name in names])
    return {n: part.reshape(shapes[n]) for n, part in zip(names, parts, strict=True)}
