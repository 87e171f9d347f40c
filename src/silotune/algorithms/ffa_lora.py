"""FFA-LoRA: LoRA's randomly initialised factor is frozen, and only the other one is trained.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning". arXiv:2403.12313
Because A is the same at all clients and never changes, the product B A is linear in B: the product
of the means is the mean of the products, and noise on B is not multiplied by noise on A.
Differs from the paper: no noise is added here. Other trained tensors, such as a classification
head, are averaged as in FedAvg. For an embedding, PEFT initialises lora_embedding_B at random, so A
is trained there. Clients do not send A, but every broadcast still contains it.
"""

from dataclasses import replace
from typing import ClassVar

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm, LocalRule
from silotune.core.errors import ConfigError
from silotune.core.types import AdapterState

FROZEN = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}
"""The factor that PEFT initialises at random, and the other one, which starts at 0 and is
trained."""


class FFALoRAConfig(FedAvgConfig):
    """Settings of FFA-LoRA, the same as FedAvg's."""

    needs_lora: ClassVar[bool] = True


def ffa_lora(cfg: FFALoRAConfig) -> Algorithm:
    """Build FFA-LoRA. The server side is FedAvg's.

    Its `init` raises a ConfigError if the adapter does not have both factors.
    """
    rule = LocalRule(trains=_is_trained)
    return replace(fedavg(cfg), name="ffa_lora", local=rule, init=_check_factors)


def _is_trained(name: str, round_: int) -> bool:  # noqa: ARG001 - the signature of `trains`
    return FROZEN.keys().isdisjoint(name.split("."))


def _check_factors(
    adapter: AdapterState,
    num_clients: int,  # noqa: ARG001 - as `init`
) -> dict[str, AdapterState]:
    parts = {part for name in adapter for part in name.split(".")}
    if not any({frozen, other} <= parts for frozen, other in FROZEN.items()):
        raise ConfigError(
            "algorithm.name = 'ffa_lora' freezes lora_A and trains lora_B, but this adapter does "
            "not have both.\n"
            "  Set adapter.kind = 'lora' without options that change its factors, or choose "
            "another algorithm."
        )
    return {}
