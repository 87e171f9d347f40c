"""The [algorithm] section: a config for each of our algorithms, and one for Flower's."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast

from pydantic import Discriminator, Field, Tag, create_model, field_validator

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.base import AlgorithmConfig
from silotune.core.algorithm import Algorithm
from silotune.core.errors import ConfigError
from silotune.core.own_code import PYTHON_NAME
from silotune.recipes.own_algorithm import build_own


def _named(name: str, cfg: type[AlgorithmConfig]) -> type[AlgorithmConfig]:
    """An algorithm's config, plus the key that selects it in a recipe."""
    field: Any = (Literal[name], Field(name, description="Which algorithm; see docs/papers.md."))
    # the texts of its fields are inherited; pydantic would look for more of them in the source of
    # every module, which took most of the time of importing recipes
    silent = {"use_attribute_docstrings": False}
    return create_model(
        cfg.__name__, __base__=cfg, __doc__=cfg.__doc__, __cls_kwargs__=silent, name=field
    )


FLOWER = "flower:<module>.<Class>"
"""Placeholder for the names of all Flower strategies, also in messages and documents."""
FLOWER_EXAMPLE = "Name a strategy like this: flower:flwr.serverapp.strategy.FedYogi."
FLOWER_NAME = r"flower:[A-Za-z_]\w*(\.[A-Za-z_]\w*)+"
NOT_OPTIONS = {
    "fraction_train": "[sampling] decides which clients take part",
    "min_train_nodes": "[sampling] decides which clients take part",
    "min_available_nodes": "[sampling] decides which clients take part",
    "fraction_evaluate": "[evaluate] decides which clients score",
    "min_evaluate_nodes": "[evaluate] decides which clients score",
    "weighted_by_key": "algorithm.weights decides how clients are weighted",
}
"""Arguments of Flower's strategies that other recipe keys replace."""


AUTO = "auto"
"""The name that stands for whatever auto.py chooses."""
PYTHON = "python:<module>:<function>"
"""Placeholder for the names of all algorithms of one's own, also in messages and documents."""
PYTHON_EXAMPLE = "Name a function like this: python:my_package.my_module:my_algorithm."


def _check_options(given: Any) -> Any:
    for key, value in cast(dict[str, Any], given).items() if isinstance(given, dict) else ():
        if not isinstance(value, (int, float, str)):  # true and false are integers in Python
            raise ValueError(f"'{key}' should be a number, a string, true or false")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"'{key}' should be a finite number")
    return cast(Any, given)


class AutoConfig(AlgorithmConfig):
    """Settings of the algorithm that is chosen for the recipe.

    With [privacy] and LoRA it is ffa_lora, otherwise fedavg. `silotune check` says what is chosen
    and why; the run records it, and its own recipe names it.
    """


class OwnAlgorithmConfig(AlgorithmConfig):
    """Settings of an algorithm of your own: a Python function that builds an `Algorithm`.

    The server and the clients import its module. A real client accepts it only if its own
    limits.algorithms names it.
    """

    name: str = Field(pattern=f"^{PYTHON_NAME}$")
    """Module and function, for example python:my_package.my_module:my_algorithm. It is called with
    this section, and with the options by name; see docs/how-to/add-an-algorithm.md."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the function by name, for example options.beta = 0.9."""

    @field_validator("options", mode="before")
    @classmethod
    def _only_options(cls, given: Any) -> Any:
        return _check_options(given)


class FlowerStrategyConfig(AlgorithmConfig):
    """Settings of a Flower strategy, for example flower:flwr.serverapp.strategy.FedYogi.

    The class is imported on the server, never at a client. Needs the extra flower.
    """

    name: str = Field(pattern=f"^{FLOWER_NAME}$")
    """Path of the strategy's class in any importable module, Flower's or your own."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """Arguments of the class by name, for example options.eta = 0.01."""

    @field_validator("options", mode="before")
    @classmethod
    def _only_options(cls, given: Any) -> Any:
        for key in cast(dict[str, Any], given) if isinstance(given, dict) else ():
            if key in NOT_OPTIONS:
                raise ValueError(f"'{key}' is not an option: {NOT_OPTIONS[key]}")
        return _check_options(given)


def chosen_algorithm(section: Any) -> str:
    """The algorithm that an [algorithm] table or config names.

    FLOWER stands for all of Flower's, PYTHON for all of one's own.
    """
    if isinstance(section, dict):
        name = str(cast(dict[str, Any], section).get("name", "fedavg"))
    else:
        name = str(getattr(section, "name", ""))
    if re.fullmatch(PYTHON_NAME, name):
        return PYTHON
    return FLOWER if re.fullmatch(FLOWER_NAME, name) else name


ALGORITHM_CONFIGS: dict[str, type[AlgorithmConfig]] = {
    **{name: _named(name, cfg) for name, (cfg, _) in ALGORITHMS.items()},
    AUTO: _named(AUTO, AutoConfig),
    PYTHON: OwnAlgorithmConfig,
    FLOWER: FlowerStrategyConfig,
}

if TYPE_CHECKING:
    AnyAlgorithmConfig = AlgorithmConfig
else:
    _tagged = tuple(Annotated[cfg, Tag(name)] for name, cfg in ALGORITHM_CONFIGS.items())
    AnyAlgorithmConfig = Annotated[Union[_tagged], Discriminator(chosen_algorithm)]  # noqa: UP007


def build_algorithm(cfg: AlgorithmConfig) -> Algorithm:
    """Build an algorithm of ours or of the user's; runtime/flower/strategy.py builds Flower's too.

    Raises:
        ConfigError: The user's function cannot be imported or called, or builds no `Algorithm`. Or
            nothing has chosen an algorithm yet, see auto.py.
    """
    if isinstance(cfg, OwnAlgorithmConfig):
        return build_own(cfg.name, cfg, cfg.options)
    if isinstance(cfg, AutoConfig):
        raise ConfigError(
            "algorithm.name = 'auto' cannot be used here.\n"
            "  Name the algorithm that `silotune check` chooses for this recipe."
        )
    return ALGORITHMS[chosen_algorithm(cfg)][1](cfg)
