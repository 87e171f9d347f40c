"""DiLoCo's outer optimizer: Nesterov momentum on the server, after many local steps.

Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models",
Algorithm 1 with Nesterov momentum as OuterOpt. arXiv:2311.08105
`u <- momentum u + D`, `theta <- theta + server_lr (D + momentum u)`, with D the clients' mean
change. Differs from the paper: the mean is weighted by examples unless `weights = "uniform"`, and
clients start every round with a new optimizer unless `train.keep_moments = true`.
"""

from dataclasses import replace
from typing import ClassVar

from pydantic import Field

from silotune.algorithms.base import AlgorithmConfig, Facts
from silotune.algorithms.fedavg import FedAvgConfig, fedavg, move
from silotune.core.algorithm import Algorithm
from silotune.core.tree import zeros_like
from silotune.core.types import AdapterState, Change, ServerState


class DiLoCoConfig(AlgorithmConfig):
    """Settings of DiLoCo."""

    server_lr: float = Field(default=0.7, gt=0)
    """Step size of the outer optimizer. With momentum 0.9 a constant change is amplified up to
    tenfold."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Factor of the Nesterov momentum. At 0, with server_lr = 1, this is FedAvg."""
    facts: ClassVar[Facts] = Facts(
        paper='Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language '
        'Models", Algorithm 1, arXiv:2311.08105',
        differs="The outer optimizer only: how many local steps a round has is the recipe's. "
        "Clients begin every round with a new inner optimizer unless `train.keep_moments = true`.",
    )


def diloco(cfg: DiLoCoConfig) -> Algorithm:
    """Build DiLoCo's outer step."""

    def init(adapter: AdapterState, _: int) -> dict[str, AdapterState]:
        return {"momentum": zeros_like(adapter)}

    def step(state: ServerState, change: Change) -> ServerState:
        old = state.extra["momentum"]
        new = {n: cfg.momentum * old[n].double() + d.double() for n, d in change.delta.items()}
        ahead = {
            n: (d.double() + cfg.momentum * new[n]).to(d.dtype) for n, d in change.delta.items()
        }
        moved = move(state, ahead, server_lr=cfg.server_lr)
        kept = {n: t.to(old[n].dtype) for n, t in new.items()}
        return replace(moved, extra={"momentum": {**old, **kept}})

    return replace(fedavg(FedAvgConfig(weights=cfg.weights)), name="diloco", step=step, init=init)
