"""By what the clients of a secure sum know each other.

Real clients sign with the key of their kit. A peer's certificate must come from the consortium's
authority, *and* its key must have the fingerprint that this client's people have pinned in their
own client.toml: the authority's key is at the server, which could make certificates of its own.
Clients of a simulation have throwaway keys, which say nothing about anybody.
"""

import datetime
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from silotune.core.atomic_files import write_atomically, write_json
from silotune.core.errors import ConfigError, Declined
from silotune.core.primitives import library
from silotune.core.reading_back import read_object
from silotune.federation.client_config import ClientConfig
from silotune.privacy.secure_sum.member import Sign, Verify
from silotune.runtime.fingerprint import digest, fingerprint

KIT = "kit.toml"
"""Beside client.toml: the consortium's authority and this client's certificate."""
THROWAWAY = "throwaway-identities.json"
"""In the run folder of a simulation: a private key for each client."""
CURVE = "secp384r1"


class Unknown(Exception):
    """A peer is not who this client knows; the text says why, in words."""


@dataclass(frozen=True)
class Identity:
    """A client's own name tag, and how it reads those of others."""

    sign: Sign
    credential: str
    """What others read: a certificate, or a public key as text."""
    verifiers: Callable[[Mapping[str, str]], Mapping[str, Verify]]
    """(credentials by client) -> how to check each one's signatures. Raises `Unknown`."""


# --- real clients ---------------------------------------------------------------------------------


def own_fingerprint(config: Path, own: ClientConfig) -> str:
    """The fingerprint that other clients write into their rosters.

    Raises:
        ConfigError: This client's key cannot be read.
    """
    return fingerprint(_read_key(config.parent / own.secure_sum.key).public_key())


def identity_of(config: Path, own: ClientConfig) -> Identity:
    """A real client's identity.

    Args:
        config: The path of its client.toml.
        own: What is in it.

    Raises:
        Declined: client.toml has no roster.
        ConfigError: The key or the kit cannot be read.
    """
    key = _read_key(config.parent / own.secure_sum.key)
    mine = fingerprint(key.public_key())
    if not own.secure_sum.roster:
        raise Declined(
            f"client '{own.name}' does not take part:\n"
            "  [secure_sum] roster in its client.toml is empty. It takes the fingerprint of every "
            f"client of the consortium, by name; this client's is {mine}"
        )
    if not digest(key.public_key()).startswith(own.secure_sum.roster.get(own.name, "")):
        raise Declined(
            f"client '{own.name}' does not take part:\n"
            f"  [secure_sum] roster in its client.toml gives '{own.name}' another fingerprint than "
            f"that of its own key, {mine}"
        )
    pinned = {**own.secure_sum.roster, own.name: digest(key.public_key())}
    credential, authority = _credential(config.parent / KIT, key)

    def verifiers(credentials: Mapping[str, str]) -> Mapping[str, Verify]:
        return {
            name: _verifier(name, text, authority, pinned.get(name))
            for name, text in credentials.items()
        }

    ec, hashes = library("hazmat.primitives.asymmetric.ec"), library("hazmat.primitives.hashes")
    return Identity(lambda text: key.sign(text, ec.ECDSA(hashes.SHA384())), credential, verifiers)


def _credential(kit: Path, key: Any) -> tuple[str, Any]:
    """A client's certificate and its authority; without a kit, its public key and None."""
    if not kit.is_file():
        forms: Any = library("hazmat.primitives.serialization")
        shown = key.public_key().public_bytes(
            forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo
        )
        return shown.decode("ascii"), None
    x509: Any = library("x509")
    try:
        found = tomllib.loads(kit.read_text(encoding="utf-8"))
        authority = x509.load_pem_x509_certificate(found["authority"].encode())
        return found["certificate"], authority
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{kit} cannot be read: {error}.\n  Take the kit again.") from error


def _verifier(name: str, credential: str, authority: Any, pinned: str | None) -> Verify:
    """How to check the signatures of the client that this certificate or key belongs to."""
    if pinned is None:
        raise Unknown(
            f"'{name}' is not on this client's roster ([secure_sum] roster in client.toml)"
        )
    key = _key_in(name, credential, authority)
    if not digest(key).startswith(pinned):
        groups = " ".join(pinned[at : at + 4] for at in range(0, 32, 4))
        raise Unknown(
            f"the key that came as that of '{name}' has the fingerprint {fingerprint(key)}, and "
            f"this client's roster says {groups}"
        )
    invalid: Any = library("exceptions").InvalidSignature
    ec, hashes = library("hazmat.primitives.asymmetric.ec"), library("hazmat.primitives.hashes")

    def is_signed(text: bytes, signature: bytes) -> bool:
        try:
            key.verify(signature, text, ec.ECDSA(hashes.SHA384()))
        except invalid:
            return False
        return True

    return is_signed


