"""The [algorithm] section: a config for each of our algorithms, and one for Flower's."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

from pydantic import Discriminator, Field, Tag, create_model, field_validator

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import AlgorithmConfig
from silotune.core.algorithm import Algorithm


def _named(name: str, cfg: type[AlgorithmConfig]) -> type[AlgorithmConfig]:
    """An algorithm's own config with the key that chooses it in a recipe."""
    field: Any = (Literal[name], Field(name, description="Which algorithm; see docs/papers.md."))
    return create_model(cfg.__name__, __base__=cfg, __doc__=cfg.__doc__, name=field)


FLOWER = "flower:<module>.<Class>"
"""Stands for the names of all Flower strategies, in messages and documents too."""
FLOWER_EXAMPLE = "A strategy is named as in flower:flwr.serverapp.strategy.FedYogi."
FLOWER_NAME = r"flower:[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
NOT_OPTIONS = {
    "fraction_train": "[sampling] rules who takes part",
    "min_train_nodes": "[sampling] rules who takes part",
    "min_available_nodes": "[sampling] rules who takes part",
    "fraction_evaluate": "[evaluate] rules who scores",
    "min_evaluate_nodes": "[evaluate] rules who scores",
    "weighted_by_key": "algorithm.weights rules how clients are weighted",
}
"""Arguments of Flower's strategies that other keys of a recipe stand for."""


class FlowerStrategyConfig(AlgorithmConfig):
    """Settings of a Flower strategy, as in flower:flwr.serverapp.strategy.FedYogi.

    The class is imported where the server runs, never at a client. Needs the extra flower.
    """

    name: str = Field(pattern=f"^{FLOWER_NAME}$")
    """The path of the strategy's class: any module that Python finds, Flower's or your own."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the class by their own names, as in options.eta = 0.01."""

    @field_validator("options", mode="before")
    @classmethod
    def _only_options(cls, given: Any) -> Any:
        for key, value in cast(dict[str, Any], given).items() if isinstance(given, dict) else ():
            if key in NOT_OPTIONS:
                raise ValueError(f"'{key}' is no option: {NOT_OPTIONS[key]}")
            if not isinstance(value, (int, float, str)):  # true and false are integers in Python
                raise ValueError(f"'{key}' should be a number, a text, true or false")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"'{key}' should be a finite number")
        return cast(Any, given)


def chosen_algorithm(section: Any) -> str:
    """The algorithm that an [algorithm] table, or a config object, names; one for all of Flower."""
    if isinstance(section, dict):
        name = str(cast(dict[str, Any], section).get("name", "fedavg"))
    else:
        name = str(getattr(section, "name", ""))
    return FLOWER if re.fullmatch(FLOWER_NAME, name) else name


ALGORITHM_CONFIGS: dict[str, type[AlgorithmConfig]] = {
    **{name: _named(name, cfg) for name, (cfg, _) in ALGORITHMS.items()},
    FLOWER: FlowerStrategyConfig,
}

if TYPE_CHECKING:
    AnyAlgorithmConfig = AlgorithmConfig
else:
    _tagged = tuple(Annotated[cfg, Tag(name)] for name, cfg in ALGORITHM_CONFIGS.items())
    AnyAlgorithmConfig = Annotated[Union[_tagged], Discriminator(chosen_algorithm)]  # noqa: UP007


def build_algorithm(cfg: AlgorithmConfig) -> Algorithm:
    """One of our own algorithms; runtime.flower_strategy.algorithm_of builds Flower's too."""
    return ALGORITHMS[chosen_algorithm(cfg)][1](cfg)
