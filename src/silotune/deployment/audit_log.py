"""`silotune audit-log verify`: checks a log of operators, and whose key signed it."""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_pem_public_key

from silotune.deployment.consortium.certificates import (
    PublicKey,
    fingerprint,
    public_key,
    read_certificate,
    read_key,
)
from silotune.federation.operator_log import KEYS, LogError, verify

AUTHORITY, OWN = Path("authority") / "certificate.pem", Path("key.pem")


@dataclass(frozen=True)
class Checked:
    """What a log shows."""

    lines: int
    first: str
    """Time of the first line, as ISO 8601."""
    last: str
    head: str
    """SHA-256 of the last line: noted elsewhere, it shows later that nothing before it is gone."""
    fingerprints: tuple[str, ...]
    """Of the keys that signed it, oldest first."""
    is_own: bool
    """Whether the newest key is that of the folder beside it; False if there is only the file."""


def check_log(path: Path, *, seen: str | None = None) -> Checked:
    """Check a log of operators, and that the folder's own key signed it.

    Args:
        path: operators.jsonl, or the folder of a consortium or a client.
        seen: The hash of a line, noted earlier.

    Raises:
        LogError: Something was changed, moved, added or removed, or another key signed it.
    """
    found = verify(path, seen=seen)
    shown = tuple(_fingerprint(path, key) for key in found.keys)
    folder = path if path.is_dir() else path.parent
    expected = _own_fingerprint(folder)
    if expected is not None and shown[-1] != expected:
        raise LogError(
            f"{path} is signed by the key {shown[-1]}, but the folder's own is {expected}.\n"
            "  It is the log of another folder, or it was written again. Compare it with a copy."
        )
    return Checked(
        found.lines, found.first, found.last, found.head, shown, is_own=expected is not None
    )


def _fingerprint(path: Path, pem: str) -> str:
    key = load_pem_public_key(pem.encode())
    if not isinstance(key, PublicKey):
        raise LogError(f"{path} names a key that is not on an elliptic curve.")
    return fingerprint(key)


def _own_fingerprint(folder: Path) -> str | None:
    """Of the key that should sign this folder's log; None if the folder does not say."""
    if (path := folder / AUTHORITY).is_file():
        return fingerprint(public_key(read_certificate(path.read_text("ascii"), where=str(path))))
    if any((folder / key).is_file() for key in KEYS):
        return fingerprint(read_key(folder / OWN).public_key())
    return None
