"""Sums of the clients' products `left @ right`, and what stands beside the adapter.

For algorithms that need each client's product, of any rank. As in `factors`, no product is formed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, weight_of
from silotune.algorithms.factors import linalg, narrow, svd, wide
from silotune.algorithms.fedavg import move
from silotune.core.lora import Pair, at_rank, is_beside, pairs_of
from silotune.core.tree import add, weighted_mean
from silotune.core.types import AdapterState, Change, ServerState, Update, Updates

RESIDUAL = "residual"
"""In `Change.extra`: the factors that are to stand beside the adapter after the round."""


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
