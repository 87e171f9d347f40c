"""Arithmetic on adapter states.

Pure: nothing is changed in place, nothing is broadcast by accident.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from silotune.core.errors import UpdateError
from silotune.core.types import AdapterState, Layout, TensorSpec
from silotune.core.wording import counted


def layout_of(state: AdapterState) -> Layout:
    """Names, shapes and dtypes of a state."""
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in state.items()}


def check_same_layout(state: AdapterState, expected: Layout, *, who: str) -> None:
    """Refuse a state whose names, shapes or dtypes differ from what is expected.

    Args:
        state: The tensors to check.
        expected: The layout they must have. A dimension of None accepts any size.
        who: Named at the start of the message, for example "client 'north', round 3".

    Raises:
        UpdateError: Names the first missing, unknown or wrong tensor.
    """
    missing, unknown = (
        sorted(expected.keys() - state.keys()),
        sorted(state.keys() - expected.keys()),
    )
    if missing:
        raise UpdateError(
            f"{who}: tensor '{missing[0]}' is missing "
            f"({len(missing)} of {counted(len(expected), 'tensor')}).\n"
            "  Use the same model, adapter and algorithm at this client as at the server."
        )
    if unknown:
        raise UpdateError(
            f"{who}: tensor '{unknown[0]}' is unknown to the server "
            f"({counted(len(unknown), 'unknown tensor')}).\n"
            "  Use the same model, adapter and algorithm at this client as at the server."
        )
    for name in sorted(expected):
        tensor, spec = state[name], expected[name]
        if tensor.shape != spec.shape or tensor.dtype != spec.dtype:
            _check_tensor(tensor, spec, f"{who}: '{name}'")


def _check_tensor(tensor: Tensor, spec: TensorSpec, what: str) -> None:
    shape = tuple(tensor.shape)
    fits = len(shape) == len(spec.shape) and all(
        want is None or got == want for got, want in zip(shape, spec.shape, strict=True)
    )
    if not fits:
        wanted = tuple("any" if n is None else n for n in spec.shape)
        raise UpdateError(
            f"{what} has shape {shape}, the server expects {wanted}.\n"
            "  Set the same [adapter] rank and targets at this client as at the server."
        )
    if tensor.dtype != spec.dtype:
        raise UpdateError(
            f"{what} has dtype {tensor.dtype}, the server expects {spec.dtype}.\n"
            "  Send float32, whatever dtype the client trains in."
        )


def check_finite(state: AdapterState, *, who: str) -> None:
    """Refuse a state that contains NaN or infinity; the message names the tensor."""
    for name in sorted(state):
        # A sum is NaN or infinite as soon as one value is: one pass instead of three. It may also
        # overflow when all values are finite, so each value is checked only then.
        if math.isfinite(state[name].sum().item()):
            continue
        if not bool(torch.isfinite(state[name]).all()):
            raise UpdateError(
                f"{who}: '{name}' contains NaN or infinity.\n"
                "  Lower train.lr or set train.clip_norm at this client; its update was not used."
            )


LARGEST = torch.finfo(torch.float16).max
"""The largest value of a trained tensor that every dtype a client may train in can hold: 65504."""


def check_representable(state: AdapterState, *, who: str) -> None:
    """Refuse a state with NaN, infinity or a value beyond float16; the message names the tensor."""
    for name in sorted(state):
        if state[name].numel() == 0:
            continue
        low, high = torch.aminmax(state[name])
        if not (low >= -LARGEST and high <= LARGEST):  # so that NaN is refused too
            check_finite({name: state[name]}, who=who)
            raise UpdateError(
                f"{who}: '{name}' contains a value beyond {LARGEST:g}.\n"
                "  Lower train.lr or set train.clip_norm at this client; its update was not used."
            )


def add(a: AdapterState, b: AdapterState, *, scale: float = 1.0) -> dict[str, Tensor]:
    """`a + scale * b`, name by name, in float64, returned in the dtypes of `a`.

    Both must have the same layout.
    """
    check_same_layout(b, layout_of(a), who="sum of two states")
    if scale == 1:  # one rounding either way, and a fifth of the memory traffic
        return {name: t + b[name] for name, t in a.items()}
    return {name: (t.double() + scale * b[name].double()).to(t.dtype) for name, t in a.items()}


def subtract(a: AdapterState, b: AdapterState) -> dict[str, Tensor]:
    """`a - b`, name by name, in the dtypes of `a`."""
    check_same_layout(b, layout_of(a), who="difference of two states")
    return {name: t - b[name] for name, t in a.items()}


def scale(state: AdapterState, factor: float) -> dict[str, Tensor]:
    """Every tensor times `factor`."""
    return {name: t * factor for name, t in state.items()}


def zeros_like(state: AdapterState) -> dict[str, Tensor]:
    """The same layout, all zero."""
    return {name: torch.zeros_like(t) for name, t in state.items()}


def weighted_mean(pairs: Iterable[tuple[float, AdapterState]]) -> dict[str, Tensor]:
    """`sum(w * s) / sum(w)` over the pairs, folded one at a time in the order given.

    Sums run in float64, so that small deltas of many clients are not lost; memory is one
    accumulator and one state. For a result that does not depend on arrival order, pass the pairs in
    client-name order.

    Args:
        pairs: Weights, finite and >= 0 with a sum > 0, and states with the same layout.

    Returns:
        The mean, in the states' own dtypes.

    Raises:
        UpdateError: Layouts differ, a weight is invalid, or there is nothing to average.
    """
    total, sums, layout = 0.0, dict[str, Tensor](), None
    for weight, state in pairs:
        if not (math.isfinite(weight) and weight >= 0.0):
            raise UpdateError(
                f"weighted mean: {weight} is not a valid weight.\n"
                "  Weights must be finite and not negative."
            )
        if layout is None:
            layout = layout_of(state)
            sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in state.items()}
        check_same_layout(state, layout, who="weighted mean")
        # An integer weight below 2^29 times a float32 is exact in float64, so one fused pass gives
        # the same bits as two. An inexact product would be rounded only after the addition.
        fused = float(weight).is_integer() and weight < 2**29
        for name, t in state.items():
            if fused and t.dtype in (torch.float32, torch.float16, torch.bfloat16):
                sums[name].add_(t, alpha=weight)
            else:
                sums[name].add_(weight * t.double())
        total += weight
    if layout is None or total <= 0.0:
        raise UpdateError(
            "weighted mean: no update carries weight.\n  At least one client needs examples."
        )
    return {name: (s / total).to(layout[name].dtype) for name, s in sums.items()}


def l2_norm(state: AdapterState) -> float:
    """L2 norm over all tensors together, summed in float64 in name order."""
    wide = (state[name].double() for name in sorted(state))
    return sum(float((d * d).sum()) for d in wide) ** 0.5


def squared_distance(a: Mapping[str, Tensor], b: AdapterState) -> Tensor:
    """`sum (a - b)^2` over the tensors of `a`, differentiable in `a`. `b` may have more tensors.

    Raises:
        UpdateError: `b` lacks a tensor of `a`, or has it in another shape.
    """
    same = {name: b[name] for name in a if name in b}
    layout = {name: TensorSpec(tuple(t.shape), same.get(name, t).dtype) for name, t in a.items()}
    check_same_layout(same, layout, who="distance of two states")
    terms = [(t - b[name].to(t.device, t.dtype)).square().sum() for name, t in a.items()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def size_bytes(state: AdapterState) -> int:
    """Bytes of the tensors' values."""
    return sum(t.numel() * t.element_size() for t in state.values())


def layout_bytes(layout: Layout) -> int:
    """Bytes of the values of a state with this layout; an open dimension counts as 1."""
    return sum(
        math.prod(size or 1 for size in spec.shape) * spec.dtype.itemsize
        for spec in layout.values()
    )


def sha256(state: AdapterState) -> str:
    """Fingerprint of names, dtypes, shapes and values; independent of the order of names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        t = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()
