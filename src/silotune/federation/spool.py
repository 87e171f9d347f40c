"""The spool: the accepted updates of a round on disk, until a checkpoint holds their result."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from silotune.core.atomic_files import ASK_AGAIN, boot_id, load_rows, make_folder, save_rows
from silotune.core.errors import RunFolderError
from silotune.core.types import Score, Update
from silotune.federation.client_memory import folder_name

BOOT = "boot"
"""The file of a spool that names the boot in which its updates were written."""


class Spool:
    """The accepted updates of one round, one file each, read one at a time in name order.

    Once `add` returns, the file survives any end of this process, even kill -9. `add` does not wait
    for the disk, because that would take longer than all other work on an update. A power failure
    could therefore leave a file whose values are zeros, so a spool from before the last boot is
    dropped and its clients are asked again. The checkpoint that replaces the spool does wait for
    the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._boot = folder / BOOT
        self._reports: dict[str, Update] = {}
        if not folder.is_dir():
            return
        # left by a process that ended during this round
        if not self._is_from_this_boot():
            self.remove()
        for path in folder.glob("*.safetensors"):
            try:
                update = read_update(path)
            except (RunFolderError, LookupError, TypeError, ValueError):
                # not a complete file of ours: its client is asked again
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                self._reports[update.client] = _without_tensors(update)

    def _is_from_this_boot(self) -> bool:
        with contextlib.suppress(OSError, ValueError):  # a damaged mark is no mark
            return self._boot.read_text(encoding="ascii") == boot_id()
        return False

    def add(self, update: Update) -> None:
        """Write an update to the spool; from then on, a crash does not lose it."""
        here = boot_id()
        if not self._boot.is_file():
            make_folder(self.folder)
            self._boot.write_text(here, encoding="ascii")
        tensors = {f"delta/{name}": t for name, t in update.delta.items()}
        for key, state in update.extra.items():
            tensors |= {f"extra/{key}/{name}": t for name, t in state.items()}
        facts = {k: v for k, v in vars(update).items() if k not in ("delta", "extra", "score")}
        facts["score"] = asdict(update.score) if update.score else None
        save_rows(self._path(update.client), tensors, about=json.dumps(facts), sync=not here)
        self._reports[update.client] = _without_tensors(update)

    def _path(self, client: str) -> Path:
        return self.folder / file_name(client)

    def names(self) -> list[str]:
        """The clients whose updates are here, sorted."""
        return sorted(self._reports)

    def reports(self) -> list[Update]:
        """The updates without their tensors, in name order. Nothing is read from disk."""
        return [self._reports[client] for client in self.names()]

    def __len__(self) -> int:
        return len(self._reports)

    def __iter__(self) -> Iterator[Update]:
        for client in self.names():
            yield read_update(self._path(client))

    def discard(self, client: str) -> None:
        """Remove one client's update: it is not used."""
        self._path(client).unlink()
        del self._reports[client]

    def remove(self) -> None:
        """Remove the round's updates: a checkpoint holds their result."""
        shutil.rmtree(self.folder, ignore_errors=True)


def rounds_in(folder: Path) -> dict[int, Path]:
    """The folders of rounds in a folder, by round."""
    found = [p for p in folder.glob("round-*") if p.is_dir()]
    numbers = [p.name.removeprefix("round-") for p in found]
    return {int(n): p for n, p in zip(numbers, found, strict=True) if n.isdecimal()}


def file_name(client: str) -> str:
    """The file that holds a client's update, in the folder of its round."""
    return f"{folder_name(client)}.safetensors"


def _without_tensors(update: Update) -> Update:
    return replace(update, delta={}, extra={})


def read_update(path: Path, *, fix: str = ASK_AGAIN) -> Update:
    """Read a file that `Spool.add` wrote.

    Raises:
        RunFolderError: It is missing, or damaged.
    """
    tensors, about = load_rows(path, fix=fix)
    delta: dict[str, Tensor] = {}
    extra: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "delta":
            delta[rest] = tensor
        else:
            key, rest = rest.split("/", 1)
            extra.setdefault(key, {})[rest] = tensor
    facts = json.loads(about)
    found = facts.pop("score")
    score = found and Score(**{**found, "label_counts": tuple(map(tuple, found["label_counts"]))})
    return Update(delta=delta, extra=extra, score=score, **facts)
