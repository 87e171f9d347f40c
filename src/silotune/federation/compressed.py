"""Both ends of [wire]: what a client sends instead of its change, and the change that arrives."""

from dataclasses import replace

from silotune.compression.changes import incoming, outgoing, travels
from silotune.core.errors import UpdateError
from silotune.core.tree import check_same_layout, size_bytes
from silotune.core.types import AdapterState, Layout, Update
from silotune.federation.client_memory import ClientMemory
from silotune.recipes.schema import RunConfig

UNSENT = "unsent"
"""In a client's memory: what a codec has left out of its changes so far."""


def as_sent(
    run: RunConfig, update: Update, before: ClientMemory, after: ClientMemory
) -> tuple[Update, ClientMemory]:
    """The update as it travels, and the client's memory with what that leaves out.

    Noise is in the change by now, and what is made of it afterwards tells nothing more.

    Args:
        run: The recipe.
        update: A round's, with a float32 delta.
        before: The memory that the round began with.
        after: The memory that it left.
    """
    payload, left = outgoing(run.wire, update.delta, before.tensors.get(UNSENT, {}))
    if payload is update.delta:
        return update, after
    size = update.bytes_up - size_bytes(update.delta) + size_bytes(payload)
    kept = {**after.tensors, **({UNSENT: left} if left else {})}
    return replace(update, delta=payload, bytes_up=size), replace(after, tensors=kept)


def as_arrived(run: RunConfig, payload: AdapterState, layout: Layout, *, who: str) -> AdapterState:
    """The change that a client's payload stands for.

    Args:
        run: The recipe.
        payload: As it came.
        layout: Of the change that is expected.
        who: Named at the start of the message, for example "client 'north', round 3".

    Raises:
        UpdateError: It has another layout, or holds what the codec never writes.
    """
    check_same_layout(payload, travels(run.wire, layout), who=who)
    try:
        return incoming(run.wire, payload, layout)
    except UpdateError as error:
        raise UpdateError(f"{who}: {error}") from None
