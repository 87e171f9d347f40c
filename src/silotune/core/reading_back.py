"""Read files that may be damaged: whatever is wrong with one is one error with its name and a fix.

The parsers here raise nothing but ValueError, with a reason that holds no contents of the file.
"""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from silotune.core.errors import RunFolderError, SilotuneError

T = TypeVar("T")

MOST_LEVELS = 100
"""Tables and lists inside each other. Ours have at most eight; libraries recurse into each level,
and Python's limit is a thousand."""


def parse_json(text: str) -> Any:
    """`json.loads`, whose refusals are all ValueErrors."""
    return _parsed(json.loads, text)


def parse_object(text: str) -> dict[str, Any]:
    """`parse_json` for an object; another value is a ValueError, too."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return cast(dict[str, Any], value)


def parse_toml(text: str) -> dict[str, Any]:
    """`tomllib.loads`, whose refusals are all ValueErrors."""
    return _parsed(tomllib.loads, text)


def _parsed(parse: Callable[[str], T], text: str) -> T:
    try:
        value = parse(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        # Python refuses integers of more than 4300 digits, and advises to change the interpreter
        if type(error) is ValueError:
            raise ValueError("a value in it is out of range") from None
        raise
    _check_levels(value)
    return value


def _check_levels(value: object) -> None:
    """Refuse deep nesting, which dotted keys can reach without recursion."""
    level: list[object] = [value]
    for _ in range(MOST_LEVELS):
        inner: list[object] = []
        for one in level:
            if isinstance(one, dict):
                inner += cast(dict[str, object], one).values()
            elif isinstance(one, list):
                inner += cast(list[object], one)
        if not inner:
            return
        level = inner
    raise ValueError("it is nested too deeply")


def reason(error: Exception) -> str:
    """Why a file could not be read, without its contents."""
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def read_text(path: Path, *, fix: str, error: type[SilotuneError] = RunFolderError) -> str:
    """A text file's contents.

    Args:
        path: The file.
        fix: How the user can fix it: the second line of the error.
        error: What to raise.

    Raises:
        SilotuneError: The file is missing, may not be read, is a folder or is not UTF-8.
    """
    return _read(path, str, fix=fix, error=error)


def read_json(path: Path, *, fix: str, error: type[SilotuneError] = RunFolderError) -> Any:
    """A JSON file's value; the arguments and errors are those of `read_text`."""
    return _read(path, parse_json, fix=fix, error=error)


def read_object(
    path: Path, *, fix: str, error: type[SilotuneError] = RunFolderError
) -> dict[str, Any]:
    """A JSON file's object; another value is an error, too."""
    return _read(path, parse_object, fix=fix, error=error)


def read_toml(
    path: Path, *, fix: str, error: type[SilotuneError] = RunFolderError
) -> dict[str, Any]:
    """A TOML file's table; the arguments and errors are those of `read_text`."""
    return _read(path, parse_toml, fix=fix, error=error)


def read_rows(
    path: Path, *, fix: str, error: type[SilotuneError] = RunFolderError
) -> list[dict[str, Any]]:
    """A JSONL file's objects; the arguments and errors are those of `read_text`."""
    return _read(path, _parse_rows, fix=fix, error=error)


def _parse_rows(text: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            rows.append(parse_object(line))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return rows


def _read(path: Path, parse: Callable[[str], T], *, fix: str, error: type[SilotuneError]) -> T:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {reason(problem)}.\n  {fix}") from problem
