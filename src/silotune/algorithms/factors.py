"""LoRA's factors: which two tensors belong together, and what follows from their product.

A module's product is `left @ right`. For a linear layer left is PEFT's lora_B (d_out, r) and right
is lora_A (r, d_in); for an embedding left is lora_embedding_B (width, r) and right is
lora_embedding_A (r, vocabulary). Kernels of convolutions are flattened to (r, rest). The product
itself is never formed: all sums run over factors, in float64. LoRA's scaling alpha / rank is left
out, because it is the same for all clients of one module.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from silotune.core.algorithm import LocalRule
from silotune.core.errors import ConfigError
from silotune.core.lora import FROZEN, Pair, is_beside, pairs_of
from silotune.core.seeds import generator
from silotune.core.types import AdapterState

linalg: Any = torch.linalg
"""The library's functions, whose types are not declared."""

SPARE, TRIES, NEARLY = 8, 12, 1e-10
"""Of `leading`: vectors beyond the rank, most iterations, and how far, relative to the largest
singular value, the product may turn a right vector away from its left one."""


def needs_pairs(algorithm: str) -> Callable[[AdapterState, int], dict[str, AdapterState]]:
    """The `init` of an algorithm without memory that works on both factors of a module.

    It raises a ConfigError if the adapter has them nowhere.
    """

    def init(adapter: AdapterState, _: int) -> dict[str, AdapterState]:
        if pairs_of(adapter):
            return {}
        raise ConfigError(
            f"algorithm.name = '{algorithm}' works on LoRA's two factors, but this adapter does "
            "not have both.\n"
            "  Set adapter.kind = 'lora' without options that change its factors, or choose "
            "another algorithm."
        )

    return init


def starts_at_zero(name: str) -> bool:
    """Whether a tensor is the factor that starts at 0."""
    return not set(FROZEN.values()).isdisjoint(name.split("."))


def starts_at_random(name: str) -> bool:
    """Whether a tensor is the factor that starts at random values."""
    return not FROZEN.keys().isdisjoint(name.split("."))


def _is_trained(name: str, round_: int) -> bool:  # noqa: ARG001 - the signature of `trains`
    return not starts_at_random(name)


ONE_FACTOR = LocalRule(trains=_is_trained)
"""Clients train the factor that starts at 0, and everything that is no factor."""


def _is_not_beside(name: str, round_: int) -> bool:  # noqa: ARG001 - the signature of `trains`
    return not is_beside(name)


WITH_RESIDUAL = LocalRule(trains=_is_not_beside)
"""Clients train the adapter next to the frozen factors beside it."""


def wide(
    state: Mapping[str, Tensor], pair: Pair, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Both factors as matrices: (d_out, r) and (r, d_in). A core goes to the left one."""
    left, right = (state[name].to(dtype).flatten(1) for name in (pair.left, pair.right))
    return (left @ state[pair.core].to(dtype) if pair.core in state else left), right


def narrow(left: Tensor, right: Tensor, pair: Pair, like: AdapterState) -> dict[str, Tensor]:
    """Two matrices of any rank as the tensors of a pair, otherwise shaped and typed as `like`."""
    b, a = like[pair.left], like[pair.right]
    return {
        pair.left: left.reshape(len(b), -1, *b.shape[2:]).to(b.dtype),
        pair.right: right.reshape(-1, *a.shape[1:]).to(a.dtype),
    }


def svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of `left @ right` and their vectors, from two thin QR factorisations.

    Args:
        left: (d_out, k), float64.
        right: (k, d_in), float64.

    Returns:
        U (d_out, m), the m = min(d_out, d_in, k) singular values, and V^T (m, d_in). The largest
        entry of each row of V^T is positive, so that equal inputs give equal factors.
    """
    q_left, r_left = linalg.qr(left)
    q_right, r_right = linalg.qr(right.T)
    u, s, vh = linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _signed(q_left @ u, s, vh @ q_right.T)


def _signed(u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return u * sign.T, s, vh * sign


def leading(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular values of `left @ right` and their vectors, as `svd` gives them.

    A stack much wider than the rank is multiplied by a block of vectors until these span the
    leading singular vectors: subspace iteration with a Rayleigh-Ritz step, Halko et al. 2011,
    "Finding Structure with Randomness", algorithm 4.4. A product whose singular values decay too
    slowly for this is decomposed as a whole.

    Args:
        left: (d_out, k), float64.
        right: (k, d_in), float64.
        rank: At least 1.

    Returns:
        As `svd`, with at most `rank` values.
    """
    width = rank + SPARE
    if left.shape[1] > 4 * width and min(len(left), right.shape[1]) > width:
        rng = generator(0, "leading", *left.shape, *right.shape)
        v = torch.randn(right.shape[1], width, generator=rng, dtype=left.dtype)
        u = s = None
        for _ in range(TRIES):
            image = left @ (right @ v)
            if u is not None and s is not None:
                missed = linalg.norm(image[:, :rank] - (u * s)[:, :rank])
                if missed <= NEARLY * s[0]:
                    return _signed(u[:, :rank], s[:rank], v.T[:rank])
            q, _ = linalg.qr(image)
            basis, small = linalg.qr(right.T @ (left.T @ q))
            turn, s, turned = linalg.svd(small.T)
            u, v = q @ turn, basis @ turned.T
    u, s, vh = svd(left, right)
    return u[:, :rank], s[:rank], vh[:rank]


def padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of exactly this rank: the first `rank` columns and rows, or zeros where they end."""
    missing = max(0, rank - left.shape[1])
    left = torch.nn.functional.pad(left[:, :rank], (0, missing))
    return left, torch.nn.functional.pad(right[:rank], (0, 0, 0, missing))


def orthonormal(left: Tensor, right: Tensor, pair: Pair, like: AdapterState) -> dict[str, Tensor]:
    """The pair whose product is nearest to `left @ right`, in the shapes and dtypes of `like`.

    The random factor is orthonormal; the singular values go to the one that starts at 0. Empty if
    the product is 0, which has no directions.
    """
    rank = len(like[pair.right])
    u, s, vh = leading(left, right, rank)
    if not bool(s.any()):
        return {}
    if pair.random == pair.right:
        return narrow(*padded(u * s, vh, rank), pair, like)
    return narrow(*padded(u, s[:, None] * vh, rank), pair, like)


def squared_product_distance(
    one: AdapterState, other: AdapterState, pairs: Iterable[Pair]
) -> float:
    """`sum |B1 A1 - B2 A2|^2` over the modules, plus `sum |t1 - t2|^2` over other tensors.

    It does not change when a client turns its factors, `(B Q, Q^T A)`. Computed from differences,
    so that two nearby states keep their digits:
    `B1 A1 - B2 A2 = (B1 - B2) A1 + B2 (A1 - A2)`.
    """
    total, seen = 0.0, set[str]()
    for pair in pairs:
        (b1, a1), (b2, a2) = wide(one, pair), wide(other, pair)
        db, da = b1 - b2, a1 - a2
        total += float(((db.T @ db) * (a1 @ a1.T)).sum() + ((b2.T @ b2) * (da @ da.T)).sum())
        total += 2 * float(((db.T @ b2) * (da @ a1.T).T).sum())
        seen |= {pair.left, pair.right}
    for name in one.keys() - seen:
        total += float((one[name].double() - other[name].double()).square().sum())
    return max(0.0, total)
