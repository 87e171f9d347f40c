"""Updates that outlive their round: `checkpoint.keep_updates` keeps them in the run folder.

They have the spool's format, and arrive in their place when the spool would be removed: once a
checkpoint holds their result. Unlike a spool they are only read, never repaired, because nobody can
be asked for them again.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from silotune.core.atomic_files import make_folder, remove_folder, writing
from silotune.core.errors import RunFolderError
from silotune.core.types import Update
from silotune.federation.metrics import Row
from silotune.federation.spool import BOOT, file_name, read_update, rounds_in

UPDATES = "updates"
"""The folder inside the run folder; in it, one folder for each round."""
FIX = "Restore it from a copy, or train again with checkpoint.keep_updates=true."


def wait_for_disk(spool: Path) -> None:
    """Wait until all spooled updates are on disk, which `Spool.add` does not do.

    Raises:
        DiskError: They cannot be written.
    """
    for path in spool.glob("round-*/*.safetensors"):
        with writing(path), path.open("rb+") as file:
            os.fsync(file.fileno())


def keep_spool(spool: Path) -> None:
    """Move a round's spool, which is in the run folder's spool/, to where it stays.

    Raises:
        DiskError: It cannot be moved. It is still in the spool, and a resume moves it.
    """
    place = spool.parent.parent / UPDATES
    with writing(place / spool.name):
        make_folder(place)
        (spool / BOOT).unlink(missing_ok=True)  # about files that may not be on disk; these are
        spool.rename(place / spool.name)


def drop_updates(run: Path, *, after: int) -> None:
    """Remove the updates of rounds after `after`, which are repeated."""
    for round_, folder in rounds_in(run / UPDATES).items():
        if round_ > after:
            remove_folder(folder)


@dataclass(frozen=True)
class KeptUpdates:
    """Some of the updates of one round; implements `Updates`."""

    folder: Path
    """The round's."""
    round: int
    clients: Sequence[str]
    """Whose, sorted."""

    def __len__(self) -> int:
        return len(self.clients)

    def __iter__(self) -> Iterator[Update]:
        """Read one at a time.

        Raises:
            RunFolderError: A file is gone or damaged, or belongs to another client or round.
        """
        for client in self.clients:
            path = self.folder / file_name(client)
            if not path.is_file():
                raise RunFolderError(
                    f"{path} is gone: the update of client '{client}' in round {self.round}.\n"
                    f"  {FIX}"
                )
            update = read_update(path, fix=FIX)
            if (update.client, update.round) != (client, self.round):
                raise RunFolderError(
                    f"{path} is not the update of client '{client}' in round {self.round}.\n  {FIX}"
                )
            yield update

    def without(self, client: str) -> "KeptUpdates":
        """The same without one client's update."""
        others = [name for name in self.clients if name != client]
        return KeptUpdates(self.folder, self.round, others)


def kept_updates(run: Path, metrics: Sequence[Row], num_rounds: int) -> Mapping[int, KeptUpdates]:
    """What was aggregated in rounds 1 to `num_rounds`, by round.

    Args:
        run: The run folder.
        metrics: Its rows; they say whose updates a round has used.
        num_rounds: As in a run's `result_round`.
    """
    used = [row for row in metrics if row["event"] == "train" and "num_examples" in row]
    return {
        r: KeptUpdates(
            run / UPDATES / f"round-{r:05d}",
            r,
            sorted(row["client"] for row in used if row["round"] == r),
        )
        for r in range(1, num_rounds + 1)
    }
