"""FedSVD: FFA-LoRA whose frozen factor is renewed by the server after every round.

Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning with LoRA".
arXiv:2505.12805
The server rewrites the product B A as (U S) V^T: the function stays, A gets orthonormal rows that
span what was learned, and clients train B on it. What the server does is made of the mean alone, so
noise and secure sums stay as they are. Differs from the paper: a product of 0 keeps its factors,
as it has no directions. For an embedding the roles of the factors are exchanged.
"""

from dataclasses import replace
from typing import ClassVar

from silotune.algorithms.base import Facts
from silotune.algorithms.factors import (
    ONE_FACTOR,
    needs_pairs,
    orthonormal,
    pairs_of,
    starts_at_random,
    wide,
)
from silotune.algorithms.fedavg import FedAvgConfig, fedavg, move
from silotune.core.algorithm import Algorithm
from silotune.core.types import Change, ServerState


class FedSVDConfig(FedAvgConfig):
    """Settings of FedSVD, the same as FedAvg's."""

    facts: ClassVar[Facts] = Facts(
        paper='Lee et al. 2025, "FedSVD: Adaptive Orthogonalization for Private Federated Learning '
        'with LoRA", arXiv:2505.12805',
        differs="A product of zero keeps its factors. The signs of the singular vectors are fixed, "
        "so that a run repeats to the bit.",
        exact="yes",
        needs_lora=True,
        up="B",
    )


def _is_turned(name: str, round_: int) -> bool:  # noqa: ARG001 - as `Algorithm.rewrites`
    return starts_at_random(name)


def fedsvd(cfg: FedSVDConfig) -> Algorithm:
    """Build FedSVD.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """

    def step(state: ServerState, change: Change) -> ServerState:
        moved = move(state, change.delta, server_lr=cfg.server_lr)
        adapter = dict(moved.adapter)
        for pair in pairs_of(adapter):
            adapter |= orthonormal(*wide(adapter, pair), pair, like=adapter)
        return replace(moved, adapter=adapter)

    return replace(
        fedavg(cfg),
        name="fedsvd",
        step=step,
        rewrites=_is_turned,
        init=needs_pairs("fedsvd"),
        local=ONE_FACTOR,
    )
