"""What each update of a round promises for each held-out row, to first order.

A client's share of the round's change is `p_i D_i`, its delta times its weight in the mean. Its
estimate for a row is `-<gradient of the row's loss, p_i D_i>`, at the adapter that the round's
clients received: how much the loss would fall if the loss were linear.

Wang et al. 2024, "Data Shapley in One Training Run", section 4.1 (first-order In-Run Data Shapley).
arXiv:2406.11011. Differs from the paper: the players are clients, and a step is a round, so a
player's part of it is the result of many local steps; the validation rows are the other clients'
held-out rows; it is computed after the run, from kept updates. The same product of a client's
change and a validation gradient is the estimate of Wang et al. 2022, "Efficient Participant
Contribution Evaluation for Horizontal and Vertical Federated Learning", ICDE (DIG-FL).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from silotune.algorithms.base import AlgorithmConfig, weight_of
from silotune.algorithms.fedavg import FedAvgConfig
from silotune.core.types import AdapterState, Update
from silotune.models.loading import LoadedModel, write_adapter
from silotune.training.tasks.base import Example, Task


def adds_up(cfg: AlgorithmConfig) -> bool:
    """Whether the server's step is the sum of the clients' parts: it adopts their mean."""
    return isinstance(cfg, FedAvgConfig)


def shares(updates: Iterable[Update], cfg: AlgorithmConfig) -> dict[str, dict[str, Tensor]]:
    """Each client's part of the round's mean delta, float64, by client and tensor.

    If the server adopts the mean (FedAvg, FedProx, FFA-LoRA), times its `server_lr`: the parts then
    add up to the step. A server optimizer's step is no sum of parts.
    """
    found = list(updates)
    total = sum(weight_of(update, cfg) for update in found)
    scale = cfg.server_lr if isinstance(cfg, FedAvgConfig) else 1.0
    return {
        u.client: {
            name: t.double() * (scale * weight_of(u, cfg) / total) for name, t in u.delta.items()
        }
        for u in found
    }


def promised(
    loaded: LoadedModel,
    task: Task,
    received: AdapterState,
    parts: Mapping[str, AdapterState],
    examples: Mapping[str, Sequence[Example]],
) -> dict[str, np.ndarray]:
    """The first-order estimates of one round.

    Args:
        loaded: Any adapter; overwritten.
        task: The run's.
        received: The adapter before the round.
        parts: See `shares`; the same tensors for every client.
        examples: Held-out rows by client.

    Returns:
        By client that the rows belong to: (clients in `parts`, rows), in nats summed over a row's
        targets; positive where the loss falls.
    """
    write_adapter(loaded, received)
    loaded.model.eval()
    names = sorted(next(iter(parts.values())))
    learning = [loaded.parameters[name] for name in names]
    moves = torch.stack([_flat([part[name] for name in names]) for part in parts.values()])
    found = dict[str, np.ndarray]()
    for client, own in examples.items():
        columns = list[Tensor]()
        for example in own:  # one at a time: a batch has one gradient only
            loss = task.loss(loaded, task.collate([example])).loss_sum
            slopes = torch.autograd.grad(loss, learning, materialize_grads=True)
            columns.append(-(moves @ _flat(slopes)))
        found[client] = torch.stack(columns, dim=1).numpy()
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().cpu().double().reshape(-1) for t in tensors])
