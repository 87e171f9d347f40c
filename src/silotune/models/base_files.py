"""The files of a base on this machine: where they are, and whether they are whole.

Nothing here contacts the hub, and only the beginning of each file is read. This file does not know
what a model is made of.
"""

import os
from pathlib import Path

from silotune.core.errors import ModelError
from silotune.core.safe_text import one_line
from silotune.models.sources import SOURCES, is_ready, looks_like_path, model_folder, resolve

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git stores in place of a large file."""
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja")
"""Endings of the files that are read when a base is loaded."""
ADAPTER = "adapter_config.json"


def folder_at_hand(name: str, revision: str | None) -> Path | None:
    """The folder with a base's config.json and safetensors on this machine, if they are there.

    Args:
        name: A `model.name`.
        revision: Branch, tag or commit of a hub model.

    Raises:
        ModelError: As in `sources.check_name`.
    """
    if name in SOURCES:
        return model_folder(name) if is_ready(name) else None
    place = resolve(name)
    folder = place if isinstance(place, Path) else _snapshot(place, revision)
    return folder if folder is not None and any(folder.glob("*.safetensors")) else None


def public_name(name: str) -> str:
    """A base's name for others; of a folder on this machine, only the last part of its path."""
    is_folder = os.path.isdir(os.path.expanduser(name)) or looks_like_path(name)
    return Path(name).expanduser().resolve().name if is_folder and name not in SOURCES else name


def public_reference(name: str) -> str:
    """What others load a base by: a folder is expected next to where they work.

    The leading './' keeps a folder's name from being looked up on the hub.
    """
    shown = public_name(name)
    return shown if shown == name else f"./{shown}"


def commit_of(name: str, revision: str | None) -> str | None:
    """What identifies the files of a hub model for others: their commit, or else `revision`.

    None for a model that is not on the hub.
    """
    if name in SOURCES:
        return None
    place = resolve(name)
    if isinstance(place, Path):
        return None
    folder = _snapshot(place, revision)
    return revision if folder is None else folder.name


def _snapshot(hub_id: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the hub library's cache, which is named after its commit."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    except HFValidationError:  # cannot be a hub id; loading it says so
        return None
    return Path(found).parent if isinstance(found, str) else None


def check_files(folder: Path, what: str) -> None:
    """Refuse files that Git or a download has left incomplete, and a folder with an adapter in it.

    Args:
        folder: A folder with a config.json.
        what: The setting and its value, for messages.

    Raises:
        ModelError: Names the file, and how to get it.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix not in MODEL_FILES or not file.is_file():
            continue
        name = one_line(file.name)
        with file.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(
                    f"{what}: '{name}' is a Git LFS pointer, not the file itself.\n"
                    f"  Run `git lfs install` and `git lfs pull` in the repository, or download "
                    f"'{name}' again."
                )
        if file.suffix == ".safetensors":
            _check_safetensors(file, what)
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{what}: '{ADAPTER}' in this folder makes it a base with an adapter on top.\n"
            "  Merge the adapter (merge_and_unload in PEFT, then save_pretrained), or remove the "
            "adapter's files."
        )


def _check_safetensors(file: Path, what: str) -> None:
    """Read the header, which has to account for every byte of the file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{what}: '{one_line(file.name)}' is damaged or was not downloaded completely "
            f"({file.stat().st_size} bytes): {one_line(str(error))}\n"
            "  Download it again, and compare its size with the original's."
        ) from error
