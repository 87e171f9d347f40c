"""FFA-LoRA: of LoRA's two factors the one drawn at random stays as it is; only the other learns.

Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning". arXiv:2403.12313
With one A at all clients and for good, the product B A is linear in B: the product of the means is
the mean of the products, and noise on B meets no noise on A.
Differs from the paper: no noise is added here. What else learns, such as a classification head, is
averaged as in FedAvg. Beside an embedding it is PEFT's lora_embedding_B that begins at random, so
there A learns. A is not sent up, but still comes down with every broadcast.
"""

from dataclasses import replace
from typing import ClassVar

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.core.algorithm import Algorithm, LocalRule
from silotune.core.errors import ConfigError
from silotune.core.types import AdapterState

FROZEN = {"lora_A": "lora_B", "lora_embedding_B": "lora_embedding_A"}
"""The factor that PEFT draws at random, and the one beside it, which begins at zero and learns."""


class FFALoRAConfig(FedAvgConfig):
    """Settings of FFA-LoRA: those of FedAvg."""

    needs_lora: ClassVar[bool] = True


def ffa_lora(cfg: FFALoRAConfig) -> Algorithm:
    """Build FFA-LoRA. The server side is FedAvg's.

    Its `init` raises a ConfigError where the adapter does not bring both factors.
    """
    rule = LocalRule(trains=_learns)
    return replace(fedavg(cfg), name="ffa_lora", local=rule, init=_check_factors)


def _learns(name: str, round_: int) -> bool:  # noqa: ARG001 - the signature of `trains`
    return FROZEN.keys().isdisjoint(name.split("."))


def _check_factors(
    adapter: AdapterState,
    num_clients: int,  # noqa: ARG001 - as `init`
) -> dict[str, AdapterState]:
    parts = {part for name in adapter for part in name.split(".")}
    if not any({frozen, other} <= parts for frozen, other in FROZEN.items()):
        raise ConfigError(
            "algorithm.name = 'ffa_lora' holds lora_A fast and trains lora_B, but this adapter "
            "does not bring both.\n"
            "  Set adapter.kind = 'lora' without options that change its factors, or choose "
            "another algorithm."
        )
    return {}
