"""LoRA's factors: which two tensors belong together, and what follows from their product.

A module's product is `left @ right`. For a linear layer left is PEFT's lora_B (d_out, r) and right
is lora_A (r, d_in); for an embedding left is lora_embedding_B (width, r) and right is
lora_embedding_A (r, vocabulary). Kernels of convolutions are flattened to (r, rest). The product
itself is never formed: all sums run over factors, in float64. LoRA's scaling alpha / rank is left
out, because it is the same for all clients of one module.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, weight_of
from silotune.algorithms.fedavg import move
from silotune.core.algorithm import LocalRule
from silotune.core.errors import ConfigError
from silotune.core.lora import FROZEN, Pair, at_rank, is_beside, pairs_of
from silotune.core.seeds import generator
from silotune.core.tree import add, weighted_mean
from silotune.core.types import AdapterState, Change, ServerState, Update, Updates

linalg: Any = torch.linalg
"""The library's functions, whose types are not declared."""

SPARE, TRIES, NEARLY = 8, 12, 1e-10
"""Of `leading`: vectors beyond the rank, most iterations, and how far, relative to the largest
singular value, the product may turn a right vector away from its left one."""
RESIDUAL = "residual"
"""In `Change.extra`: the factors that are to stand beside the adapter after the round."""


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


# --- clients of several ranks, and sums of their products


def trained(state: AdapterState, update: Update) -> dict[str, Tensor]:
    """A client's adapter after training: what it received, at the rank of its update, plus that.

    Args:
        state: The server's adapter; of it, a client with rank r received the first r columns and
            rows of every pair of factors.
        update: The client's.
    """
    ranks = {len(update.delta[pair.right]) for pair in pairs_of(update.delta)}
    received = at_rank(state, min(ranks)) if len(ranks) == 1 else state
    return add({name: received[name] for name in update.delta}, update.delta)


Products = Iterable[tuple[Pair, Tensor, Tensor]]
"""One product per module, as float64 factors (d_out, k) and (k, d_in)."""


class SumOfProducts:
    """The weighted sum of products, module by module, as stacked factors: no product is formed.

    Factors are kept in 32 bits, or in 64 if the adapter has 64, until their module's sum is taken.
    A stack with more than twice as many columns as its product has rows or columns is rewritten
    with as many as it needs.
    """

    def __init__(self) -> None:
        self._parts: dict[Pair, list[tuple[float, Tensor, Tensor]]] = {}
        self._columns: dict[Pair, int] = {}

    def add(self, pair: Pair, weight: float, left: Tensor, right: Tensor) -> None:
        """Add a weighted product; its factors are not copied."""
        own = self._parts.setdefault(pair, [])
        own.append((weight, left, right))
        self._columns[pair] = self._columns.get(pair, 0) + left.shape[1]
        if self._columns[pair] > 2 * min(len(left), right.shape[1]):
            left, right = compressed(*_stack(own, 1.0))
            self._parts[pair], self._columns[pair] = [(1.0, left, right)], left.shape[1]

    def take(self, factor: float) -> Iterator[tuple[Pair, Tensor, Tensor]]:
        """The sum times a factor, one module at a time; what was taken is forgotten."""
        for pair in list(self._parts):
            yield pair, *_stack(self._parts.pop(pair), factor)


def _stack(parts: Sequence[tuple[float, Tensor, Tensor]], factor: float) -> tuple[Tensor, Tensor]:
    columns = sum(part.shape[1] for _, part, _ in parts)
    _, one, other = parts[0]
    left = one.new_empty(len(one), columns, dtype=torch.float64)
    right = other.new_empty(columns, other.shape[1], dtype=torch.float64)
    at = 0
    for weight, b, a in parts:
        here = slice(at, at + b.shape[1])
        left[:, here] = b
        left[:, here] *= factor * weight
        right[here] = a
        at = here.stop
    return left, right


def kept_dtype(state: AdapterState, pair: Pair) -> torch.dtype:
    """In what a client's factors wait for the others: 32 bits, or those of the adapter if more."""
    return torch.promote_types(state[pair.left].dtype, torch.float32)


