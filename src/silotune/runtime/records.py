"""Parcels <-> Flower's records: one text in a ConfigRecord, one float32 row in an ArrayRecord.

One row instead of an array per tensor: Flower stores, hashes and fetches every array as objects of
their own, and an adapter has hundreds. The row holds the plain numbers, little end first. Flower
itself would write a NumPy file, and to read one is to decode whatever its header announces.
"""

import json

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from silotune.errors import UpdateError
from silotune.runtime.parcel import Parcel, no_values, read_text

ABOUT, VALUES = "about", "values"
PLAIN = "silotune.float32"
"""Name of our form among those of Flower's arrays."""


def to_record(parcel: Parcel) -> RecordDict:
    """A parcel as the content of a Flower message."""
    about = ConfigRecord({ABOUT: json.dumps(parcel.about)})
    if not parcel.values.size:
        return RecordDict({ABOUT: about})
    row = np.asarray(parcel.values, dtype="<f4")
    array = Array("float32", row.shape, PLAIN, row.tobytes())
    return RecordDict({ABOUT: about, VALUES: ArrayRecord({VALUES: array})})


def from_record(record: RecordDict) -> Parcel:
    """Undo `to_record`.

    Raises:
        UpdateError: The content is no parcel.
    """
    text = record.config_records.get(ABOUT, {}).get(ABOUT)
    if not isinstance(text, str):
        raise UpdateError("a message has no readable text.\n  Use the same silotune on both sides.")
    arrays = record.array_records.get(VALUES)
    values = no_values()
    if arrays is not None and VALUES in arrays:
        array = arrays[VALUES]
        announced = (array.dtype, array.stype, array.shape)
        if announced != ("float32", PLAIN, (len(array.data) / 4,)):
            raise UpdateError("a message brings other numbers; only float32 is accepted.")
        values = np.frombuffer(array.data, dtype="<f4")
    return Parcel(read_text(text), values)
