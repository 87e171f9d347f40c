"""The adapter that a run starts from, as a client that is only told its hash sees it."""

from silotune.core.errors import Declined
from silotune.core.tree import sha256
from silotune.core.types import Broadcast
from silotune.models.adapters import AdapterConfig
from silotune.models.start import TOLD, is_told
from silotune.recipes.schema import RunConfig

UNKNOWN = TOLD
"""What a client that trains at a lower rank is told: it receives a part, whose hash is another."""


def own_start(asked: AdapterConfig, own: AdapterConfig) -> AdapterConfig:
    """A client's own adapter, which starts from what the recipe asks for, at the client's rank."""
    if asked.start is None or own.rank == asked.rank:
        return own
    return own.model_copy(update={"start": UNKNOWN})


def check_first_adapter(run: RunConfig, client: str, broadcast: Broadcast) -> None:
    """Refuse a first adapter that is not the one that the recipe names by its hash.

    Raises:
        Declined: It is another one, so other clients may have received yet another.
    """
    start = run.adapter.start
    if start is None or not is_told(start) or start == UNKNOWN or broadcast.round != 1:
        return
    if (found := sha256(broadcast.adapter)) != start.removeprefix(TOLD):
        raise Declined(
            f"client '{client}': the first adapter has the SHA-256 {found[:12]}..., and the recipe "
            f"names {start.removeprefix(TOLD)[:12]}.... The server has to send the adapter of its "
            "recipe."
        )
