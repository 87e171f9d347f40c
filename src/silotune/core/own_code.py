"""Functions of a user's own that a recipe names as "python:<module>:<function>".

Importing the module runs it. A real client does so only if its own limits name the function, see
federation/client_recipe.py.
"""

import importlib
import inspect
from collections.abc import Callable

from silotune.core.errors import ConfigError, SilotuneError
from silotune.core.wording import did_you_mean

PYTHON_NAME = r"python:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"


def import_own(key: str, name: str) -> Callable[..., object]:
    """Import a function.

    Args:
        key: The recipe's key, for errors.
        name: Its value, which matches PYTHON_NAME.

    Raises:
        ConfigError: The module cannot be imported, or has no such function.
    """
    path, _, function = name.removeprefix("python:").partition(":")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # a user's module: whatever it raises is explained
        fix = "Correct the path; a module of your own must be installed or on PYTHONPATH"
        raise refused(key, name, f"cannot be imported: {text_of(error)}", fix) from error
    found = getattr(module, function, None)
    if callable(found):
        return found
    there = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == path]
    what = f"does not exist: '{path}' has no function '{function}'.{did_you_mean(function, there)}"
    raise refused(key, name, what, f"Its functions: {', '.join(there) or 'none'}")


def refused(key: str, name: str, what: str, fix: str) -> ConfigError:
    """The error for code that cannot be used: where, what is wrong, and how to fix it."""
    what = what.rstrip(".")
    end = "" if what.endswith("?") else "."
    return ConfigError(f"{key}: '{name}' {what}{end}\n  {fix}.")


def text_of(error: Exception) -> str:
    """The text of an error from third-party code, in one line."""
    kind = "" if isinstance(error, SilotuneError) else f"{type(error).__name__}: "
    return f"{kind}{error}".partition("\n")[0].rstrip(". ")
