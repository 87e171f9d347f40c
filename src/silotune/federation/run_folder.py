"""The run folder: recipe, provenance, checkpoints, updates, metrics. Nothing is pickled.

Every file appears complete or not at all: it is written next to its final place and then renamed.
A kill at any moment therefore leaves a folder that can be resumed. What is read back is compared
with a SHA-256 that was written with it: tensors with the one in their file, other files with the
folder's list (core/checksums.py). docs/quickstart.md has a map.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Self

from torch import Tensor

from silotune.core.atomic_files import (
    build_folder,
    load_tensors,
    make_folder,
    owner_only,
    remove_folder,
    save_tensors,
    write_json,
    write_rows,
    writing,
)
from silotune.core.checksums import FILE as CHECKSUMS
from silotune.core.checksums import list_files, listed, take_off
from silotune.core.errors import DiskError, RunFolderError
from silotune.core.types import ServerState
from silotune.federation.client_memory import folder_name
from silotune.federation.extended import with_extensions
from silotune.federation.kept_updates import UPDATES, drop_updates, keep_spool, wait_for_disk
from silotune.federation.metrics import Row, choosing_losses
from silotune.federation.recipe_origin import origin_line
from silotune.federation.roster import at_home
from silotune.federation.run_record import RunRecord
from silotune.federation.spool import Spool, rounds_in
from silotune.recipes.parse import parse, to_toml
from silotune.recipes.schema import RunConfig


class RunFolder(RunRecord):
    """One run on disk."""

    def __init__(self, path: Path, run: RunConfig) -> None:
        super().__init__(path)
        self.run = run
        self.lock_fd: int | None = None
        """Set while the folder is locked. A process that inherits it holds the lock too."""

    @classmethod
    def create(cls, path: Path, run: RunConfig, *, name: str = "") -> Self:
        """Create a run folder. It exists with its recipe, or not at all.

        `name` is what people call the recipe; see recipe_origin.py.

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
                file.write(origin_line(name) + to_toml(run))
            list_files(part, [cls.RECIPE])
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
            RunFolderError: It is not a run folder, its recipe has changed since it was written, or
                an earlier version of silotune wrote it.
        """
        run = parse(cls.recipe_table(path), name=str(path / cls.RECIPE))
        return cls(path, at_home(path, with_extensions(path, run)))

    def has_begun(self) -> bool:
        """Whether any round has left an update, metrics or a checkpoint."""
        begun = any((self.path / n).exists() for n in ("spool", "metrics.jsonl"))
        return begun or any(round_ > 0 for round_ in self._checkpoints())

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
        with _open_lock(self.path / "run.lock") as file:
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
        return dict(sorted(rounds_in(self.path / "checkpoints").items()))

    def load_state(self, round_: int | None = None) -> ServerState | None:
        """The state after a checkpointed round, by default the newest; None if there is none.

        Raises:
            RunFolderError: The checkpoint is damaged, or the metrics of its rounds have changed.
        """
        found = self._checkpoints()
        if not found:
            return None
        at = max(found) if round_ is None else round_
        adapter, about = load_tensors(found[at] / "adapter.safetensors")
        self._check_metrics(about)
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
        seen = {**about, **self._metrics_so_far()}
        save_tensors(part / "adapter.safetensors", state.adapter, about=seen)
        flat = {f"{key}/{n}": t for key, s in state.extra.items() for n, t in s.items()}
        save_tensors(part / "extra.safetensors", flat, about=about)
        shutil.rmtree(final, ignore_errors=True)
        if self.run.checkpoint.keep_updates:  # after the rename, nothing can replace them
            wait_for_disk(self.path / "spool")
        part.rename(final)
        self._prune(state.round)

    def _prune(self, newest: int) -> None:
        keep = {newest}
        if self.run.checkpoint.keep == "best" and (best := self.best_round()) is not None:
            keep.add(best)
        if self.run.checkpoint.keep != "all":
            for round_, path in self._checkpoints().items():
                if round_ not in keep:
                    remove_folder(path)
        settle = keep_spool if self.run.checkpoint.keep_updates else remove_folder
        for round_, spool in rounds_in(self.path / "spool").items():
            if round_ <= newest:
                settle(spool)

    def clear_away(self) -> None:
        """Remove what only unfinished rounds need, and what a kill has left of it."""
        self._prune(max(self._checkpoints()))
        shutil.rmtree(self.path / "spool", ignore_errors=True)
        for folder in ("checkpoints", UPDATES):
            for left in (self.path / folder).glob(".round-*"):
                shutil.rmtree(left, ignore_errors=True)

    def best_round(self) -> int | None:
        """The checkpointed round whose adapter has the lowest loss of those that choose."""
        scored = choosing_losses(self.metrics(), self.run.evaluate.choose_by)
        whole = (r for r, p in self._checkpoints().items() if (p / "adapter.safetensors").is_file())
        there = [r for r in whole if r in scored and r > 0]
        return min(there, key=lambda r: (scored[r], r), default=None)

    # --- metrics

    def _metrics_so_far(self) -> dict[str, str]:
        """How long metrics.jsonl is, and its SHA-256: a checkpoint holds both."""
        written = self._metrics_path.read_bytes() if self._metrics_path.exists() else b""
        return {"metrics_bytes": str(len(written)), "metrics": sha256(written).hexdigest()}

    def _check_metrics(self, about: Mapping[str, str]) -> None:
        """Compare metrics.jsonl with a checkpoint; what was appended later is not looked at."""
        try:
            with self._metrics_path.open("rb") as file:
                written = file.read(int(about["metrics_bytes"]))
        except FileNotFoundError:
            written = b""
        except OSError as error:
            raise RunFolderError(
                f"{self._metrics_path} cannot be read: {error.strerror}.\n"
                f"  {self._fix('metrics.jsonl')}"
            ) from error
        if sha256(written).hexdigest() != about["metrics"]:
            raise RunFolderError(
                f"{self._metrics_path} has changed since the checkpoint of round {about['round']} "
                f"was written.\n  {self._fix('metrics.jsonl')}"
            )

    def append_metrics(self, rows: Iterable[Row]) -> None:
        """Append rows to metrics.jsonl."""
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        if not lines:
            return
        path = self._metrics_path
        take_off(self.path, path.name)
        with writing(path), open(path, "a", encoding="utf-8", opener=owner_only) as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, round_: int) -> None:
        """Drop kept updates and metrics of rounds after `round_`, and half-written lines."""
        drop_updates(self.path, after=round_)
        if not self._metrics_path.exists():
            return
        # the adapter after round r is scored in round r + 1
        kept = [r for r in self.metrics() if r["round"] + (r["event"] == "evaluate") <= round_]
        take_off(self.path, self._metrics_path.name)
        write_rows(self._metrics_path, kept)

    # --- results

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file in the folder, and list its SHA-256."""
        take_off(self.path, name)
        write_json(self.path / name, value)
        list_files(self.path, [name])

    def install(self, name: str, build: Callable[[Path], None]) -> Path:
        """Build a subfolder of the run folder and list its files; see `build_folder`."""
        take_off(self.path, f"{name}/")
        place = build_folder(self.path / name, build)
        files = sorted(p.relative_to(self.path).as_posix() for p in place.rglob("*") if p.is_file())
        list_files(self.path, files)
        return place

    def check_files(self, name: str) -> None:
        """Compare all files of an installed subfolder with their SHA-256.

        Raises:
            RunFolderError: One is gone or has changed, or none is listed.
        """
        files = [file for file in listed(self.path) if file.startswith(f"{name}/")]
        if not files:
            raise RunFolderError(
                f"{self.path / name}: {CHECKSUMS} lists none of its files.\n  {self._fix(name)}"
            )
        for file in files:
            self._check(file)

    def list_record(self) -> None:
        """List the files that grow during a run, once it is done."""
        names = ("metrics.jsonl", "privacy.jsonl", "budget.json", "run-id")
        list_files(self.path, [name for name in names if (self.path / name).is_file()])


def _open_lock(path: Path) -> IO[str]:
    try:
        return open(path, "w", opener=owner_only)
    except OSError as error:
        raise DiskError(
            f"{path.parent} cannot be locked for this process: {error.strerror}.\n"
            "  Make it writable for you, or resume a copy of it."
        ) from error
