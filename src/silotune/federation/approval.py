"""Whether the people who run a client agree to a run: it asks, they answer, the client remembers.

An answer belongs to one run and to the hash of what it asks for, so a changed recipe asks again.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from silotune.core.errors import AwaitsConsent, Declined
from silotune.federation.approval_files import (
    APPROVED,
    DECLINED,
    WAITING,
    Request,
    ask,
    now,
    read_request,
    requests,
)
from silotune.federation.client_config import ClientConfig
from silotune.federation.client_recipe import without_server
from silotune.federation.operator_log import ASKS, NOT_ASKED
from silotune.recipes.schema import RunConfig
from silotune.recipes.sections import RuntimeConfig

SHA256 = r"[0-9a-f]{64}"
MOST_WAITING = 20
"""Runs that may wait for an answer at a time. A server that asks without end fills no disk."""
Tell = Callable[..., None]
"""(what, **facts) -> a line in the client's log of operators."""


def consent_sha256(run: RunConfig) -> str:
    """The hash of all that a recipe asks of a client.

    Left out is what a client does not take from a recipe (how the server runs, and its own
    sections), and the day that chat templates show: a recipe has the same hash tomorrow.
    """
    asks = run.model_copy(
        update={
            "data": run.data.model_copy(update={"date": None}),
            "runtime": RuntimeConfig(threads=1),
            **without_server(run),
        }
    )
    return hashlib.sha256(asks.model_dump_json(serialize_as_any=True).encode()).hexdigest()


def check_approved(
    own: ClientConfig,
    run: RunConfig,
    about: Mapping[str, Any],
    hash_of: Callable[[str], str],
    tell: Tell,
) -> None:
    """Refuse a run until this client's people agree, if they want to be asked.

    Args:
        own: The client's configuration.
        run: The recipe as it was sent.
        about: run (its id), recipe (its text), base_sha256 and version, as they were sent.
        hash_of: `consent_sha256` of a recipe by the name of a shipped one or a file.
        tell: Told when a run begins to ask, when its recipe has changed since it was answered, and
            when too many wait.

    Raises:
        AwaitsConsent: Nobody has answered yet.
        Declined: They said no, or the recipe is not one of those listed.
    """
    mode, sha256 = own.runs.approve, consent_sha256(run)
    if mode == "all":
        return
    if mode == "listed":
        _check_listed(own, sha256, hash_of)
        return
    request = Request(
        run=str(about["run"]),
        sha256=sha256,
        recipe=str(about["recipe"]),
        base_sha256=str(about.get("base_sha256", "")),
        version=str(about.get("version", "")),
        time=now(),
        state=WAITING,
    )
    known = read_request(Path(own.state), request.run)
    if known is None or known.sha256 != sha256:
        _ask(own, request, known, tell)
    elif known.state == APPROVED:
        return
    elif known.state == DECLINED:
        raise Declined(f"client '{own.name}' does not take part: its people declined this run")
    raise AwaitsConsent(f"client '{own.name}' has not agreed to this run yet")


def _ask(own: ClientConfig, request: Request, known: Request | None, tell: Tell) -> None:
    waiting = [each for each in requests(Path(own.state)) if each.state == WAITING]
    if known is None and len(waiting) >= MOST_WAITING:
        tell(NOT_ASKED, waiting=len(waiting))
        raise AwaitsConsent(
            f"client '{own.name}' is not asked: {len(waiting)} runs wait for its people already"
        )
    ask(Path(own.state), request)
    if known is None:
        tell(ASKS, run=request.run, recipe_sha256=request.sha256)
    elif known.state != WAITING:  # what changes while nobody has answered is no news
        tell(
            ASKS,
            run=request.run,
            recipe_sha256=request.sha256,
            why=f"its recipe has changed since it was {known.state}",
        )


def _check_listed(own: ClientConfig, sha256: str, hash_of: Callable[[str], str]) -> None:
    for entry in own.runs.recipes:
        if sha256 == (entry if re.fullmatch(SHA256, entry) else hash_of(entry)):
            return
    raise Declined(
        f"client '{own.name}' does not take part:\n"
        f"  this recipe, SHA-256 {sha256}, is not in runs.recipes"
    )
