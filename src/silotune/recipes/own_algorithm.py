"""Builds the algorithm that a recipe names as "python:<module>:<function>".

Importing the module runs it. A real client does so only if its own limits.algorithms names the
algorithm, see federation/client_recipe.py.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from silotune.algorithms.base import AlgorithmConfig
from silotune.core.algorithm import Algorithm
from silotune.core.errors import ConfigError, SilotuneError
from silotune.core.wording import did_you_mean


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
    build = _imported(name)
    known = inspect.signature(build).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in sorted(options.keys() - known.keys()):
        if not takes_any:
            _, *own = known
            what = f"has no option '{key}'.{did_you_mean(key, own)}"
            raise refused(name, what, f"Its options: {', '.join(own) or 'none'}")
    try:
        built = build(cfg, **options)
    except Exception as error:  # a user's code: whatever it raises is explained
        raise refused(
            name,
            f"cannot be built: {text_of(error)}",
            "It is called with the [algorithm] section, and with algorithm.options by name",
        ) from error
    if not isinstance(built, Algorithm):
        raise refused(
            name,
            f"returns a {type(built).__name__}",
            "It must return a silotune.core.algorithm.Algorithm",
        )
    return replace(built, name=name)


def _imported(name: str) -> Callable[..., object]:
    path, _, function = name.removeprefix("python:").partition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # a user's module: whatever it raises is explained
        fix = "Correct the path; a module of your own must be installed or on PYTHONPATH"
        raise refused(name, f"cannot be imported: {text_of(error)}", fix) from error
    found = getattr(module, function, None)
    if callable(found):
        return found
    there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == path]
    what = f"does not exist: '{path}' has no function '{function}'.{did_you_mean(function, there)}"
    raise refused(name, what, f"Its functions: {', '.join(there) or 'none'}")


def refused(name: str, what: str, fix: str) -> ConfigError:
    """The error for code that cannot be used: what is wrong, and how to fix it."""
    what = what.rstrip(".")
    end = "" if what.endswith("?") else "."
    return ConfigError(f"algorithm.name: '{name}' {what}{end}\n  {fix}.")


def text_of(error: Exception) -> str:
    """The text of an error from third-party code, in one line."""
    kind = "" if isinstance(error, SilotuneError) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0].rstrip(". ")
