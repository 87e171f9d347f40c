"""SHA-256 of a folder's files, in a file that `sha256sum --check` reads, too.

A file is written first and listed afterwards; before it is replaced, it is taken off the list. A
kill in between leaves a complete file that is not listed, which is read without being compared.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from silotune.core.atomic_files import write_atomically
from silotune.core.errors import RunFolderError
from silotune.core.reading_back import read_text

FILE = "checksums.sha256"

_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as `sha256sum` prints it; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def listed(folder: Path) -> dict[str, str]:
    """The SHA-256 of every listed file, by its path inside the folder; empty without a list.

    Raises:
        RunFolderError: The list is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    fix = "Restore it from a copy of the folder."
    lines = read_text(path, fix=fix).splitlines()
    found = [match for line in lines if (match := _LINE.fullmatch(line))]
    if len(found) < len(lines):
        raise RunFolderError(f"{path} is damaged: a line holds no SHA-256 of a file.\n  {fix}")
    return {match[2]: match[1] for match in found}


def list_files(folder: Path, names: Iterable[str]) -> None:
    """List files that have just been written, with their SHA-256.

    Args:
        folder: The folder.
        names: Their paths inside it, with "/" between folders.

    Raises:
        DiskError: The list cannot be written.
    """
    _write(folder, {**listed(folder), **{name: sha256_of(folder / name) for name in names}})


def take_off(folder: Path, *names: str) -> None:
    """Take files off the list, because they are about to be replaced.

    Args:
        folder: The folder.
        names: Paths as in `list_files`; one that ends in "/" means everything below it.
    """
    before = listed(folder)
    kept = {
        name: digest
        for name, digest in before.items()
        if not any(name == gone or (gone[-1] == "/" and name.startswith(gone)) for gone in names)
    }
    if len(kept) < len(before):
        _write(folder, kept)


def check_listed(folder: Path, name: str, *, fix: str) -> None:
    """Refuse a listed file that is gone or is not as it was written.

    Args:
        folder: The folder.
        name: A path as in `list_files`.
        fix: How the user can fix it: the second line of the error.

    Raises:
        RunFolderError: It is gone, cannot be read, or has changed.
    """
    if (expected := listed(folder).get(name)) is None:
        return
    path = folder / name
    try:
        same = sha256_of(path) == expected
    except OSError as error:
        raise RunFolderError(f"{path} cannot be read: {error.strerror}.\n  {fix}") from error
    if not same:
        raise RunFolderError(
            f"{path} has changed since it was written: its SHA-256 is not the one in "
            f"{FILE}.\n  {fix}"
        )


def _write(folder: Path, digests: dict[str, str]) -> None:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    write_atomically(folder / FILE, lines.encode())
