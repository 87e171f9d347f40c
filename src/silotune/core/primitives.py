"""The primitives of `cryptography`, loaded when one is needed."""

from importlib import import_module
from typing import Any

from silotune.core.errors import ConfigError


def library(name: str) -> Any:
    """A module of cryptography.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module(f"cryptography.{name}")
    except ImportError as error:
        raise ConfigError(
            "[secure_sum] needs cryptography, which is not installed.\n"
            "  Install it: make env EXTRAS=secure"
        ) from error
