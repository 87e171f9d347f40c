"""The members of a consortium, for a run in progress: names, and the node that each key belongs to.

This module needs no library, because reading a recipe includes asking whether a folder belongs to a
consortium. The server writes the file whenever a member joins or leaves; a run's server app reads
it before each round.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from silotune.core.atomic_files import write_json
from silotune.core.reading_back import read_object
from silotune.core.safe_text import visible

if TYPE_CHECKING:
    from silotune.recipes.schema import RunConfig

ABOUT = "consortium.toml"
MEMBERS = Path("engine") / "members.json"
VERSIONS = "versions.json"
"""Beside MEMBERS: what each client said of its installed silotune."""
ORDERS = "server.json"
"""File of a run folder in a consortium: what the server should do with the run."""
CHOSEN = "chosen-clients.json"
"""File of a run folder: the names of a consortium's clients that the run is for, if not all."""
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
"""Allowed names of clients and consortiums: a name is also used in files and certificates."""


LONGEST_NAME = 200
"""Most characters in a client's name."""


def check_client_name(name: str) -> str:
    """Return a name that people can read and type; names in a consortium are also `NAME`.

    Raises:
        ValueError: It is blank or only signs, or holds an escape or a line break.
    """
    if (
        visible(name) != name
        or "\n" in name
        or name != name.strip()
        or not any(map(str.isalnum, name))
        or len(name) > LONGEST_NAME
    ):
        raise ValueError(
            f"name: {name!r:.60} is not a name; use printable characters without blanks at the "
            f"ends, at least one letter or digit, and at most {LONGEST_NAME} characters"
        )
    return name


def is_consortium(place: Path) -> bool:
    """Whether a folder belongs to a consortium."""
    return (place / ABOUT).is_file()


def at_home(folder: Path, run: "RunConfig") -> "RunConfig":
    """A consortium's run with its consortium where it is now: both may have been moved.

    Args:
        folder: The run's, in its consortium's `runs`, or any other run's.
        run: What its recipe says, where `data.path` is the consortium's path at its submission.
    """
    home = folder.absolute().parent.parent
    if not (folder / ORDERS).is_file() or not is_consortium(home):
        return run
    return run.model_copy(update={"data": run.data.model_copy(update={"path": str(home)})})


def names_in(place: Path) -> Sequence[str]:
    """The clients that are members, sorted, according to the folders that approval creates."""
    folders = sorted((place / "clients").glob("*/certificate.pem"))
    return [path.parent.name for path in folders if re.fullmatch(NAME, path.parent.name)]


def write_members(path: Path, nodes: Mapping[str, int]) -> None:
    """Record which node belongs to which client."""
    write_json(path, dict(sorted(nodes.items())))


def versions_seen(members: Path) -> Mapping[str, Mapping[str, str]]:
    """What each client last said of its silotune: version and code_sha256, by name."""
    path = members.with_name(VERSIONS)
    fix = "Remove it: clients say it again at the next run."
    return read_object(path, fix=fix) if path.is_file() else {}


class Roster:
    """Reads the file of `write_members` again on every call."""

    def __init__(self, path: Path, *, only: Sequence[str] | None = None) -> None:
        """Take the path of a consortium's `MEMBERS` file, and the clients that a run is for."""
        self._path, self._only = path, only

    def nodes(self) -> Mapping[str, int]:
        """The node of each client that is currently a member and chosen, sorted by name."""
        fix = "Remove it and start the server again, which writes it: silotune server up"
        found: Mapping[str, int] = read_object(self._path, fix=fix)
        only = self._only
        return found if only is None else {n: node for n, node in found.items() if n in only}

    def may_ask(self, node: int) -> bool:
        """Whether a node may be told of the run: not those of clients that it is not for."""
        return self._only is None or self.name_of(node) is not None

    def saw_version(self, name: str, *, version: str, code_sha256: str) -> None:
        """Record what a client says of its silotune, for `silotune server status`."""
        seen = dict(versions_seen(self._path))
        if seen.get(name) != (now := {"version": version, "code_sha256": code_sha256}):
            write_json(self._path.with_name(VERSIONS), {**seen, name: now})

    def name_of(self, node: int) -> str | None:
        """The client whose key a node has; None if that client is no longer a member."""
        return next((name for name, own in self.nodes().items() if own == node), None)
