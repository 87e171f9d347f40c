"""The run folder: recipe, provenance, checkpoints, updates, metrics. Nothing is pickled.

Every file appears complete or not at all: it is written next to its final place and then renamed.
A kill at any moment therefore leaves a folder that can be resumed. docs/quickstart.md has a map.
"""

import contextlib
import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from silotune.core.atomic_files import (
    boot_id,
    build_folder,
    load_rows,
    load_tensors,
    make_folder,
    owner_only,
    save_rows,
    save_tensors,
    write_atomically,
    write_rows,
    writing,
)
from silotune.core.errors import RunFolderError
from silotune.core.types import Score, ServerState, Update
from silotune.federation.client_memory import folder_name
from silotune.federation.metrics import Row, held_out_losses
from silotune.recipes.parse import parse, to_toml
from silotune.recipes.schema import RunConfig


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
        self._boot = folder / "boot"
        self._reports: dict[str, Update] = {}
        if not folder.is_dir():
            return
        # left by a process that ended during this round
        if not self._boot.is_file() or self._boot.read_text(encoding="ascii") != boot_id():
            self.remove()
        for path in folder.glob("*.safetensors"):
            try:
                update = _read_update(path)
            except (RunFolderError, LookupError, TypeError, ValueError):
                path.unlink()  # not a complete file of ours: its client is asked again
            else:
                self._reports[update.client] = _without_tensors(update)

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
        return self.folder / f"{folder_name(client)}.safetensors"

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
            yield _read_update(self._path(client))

    def discard(self, client: str) -> None:
        """Remove one client's update: it is not used."""
        self._path(client).unlink()
        del self._reports[client]

    def remove(self) -> None:
        """Remove the round's updates: a checkpoint holds their result."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _without_tensors(update: Update) -> Update:
    return replace(update, delta={}, extra={})


def _read_update(path: Path) -> Update:
    tensors, about = load_rows(path)
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


class RunFolder:
    """One run on disk."""

    RECIPE = "recipe.toml"
    """The file that marks a folder as a run folder."""
    KIND = "run"
    COMMAND = "silotune run"

    def __init__(self, path: Path, run: RunConfig) -> None:
        self.path = path
        self.run = run
        self.lock_fd: int | None = None
        """Set while the folder is locked. A process that inherits it holds the lock too."""

    @classmethod
    def create(cls, path: Path, run: RunConfig) -> Self:
        """Create a run folder. It exists with its recipe, or not at all.

        Raises:
            RunFolderError: The path already exists; nothing is overwritten.
        """
        if path.exists():
            resume = f", or resume it: {cls.COMMAND} --resume {path}"
            is_run = (path / cls.RECIPE).is_file()
            raise RunFolderError(
                f"{path} exists and is not overwritten.\n"
                f"  Choose another --out{resume if is_run else '.'}"
            )
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            make_folder(part)
            with open(part / cls.RECIPE, "w", encoding="utf-8", opener=owner_only) as file:
                file.write(to_toml(run))
            part.rename(path)
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be created: {error.strerror}.\n  Choose another --out."
            ) from error
        return cls(path, run)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open an existing run folder.

        Raises:
            RunFolderError: It is not a run folder.
        """
        recipe = path / cls.RECIPE
        if not recipe.is_file():
            why = f"it has no {cls.RECIPE}" if path.is_dir() else "there is no such folder"
            raise RunFolderError(
                f"{path} is not a {cls.KIND} folder: {why}.\n"
                f"  Give the folder that a {cls.KIND} printed, for example "
                "runs/2026-01-31-120000-demo."
            )
        table = tomllib.loads(recipe.read_text(encoding="utf-8"))
        return cls(path, parse(table, name=str(recipe)))

    def has_begun(self) -> bool:
        """Whether any round has left an update, metrics or a checkpoint."""
        begun = any((self.path / n).exists() for n in ("spool", "metrics.jsonl"))
        return begun or any(round_ > 0 for round_ in self._checkpoints())

    def run_id(self) -> str:
        """A unique identifier of this run. A resume does not change it."""
        path = self.path / "run-id"
        if not path.exists():
            write_atomically(path, secrets.token_hex(16).encode())
        return path.read_text(encoding="utf-8")

    def remove(self) -> None:
        """Delete the folder and everything in it."""
        shutil.rmtree(self.path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for this process. The lock ends with the process, even if it is killed.

        Raises:
            RunFolderError: Another process is using the folder.
        """
        try:
            import fcntl
        except ImportError:
            # Windows has no advisory locks: the user must not run two processes on one folder
            yield
            return
        with open(self.path / "run.lock", "w", opener=owner_only) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"{self.path} is in use by another process.\n"
                    "  Wait for that process, or stop it first."
                ) from None
            self.lock_fd = file.fileno()
            try:
                yield
            finally:
                self.lock_fd = None

    # --- the current round

    def spool(self, round_: int) -> Spool:
        """The updates of a round."""
        return Spool(self.path / "spool" / f"round-{round_:05d}")

    def client_folder(self, client: str) -> Path:
        """Where a simulated client keeps its memory. A real client keeps it on its own machine."""
        return self.path / "clients" / folder_name(client)

    # --- checkpoints

    def _checkpoints(self) -> dict[int, Path]:
        folder = self.path / "checkpoints"
        found = {
            int(p.name.removeprefix("round-")): p for p in folder.glob("round-*") if p.is_dir()
        }
        return dict(sorted(found.items()))

    def load_state(self, round_: int | None = None) -> ServerState | None:
        """The state after a checkpointed round, by default the newest; None if there is none."""
        found = self._checkpoints()
        if not found:
            return None
        at = max(found) if round_ is None else round_
        adapter, _ = load_tensors(found[at] / "adapter.safetensors")
        flat, _ = load_tensors(found[at] / "extra.safetensors")
        extra: dict[str, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            purpose, name = key.split("/", 1)
            extra.setdefault(purpose, {})[name] = tensor
        return ServerState(at, adapter, extra)

    def save(self, state: ServerState, *, last: bool) -> None:
        """Write a checkpoint if one is due or after the last round, and remove what it replaces.

        The round's metrics are written first. After a crash before the checkpoint's rename, the
        round is repeated from its spooled updates; after the rename, nothing is repeated. `rewind`
        removes the metrics of a repeated round.
        """
        if state.round % self.run.checkpoint.every and not last:
            return
        final = self.path / "checkpoints" / f"round-{state.round:05d}"
        part = final.with_name(f".{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make_folder(part)
        about = {"round": str(state.round)}
        save_tensors(part / "adapter.safetensors", state.adapter, about=about)
        flat = {f"{key}/{n}": t for key, s in state.extra.items() for n, t in s.items()}
        save_tensors(part / "extra.safetensors", flat, about=about)
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        self._prune(state.round)

    def _prune(self, newest: int) -> None:
        keep = {newest}
        if self.run.checkpoint.keep == "best" and (best := self.best_round()) is not None:
            keep.add(best)
        if self.run.checkpoint.keep != "all":
            for round_, path in self._checkpoints().items():
                if round_ not in keep:
                    shutil.rmtree(path)
        for spool in (self.path / "spool").glob("round-*"):
            if int(spool.name.removeprefix("round-")) <= newest:
                shutil.rmtree(spool)

    def best_round(self) -> int | None:
        """The checkpointed round whose adapter has the lowest overall held-out loss."""
        scored = held_out_losses(self.metrics())
        there = [r for r in self._checkpoints() if r in scored and r > 0]
        return min(there, key=lambda r: (scored[r], r), default=None)

    # --- metrics

    @property
    def _metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def metrics(self) -> list[Row]:
        """All rows written so far. A half-written line is skipped: its round is repeated."""
        if not self._metrics_path.exists():
            return []
        rows: list[Row] = []
        for line in self._metrics_path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # truncated by a kill or a full disk
                rows.append(json.loads(line))
        return rows

    def append_metrics(self, rows: Iterable[Row]) -> None:
        """Append rows to metrics.jsonl."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if not lines:
            return
        path = self._metrics_path
        with writing(path), open(path, "a", encoding="utf-8", opener=owner_only) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, round_: int) -> None:
        """Drop metrics of rounds after `round_` and half-written lines; they are written again."""
        if not self._metrics_path.exists():
            return
        # the adapter after round r is scored in round r + 1
        kept = [r for r in self.metrics() if r["round"] + (r["event"] == "evaluate") <= round_]
        write_rows(self._metrics_path, kept)

    # --- results

    def read_json(self, name: str) -> Any:
        """The contents of a JSON file in the folder, or None if it does not exist yet."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def install(self, name: str, build: Callable[[Path], None]) -> Path:
        """Build a subfolder of the run folder; see `atomic_files.build_folder`."""
        return build_folder(self.path / name, build)
