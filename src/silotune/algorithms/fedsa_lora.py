"""FedSA-LoRA: clients share LoRA's first factor A, and each keeps a second factor B of its own.

Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning".
arXiv:2410.01463
A learns what the clients have in common, B what each of them makes of it. The result is therefore
one adapter for each client: the shared A with its own B. A client that has not trained yet has a B
of 0, so it begins with the base.
Differs from the paper: a classification head is averaged unless the recipe keeps it at the clients,
too. For an embedding, the factor that stays is the one that starts at 0, which PEFT calls A there.
"""

from dataclasses import replace
from typing import ClassVar

from silotune.algorithms.base import Facts
from silotune.algorithms.factors import needs_pairs, starts_at_zero
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm, LocalRule


class FedSALoRAConfig(FedAvgConfig):
    """Settings of FedSA-LoRA, the same as FedAvg's."""

    facts: ClassVar[Facts] = Facts(
        paper='Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated '
        'Learning", arXiv:2410.01463',
        differs='A classification head is averaged unless `adapter.head = "local"`. On an '
        "embedding, the factor that starts at zero, and therefore stays at the client, is the one "
        "that PEFT calls A. B is not sent up, but comes down as zeros with a whole adapter.",
        needs_lora=True,
        keeps="B",
        up="A",
    )


def fedsa_lora(cfg: FedSALoRAConfig) -> Algorithm:
    """Build FedSA-LoRA. The server side is FedAvg's, on A.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """
    return replace(
        fedavg(cfg),
        name="fedsa_lora",
        local=LocalRule(personal=starts_at_zero),
        init=needs_pairs("fedsa_lora"),
    )
