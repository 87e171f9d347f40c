"""Sums of encrypted numbers: CKKS, a homomorphic encryption of vectors, through TenSEAL.

Cheon, Kim, Kim and Song 2017, "Homomorphic Encryption for Arithmetic of Approximate Numbers",
doi 10.1007/978-3-319-70694-8_15. Whoever has the public half of a key can encrypt and add; whoever
has the secret half reads everything that was ever encrypted with it. Only addition is used here, so
there is a single modulus besides the special one.

Adversary: a server that adds what it is given, asks for nothing but the sum, and works together
with no client. It is far weaker than that of masks, see `KEYS_NOTE`.

What is read from elsewhere is TenSEAL's own format, of exactly one length. There is no pickle.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from silotune.core.errors import ConfigError, UpdateError

SLOTS = 4096
"""Numbers in a ciphertext: half of the polynomials' degree."""
MODULI = (60, 60)
"""Bits of the moduli: 120 in all, where 218 would still give 128 bits of security."""
CIPHERTEXT_BYTES = 131_217
"""A ciphertext as TenSEAL 0.3 writes it: two polynomials of 8192 words, and a header. Residues of
60 bits do not compress, so every one has this length: 32 bytes a number."""
BITS = 57
"""All clients together stay below 2**57 steps of the encoding, two bits below the modulus."""

KEYS_NOTE = (
    "all clients share one secret key: one of them that gives it to the server opens every "
    "single change"
)
COST_NOTE = (
    "Encrypting takes about 1.4 s of processor per million numbers and round at each client, and "
    "an update is eight times as large as float32"
)
Bytes = NDArray[np.uint8]


def num_ciphertexts(count: int) -> int:
    """How many ciphertexts hold `count` numbers."""
    return math.ceil(count / SLOTS)


class Holder:
    """Whoever has the secret key: every client, and nobody else."""

    def __init__(self, limit: float, num_clients: int) -> None:
        """Make a new key.

        Args:
            limit: Largest absolute value of one client's number.
            num_clients: Most clients whose numbers are summed.

        Raises:
            ConfigError: TenSEAL is not installed, or such numbers do not fit.
        """
        scale = BITS - math.ceil(math.log2(limit * num_clients))
        if scale < 20:
            raise ConfigError(
                f"numbers up to {limit:g} of {num_clients} clients are too large to be encrypted "
                "with a useful precision.\n  Use a smaller secure_sum.range."
            )
        library = tenseal()
        self._context: Any = library.context(
            library.SCHEME_TYPE.CKKS,
            2 * SLOTS,
            coeff_mod_bit_sizes=list(MODULI),
            n_threads=1,
        )
        self._context.global_scale = 2.0 ** min(scale, 50)

    def public(self) -> "Adder":
        """All that a server needs."""
        own = self._context.copy()
        own.make_context_public()
        return Adder(own)

    def encrypt(self, values: NDArray[np.float64]) -> Bytes:
        """Ciphertexts of a vector, (num_ciphertexts, CIPHERTEXT_BYTES)."""
        library = tenseal()
        padded = np.zeros(num_ciphertexts(len(values)) * SLOTS)
        padded[: len(values)] = values
        rows = [
            np.frombuffer(library.ckks_vector(self._context, part).serialize(), dtype=np.uint8)
            for part in padded.reshape(-1, SLOTS)
        ]
        assert all(len(row) == CIPHERTEXT_BYTES for row in rows), "TenSEAL writes another format"
        return np.stack(rows)

    def decrypt(self, total: Sequence[Any], count: int) -> NDArray[np.float64]:
        """The numbers in a sum of `Adder`."""
        parts: list[NDArray[np.float64]] = []
        for own in total:
            own.link_context(self._context)
            parts.append(np.asarray(own.decrypt(), dtype=np.float64))
        return np.concatenate(parts)[:count]


class Adder:
    """Whoever has the public key only: it adds, and reads nothing."""

    def __init__(self, context: Any) -> None:
        """From `Holder.public`."""
        assert not context.has_secret_key()
        self._context = context

    def add(self, total: Sequence[Any] | None, ciphertexts: Bytes, *, who: str) -> Sequence[Any]:
        """A sum with one client's ciphertexts more.

        Args:
            total: So far; None if it is the first client.
            ciphertexts: (num_ciphertexts, CIPHERTEXT_BYTES).
            who: The client, for the error.

        Raises:
            UpdateError: They are no ciphertexts of this key's form. Whether they hold sensible
                numbers, nobody can see.
        """
        library, read = tenseal(), list[Any]()
        assert ciphertexts.shape[1] == CIPHERTEXT_BYTES
        for row in ciphertexts:
            own: Any = None
            with suppress(RuntimeError, ValueError, IndexError, TypeError):
                own = library.ckks_vector_from(self._context, row.tobytes())
            if own is None or own.size() != SLOTS:
                raise UpdateError(
                    f"{who}: what it sent are no ciphertexts of this run.\n"
                    "  Use the same recipe and version at this client."
                )
            read.append(own)
        if total is None:
            return read
        return [one + two for one, two in zip(total, read, strict=True)]


def tenseal() -> Any:
    """The library.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return import_module("tenseal")
    except ImportError as error:
        raise ConfigError(
            'secure_sum.kind = "ckks" needs tenseal, which is not installed.\n'
            '  Install it: make env EXTRAS=ckks. Or set secure_sum.kind = "masks", which hides '
            "more and costs less."
        ) from error