def compressed(
    left: Tensor, right: Tensor, *, rank: int | None = None, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Factors of the same product with as few columns as it needs, largest directions first.

    Args:
        left: (d_out, k), float64.
        right: (k, d_in), float64.
        rank: At most so many columns: the nearest product of that rank (Eckart and Young 1936).
        floor: Directions of at most this size are rounding. So are those that float64 cannot tell
            from 0 at the size of the factors.

    Returns:
        (d_out, m) and (m, d_in), the second one with orthonormal rows. m = 0 for a product of 0.
    """
    u, s, vh = svd(left, right)
    rounding = 1e-14 * float(linalg.norm(left) * linalg.norm(right))
    num = int((s > max(floor, rounding)).sum())
    num = num if rank is None else min(num, rank)
    return (u * s)[:, :num], vh[:num]


def mean_of_products(
    state: AdapterState, updates: Updates, cfg: AlgorithmConfig
) -> tuple[Products, dict[str, Tensor]]:
    """The weighted mean of the clients' products, and of the changes of all other tensors.

    The updates are read once.
    """
    sums, total = SumOfProducts(), 0.0

    def read() -> Iterator[tuple[float, AdapterState]]:
        nonlocal total
        for update in updates:
            weight, own = weight_of(update, cfg), trained(state, update)
            total += weight
            for pair in pairs_of(own):
                sums.add(pair, weight, *wide(own, pair, kept_dtype(own, pair)))
            yield weight, without_factors(update.delta)

    others = weighted_mean(read())
    return sums.take(1 / total), others


def without_factors(state: AdapterState) -> dict[str, Tensor]:
    """The tensors that are no factors."""
    factors = {name for pair in pairs_of(state) for name in (pair.left, pair.right)}
    return {name: t for name, t in state.items() if name not in factors and not is_beside(name)}


# --- what stands beside the adapter


def beside(state: AdapterState, pair: Pair) -> tuple[Tensor, Tensor]:
    """The frozen factors of a module, float64; (d_out, 0) and (0, d_in) if there are none."""
    if pair.beside.left in state:
        return wide(state, pair.beside)
    left, right = wide(state, pair)
    return left[:, :0], right[:0]


def added_beside(
    adapter: AdapterState, new: Products, *, decay: float = 1.0, rank: int | None = None
) -> dict[str, Tensor]:
    """`decay` times what stands beside the adapter plus new products, as tensors.

    Columns that the adapter's own dtype would round away next to its factors are left out. A module
    with more columns than its smaller side, or with `rank`, gets as many as its sum needs, at most
    `rank`. A product of 0 has no tensors.
    """
    found: dict[str, Tensor] = {}
    for pair, left, right in new:
        old_left, old_right = beside(adapter, pair)
        own_left, own_right = wide(adapter, pair)
        size = float(linalg.norm(own_left) * linalg.norm(own_right))
        floor = torch.finfo(adapter[pair.left].dtype).eps * size
        factors = left, right
        if old_left.shape[1]:
            factors = torch.cat([decay * old_left, left], dim=1), torch.cat([old_right, right])
        if rank is None and factors[0].shape[1] <= min(len(left), right.shape[1]):
            seen = linalg.norm(factors[0], dim=0) * linalg.norm(factors[1], dim=1) > floor
            kept = factors if bool(seen.all()) else (factors[0][:, seen], factors[1][seen])
        else:
            kept = compressed(*factors, rank=rank, floor=floor)
        if kept[0].shape[1]:
            named = narrow(*kept, pair, adapter)
            found[pair.beside.left] = named[pair.left]
            found[pair.beside.right] = named[pair.right]
    return found


def replace_beside(adapter: AdapterState, new: AdapterState) -> dict[str, Tensor]:
    """The adapter with other frozen factors beside it."""
    return {**{name: t for name, t in adapter.items() if not is_beside(name)}, **new}


def squared_norm(left: Tensor, right: Tensor) -> float:
    """`|left @ right|^2` from two small Gram matrices."""
    return max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))


def report_residual(state: ServerState, change: Change) -> dict[str, float]:
    """How large what stands beside the adapter is after a round, for metrics.jsonl.

    Returns:
        residual_rank, the highest rank of a module's residual; residual_norm, its Frobenius norm
        over all modules without LoRA's scaling; and residual_ratio, that norm divided by the
        adapter's own. The ratio is missing where the adapter's product is 0.
    """
    after = _moved(state.adapter, change.delta)
    kept = replace_beside(after, change.extra.get(RESIDUAL, {}))
    pairs = pairs_of(after)
    rank = max((beside(kept, pair)[0].shape[1] for pair in pairs), default=0)
    norm = sum(squared_norm(*beside(kept, pair)) for pair in pairs) ** 0.5
    own = sum(squared_norm(*wide(after, pair)) for pair in pairs) ** 0.5
    found = {"residual_rank": float(rank), "residual_norm": norm}
    return found | ({"residual_ratio": norm / own} if own > 0 else {})


def _moved(adapter: AdapterState, delta: AdapterState) -> dict[str, Tensor]:
    return {**adapter, **add({name: adapter[name] for name in delta}, delta)}


def step_with_residual(state: ServerState, change: Change) -> ServerState:
    """Move the adapter as FedAvg does, and replace what stands beside it if the change says so."""
    moved = move(state, change.delta)
    if RESIDUAL not in change.extra:
        return moved
    return replace(moved, adapter=replace_beside(moved.adapter, change.extra[RESIDUAL]))
