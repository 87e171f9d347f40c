"""What is installed here of silotune: its version, and a hash of its files."""

import functools
import hashlib
import importlib.metadata
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
LEFT_OUT = ("__pycache__",)


def version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("silotune")


@functools.cache
def code_sha256() -> str:
    """SHA-256 of all files of the installed package, with their names; caches of Python left out.

    Two machines with the same one run the same code of silotune, if they say so honestly.
    """
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        name = path.relative_to(PACKAGE)
        if path.is_file() and not set(LEFT_OUT) & set(name.parts):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            found.update(f"{name.as_posix()} {content}\n".encode())
    return found.hexdigest()
