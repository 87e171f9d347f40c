"""The front door's functions, called with a wrong type: one error that names the argument.

The annotations are the only place that says what a function accepts; pydantic compares. This file
does not know any of the functions.
"""

import errno
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from silotune.core.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Check the types of a function's arguments before it is called; values go through unchanged.

    Raises:
        ConfigError: From the function it returns: an argument has another type than its annotation
            says, or a name is too long for a path.
    """
    signature, known = inspect.signature(function), dict[str, Any]()

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name not in known:  # built when first used: this takes longer than a call
                known[name] = _adapter(signature.parameters[name].annotation)
            if known[name] is not None:
                _check(known[name], value, name, function, signature)
        try:
            return function(*args, **kwargs)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise ConfigError(
                f"{_called(function)}: a name is too long for a file.\n  Give a shorter path."
            ) from error

    return checked


def as_path(value: object, what: str) -> Path:
    """A path that somebody gave as text or as a path.

    Raises:
        ConfigError: It is neither.
    """
    if isinstance(value, str | Path):
        return Path(value)
    raise ConfigError(
        f"{what} has the type {type(value).__name__}, but should be a path.\n"
        "  Give the folder as a str or a Path."
    )


def _adapter(annotation: Any) -> Any:
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str):
        return None
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True, strict=True))
    except PydanticUserError:  # a dataclass or a model brings its own configuration
        return TypeAdapter(annotation)


def _check(
    adapter: Any, value: object, name: str, function: Callable[..., Any], signature: Any
) -> None:
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        if isinstance(value, str) and all(m["type"] == "literal_error" for m in error.errors()):
            return  # an unknown word: the function knows which of its words is meant
        inner = [
            m for m in error.errors() if m["type"] in ("greater_than_equal", "less_than_equal")
        ]
        wanted = inspect.formatannotation(signature.parameters[name].annotation)
        wanted = wanted.replace("collections.abc.", "").replace("pathlib.", "")
        if inner:
            problem = f"{name} is out of range: {inner[0]['msg'].lower()}"
        else:
            problem = f"{name} has the type {type(value).__name__}, but should be {_short(wanted)}"
        raise ConfigError(
            f"{_called(function)}: {problem}.\n  help({_called(function)}) says what it accepts."
        ) from None


def _short(annotation: str) -> str:
    """'silotune.recipes.schema.RunConfig | None' -> 'RunConfig or None'."""
    parts = [part.strip() for part in annotation.split("|")]
    names = [part.rpartition(".")[2] if "[" not in part else part for part in parts]
    return " or ".join(dict.fromkeys(names))


def _called(function: Callable[..., Any]) -> str:
    return f"silotune.{function.__qualname__}"
