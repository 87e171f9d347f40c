"""FLoRA: the clients' factors are stacked, which adds their products without an error.

Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank
Adaptations", section 3, eq. 8. arXiv:2409.05976
`[p_1 B_1, p_2 B_2, ...] [A_1; A_2; ...] = sum_i p_i B_i A_i`, with weights on one side only.
Clients of any rank take part. Every round starts from new factors whose product is 0, next to what
all rounds have added up so far. Differs from the paper: the sum is not merged into the base's
weights. It stands beside the adapter as frozen factors of 32 bits, with at most as many columns as
the smaller side of the module; so the base, which may be quantised, stays as it is.
New factors are the last ones with columns permuted and signs flipped, which keeps their
distribution.
"""

from typing import ClassVar

import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts
from silotune.algorithms.factors import WITH_RESIDUAL, needs_pairs
from silotune.algorithms.products import (
    RESIDUAL,
    added_beside,
    mean_of_products,
    report_residual,
    step_with_residual,
)
from silotune.core.algorithm import Algorithm
from silotune.core.lora import Pair, pairs_of
from silotune.core.seeds import generator
from silotune.core.tree import subtract
from silotune.core.types import AdapterState, Change, ServerState, Updates


class FLoRAConfig(AlgorithmConfig):
    """Settings of FLoRA; there are none beside the weights."""

    facts: ClassVar[Facts] = Facts(
        paper='Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with '
        'Heterogeneous Low-Rank Adaptations", section 3, arXiv:2409.05976',
        differs="The sum of the products is not merged into the base: it is kept beside the "
        "adapter as frozen factors of 32 bits, of at most the rank that the module has. New "
        "factors are permutations of the first ones. LoRA's scaling is the same at every rank.",
        linear=False,
        exact="yes",
        needs_lora=True,
        mixed_ranks=True,
        residual=True,
        down="adapter, residual",
    )


def flora(cfg: FLoRAConfig) -> Algorithm:
    """Build FLoRA.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        mean, delta = mean_of_products(state.adapter, updates, cfg)
        new = fresh_factors(state.adapter, state.round)
        delta |= subtract(new, {name: state.adapter[name] for name in new})
        return Change(delta, {RESIDUAL: added_beside(state.adapter, mean)})

    return Algorithm(
        name="flora",
        combine=combine,
        step=step_with_residual,
        init=needs_pairs("flora"),
        local=WITH_RESIDUAL,
        report=report_residual,
        linear=False,
    )


def fresh_factors(adapter: AdapterState, round_: int) -> dict[str, Tensor]:
    """Factors for the next round: the random ones drawn again, the others 0.

    Args:
        adapter: With the last ones. Permuting the columns of A and flipping their signs keeps the
            distribution of independent symmetric values, and also `A A^T`, so that orthogonal rows
            stay orthogonal.
        round_: Completed rounds before this one; with the tensor's name, it decides the draw.
    """
    found: dict[str, Tensor] = {}
    for pair in pairs_of(adapter):
        found[pair.zero] = torch.zeros_like(adapter[pair.zero])
        found[pair.random] = _drawn_again(adapter[pair.random], pair, round_)
    return found


def _drawn_again(factor: Tensor, pair: Pair, round_: int) -> Tensor:
    rng = generator(0, "flora", round_, pair.random)
    by_columns = pair.random == pair.right
    flat = factor.flatten(1) if by_columns else factor.flatten(1).T  # (rank, width)
    width = flat.shape[1]
    order = torch.randperm(width, generator=rng)
    signs = torch.randint(0, 2, (width,), generator=rng).to(flat.dtype) * 2 - 1
    moved = flat[:, order] * signs
    return (moved if by_columns else moved.T).reshape(factor.shape).contiguous()
