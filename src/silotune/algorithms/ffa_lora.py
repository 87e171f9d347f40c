"""FFA-LoRA: LoRA's randomly initialised factor is frozen, and only the other one is trained.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning". arXiv:2403.12313
Because A is the same at all clients and never changes, the product B A is linear in B: the product
of the means is the mean of the products, and noise on B is not multiplied by noise on A.
Differs from the paper: no noise is added here. Other trained tensors, such as a classification
head, are averaged as in FedAvg. For an embedding, PEFT initialises lora_embedding_B at random, so A
is trained there. Clients do not send A, and receive it with a whole adapter only.
"""

from dataclasses import replace
from typing import ClassVar

from silotune.algorithms.base import Facts
from silotune.algorithms.factors import ONE_FACTOR, needs_pairs
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm


class FFALoRAConfig(FedAvgConfig):
    """Settings of FFA-LoRA, the same as FedAvg's."""

    facts: ClassVar[Facts] = Facts(
        paper='Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning", '
        "arXiv:2403.12313",
        differs="No noise is added. A classification head, if there is one, is trained and "
        "averaged along with B. On an embedding, the factor that starts at zero, and is therefore "
        "trained, is the one that PEFT calls A. A is not sent up, and comes down with a whole "
        "adapter only. Other kinds of adapter and DoRA are refused: DoRA divides by a "
        "norm of base and product together, so the mean of B would not be exact.",
        exact="yes",
        needs_lora=True,
        up="B",
    )


def ffa_lora(cfg: FFALoRAConfig) -> Algorithm:
    """Build FFA-LoRA. The server side is FedAvg's.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """
    return replace(fedavg(cfg), name="ffa_lora", local=ONE_FACTOR, init=needs_pairs("ffa_lora"))
