"""The files in which a client's worker asks for consent, and a command answers; no torch.

Each run has two, one for either side, so that neither overwrites what the other wrote.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import make_folder, write_json
from silotune.core.errors import ConfigError, Declined
from silotune.core.reading_back import read_object

FOLDER = "approvals"
ASKED, ANSWER = "asked.json", "answer.json"
FIX = "Remove it: the run then asks again."
WAITING, APPROVED, DECLINED = "waiting", "approved", "declined"
READ_BACK = ("state", "changed")
"""What follows from both files together."""


@dataclass(frozen=True)
class Request:
    """What a run asks this client for, and what was answered."""

    run: str
    sha256: str
    """Of the recipe; see `consent_sha256`."""
    recipe: str
    """As it was sent: JSON."""
    base_sha256: str
    version: str
    """The server's version of silotune."""
    time: str
    """When it asked, as ISO 8601."""
    state: str
    """waiting, approved or declined."""
    changed: bool = False
    """Whether it waits because its recipe is not the one that was answered."""


def requests(state: Path) -> list[Request]:
    """All runs that asked, oldest first."""
    found = [read_request(state, path.parent.name) for path in (state / FOLDER).glob(f"*/{ASKED}")]
    return sorted((own for own in found if own is not None), key=lambda own: own.time)


def read_request(state: Path, run: str) -> Request | None:
    """What a run asks for; None if it has not asked.

    Raises:
        ConfigError: One of its files is damaged.
    """
    folder = _folder(state, run)
    if not (folder / ASKED).is_file():
        return None
    asked = read_object(folder / ASKED, fix=FIX, error=ConfigError)
    answer: Mapping[str, Any] = {}
    if (folder / ANSWER).is_file():
        answer = read_object(folder / ANSWER, fix=FIX, error=ConfigError)
    try:
        fits = answer.get("sha256") == asked["sha256"]
        said = answer.get("answer") if fits else WAITING
        state_ = said if said in (APPROVED, DECLINED) else WAITING
        facts = {key: str(value) for key, value in asked.items()}
        return Request(**facts, state=state_, changed=bool(answer) and not fits)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / ASKED} is damaged.\n  {FIX}") from error


def answer(state: Path, request: Request, *, approved: bool) -> None:
    """Remember what this client's people say; a later answer replaces an earlier one."""
    said = APPROVED if approved else DECLINED
    path = _folder(state, request.run) / ANSWER
    write_json(path, {"sha256": request.sha256, "answer": said, "time": now()})


def ask(state: Path, request: Request) -> None:
    """Ask this client's people about a run; what they answered before no longer counts."""
    folder = make_folder(_folder(state, request.run))
    facts = {key: value for key, value in vars(request).items() if key not in READ_BACK}
    write_json(folder / ASKED, facts)


def _folder(state: Path, run: str) -> Path:
    if not run.isalnum():
        raise Declined("the run's id must consist of letters and digits")
    return state / FOLDER / run


def now() -> str:
    """The time, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
