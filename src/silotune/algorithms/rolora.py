"""RoLoRA: odd rounds train one of LoRA's factors, even rounds the other.

Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA".
arXiv:2502.01755
Within a round one factor is the same at all clients, so the product of the means is the mean of the
products; over two rounds both factors learn. Differs from the paper: the factor that starts at 0 is
trained first, because the other one has no gradient until then. Tensors that are no factors, such
as a classification head, are trained in every round.
"""

from dataclasses import replace
from typing import ClassVar

from silotune.algorithms.base import Facts
from silotune.algorithms.factors import needs_pairs, starts_at_random, starts_at_zero
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm, LocalRule


class RoLoRAConfig(FedAvgConfig):
    """Settings of RoLoRA, the same as FedAvg's."""

    facts: ClassVar[Facts] = Facts(
        paper='Chen et al. 2025, "Robust Federated Finetuning of LLMs via Alternating Optimization '
        'of LoRA", arXiv:2502.01755',
        differs="The factor that starts at zero is trained first, because the other one has no "
        "gradient until then. A classification head is trained in every round.",
        exact="yes",
        needs_lora=True,
        up="B, then A",
    )


def rolora(cfg: RoLoRAConfig) -> Algorithm:
    """Build RoLoRA. The server side is FedAvg's.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """
    return replace(
        fedavg(cfg), name="rolora", local=LocalRule(trains=_is_trained), init=needs_pairs("rolora")
    )


def _is_trained(name: str, round_: int) -> bool:
    rests = starts_at_random if round_ % 2 == 1 else starts_at_zero
    return not rests(name)
