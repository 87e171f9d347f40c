"""What travels between processes: one JSON text and one row of bytes. Nothing pickled.

Imports neither torch nor flwr, so that a process that only passes parcels on starts at once.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from silotune.core.errors import UpdateError

HEADER_BYTES = 8


def no_values() -> np.ndarray:
    """An empty row of bytes."""
    return np.zeros(0, dtype=np.uint8)


@dataclass(frozen=True)
class Parcel:
    """A message's contents, however it is carried."""

    about: dict[str, Any]
    """Plain JSON values."""
    values: np.ndarray = field(default_factory=no_values)
    """The little-endian bytes of all tensors, concatenated to 1-D uint8."""


def pack(parcel: Parcel) -> bytes:
    """One byte string: the length of the text, the text, the bytes of the tensors."""
    text = json.dumps(parcel.about).encode()
    return len(text).to_bytes(HEADER_BYTES, "little") + text + parcel.values.tobytes()


def unpack(data: bytes) -> Parcel:
    """Undo `pack`.

    Raises:
        UpdateError: The bytes are not a parcel.
    """
    start = HEADER_BYTES + int.from_bytes(data[:HEADER_BYTES], "little")
    if len(data) < start:
        raise UpdateError(
            "a message is incomplete.\n  Install the same version of silotune on both sides."
        )
    values = np.frombuffer(data, dtype=np.uint8, offset=start)
    return Parcel(read_text(data[HEADER_BYTES:start]), values)


def round_of(about: dict[str, Any]) -> int:
    """The round that a message is about; 0 if it names none, or something that is no round.

    Only for the text of a failure: what a round may be is checked in `wire.decode_broadcast`.
    """
    found = about.get("round")
    return found if isinstance(found, int) and 0 <= found <= 2**53 else 0


def read_text(text: str | bytes) -> dict[str, Any]:
    """The JSON object of a parcel.

    Raises:
        UpdateError: It is not a JSON object.
    """
    try:
        about = json.loads(text)
        # JSON lets half a character through (a lone surrogate); no file of the run could hold it
        json.dumps(about, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        raise UpdateError(
            "a message has no readable text.\n  Install the same version of silotune on both sides."
        )
    return about
