"""The algorithms by the name that a recipe uses. One file per paper; adding one is a line here."""

from collections.abc import Callable
from typing import Any

from silotune.algorithms.base import AlgorithmConfig
from silotune.algorithms.diloco import DiLoCoConfig, diloco
from silotune.algorithms.fed_sb import FedSBConfig, fed_sb
from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.algorithms.feddyn import FedDynConfig, feddyn
from silotune.algorithms.fedex import FedExConfig, fedex
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
from silotune.algorithms.fedrot import FedRotConfig, fedrot
from silotune.algorithms.fedsa_lora import FedSALoRAConfig, fedsa_lora
from silotune.algorithms.fedsvd import FedSVDConfig, fedsvd
from silotune.algorithms.ffa_lora import FFALoRAConfig, ffa_lora
from silotune.algorithms.flexlora import FlexLoRAConfig, flexlora
from silotune.algorithms.flora import FLoRAConfig, flora
from silotune.algorithms.hetlora import HetLoRAConfig, hetlora
from silotune.algorithms.lora_fair import LoRAFAIRConfig, lora_fair
from silotune.algorithms.robust import (
    GeometricMedianConfig,
    KrumConfig,
    MedianConfig,
    MultiKrumConfig,
    NormBoundConfig,
    TrimmedMeanConfig,
    geometric_median,
    krum,
    median,
    multi_krum,
    norm_bound,
    trimmed_mean,
)
from silotune.algorithms.rolora import RoLoRAConfig, rolora
from silotune.algorithms.scaffold import ScaffoldConfig, scaffold
from silotune.core.algorithm import Algorithm

ALGORITHMS: dict[str, tuple[type[AlgorithmConfig], Callable[[Any], Algorithm]]] = {
    "fedavg": (FedAvgConfig, fedavg),
    "fedprox": (FedProxConfig, fedprox),
    "fedavgm": (FedAvgMConfig, fedavgm),
    "fedadagrad": (FedAdagradConfig, fedadagrad),
    "fedadam": (FedAdamConfig, fedadam),
    "fedyogi": (FedYogiConfig, fedyogi),
    "diloco": (DiLoCoConfig, diloco),
    "scaffold": (ScaffoldConfig, scaffold),
    "feddyn": (FedDynConfig, feddyn),
    "ffa_lora": (FFALoRAConfig, ffa_lora),
    "rolora": (RoLoRAConfig, rolora),
    "fedsvd": (FedSVDConfig, fedsvd),
    "fed_sb": (FedSBConfig, fed_sb),
    "flexlora": (FlexLoRAConfig, flexlora),
    "hetlora": (HetLoRAConfig, hetlora),
    "flora": (FLoRAConfig, flora),
    "fedex": (FedExConfig, fedex),
    "lora_fair": (LoRAFAIRConfig, lora_fair),
    "fedrot": (FedRotConfig, fedrot),
    "fedsa_lora": (FedSALoRAConfig, fedsa_lora),
    "norm_bound": (NormBoundConfig, norm_bound),
    "median": (MedianConfig, median),
    "trimmed_mean": (TrimmedMeanConfig, trimmed_mean),
    "geometric_median": (GeometricMedianConfig, geometric_median),
    "krum": (KrumConfig, krum),
    "multi_krum": (MultiKrumConfig, multi_krum),
}
