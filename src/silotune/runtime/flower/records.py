"""Converts parcels to Flower's records and back: one text, and one row of bytes.

Flower stores, hashes and fetches every record, array and part of an array as a separate object,
with one request at each of the six places that a round's message passes. So an adapter is one row,
not hundreds of arrays. A row that fits into one object is stored in the text's ConfigRecord; a
larger one in an ArrayRecord, which travels in parts. The row holds plain little-endian tensors.
Flower itself would write a NumPy file, and reading one means decoding whatever its header
announces.
"""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk

from silotune.core.errors import UpdateError
from silotune.runtime.parts import part_bytes
from silotune.runtime.payload import Parcel, read_text

ABOUT, VALUES = "about", "values"
PLAIN = "silotune.bytes"
"""Name of our format in Flower's arrays."""


def to_record(parcel: Parcel) -> RecordDict:
    """A parcel as the content of a Flower message."""
    text, row = json.dumps(parcel.about), np.asarray(parcel.values, dtype=np.uint8)
    size = part_bytes(row.nbytes)
    if row.nbytes <= size:
        return RecordDict({ABOUT: ConfigRecord({ABOUT: text, VALUES: row.tobytes()})})
    values = ArrayRecord()
    # put in later: Flower would copy what it is given at once, and cut the copy in its own way
    values[VALUES] = _in_parts(Array("uint8", row.shape, PLAIN, row.tobytes()), size)
    about = ConfigRecord({ABOUT: text})
    return RecordDict({ABOUT: about, VALUES: values})


def _in_parts(array: Array, size: int) -> Array:
    """The same array, cut into parts of `size` bytes: Flower's own size is one for a process."""
    data = memoryview(array.data)
    parts = [ArrayChunk(data[start : start + size]) for start in range(0, len(data), size)]
    # where Flower keeps the parts once it has cut them
    array.__dict__["_chunks"] = [(part.object_id, part) for part in parts]
    return array


def from_record(record: RecordDict, *, most_text: int | None = None) -> Parcel:
    """Undo `to_record`.

    Args:
        record: The content of a message.
        most_text: Most characters of its text; None for any number.

    Raises:
        UpdateError: The content is not a parcel, or its text is too long.
    """
    about, arrays = record.config_records.get(ABOUT, {}), record.array_records.get(VALUES)
    text, row = about.get(ABOUT), about.get(VALUES, b"")
    if not isinstance(text, str):
        raise UpdateError(
            "a message has no readable text.\n  Install the same version of silotune on both sides."
        )
    if most_text is not None and len(text) > most_text:
        raise UpdateError(
            f"a message has a text of {len(text)} characters; at most {most_text} are accepted.\n"
            "  Install the same version of silotune on both sides."
        )
    if arrays is not None and VALUES in arrays:
        array = arrays[VALUES]
        announced = (array.dtype, array.stype, array.shape)
        row = array.data if announced == ("uint8", PLAIN, (len(array.data),)) else None
    if not isinstance(row, bytes):
        raise UpdateError(
            "a message holds something else than bytes.\n"
            "  Install the same version of silotune on both sides."
        )
    return Parcel(read_text(text), np.frombuffer(row, dtype=np.uint8))
