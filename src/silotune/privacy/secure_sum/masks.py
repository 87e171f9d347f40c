"""Keys of a round, and the masks that follow from them.

X25519 (RFC 7748) agrees on a secret for each pair, HKDF with SHA-256 (RFC 5869) makes keys of it,
ChaCha20 (RFC 8439) makes masks of keys, and ChaCha20-Poly1305 hides shares: all from the library
cryptography. Every key is used for one round and one purpose.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from silotune.core.primitives import library
from silotune.privacy.secure_sum.ring import Words

VERSION = b"silotune secure sum 1"
KEY_BYTES = 32


@dataclass(frozen=True)
class Session:
    """What all keys and signatures of a round are bound to."""

    run_id: str
    round: int

    def about(self, *what: str | bytes) -> bytes:
        """Bytes that differ whenever any of the words do: each has its length in front."""
        words = [self.run_id.encode(), str(self.round).encode()]
        words += [each if isinstance(each, bytes) else each.encode() for each in what]
        return VERSION + b"".join(len(word).to_bytes(4, "big") + word for word in words)


def read_private(raw: bytes) -> Any:
    """The X25519 key of 32 secret bytes."""
    return library("hazmat.primitives.asymmetric.x25519").X25519PrivateKey.from_private_bytes(raw)


def public_of(key: Any) -> bytes:
    """The public half, 32 bytes."""
    return key.public_key().public_bytes_raw()


def agree(key: Any, other: bytes, about: bytes) -> bytes:
    """The 32-byte secret that two clients share: mine with their public key, and theirs with mine.

    Args:
        key: A private key.
        other: The other's public key, 32 bytes.
        about: What the secret is for; both sides say the same.

    Raises:
        ValueError: The public key is none, or one with which every secret is the same.
    """
    kind: Any = library("hazmat.primitives.asymmetric.x25519").X25519PublicKey
    return derive(key.exchange(kind.from_public_bytes(other)), about)


def derive(secret: bytes, about: bytes, length: int = KEY_BYTES) -> bytes:
    """A key for one purpose from a secret that several follow from."""
    hashes: Any = library("hazmat.primitives.hashes")
    kind: Any = library("hazmat.primitives.kdf.hkdf").HKDF
    return kind(algorithm=hashes.SHA256(), length=length, salt=None, info=about).derive(secret)


def mask(key: bytes, count: int) -> Words:
    """A client's or a pair's mask: that many words, each as likely as any other.

    Args:
        key: 32 bytes that are used for nothing else.
        count: At most 2**36, where the cipher's counter of blocks would begin again.
    """
    ciphers: Any = library("hazmat.primitives.ciphers")
    stream = ciphers.Cipher(ciphers.algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(4 * count)), dtype="<u4").astype(np.uint32, copy=False)


def hide(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate one message; the key hides no other."""
    return (
        library("hazmat.primitives.ciphers.aead")
        .ChaCha20Poly1305(key)
        .encrypt(bytes(12), text, about)
    )


def reveal(key: bytes, hidden: bytes, about: bytes) -> bytes | None:
    """The message, or None if it or what it is about was changed."""
    invalid: Any = library("exceptions").InvalidTag
    try:
        return (
            library("hazmat.primitives.ciphers.aead")
            .ChaCha20Poly1305(key)
            .decrypt(bytes(12), hidden, about)
        )
    except invalid:
        return None
