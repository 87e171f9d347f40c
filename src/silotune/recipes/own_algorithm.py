"""Builds the algorithm that a recipe names as "python:<module>:<function>".

Importing the module runs it. A real client does so only if its own limits.algorithms names the
algorithm, see federation/client_recipe.py.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from silotune.algorithms.base import AlgorithmConfig
from silotune.core.algorithm import Algorithm
from silotune.core.own_code import import_own, refused, text_of
from silotune.core.wording import did_you_mean

KEY = "algorithm.name"


def build_own(name: str, cfg: AlgorithmConfig, options: Mapping[str, Any]) -> Algorithm:
    """Call the function with the config and the options.

    Args:
        name: As in the recipe.
        cfg: The recipe's [algorithm]; its `weights` is for `mean_delta`.
        options: Keyword arguments.

    Raises:
        ConfigError: The module or the function is missing, the options are not the function's, it
            fails, or what it returns is no `Algorithm`.
    """
    build = import_own(KEY, name)
    known = inspect.signature(build).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in sorted(options.keys() - known.keys()):
        if not takes_any:
            _, *own = known
            what = f"has no option '{key}'.{did_you_mean(key, own)}"
            raise refused(KEY, name, what, f"Its options: {', '.join(own) or 'none'}")
    try:
        built = build(cfg, **options)
    except Exception as error:  # a user's code: whatever it raises is explained
        raise refused(
            KEY,
            name,
            f"cannot be built: {text_of(error)}",
            "It is called with the [algorithm] section, and with algorithm.options by name",
        ) from error
    if not isinstance(built, Algorithm):
        raise refused(
            KEY,
            name,
            f"returns a {type(built).__name__}",
            "It must return a silotune.core.algorithm.Algorithm",
        )
    return replace(built, name=name)
