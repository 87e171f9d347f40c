"""FedProx: each client is pulled back towards the adapter it received.

Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2. arXiv:1812.06127
Differs from the paper: every client runs its full local budget; there is no inexactness test. With
AdamW the pull passes through the preconditioner like any other gradient.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from silotune.algorithms.base import Facts
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm, LocalContext, LocalRule
from silotune.core.tree import squared_distance


class FedProxConfig(FedAvgConfig):
    """Settings of FedProx, in addition to FedAvg's."""

    mu: float = Field(default=0.01, ge=0)
    """Strength of the pull, mu in eq. 2. At 0 this is FedAvg."""
    facts: ClassVar[Facts] = Facts(
        paper='Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2, '
        "arXiv:1812.06127",
        differs="Every client runs its full local budget; there is no inexactness test. With AdamW "
        "the pull passes through the preconditioner like any other gradient.",
    )


def fedprox(cfg: FedProxConfig) -> Algorithm:
    """Build FedProx. The server side is FedAvg's."""

    def pull(now: Mapping[str, Tensor], context: LocalContext) -> Tensor:
        return 0.5 * cfg.mu * squared_distance(now, context.received)

    # At 0 no term is built at all, so that mu = 0 is FedAvg to the last bit.
    rule = LocalRule(penalty=pull if cfg.mu > 0 else None, settings={"mu": cfg.mu})
    return replace(fedavg(cfg), name="fedprox", local=rule)
