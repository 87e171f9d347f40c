"""Which of PEFT's options a recipe may set: by the type of the option, not by a list of bad ones.

A recipe comes from a server and is applied at clients, so no option may name a path or a model.
Numbers, switches and choices from a list cannot. A text can, and PEFT's types do not say which
texts are read as paths: it may only name modules of the model, where PEFT looks for nothing else.
"""

import enum
import math
import re
import types
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from silotune.core.errors import ConfigError

OF_MODULES = frozenset(
    {
        "exclude_modules",
        "feedforward_modules",
        "layers_pattern",
        "target_parameters",
        *("alpha_pattern", "block_size_pattern", "lambda_pattern"),
        *("n_frequency_pattern", "rank_pattern"),
    }
)
"""Options whose texts PEFT compares with the names of modules."""
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
LONGEST = 10_000
"""Most entries in a list or table."""


def check_option(kind: type, option: str, value: Any) -> None:
    """Refuse a value that could name a path or a model, or has another type than its option.

    Args:
        kind: PEFT's configuration class.
        option: The name of one of its fields.
        value: What a recipe sets it to.

    Raises:
        ConfigError: Says what the option takes.
    """
    hint = _hints(kind).get(option, Any)
    if not _fits(value, hint, names=option in OF_MODULES):
        accepted = sorted(_accepted(hint, names=option in OF_MODULES))
        takes = f"it takes {' or '.join(accepted)}" if accepted else "a recipe cannot set it"
        raise ConfigError(
            f"adapter.peft.{option}: {takes}.\n"
            "  A recipe sets numbers, switches, choices and names of modules; nothing that could "
            "be a path or a model."
        )


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any, *, names: bool) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part, names=names) for part in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return type(value) is str and value in [choice.value for choice in hint]
    if hint is bool or hint is int:
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is str:
        return names and type(value) is str and NAME.fullmatch(value) is not None
    if origin in (list, tuple, set):
        return isinstance(value, (list, tuple)) and _all_fit(
            cast(Sequence[Any], value), inner[0] if inner else Any, names=names
        )
    if (hint is dict or origin is dict) and names and isinstance(value, dict):
        table = cast(dict[Any, Any], value)
        of_values = inner[1] if inner else int | float
        keys = _all_fit(list(table), str, names=True)
        return keys and _all_fit(list(table.values()), of_values, names=False)
    return False


def _all_fit(values: Sequence[Any], hint: Any, *, names: bool) -> bool:
    return len(values) <= LONGEST and all(_fits(value, hint, names=names) for value in values)


def _accepted(hint: Any, *, names: bool) -> set[str]:
    """What `_fits` takes, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return set[str]().union(*(_accepted(part, names=names) for part in inner))
    if origin is Literal:
        return {repr(choice) for choice in inner}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {repr(choice.value) for choice in hint}
    if hint in (bool, int, float):
        return {{bool: "true or false", int: "an integer", float: "a number"}[hint]}
    if hint is str and names:
        return {"the name of a module"}
    if origin in (list, tuple, set) and inner and _accepted(inner[0], names=names):
        return {"a list"}
    return (
        {"a table of numbers by the names of modules"}
        if names and dict in (hint, origin)
        else set()
    )
