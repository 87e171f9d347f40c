"""Server optimizers: the clients' mean change serves as the gradient of an optimizer on the server.

FedAdagrad, FedYogi, FedAdam: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.
arXiv:2003.00295
FedAvgM: Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification", section 4. arXiv:1909.06335
As published: no bias correction, and the second moment starts at tau^2. Differs from the papers:
tau is 1e-4 by default, near the size of an adapter's changes, where the paper uses 1e-3; the mean
is weighted by examples unless `weights = "uniform"`; tensors without a change this round keep their
moments. Every round reports the share of changes below tau.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, Facts
from silotune.algorithms.fedavg import FedAvgConfig, fedavg, move
from silotune.core.algorithm import Algorithm
from silotune.core.tree import zeros_like
from silotune.core.types import AdapterState, Change, ServerState

REDDI = Facts(
    paper='Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2, arXiv:2003.00295',
    differs="As published: no bias correction, the second moment starts at tau squared. Weights "
    "and unchanged tensors are handled as in `fedavgm`.",
)


class FedAvgMConfig(AlgorithmConfig):
    """Settings of FedAvgM."""

    server_lr: float = Field(default=1.0, gt=0)
    """Step size applied to the momentum, which at 0.9 amplifies a constant change up to tenfold."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Heavy-ball factor beta: v = beta v + change. At 0 this is FedAvg."""
    facts: ClassVar[Facts] = Facts(
        paper='Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for '
        'Federated Visual Classification", section 4, arXiv:1909.06335',
        differs='The mean is weighted by examples unless `weights = "uniform"`. Tensors that do '
        "not change in a round keep their momentum.",
    )


class FedAdagradConfig(AlgorithmConfig):
    """Settings of FedAdagrad."""

    server_lr: float = Field(default=1e-2, gt=0)
    """Step size eta."""
    beta1: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the first moment; the paper uses 0 for FedAdagrad."""
    tau: float = Field(default=1e-4, gt=0)
    """Added to the square root of the second moment, which starts at tau squared. Far above the
    changes, the step is plain momentum; a round of a few steps changes LoRA by 1e-4 to 1e-3."""
    facts: ClassVar[Facts] = REDDI


class FedAdamConfig(AlgorithmConfig):
    """Settings of FedAdam."""

    server_lr: float = Field(default=1e-2, gt=0)
    """Step size eta."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the second moment."""
    tau: float = Field(default=1e-4, gt=0)
    """Added to the square root of the second moment, which starts at tau squared. Far above the
    changes, the step is plain momentum; a round of a few steps changes LoRA by 1e-4 to 1e-3."""
    facts: ClassVar[Facts] = REDDI


class FedYogiConfig(FedAdamConfig):
    """Settings of FedYogi."""


def fedavgm(cfg: FedAvgMConfig) -> Algorithm:
    """Build FedAvgM: `v = momentum v + D`, `theta += server_lr v`."""

    def init(adapter: AdapterState, _: int) -> dict[str, AdapterState]:
        return {"momentum": zeros_like(adapter)}

    def step(state: ServerState, change: Change) -> ServerState:
        old = state.extra["momentum"]
        new = {
            n: (cfg.momentum * old[n].double() + d.double()).to(d.dtype)
            for n, d in change.delta.items()
        }
        moved = move(state, new, server_lr=cfg.server_lr)
        return replace(moved, extra={"momentum": {**old, **new}})

    return replace(fedavg(FedAvgConfig(weights=cfg.weights)), name="fedavgm", step=step, init=init)


def fedadagrad(cfg: FedAdagradConfig) -> Algorithm:
    """Build FedAdagrad: `v += D^2`."""
    return _adaptive("fedadagrad", cfg, lambda v, d: v + d.square())


def fedadam(cfg: FedAdamConfig) -> Algorithm:
    """Build FedAdam: `v = beta2 v + (1 - beta2) D^2`."""
    return _adaptive("fedadam", cfg, lambda v, d: cfg.beta2 * v + (1 - cfg.beta2) * d.square())


def fedyogi(cfg: FedYogiConfig) -> Algorithm:
    """Build FedYogi: `v = v - (1 - beta2) D^2 sign(v - D^2)`."""

    def second(v: Tensor, d: Tensor) -> Tensor:
        square = d.square()
        return v - (1 - cfg.beta2) * square * torch.sign(v - square)

    return _adaptive("fedyogi", cfg, second)


def _adaptive(
    name: str,
    cfg: FedAdagradConfig | FedAdamConfig,
    second: Callable[[Tensor, Tensor], Tensor],
) -> Algorithm:
    """`m = beta1 m + (1 - beta1) D`, `v = second(v, D)`, `theta += eta m / (sqrt(v) + tau)`."""

    def init(adapter: AdapterState, _: int) -> dict[str, AdapterState]:
        # float64: v starts at tau^2 and accumulates squares of deltas around 1e-5, which float32
        # would round away
        start = {
            n: torch.full(t.shape, cfg.tau**2, dtype=torch.float64) for n, t in adapter.items()
        }
        return {
            "first_moment": {n: torch.zeros_like(t) for n, t in start.items()},
            "second_moment": start,
        }

    def step(state: ServerState, change: Change) -> ServerState:
        first, second_ = dict(state.extra["first_moment"]), dict(state.extra["second_moment"])
        direction: dict[str, Tensor] = {}
        for n, delta in change.delta.items():
            d = delta.double()
            first[n] = cfg.beta1 * first[n] + (1 - cfg.beta1) * d
            second_[n] = second(second_[n], d)
            direction[n] = (first[n] / (second_[n].sqrt() + cfg.tau)).to(delta.dtype)
        moved = move(state, direction, server_lr=cfg.server_lr)
        return replace(moved, extra={"first_moment": first, "second_moment": second_})

    def report(state: ServerState, change: Change) -> dict[str, float]:  # noqa: ARG001
        below = sum(int((d.abs() < cfg.tau).sum()) for d in change.delta.values())
        return {"share_below_tau": below / sum(d.numel() for d in change.delta.values())}

    plain = fedavg(FedAvgConfig(weights=cfg.weights))
    return replace(plain, name=name, step=step, init=init, report=report)
