"""Files that appear whole or not at all: written beside their place, then renamed into it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from silotune.errors import RunFolderError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none: beside its place first, then renamed into it."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people can read too."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], *, about: Mapping[str, str]) -> None:
    """Write a safetensors file whole or not at all."""
    part = path.with_name(path.name + ".part")
    save_file({name: t.contiguous() for name, t in tensors.items()}, part, metadata=dict(about))
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and what was written about it.

    Raises:
        RunFolderError: The file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
        return load_file(path), about
    except (SafetensorError, OSError) as error:
        raise RunFolderError(
            f"{path} is damaged: {error}\n"
            "  Remove its folder and resume; the run goes on from what is left."
        ) from error
