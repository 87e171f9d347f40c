"""Imports, checks and builds the class that a recipe names as "flower:<module>.<Class>".

Importing it runs its module, so this happens only where a recipe is checked and on the server.
"""

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

from silotune.core import own_code
from silotune.core.errors import ConfigError
from silotune.core.own_code import text_of
from silotune.core.wording import did_you_mean
from silotune.recipes.algorithm import NOT_OPTIONS, FlowerStrategyConfig

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

OURS = {
    "fraction_train": 1.0,
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 1,
    "min_available_nodes": 1,
}
"""Arguments that leave the choice of clients to [sampling], for classes that have them."""


def refused(cfg: FlowerStrategyConfig, what: str, fix: str) -> ConfigError:
    """The error for a strategy that cannot be used: what is wrong, and how to fix it."""
    return own_code.refused("algorithm.name", cfg.name, what, fix)


def class_of(cfg: FlowerStrategyConfig) -> "type[Strategy]":
    """Import the class that a recipe names. This runs its module.

    Raises:
        ConfigError: Flower, the module or the class is missing, or the class is not a strategy.
    """
    try:
        from flwr.serverapp.strategy import Strategy
    except ImportError as error:
        fix = "Install it where the server runs: make env EXTRAS=flower"
        raise refused(cfg, f"needs Flower: {text_of(error)}", fix) from error
    path, _, name = cfg.name.removeprefix("flower:").rpartition(".")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # a third-party module: whatever it raises is explained
        fix = "Correct the path; a module of your own must be on PYTHONPATH"
        raise refused(cfg, f"cannot be imported: {text_of(error)}", fix) from error
    found = getattr(module, name, None)
    if isinstance(found, type) and issubclass(found, Strategy):
        return found
    classes = {n: c for n, c in vars(module).items() if isinstance(c, type)}
    there = [n for n, c in classes.items() if issubclass(c, Strategy) and not inspect.isabstract(c)]
    if found is None:
        what = f"does not exist: '{path}' has no '{name}'.{did_you_mean(name, there)}"
        raise refused(cfg, what, f"Its strategies: {', '.join(there) or 'none'}")
    fix = "Name a class of the message API; those in flwr.server.strategy are of the older API"
    raise refused(cfg, "is not a subclass of flwr.serverapp.strategy.Strategy", fix)


def builder_of(cfg: FlowerStrategyConfig) -> "Callable[[], Strategy]":
    """A function that builds a fresh strategy with the recipe's options.

    Raises:
        ConfigError: As in `class_of`; or the options are not those of the class.
    """
    cls = class_of(cfg)
    known = _arguments(cls)
    for key in sorted(cfg.options.keys() - known.keys()):
        there = sorted(known.keys() - NOT_OPTIONS.keys())
        what = f"has no option '{key}'.{did_you_mean(key, there)}"
        raise refused(cfg, what, f"Its options: {', '.join(there) or 'none'}")
    given = {**{key: value for key, value in OURS.items() if key in known}, **cfg.options}
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if "strategy" in missing:
        fix = "Name a strategy that does not wrap another"
        raise refused(cfg, "wraps another strategy, which a recipe cannot express", fix)
    if missing:
        fix = f"Set {', '.join(f'algorithm.options.{key}' for key in missing)}"
        raise refused(cfg, f"cannot be built without {', '.join(missing)}", fix)

    def build() -> "Strategy":
        try:
            return cls(**given)
        except Exception as error:
            fix = "Change [algorithm.options]"
            raise refused(cfg, f"cannot be built: {text_of(error)}", fix) from error

    return build


def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """A class's arguments by name; if it takes **kwargs, those of its base too."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _, *own = inspect.signature(vars(base)["__init__"]).parameters.values()
            named = {p.name: p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            found = {**named, **found}
            if all(p.kind is not p.VAR_KEYWORD for p in own):
                break
    return found
