"""Who is in a consortium, for a run that goes on: names, and the node that each one's key makes.

Needs no library: whoever reads recipes asks whether a folder is a consortium's. The server writes
the file each time somebody comes or goes; a run's server app reads it before each round.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from silotune.core.atomic_files import write_json

ABOUT = "consortium.toml"
MEMBERS = Path("engine") / "members.json"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"
"""How clients and consortiums may be called: a name becomes a file's and a certificate's."""


def is_consortium(place: Path) -> bool:
    """Whether a folder is a consortium's."""
    return (place / ABOUT).is_file()


def names_in(place: Path) -> Sequence[str]:
    """The clients that are in, sorted, by the folders that approval makes."""
    folders = sorted((place / "clients").glob("*/certificate.pem"))
    return [path.parent.name for path in folders if re.fullmatch(NAME, path.parent.name)]


def write_members(path: Path, nodes: Mapping[str, int]) -> None:
    """Say which node belongs to which client."""
    write_json(path, dict(sorted(nodes.items())))


class Roster:
    """Reads `write_members` anew each time it is asked."""

    def __init__(self, path: Path) -> None:
        """Of a consortium's `MEMBERS` file."""
        self._path = path

    def nodes(self) -> Mapping[str, int]:
        """The node of each client that is in now, sorted by name."""
        return json.loads(self._path.read_text(encoding="utf-8"))

    def name_of(self, node: int) -> str | None:
        """Whose key a node has; None when its client is not in any more."""
        return next((name for name, own in self.nodes().items() if own == node), None)
