"""A ledger of releases: an append-only file of JSON lines.

Each line is written before its release is made, so that a crash cannot hide a release.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import make_folder, owner_only, writing
from silotune.core.reading_back import parse_object, read_text

FILE = "privacy.jsonl"
"""Its file name, in a run folder or in a client's own folder."""


def write_down(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line, and wait until it is on disk.

    Raises:
        DiskError: The disk is full, or writing is not permitted.
    """
    make_folder(path.parent)
    with writing(path), open(path, "a", encoding="utf-8", opener=owner_only) as file:
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            file.write("\n")  # a crash truncated the last line: keep it as a separate line
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[dict[str, Any]]:
    """Every release that was made or started, in order; [] if there is no ledger.

    A line that a crash truncated also counts: as a copy of the line before it, without a client's
    name.
    """
    found: list[dict[str, Any]] = []
    if not path.exists():
        return found
    fix = "Restore it from a copy: without it, nobody knows what was released."
    for line in read_text(path, fix=fix).splitlines():
        try:
            found.append(parse_object(line))
        except ValueError:
            found.append({**(found[-1] if found else {}), "round": len(found) + 1})
            found[-1].pop("client", None)
    return found
