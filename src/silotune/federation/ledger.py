"""A ledger of releases: a file of JSON lines that only grows.

A line is written before its release is made, so that a crash cannot hide one.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import writing

FILE = "privacy.jsonl"
"""Its name, in a run's folder or a client's own."""


def write_down(path: Path, row: Mapping[str, Any]) -> None:
    """Add a line, and wait until it is on the disk.

    Raises:
        DiskError: There is no room, or no right to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("a", encoding="utf-8") as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a crash cut the last line off: it stays a line of its own
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[dict[str, Any]]:
    """Every release that was made, or begun, in order; [] where there is no ledger.

    A line that a crash cut off counts too: as one more like the one before, of nobody by name.
    """
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            found.append({**(found[-1] if found else {}), "round": len(found) + 1})
            found[-1].pop("client", None)
    return found
