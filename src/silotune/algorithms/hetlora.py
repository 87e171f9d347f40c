"""HetLoRA: factors of different ranks are padded with zeros and averaged by the clients' norms.

Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
section 3. arXiv:2401.06432
A client of rank r receives the first r columns and rows, trains them, and its factors are padded
with zeros to the server's rank. Its share in the mean grows with the Frobenius norm of its product
over all modules, so that clients that have learned more count for more. A column that only some
clients have shrinks by the share of the others: the price of padding. Differs from the paper: the
norms are multiplied by the clients' examples unless `weights = "uniform"`; no client prunes its
rank by itself; LoRA's scaling is the same at every rank. With equal ranks and without norms this is
FedAvg.
"""

from typing import ClassVar

import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts, weight_of
from silotune.algorithms.factors import needs_pairs, wide
from silotune.algorithms.fedavg import move
from silotune.algorithms.products import squared_norm, trained
from silotune.core.algorithm import Algorithm
from silotune.core.lora import pairs_of
from silotune.core.tree import subtract, weighted_mean
from silotune.core.types import AdapterState, Change, ServerState, Updates


class HetLoRAConfig(AlgorithmConfig):
    """Settings of HetLoRA."""

    by_norm: bool = True
    """Whether a client's weight is multiplied by the norm of its product. A client that has learned
    more, or scales its factors up, then counts for more."""
    facts: ClassVar[Facts] = Facts(
        paper='Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device '
        'Foundation Models", section 3, arXiv:2401.06432',
        differs='The norms are multiplied by the clients\' examples unless `weights = "uniform"`. '
        "No client prunes its rank by itself. LoRA's scaling is the same at every rank. A round in "
        "which all products are zero is averaged without norms.",
        linear=False,
        needs_lora=True,
        mixed_ranks=True,
    )


def hetlora(cfg: HetLoRAConfig) -> Algorithm:
    """Build HetLoRA.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        norms = [product_norm(trained(state.adapter, u)) if cfg.by_norm else 1.0 for u in updates]
        if not any(norms):
            norms = [1.0] * len(norms)
        pairs = zip(norms, updates, strict=True)
        mean = weighted_mean(
            (norm * weight_of(u, cfg), widened(trained(state.adapter, u), state.adapter))
            for norm, u in pairs
        )
        return Change(subtract(mean, {name: state.adapter[name] for name in mean}))

    def step(state: ServerState, change: Change) -> ServerState:
        return move(state, change.delta)

    return Algorithm(
        name="hetlora", combine=combine, step=step, init=needs_pairs("hetlora"), linear=False
    )


def product_norm(adapter: AdapterState) -> float:
    """The Frobenius norm of all modules' products together, from small Gram matrices."""
    return sum(squared_norm(*wide(adapter, pair)) for pair in pairs_of(adapter)) ** 0.5


def widened(delta: AdapterState, like: AdapterState) -> dict[str, Tensor]:
    """The same delta with factors of the rank that they have in `like`: zeros are appended."""
    found = dict(delta)
    for pair in pairs_of(delta):
        missing = len(like[pair.right]) - len(delta[pair.right])
        if missing:
            left, right = delta[pair.left], delta[pair.right]
            found[pair.left] = torch.cat([left, left.new_zeros(_sized(left, 1, missing))], dim=1)
            found[pair.right] = torch.cat([right, right.new_zeros(_sized(right, 0, missing))])
    return found


def _sized(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [size if i == dim else n for i, n in enumerate(tensor.shape)]
