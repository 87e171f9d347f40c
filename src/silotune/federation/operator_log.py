"""What the operators of a server or a client did, and what was refused: operators.jsonl.

An append-only file of JSON lines in the folder of a consortium or a client. Each line holds the
SHA-256 of the line before it and a signature by the folder's own key, so that a line that was
changed, moved, added or removed by somebody without that key is found. operators.head holds the
number of lines and the hash of the last one, which shows that lines at the end are missing.

What cannot be found: a change by whoever has the key, and missing lines at the end if
operators.head was set back as well. Against both, note the hash that `verify` returns elsewhere.
"""

import contextlib
import datetime
import fcntl
import getpass
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silotune.core.atomic_files import owner_only, write_json, writing
from silotune.core.errors import RunFolderError
from silotune.core.reading_back import parse_object, read_object
from silotune.core.safe_text import one_line

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

FILE, HEAD = "operators.jsonl", "operators.head"
KEYS = (Path("authority") / "key.pem", Path("key.pem"))
"""The key that signs, in the folder of a consortium or of a client."""
FIRST = "0" * 64
"""What the first line names as the hash of the line before it."""
BUNDLE_REFUSED = "bundle refused"
"""A server sent something to run that is not the bundle of this package."""
REFUSED = "refused"
"""A client took no part: what was asked is beyond its limits, or cannot be right."""
ASKS, NOT_ASKED = "run asks for consent", "run not asked about"
"""A run waits for this client's people; or too many wait already."""


class LogError(RunFolderError):
    """A log of operators that is not as it was written."""


@dataclass(frozen=True)
class Verified:
    """A log in which nothing was found."""

    lines: int
    head: str
    """SHA-256 of the last line."""
    first: str
    """Time of the first line, as ISO 8601."""
    last: str
    keys: tuple[str, ...]
    """The public keys that signed it, oldest first, as PEM; the last one signs the next line."""


def record(folder: Path, what: str, **facts: Any) -> None:
    """Append a line; does nothing in a folder without a key, as a simulation's.

    Args:
        folder: Of a consortium or a client.
        what: What was done or refused.
        facts: Names, hashes, fingerprints; no rows. Texts of the other side must be made safe.

    Raises:
        DiskError: It cannot be written.
        LogError: The key or the log cannot be read.
    """
    if (key := _key_file(folder)) is not None:
        _append(folder, _private(key), what, facts)


def record_new_key(folder: Path, new: "EllipticCurvePublicKey", **facts: Any) -> None:
    """Append a line that names the key of all later ones; the present key signs it.

    Call it before the key is replaced; a second call after a crash changes nothing.
    """
    last, pem = entries(folder)[-1:], _pem(new)
    if not last or last[0].get("key") != pem:
        record(folder, "new key", **facts, key=pem)


def _append(
    folder: Path, signer: "EllipticCurvePrivateKey", what: str, facts: dict[str, Any]
) -> None:
    path = folder / FILE
    with (
        writing(path),
        open(path, "a+b", opener=owner_only) as file,
        _locked(file.fileno()),
    ):
        file.seek(0)
        before = file.read().split(b"\n")
        # nothing stands behind the last newline, unless a crash has cut a line: it stays as it is,
        # and `verify` will say so
        cut = before.pop()
        if cut:
            before.append(cut)
        row: dict[str, Any] = {
            "n": len(before) + 1,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "user": _user(),
            "what": what,
            "before": hashlib.sha256(before[-1]).hexdigest() if before else FIRST,
            **facts,
        }
        if not before:
            row["key"] = _pem(signer.public_key())
        row["signature"] = _sign(signer, row)
        line = json.dumps(row).encode()
        file.write((b"\n" if cut else b"") + line + b"\n")
        file.flush()
        os.fsync(file.fileno())
        write_json(folder / HEAD, {"lines": row["n"], "sha256": hashlib.sha256(line).hexdigest()})


