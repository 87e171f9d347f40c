"""How far the aggregated change of a round is from the mean of what the clients learned.

LoRA's factors are averaged separately by FedAvg, so the product of the means is not the mean of the
products. The error is `|B A - M| / |M - B0 A0|` over all modules, with B A the factors after the
change, M the weighted mean of the clients' products and B0 A0 what they received: 0 is exact, at 1
the error is as large as the change itself. Robust rules leave clients out, which counts as an error
here. Clients of lower ranks received less: their products are those of what they trained. What
stands beside the adapter is a part of the function before and after.

No product is formed. Norms are estimated from random directions, `E |X z|^2 = |X|^2` for z of
independent signs: Hutchinson 1990, "A Stochastic Estimator of the Trace of the Influence Matrix".
One pass over the updates, one of them in memory at a time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, weight_of
from silotune.algorithms.factors import wide
from silotune.algorithms.products import RESIDUAL, beside, replace_beside, trained
from silotune.core.algorithm import Algorithm
from silotune.core.lora import Pair, pairs_of
from silotune.core.seeds import generator
from silotune.core.types import AdapterState, Change, ServerState, Updates
from silotune.federation.conflict import opposed_pairs
from silotune.recipes.schema import RunConfig

DIRECTIONS = 16
"""More give a better estimate: the relative error of a squared norm is at most (2 / 16)^(1/2)."""

ROUNDING = 1e-12
"""A move below this share of the product is rounding."""


def measure(
    run: RunConfig, algorithm: Algorithm, state: ServerState, updates: Updates, change: Change
) -> dict[str, Any]:
    """What a round says about its aggregation, for metrics.jsonl.

    Nothing under client-level privacy at the server, where single updates have no noise yet; no
    error where an own algorithm gives updates shapes of their own.

    Args:
        run: The recipe; its seed chooses the directions.
        algorithm: Adds what it reports about itself.
        state: What the clients received.
        updates: What they sent.
        change: What the algorithm made of it.

    Returns:
        aggregation_error if the adapter has LoRA's factors, the algorithm's own numbers, and the
        pairs of clients whose preferences are opposed.
    """
    if run.privacy.clips_at_server:
        return {}
    found: dict[str, Any] = dict(algorithm.report(state, change)) if algorithm.report else {}
    if pairs := opposed_pairs(run, updates):
        found["opposed"] = pairs
    if algorithm.layout is not None and not run.algorithm.facts.mixed_ranks:
        return found
    error = aggregation_error(run.algorithm, state, updates, change, seed=run.seed)
    return found if error is None else {"aggregation_error": error, **found}


def aggregation_error(
    cfg: AlgorithmConfig, state: ServerState, updates: Updates, change: Change, *, seed: int
) -> float | None:
    """The relative error; None without factors, or if no client changed its product."""
    pairs = pairs_of(state.adapter)
    if not pairs:
        return None
    rng = generator(seed, "aggregation error", state.round)
    directions = {pair: _signs(state.adapter[pair.right], rng) for pair in pairs}
    total = sum(weight_of(update, cfg) for update in updates)
    mean: dict[Pair, Tensor] = {}
    for update in updates:
        after = {**state.adapter, **trained(state.adapter, update)}
        for pair, seen in _seen(after, directions).items():
            part = weight_of(update, cfg) / total * seen
            mean[pair] = mean[pair] + part if pair in mean else part
    before = _seen(state.adapter, directions)
    after = _seen(_with(state.adapter, change.delta), directions)
    if RESIDUAL in change.extra:
        kept = replace_beside(state.adapter, change.extra[RESIDUAL])
        for pair, signs in directions.items():
            (left, right), (old_left, old_right) = beside(kept, pair), beside(state.adapter, pair)
            after[pair] += left @ (right @ signs) - old_left @ (old_right @ signs)
    moved = sum(float((mean[pair] - before[pair]).square().sum()) for pair in pairs)
    missed = sum(float((mean[pair] - after[pair]).square().sum()) for pair in pairs)
    size = sum(float(seen.square().sum()) for seen in before.values())
    return (missed / moved) ** 0.5 if moved > ROUNDING**2 * size else None


def _with(adapter: AdapterState, delta: AdapterState) -> AdapterState:
    moved = {n: adapter[n].double() + delta[n].double() for n in delta if n in adapter}
    return {**adapter, **moved}


def _seen(adapter: AdapterState, directions: Mapping[Pair, Tensor]) -> dict[Pair, Tensor]:
    """Each module's product applied to its directions: (d_out, DIRECTIONS)."""
    found: dict[Pair, Tensor] = {}
    for pair, signs in directions.items():
        left, right = wide(adapter, pair)
        found[pair] = left @ (right @ signs)
    return found


def _signs(right: Tensor, rng: torch.Generator) -> Tensor:
    width = right.flatten(1).shape[1]
    return torch.randint(0, 2, (width, DIRECTIONS), generator=rng).double() * 2 - 1
