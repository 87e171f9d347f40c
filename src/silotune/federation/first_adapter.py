"""The adapter that a run starts from, where clients are told its hash only.

It is the first adapter that they receive. With task = "prefer" it is the reference, too, so every
client needs it as long as it takes part: it is sent along with the first message to a client that
was not there in the first round, and each client keeps it in its own folder of the run.
"""

import contextlib
from pathlib import Path

from silotune.core.atomic_files import load_tensors, make_folder, save_tensors
from silotune.core.errors import Declined, RunFolderError, UpdateError
from silotune.core.lora import without_identities
from silotune.core.tree import sha256
from silotune.core.types import AdapterState, Broadcast
from silotune.models.adapters import AdapterConfig
from silotune.models.start import PART, TOLD, hash_of_start, is_told, read_start
from silotune.recipes.schema import RunConfig

FILE = "start.safetensors"
"""In a client's own folder of a run: the adapter that preferences are measured against."""


def own_start(asked: AdapterConfig, own: AdapterConfig) -> AdapterConfig:
    """A client's own adapter, which starts from what the recipe asks for, at the client's rank."""
    if asked.start is None or own.rank == asked.rank:
        return own
    return own.model_copy(update={"start": PART + asked.start.removeprefix(TOLD)})


def check_first_adapter(run: RunConfig, client: str, broadcast: Broadcast) -> None:
    """Refuse a first adapter that is not the one that the recipe names by its hash.

    A client of a lower rank receives a part of it, whose hash nobody has told it.

    Raises:
        Declined: It is another one, so other clients may have received yet another.
    """
    start = run.adapter.start
    if start is None or not start.startswith(TOLD) or broadcast.round != 1:
        return
    found = sha256(without_identities(broadcast.adapter))
    if found != hash_of_start(start):
        raise _another(run, client, "the first adapter", found)


def _another(run: RunConfig, client: str, what: str, found: str) -> Declined:
    wanted = hash_of_start(run.adapter.start or "")
    return Declined(
        f"client '{client}': {what} has the SHA-256 {found[:12]}..., and the recipe names "
        f"{wanted[:12]}.... The server has to send the adapter of its recipe."
    )


# --- the reference of preferences ---------------------------------------------------------------


def start_to_send(run: RunConfig, path: str | None = None) -> AdapterState | None:
    """The adapter that every client needs as its reference; None if the recipe has no such thing.

    Args:
        run: The recipe.
        path: Where the adapter is, if the recipe only has its hash.

    Raises:
        ConfigError: It cannot be read.
    """
    start = path or run.adapter.start
    return None if run.task != "prefer" or start is None else read_start(start)


def needs_start(run: RunConfig) -> bool:
    """Whether a client's pairs need an adapter of which the recipe only has the hash."""
    return run.task == "prefer" and is_told(run.adapter.start)


def find_start(run: RunConfig, client: str, broadcast: Broadcast, folder: Path) -> AdapterState:
    """The adapter that a client's pairs are measured against: just received, or kept.

    Args:
        run: The recipe, see `needs_start`.
        client: The client.
        broadcast: What the server sent.
        folder: The client's own folder of the run.

    Raises:
        Declined: The server sent another adapter than its recipe names.
        UpdateError: It is neither here nor in the message; the next message brings it.
    """
    wanted = hash_of_start(run.adapter.start or "")
    check_first_adapter(run, client, broadcast)
    sent = broadcast.start or (
        without_identities(broadcast.adapter) if broadcast.round == 1 else {}
    )
    found = sha256(sent)
    if found == wanted:
        make_folder(folder)
        save_tensors(folder / FILE, sent, about={})
        return sent
    if broadcast.start:
        raise _another(run, client, "the adapter to start from", found)
    if (folder / FILE).is_file():
        with contextlib.suppress(RunFolderError):
            kept, _ = load_tensors(folder / FILE)
            if sha256(kept) == wanted:
                return kept
    raise UpdateError(
        f"client '{client}', round {broadcast.round}: the adapter that the run started from is not "
        f"here, and preferences are measured against it ({FILE} in this client's folder of the "
        "run).\n  Nothing is lost: the server sends it with the next message."
    )
