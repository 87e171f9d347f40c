"""What a client keeps between its rounds, in its own folder. None of it is ever sent."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from silotune.core.atomic_files import load_tensors, make_folder, save_tensors
from silotune.core.errors import Declined
from silotune.core.types import AdapterState
from silotune.data.row_draws import RULE


@dataclass(frozen=True)
class ClientMemory:
    """What a client keeps between its rounds. It never leaves the client."""

    position: int = 0
    """Rows taken from the client's stream so far."""
    tensors: Mapping[str, AdapterState] = field(default_factory=dict)
    """The algorithm's memory, by purpose: personal tensors, control variates."""


def folder_name(client: str) -> str:
    """A file name for a client: its name if that is safe, else a part of it with a fingerprint."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,60}", client):
        return client
    readable = re.sub(r"[^A-Za-z0-9]+", "-", client).strip("-")[:40]
    return f"{readable or 'client'}-{sha256(client.encode()).hexdigest()[:8]}"


def load_memory(folder: Path, round_: int) -> ClientMemory:
    """Load the client's newest memory from a round before `round_`; an empty one if there is none.

    Memories are kept per round, so that a round that is repeated after a crash starts from the
    same one.
    """
    earlier = [p for p in sorted(folder.glob("round-*.safetensors")) if _round_of(p) < round_]
    if not earlier:
        return ClientMemory()
    flat, about = load_tensors(earlier[-1])
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        purpose, name = key.split("/", 1)
        tensors.setdefault(purpose, {})[name] = tensor
    return ClientMemory(int(about["position"]), tensors)


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
    save_tensors(folder / f"round-{round_:05d}.safetensors", flat, about=about)
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


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))
