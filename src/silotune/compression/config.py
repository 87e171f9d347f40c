"""The [wire] section: in how many bytes changes travel."""

from typing import Literal

from pydantic import Field

from silotune.core.types import Config

CodecName = Literal["float32", "bf16", "int8", "int4", "sign", "topk"]


class WireConfig(Config):
    """How changes are written for the way between clients and server, and back."""

    down: CodecName = "float32"
    """How the adapter's change of a round is written on its way to clients that hold the adapter
    before it. Others receive the whole adapter as float32."""
    up: CodecName = "float32"
    """How a client's change is written. float32: exactly, 4 bytes a number. bf16: 2 bytes. int8 and
    int4: about 1 and 0.5 bytes, as multiples of a step per block. sign: 1 bit, and a mean size per
    block. topk: the largest numbers of each block, as int8."""
    error_feedback: bool = True
    """Whether what a codec leaves out of a change is kept and added to the next one. Seide et al.
    2014; Karimireddy et al. 2019, arXiv:1901.09847, Algorithm 1."""
    block: Literal[32, 64, 128, 256] | None = None
    """Numbers that share a step. Absent: 64 with int4, otherwise 256."""
    share: float = Field(default=0.1, gt=0, le=1)
    """With topk: share of the numbers that is sent, at least one per block."""
