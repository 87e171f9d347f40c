"""The algorithms by the name that a recipe uses. One file per paper; adding one is a line here."""

from collections.abc import Callable
from typing import Any

from silotune.algorithms.base import AlgorithmConfig
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.fedopt import (
    FedAdagradConfig,
    FedAdamConfig,
    FedAvgMConfig,
    FedYogiConfig,
    fedadagrad,
    fedadam,
    fedavgm,
    fedyogi,
)
from silotune.algorithms.fedprox import FedProxConfig, fedprox
from silotune.algorithms.ffa_lora import FFALoRAConfig, ffa_lora
from silotune.core.algorithm import Algorithm

ALGORITHMS: dict[str, tuple[type[AlgorithmConfig], Callable[[Any], Algorithm]]] = {
    "fedavg": (FedAvgConfig, fedavg),
    "fedprox": (FedProxConfig, fedprox),
    "fedavgm": (FedAvgMConfig, fedavgm),
    "fedadagrad": (FedAdagradConfig, fedadagrad),
    "fedadam": (FedAdamConfig, fedadam),
    "fedyogi": (FedYogiConfig, fedyogi),
    "ffa_lora": (FFALoRAConfig, ffa_lora),
}
