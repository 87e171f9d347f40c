"""LoRA-FAIR: the mean factors, and a correction of B towards the mean of the products.

Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization
Refinement". arXiv:2411.14961
A stays the clients' mean; B becomes `mean(B) + dB`, with the dB that brings
`(mean(B) + dB) mean(A)` nearest to the mean product M: `dB = R A^T (A A^T + ridge I)^-1` with
`A = mean(A)` and `R = M - mean(B) A`, which is never formed. Differs from the paper: least squares
with a ridge in closed form; the paper minimises a cosine distance with the same penalty by gradient
steps.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts, mean_delta, weight_of
from silotune.algorithms.factors import Pair, linalg, needs_pairs, pairs_of, wide
from silotune.algorithms.fedavg import move
from silotune.core.algorithm import Algorithm
from silotune.core.tree import add
from silotune.core.types import Change, ServerState, Updates


class LoRAFAIRConfig(AlgorithmConfig):
    """Settings of LoRA-FAIR."""

    ridge: float = Field(default=0.01, ge=0)
    """Penalty on the size of the correction, relative to the mean square of mean(A)'s rows. The
    larger, the nearer to FedAvg."""
    facts: ClassVar[Facts] = Facts(
        paper='Bian et al. 2025, "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and '
        'Initialization Refinement", arXiv:2411.14961',
        differs="Least squares with a ridge in closed form; the paper minimises a cosine distance "
        "with the same penalty by gradient steps.",
        linear=False,
        exact="nearly",
        needs_lora=True,
    )


def lora_fair(cfg: LoRAFAIRConfig) -> Algorithm:
    """Build LoRA-FAIR.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def combine(state: ServerState, updates: Updates) -> Change:
        delta = mean_delta(updates, cfg)
        received = {name: state.adapter[name] for name in delta}
        mean, pairs = add(received, delta), pairs_of(delta)
        # sum_i p_i B_i (A_i mean(A)^T), one client in memory at a time
        total = sum(weight_of(u, cfg) for u in updates)
        seen: dict[Pair, Tensor] = {}
        for update in updates:
            share, trained = weight_of(update, cfg) / total, add(received, update.delta)
            for pair in pairs:
                left, right = wide(trained, pair)
                part = share * left @ (right @ wide(mean, pair)[1].T)
                seen[pair] = seen[pair] + part if pair in seen else part
        for pair, product in seen.items():
            left, right = wide(mean, pair)
            gram = right @ right.T
            ridge = cfg.ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            residual = product - left @ gram
            # the pseudo-inverse, for rows of mean(A) that depend on each other
            correction: Tensor = residual @ linalg.pinv(gram + ridge, hermitian=True)
            old = delta[pair.left]
            delta[pair.left] = (old.double() + correction.reshape(old.shape)).to(old.dtype)
        return Change(delta)

    def step(state: ServerState, change: Change) -> ServerState:
        return move(state, change.delta)

    return Algorithm(
        name="lora_fair", combine=combine, step=step, init=needs_pairs("lora_fair"), linear=False
    )
