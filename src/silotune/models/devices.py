"""Where a model runs, with which dtype, and how much memory that took."""

import sys
from pathlib import Path
from typing import cast

import torch

from silotune.core.errors import ModelError


def pick_device(wanted: str) -> torch.device:
    """The named device, or with "auto" the first of CUDA, MPS and CPU that works here.

    Raises:
        ModelError: The named device is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[wanted]:
        there = ", ".join(name for name, ok in available.items() if ok)
        raise ModelError(
            f"runtime.device = '{wanted}' is not available here.\n  Set one of: auto, {there}."
        )
    return torch.device(wanted)


def pick_dtype(wanted: str, device: torch.device, *, whole: bool) -> torch.dtype:
    """The dtype of the base weights.

    With "auto", a frozen base is bfloat16 if the hardware multiplies it natively, else float32:
    bfloat16 would work, but many times slower. If all weights are trained, they are float32.
    """
    if wanted != "auto":
        return cast(torch.dtype, getattr(torch, wanted))
    if whole:
        return torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def peak_memory_bytes() -> int:
    """The peak resident size of this process, or the peak allocation on a GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes(device: torch.device) -> int | None:
    """Memory that new processes can use without displacing others; None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    found = dict(line.split(":", 1) for line in lines)
    return int(found["MemAvailable"].split()[0]) * 1024