def _key_in(name: str, credential: str, authority: Any) -> Any:
    """The public key of a credential, whose certificate the authority has made for this client."""
    ec: Any = library("hazmat.primitives.asymmetric.ec")
    try:
        if authority is None:
            forms: Any = library("hazmat.primitives.serialization")
            key = forms.load_pem_public_key(credential.encode())
        else:
            x509: Any = library("x509")
            found = x509.load_pem_x509_certificate(credential.encode())
            found.verify_directly_issued_by(authority)
            names = found.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
            now = datetime.datetime.now(datetime.UTC)
            if [each.value for each in names] != [name]:
                raise Unknown(f"the certificate that came as that of '{name}' names another client")
            if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
                raise Unknown(f"the certificate of '{name}' has expired")
            key = found.public_key()
    except (ValueError, TypeError, library("exceptions").InvalidSignature) as error:
        raise Unknown(
            f"the certificate of '{name}' is not from this consortium's authority"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != CURVE:
        raise Unknown(f"the key of '{name}' is not a P-384 key")
    return key


def _read_key(path: Path) -> Any:
    forms: Any = library("hazmat.primitives.serialization")
    ec: Any = library("hazmat.primitives.asymmetric.ec")
    try:
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by other users.\n  Fix it: chmod 600 {path}")
        key = forms.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a readable private key, and secure sums need one: {error}.\n"
            "  Name this client's key in client.toml: [secure_sum] key."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != CURVE:
        raise ConfigError(f"{path} is not a P-384 private key.")
    return key


# --- simulations ----------------------------------------------------------------------------------


def new_throwaway() -> Any:
    """A key that belongs to nobody."""
    return library("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey.generate()


def write_throwaways(folder: Path, names: list[str]) -> None:
    """Make throwaway keys for the clients of a simulation, in its run folder, where all read them.

    Raises:
        ConfigError: cryptography is not installed.
    """
    path = folder / THROWAWAY
    kept = read_object(path, fix=f"Remove {path} and resume.") if path.exists() else {}
    new = {name: new_throwaway().private_bytes_raw().hex() for name in names if name not in kept}
    write_json(path, {**kept, **new})


def throwaway_of(folder: Path, name: str) -> Identity:
    """The throwaway identity of one client of a simulation."""
    path = folder / THROWAWAY
    kind: Any = library("hazmat.primitives.asymmetric.ed25519").Ed25519PrivateKey
    found = read_object(path, fix=f"Remove {path} and resume.")
    keys = {n: kind.from_private_bytes(bytes.fromhex(text)) for n, text in found.items()}
    roster = {n: verifier_of(key) for n, key in keys.items()}
    return Identity(keys[name].sign, "", lambda _: roster)


def verifier_of(key: Any) -> Verify:
    """How to check what was signed with a throwaway key."""
    invalid: Any = library("exceptions").InvalidSignature
    public = key.public_key()

    def is_signed(message: bytes, signature: bytes) -> bool:
        try:
            public.verify(signature, message)
        except invalid:
            return False
        return True

    return is_signed


def add_throwaways(configs: Mapping[str, Path]) -> None:
    """Give clients that all run on this machine throwaway keys, each in its own client.toml.

    Args:
        configs: Their configurations, which have no [secure_sum] yet, by client name.
    """
    ec: Any = library("hazmat.primitives.asymmetric.ec")
    forms: Any = library("hazmat.primitives.serialization")
    own = (forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in configs}
    for name, path in configs.items():
        write_atomically(path.parent / "key.pem", keys[name].private_bytes(*own))
    add_roster(configs, {name: fingerprint(key.public_key()) for name, key in keys.items()})


def add_roster(configs: Mapping[str, Path], roster: Mapping[str, str]) -> None:
    """Write into each client.toml of clients on one machine that it accepts all of them in sums.

    Args:
        configs: As in `add_throwaways`.
        roster: Each client's fingerprint.
    """
    everyone = "".join(f"{json.dumps(n)} = {json.dumps(t)}\n" for n, t in roster.items())
    table = f"\n[secure_sum]\nmin_cohort = 3\n\n[secure_sum.roster]\n{everyone}"
    for path in configs.values():
        write_atomically(path, path.read_bytes() + table.encode())
