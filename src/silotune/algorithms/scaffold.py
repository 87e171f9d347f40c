"""SCAFFOLD: control variates at the clients and at the server correct each client's drift.

Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
Algorithm 1 with option II. arXiv:1910.06378
A client steps along `g - c_i + c`; its new variate is `c_i' = c_i - c - D / (sum of step sizes)`;
the server adds the clients' changes of variates, divided by the number of all clients. Defined for
plain gradient steps. With another optimizer D / (sum of step sizes) is no gradient, so that has to
be asked for by name: `variates = "displacement"`. Differs from the paper: the mean is weighted by
examples unless `weights = "uniform"`; variates have equal weights, as published.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from silotune.algorithms.base import Facts, kept, mean_delta
from silotune.algorithms.fedavg import FedAvgConfig, move
from silotune.core.algorithm import Algorithm, LocalContext, LocalOutcome, LocalRule
from silotune.core.tree import add, layout_of, scale, subtract, weighted_mean, zeros_like
from silotune.core.types import AdapterState, Change, Layout, ServerState, Updates

CONTROL = "control"


class ScaffoldConfig(FedAvgConfig):
    """Settings of SCAFFOLD, in addition to FedAvg's."""

    variates: Literal["gradient", "displacement"] = "gradient"
    """What a variate is made of. gradient, as published: needs train.optimizer = "sgd" without
    clip_norm and weight_decay. displacement: the same formula with any optimizer, whose steps are
    not gradients; nothing is proved about it."""
    facts: ClassVar[Facts] = Facts(
        paper='Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated '
        'Learning", Algorithm 1, option II, arXiv:1910.06378',
        differs='The mean is weighted by examples unless `weights = "uniform"`. Any optimizer '
        'but plain SGD has to be asked for by `variates = "displacement"`.',
        sends_more=True,
        remembers=True,
        up="adapter, change of variates",
        down="adapter, variates",
    )

    @property
    def needs_plain_sgd(self) -> bool:
        """With variates that are gradients."""
        return self.variates == "gradient"


def scaffold(cfg: ScaffoldConfig) -> Algorithm:
    """Build SCAFFOLD."""

    def init(adapter: AdapterState, num_clients: int) -> dict[str, AdapterState]:
        number = torch.tensor([num_clients], dtype=torch.int64)
        return {CONTROL: zeros_like(adapter), "clients": {"number": number}}

    def correct(name: str, gradient: Tensor, context: LocalContext) -> Tensor:
        theirs = context.extra[CONTROL][name].to(gradient)
        return gradient - kept(context, CONTROL, name, gradient) + theirs

    def finish(delta: AdapterState, sum_of_steps: float, context: LocalContext) -> LocalOutcome:
        old = {name: kept(context, CONTROL, name, d) for name, d in delta.items()}
        new = {
            name: old[name] - context.extra[CONTROL][name] - d / sum_of_steps
            for name, d in delta.items()
        }
        return LocalOutcome(extra={CONTROL: subtract(new, old)}, memory={CONTROL: new})

    def combine(state: ServerState, updates: Updates) -> Change:
        share = len(updates) / int(state.extra["clients"]["number"])
        change = scale(weighted_mean((1.0, u.extra[CONTROL]) for u in updates), share)
        return Change(mean_delta(updates, cfg), {CONTROL: change})

    def step(state: ServerState, change: Change) -> ServerState:
        moved = move(state, change.delta, server_lr=cfg.server_lr)
        old = state.extra[CONTROL]
        changed = change.extra.get(CONTROL, {})
        new = add({name: old[name] for name in changed}, changed)
        return replace(moved, extra={**state.extra, CONTROL: {**old, **new}})

    def extra_layout(state: ServerState, _: str | None) -> dict[str, Layout]:
        return {CONTROL: layout_of(state.extra[CONTROL])}

    return Algorithm(
        name="scaffold",
        combine=combine,
        step=step,
        init=init,
        local=LocalRule(correct=correct, finish=finish),
        extra_layout=extra_layout,
        broadcasts=(CONTROL,),
    )
