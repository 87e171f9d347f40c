"""LoRA's factors: which two tensors belong together, and what follows from their product.

A module's product is `left @ right`. For a linear layer left is PEFT's lora_B (d_out, r) and right
is lora_A (r, d_in); for an embedding left is lora_embedding_B (width, r) and right is
lora_embedding_A (r, vocabulary). Kernels of convolutions are flattened to (r, rest). The product
itself is never formed: all sums run over factors, in float64. LoRA's scaling alpha / rank is left
out, because it is the same for all clients of one module.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from silotune.core.algorithm import LocalRule
from silotune.core.errors import ConfigError
from silotune.core.types import AdapterState

linalg: Any = torch.linalg
"""The library's functions, whose types are not declared."""

FROZEN = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}
"""The factor that PEFT initialises at random, and the other one, which starts at 0."""
RIGHT = {"lora_A", "lora_embedding_A"}


@dataclass(frozen=True)
class Pair:
    """The names of one module's factors."""

    random: str
    """Starts at random values; the one that FFA-LoRA freezes."""
    zero: str
    """Starts at 0."""

    @property
    def right(self) -> str:
        """The factor of shape (r, d_in)."""
        return self.random if RIGHT & set(self.random.split(".")) else self.zero

    @property
    def left(self) -> str:
        """The factor of shape (d_out, r)."""
        return self.zero if self.right == self.random else self.random


def pairs_of(names: Iterable[str]) -> list[Pair]:
    """The pairs of factors among these tensors, in the order of their names."""
    known, found = set(names), list[Pair]()
    for name in sorted(known):
        parts = name.split(".")
        for random, zero in FROZEN.items():
            if random in parts:
                other = ".".join(zero if part == random else part for part in parts)
                if other in known:
                    found.append(Pair(name, other))
    return found


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


def wide(state: Mapping[str, Tensor], pair: Pair) -> tuple[Tensor, Tensor]:
    """Both factors as float64 matrices: (d_out, r) and (r, d_in)."""
    return state[pair.left].double().flatten(1), state[pair.right].double().flatten(1)


def narrow(left: Tensor, right: Tensor, pair: Pair, like: AdapterState) -> dict[str, Tensor]:
    """Two matrices as the tensors of a pair, in the shapes and dtypes of `like`."""
    found = {pair.left: left, pair.right: right}
    return {name: t.reshape(like[name].shape).to(like[name].dtype) for name, t in found.items()}


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
    u, vh = q_left @ u, vh @ q_right.T
    largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return u * sign.T, s, vh * sign


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
    u, s, vh = svd(left, right)
    if not bool(s.any()):
        return {}
    rank = wide(like, pair)[0].shape[1]
    if pair.random == pair.right:
        return narrow(*padded(u * s, vh, rank), pair, like)
    return narrow(*padded(u, s[:, None] * vh, rank), pair, like)


def stacked(states: Sequence[tuple[float, AdapterState]], pair: Pair) -> tuple[Tensor, Tensor]:
    """Factors whose product is the weighted sum of the states' products.

    The weights are on one side only: FLoRA, Wang et al. 2024, eq. 8. arXiv:2409.05976

    Returns:
        (d_out, sum of ranks) and (sum of ranks, d_in).
    """
    factors = [wide(state, pair) for _, state in states]
    weights = [weight for weight, _ in states]
    left = torch.cat([w * b for w, (b, _) in zip(weights, factors, strict=True)], dim=1)
    return left, torch.cat([a for _, a in factors])


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
