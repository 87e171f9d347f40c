"""Atomic files: written to a temporary file next to their place, then renamed into it.

They hold what a run or a client knows, so they and their folders are readable by their owner only.
A file of tensors holds the SHA-256 of its contents, which is compared whenever it is read.
"""

# safetensors ships no type stubs, so strict checking would report every value from it
# pyright: standard

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from silotune.core.errors import DiskError, RunFolderError
from silotune.core.reading_back import read_rows

if TYPE_CHECKING:
    from torch import Tensor  # torch is imported where it is used: most files hold no tensors

OWNER_FILE, OWNER_FOLDER = 0o600, 0o700
"""Modes of files and folders. The umask is not changed: it would also apply to the caches of models
that libraries keep, which people who work on one machine share."""


def owner_only(path: str, flags: int) -> int:
    """An `opener` for `open`: a file that is created is readable by its owner only."""
    return os.open(path, flags, OWNER_FILE)


def make_folder(path: Path) -> Path:
    """Create a folder and the missing ones above it, for their owner only; others stay as they are.

    Returns:
        The path.
    """
    for missing in [place for place in path.parents if not place.exists()][::-1]:
        missing.mkdir(mode=OWNER_FOLDER, exist_ok=True)
    path.mkdir(mode=OWNER_FOLDER, exist_ok=True)
    return path


@contextlib.contextmanager
def writing(path: Path, part: Path | None = None) -> Iterator[None]:
    """Turn a failed write into one error, and remove what was partly written.

    Args:
        path: Named in the error.
        part: The file or folder to remove on failure.

    Raises:
        DiskError: In place of whatever the system or a library raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if part is not None and part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        elif part is not None:
            with contextlib.suppress(OSError):  # as in a folder that may not be written
                part.unlink(missing_ok=True)
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DiskError(
            f"{path} cannot be written: {why}.\n"
            "  Free up space or fix its folder, then try again. What was finished before is intact."
        ) from error


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A temporary file next to `path` that replaces it, or is removed on failure."""
    part = path.with_name(path.name + ".part")
    with writing(path, part):
        part.touch()
        part.chmod(OWNER_FILE)
        yield part
        part.replace(path)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a complete file or none: to a temporary file first, then renamed.

    Raises:
        DiskError: It cannot be written. The same holds for all functions below.
    """
    with _whole(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def free_place(first: Path) -> Path:
    """`first`, or with a number appended if it exists, as after two runs within a second."""
    others = (first.with_name(f"{first.name}-{i}") for i in itertools.count(2))
    return next(place for place in itertools.chain([first], others) if not place.exists())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file completely or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lines.encode())


def written_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_rows` wrote; empty if there is no such file."""
    if not path.exists():
        return []
    return read_rows(path, fix="Restore it from a copy, or start again in a new folder.")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that people can read, too."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


SHA256 = "sha256"
"""The metadata of a safetensors file that holds the SHA-256 of everything else in it."""


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], *, about: Mapping[str, str]) -> None:
    """Write a safetensors file completely or not at all, with the SHA-256 of its contents.

    Args:
        path: Where to write it.
        tensors: Its contents, by name.
        about: Its metadata.
    """
    from safetensors.torch import save_file

    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with _whole(path) as part:
        save_file(whole, part, metadata={**about, SHA256: _digest(whole, about)})
        with part.open("rb+") as file:
            os.fsync(file.fileno())


def load_tensors(
    path: Path,
    *,
    fix: str = "Remove its folder and resume; the run continues from what is left.",
) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """Read a file of `save_tensors`: its tensors and its metadata.

    Args:
        path: The file.
        fix: How the user can fix a damaged file: the second line of the error.

    Raises:
        RunFolderError: The file is missing, damaged, or without a SHA-256.
    """
    from safetensors.torch import load_file

    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RunFolderError(f"{path} is damaged: {error}\n  {fix}") from error
    _compare(path, tensors, about, fix)
    return tensors, about


def _digest(tensors: Mapping[str, "Tensor"], about: Mapping[str, str]) -> str:
    """The SHA-256 of metadata, names, dtypes, shapes and values."""
    import torch

    found = sha256(json.dumps(sorted(about.items())).encode())
    for name in sorted(tensors):
        t = tensors[name]
        found.update(json.dumps([name, str(t.dtype), list(t.shape)]).encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _compare(path: Path, tensors: Mapping[str, "Tensor"], about: dict[str, str], fix: str) -> None:
    """Compare a file with its SHA-256, which is removed from `about`."""
    expected = about.pop(SHA256, None)
    if expected is None:
        raise RunFolderError(
            f"{path} has no SHA-256: an earlier version of silotune wrote it, or it is damaged.\n"
            "  Finish the run with the version that began it, or start a new run."
        )
    if _digest(tensors, about) != expected:
        raise RunFolderError(
            f"{path} is damaged: it does not match the SHA-256 that was written with it.\n  {fix}"
        )


# --- many tensors as a few flat arrays --------------------------------------------------------


def save_rows(path: Path, tensors: Mapping[str, "Tensor"], *, about: str, sync: bool) -> None:
    """Write tensors completely or not at all, as one flat array per dtype in a safetensors file.

    For files written by the thousand: an adapter has hundreds of small tensors, and each of them
    costs as much in a file as one flat array.

    Args:
        path: Where to write it.
        tensors: Its contents, by name.
        about: A text that is stored with them.
        sync: Wait until it is on disk. Otherwise the file survives the end of this process, however
            it ends, but not a power failure; see `boot_id`.
    """
    import torch
    from safetensors.torch import save_file

    layout: dict[str, list[tuple[str, list[int]]]] = {}
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        dtype = str(tensor.dtype).removeprefix("torch.")
        layout.setdefault(dtype, []).append((name, list(tensor.shape)))
        parts.setdefault(dtype, []).append(tensor.reshape(-1))
    rows = {dtype: torch.cat(own) for dtype, own in parts.items()}
    known = {"layout": json.dumps(layout), "about": about}
    with _whole(path) as part:
        save_file(rows, part, metadata={**known, SHA256: _digest(rows, known)})
        if sync:
            with part.open("rb+") as file:
                os.fsync(file.fileno())


ASK_AGAIN = "Remove it and resume; its client is asked again."


def load_rows(path: Path, *, fix: str = ASK_AGAIN) -> "tuple[dict[str, Tensor], str]":
    """Undo `save_rows`.

    Args:
        path: The file.
        fix: As in `load_tensors`.

    Raises:
        RunFolderError: The file is missing, damaged, or without a SHA-256.
    """
    rows, known = load_tensors(path, fix=fix)
    tensors: dict[str, Tensor] = {}
    for dtype, own in json.loads(known["layout"]).items():
        pieces = rows[dtype].split([math.prod(shape) for _, shape in own])
        for (name, shape), piece in zip(own, pieces, strict=True):
            tensors[name] = piece.view(shape)
    return tensors, known["about"]


def boot_id() -> str:
    """A word that changes every time this machine boots; empty if the system has none.

    A file that was written without `sync` is intact if the machine has not rebooted since.
    """
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def remove_folder(folder: Path) -> None:
    """Remove a folder: it is there with everything, or gone.

    It is renamed aside first, so that a kill halfway leaves no half folder under its name.
    """
    aside = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def build_folder(final: Path, build: Callable[[Path], None]) -> Path:
    """Let `build(folder)` fill a folder, then move it into place, replacing what was there."""
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with writing(final, part):
        make_folder(part)
        build(part)
        for path in part.rglob("*"):  # whatever a library wrote with its modes
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & OWNER_FOLDER)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    return final
