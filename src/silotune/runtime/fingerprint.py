"""What names a public key to people: a short hash. Imports no torch, so that commands are fast."""

import hashlib
from typing import Any

from silotune.core.primitives import library


def fingerprint(key: Any) -> str:
    """What two people compare by telephone: 128 bits of the key's SHA-256, eight groups of four."""
    text = digest(key)
    return " ".join(text[at : at + 4] for at in range(0, 32, 4))


def digest(key: Any) -> str:
    """The SHA-256 of a public key, as 64 hexadecimal digits."""
    forms: Any = library("hazmat.primitives.serialization")
    der = key.public_bytes(forms.Encoding.DER, forms.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