def entries(folder: Path, what: str = "") -> list[dict[str, Any]]:
    """The readable lines, unchecked; with `what`, those about it. [] if there is no log."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in (folder / FILE).read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(parse_object(line.decode("utf-8")))
    return [row for row in found if not what or row.get("what") == what]


def verify(path: Path, *, seen: str | None = None) -> Verified:
    """Check every line of a log: its place in the chain and its signature.

    Args:
        path: The log, or the folder that holds it. Only with the folder, or with operators.head
            beside the log, can missing lines at the end be found.
        seen: The hash of a line, noted earlier, which must still be there.

    Returns:
        What it holds. The keys are those that the log itself names: compare the last one with the
        fingerprint that its operators tell you.

    Raises:
        LogError: Something was changed, moved, added or removed; names the line.
    """
    path = path / FILE if path.is_dir() else path
    head = _read_head(path)  # first: somebody may append a line meanwhile
    try:
        text = path.read_bytes()
    except OSError as error:
        raise LogError(
            f"{path} cannot be read: {error.strerror}.\n  Give the log, or its folder."
        ) from error
    if not text:
        raise _broken(path, 1, "there is none")
    *whole, rest = text.split(b"\n")
    keys: list[str] = []
    hashes: list[str] = []
    times: list[str] = []
    for number, line in enumerate(whole, start=1):
        before = hashes[-1] if hashes else FIRST
        row = _checked_line(path, number, line, before, keys[-1] if keys else None)
        hashes.append(hashlib.sha256(line).hexdigest())
        times.append(str(row["time"]))
        if "key" in row:
            keys.append(str(row["key"]))
    if rest:
        raise _broken(path, len(whole) + 1, "it is cut")
    _compare_head(path, hashes, head)
    if seen is not None and seen not in hashes:
        raise LogError(
            f"{path} does not hold the line with the hash {one_line(seen, longest=64)}.\n"
            "  Lines are missing, or it is the log of another folder."
        )
    return Verified(len(hashes), hashes[-1], times[0], times[-1], tuple(keys))


def _checked_line(
    path: Path, number: int, line: bytes, before: str, key: str | None
) -> dict[str, Any]:
    try:
        row = parse_object(line.decode("utf-8"))
        signature = bytes.fromhex(row.pop("signature"))
        key = key or row["key"]
        what = {"n": number, "before": before}
        differs = [name for name in what if row.get(name) != what[name]]
        if not isinstance(row.get("time"), str) or not isinstance(key, str):
            raise ValueError("a part is missing")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, number, "it is not a line of such a log") from error
    if differs:
        raise _broken(path, number, "it is not the one that follows the line before it")
    if not _is_signed(row, signature, key):
        raise _broken(path, number, "its signature is not valid")
    return row


def _read_head(path: Path) -> dict[str, Any] | None:
    """What operators.head says; None if it is not beside the log."""
    head = path.with_name(HEAD)
    if not head.is_file():
        return None
    fix = "Remove it: it then no longer shows missing lines."
    return read_object(head, fix=fix, error=LogError)


def _compare_head(path: Path, hashes: list[str], known: dict[str, Any] | None) -> None:
    if known is None:
        return
    at = known.get("lines")
    if not isinstance(at, int) or at < 1 or hashes[at - 1 : at] != [known.get("sha256")]:
        raise LogError(
            f"{path} has {len(hashes)} lines, but {path.with_name(HEAD)} knows of line {at}, which "
            "is missing or another one.\n  Restore both from a copy, and compare them."
        )


def _broken(path: Path, number: int, why: str) -> LogError:
    return LogError(
        f"{path}, line {number}: {why}.\n"
        "  It was changed, or lines before it were moved, added or removed. Compare it with a copy."
    )


# --- keys and signatures --------------------------------------------------------------------------


def _key_file(folder: Path) -> Path | None:
    return next((folder / key for key in KEYS if (folder / key).is_file()), None)


def _private(path: Path) -> "EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise LogError(f"{path} is not a readable private key: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LogError(f"{path} is not a private key of an elliptic curve.")
    return key


def _pem(key: "EllipticCurvePublicKey") -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


def _signed_text(row: dict[str, Any]) -> bytes:
    return json.dumps(row, sort_keys=True).encode()


def _sign(key: "EllipticCurvePrivateKey", row: dict[str, Any]) -> str:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return key.sign(_signed_text(row), ec.ECDSA(hashes.SHA384())).hex()


def _is_signed(row: dict[str, Any], signature: bytes, key: str) -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public = load_pem_public_key(key.encode())
        if not isinstance(public, ec.EllipticCurvePublicKey):
            return False
        public.verify(signature, _signed_text(row), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, UnsupportedAlgorithm, ValueError):
        return False
    return True


def _user() -> str:
    """Who did it, by the name of the account; a container may have none."""
    with contextlib.suppress(OSError, KeyError):
        return getpass.getuser()
    return str(os.getuid())


@contextlib.contextmanager
def _locked(handle: int) -> Iterator[None]:
    """One process appends at a time."""
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
