"""Read a user's TOML file into one of our models, with all its mistakes in one message.

For files other than recipes: a client's configuration, a consortium, kits. Recipes explain their
mistakes in more detail (recipes/mistakes.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from silotune.core.errors import ConfigError
from silotune.core.reading_back import read_toml, reason
from silotune.core.wording import counted, did_you_mean, shortened

MOST_SHOWN = 30
"""Mistakes of one file that are explained; the others are counted."""

M = TypeVar("M", bound=BaseModel)


def read_table(
    path: Path,
    kind: type[M],
    *,
    what: str = "",
    unless_said: Mapping[str, Any] | None = None,
    most_bytes: int = 1_000_000,
) -> M:
    """Read and check a file.

    Args:
        path: The file.
        kind: The model that it must match.
        what: What users call such a file, if it could be confused with another.
        unless_said: Values of keys that it does not have.
        most_bytes: A larger file is not read.

    Raises:
        ConfigError: It cannot be read, or has mistakes: all together, each with its key.
    """
    try:
        if path.stat().st_size > most_bytes:
            raise ConfigError(f"{path} is too large for a {what or 'settings file'}.")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {reason(error)}.\n  Fix the file.") from error
    table = read_toml(path, fix="Fix the file.", error=ConfigError)
    try:
        return kind.model_validate({**(unless_said or {}), **table})
    except ValidationError as error:
        found = error.errors()
        lines = [
            _explain(kind, item["type"], item["loc"], item["msg"]) for item in found[:MOST_SHOWN]
        ]
        if len(found) > MOST_SHOWN:
            lines.append(f"and {counted(len(found) - MOST_SHOWN, 'more mistake')}.")
        head = f"{path} is not a {what}:" if what else f"mistakes in {path}:"
        raise ConfigError("\n  ".join([head, *lines])) from None


def _explain(kind: type[BaseModel], type_: str, where: tuple[int | str, ...], text: str) -> str:
    key = shortened(".".join(map(str, where)))
    if type_ == "extra_forbidden":
        return f"{key}: unknown key.{did_you_mean(str(where[-1]), _keys(kind, where[:-1]))}"
    return f"{key}: is missing." if type_ == "missing" else f"{key}: {text}."


def _keys(kind: type[BaseModel], section: tuple[int | str, ...]) -> list[str]:
    """The keys that a section can have."""
    for part in section:
        inner = kind.model_fields[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)
