"""What a client keeps between its rounds, in its own folder. None of it is ever sent."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from silotune.core.atomic_files import load_tensors, make_folder, save_tensors
from silotune.core.errors import Declined, RunFolderError
from silotune.core.safe_text import folder_name as folder_name  # for files here and elsewhere
from silotune.core.types import AdapterState
from silotune.data.row_draws import RULE
from silotune.federation.metrics import Row

FIX = "Restore it from a copy, or start a new run."


@dataclass(frozen=True)
class ClientMemory:
    """What a client keeps between its rounds. It never leaves the client."""

    position: int = 0
    """Rows taken from the client's stream so far."""
    tensors: Mapping[str, AdapterState] = field(default_factory=dict)
    """The algorithm's memory, by purpose: personal tensors, control variates."""


def load_memory(folder: Path, round_: int) -> ClientMemory:
    """Load the client's newest memory from a round before `round_`; an empty one if there is none.

    Memories are kept per round, so that a round that is repeated after a crash starts from the
    same one.
    """
    earlier = [p for p in sorted(folder.glob("round-*.safetensors")) if _round_of(p) < round_]
    if not earlier:
        return ClientMemory()
    flat, about = load_tensors(earlier[-1], fix=FIX)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        purpose, name = key.split("/", 1)
        tensors.setdefault(purpose, {})[name] = tensor
    return ClientMemory(int(about["position"]), tensors)


def check_memory(folder: Path, round_: int) -> None:
    """Refuse to go on without the memory of a round that a client has trained in.

    Args:
        folder: The client's folder.
        round_: A round whose update was accepted.

    Raises:
        RunFolderError: There is no memory of this round.
    """
    path = _path(folder, round_)
    if not path.is_file():
        raise RunFolderError(f"{path} is gone: the client trained in this round.\n  {FIX}")


def check_memories(
    rows: Iterable[Row], spooled: Iterable[str], *, at: int, folder_of: Callable[[str], Path]
) -> None:
    """Refuse to resume a run whose clients have lost what they keep between rounds.

    Args:
        rows: The run's metrics.
        spooled: Clients whose updates of the next round are here already.
        at: The round that the run goes on from.
        folder_of: A client's folder, by its name.

    Raises:
        RunFolderError: See `check_memory`.
    """
    newest: dict[str, int] = {}
    for row in rows:
        if row["event"] == "train" and "num_examples" in row and row["round"] <= at:
            newest[row["client"]] = row["round"]
    for client, round_ in (newest | dict.fromkeys(spooled, at + 1)).items():
        check_memory(folder_of(client), round_)


def save_memory(folder: Path, round_: int, memory: ClientMemory, *, keep_from: int) -> None:
    """Write a client's memory of a round, and remove older ones that no resume can need.

    Args:
        folder: The client's own folder.
        round_: The round that it has just trained in.
        memory: What to keep.
        keep_from: The newest memory before this round, and all later ones, are kept.
    """
    make_folder(folder)
    flat = {f"{purpose}/{n}": t for purpose, s in memory.tensors.items() for n, t in s.items()}
    about = {"position": str(memory.position), "held_out": RULE}
    save_tensors(_path(folder, round_), flat, about=about)
    older = [p for p in sorted(folder.glob("round-*.safetensors")) if _round_of(p) < keep_from]
    for stale in older[:-1]:
        stale.unlink()


def check_split_rule(folder: Path) -> None:
    """Refuse to go on with a run whose held-out rows were chosen in another way.

    Rows that were trained on would be held out, and their scores would look too good.

    Raises:
        Declined: The memory is from another version of silotune.
    """
    kept = sorted(folder.glob("round-*.safetensors"))
    if kept and load_tensors(kept[-1])[1].get("held_out") != RULE:
        raise Declined(
            "this run began here with another version of silotune, which chose the held-out rows "
            "in another way.\n  Use that version until the run ends, or start a new run."
        )


def _path(folder: Path, round_: int) -> Path:
    return folder / f"round-{round_:05d}.safetensors"


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
