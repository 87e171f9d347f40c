"""Keys and certificates of a consortium: its own authority, the server's, and each client's.

The library cryptography makes them all. Keys are on the curve P-384, because Flower signs with such
keys. A client proves who it is twice with one key: to the gate by TLS, and to the engine behind it
by signatures. An authority signs only what its operators approve: requests arrive as files, and
people compare their fingerprints.
"""

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from silotune.core.errors import ConfigError
from silotune.runtime.fingerprint import fingerprint as fingerprint  # clients read it, too

Key = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey
Certificate = x509.Certificate
AUTHORITY_DAYS = 20 * 365
"""Longer than any run, so that nobody needs a new kit because the authority has expired."""
DAYS = 5 * 365
"""How long the certificates of clients and of the server are valid. A revoked client is out at
once, because the gate knows by name who is in."""
SKEW = datetime.timedelta(days=1)
"""Certificates are valid from a day before now, because other institutions' clocks may differ."""


def new_key() -> Key:
    """A private key; it is never sent."""
    return ec.generate_private_key(ec.SECP384R1())


def write_key(path: Path, key: Key) -> None:
    """Write a private key that only its owner may read.

    Raises:
        ConfigError: A key already exists.
    """
    form = serialization.PrivateFormat.PKCS8
    _write_private(path, key, serialization.Encoding.PEM, form)


def write_ssh_key(path: Path, key: Key) -> None:
    """Write the same key in the form that Flower's SuperNode reads."""
    form = serialization.PrivateFormat.OpenSSH
    _write_private(path, key, serialization.Encoding.PEM, form)


def _write_private(
    path: Path, key: Key, encoding: serialization.Encoding, form: serialization.PrivateFormat
) -> None:
    text = key.private_bytes(encoding, form, serialization.NoEncryption())
    try:
        # created with its final permissions: others cannot read it at any moment
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(
            f"{path} already exists, and a private key is never overwritten.\n"
            "  Use another folder, or remove the key; a client approved with it is then out."
        ) from None
    with open(handle, "wb") as file:
        file.write(text)


def read_key(path: Path) -> Key:
    """Read a private key.

    Raises:
        ConfigError: It is missing, damaged, of another kind, or others may read it.
    """
    try:
        text = path.read_bytes()
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path} can be read by other users.\n  Fix it: chmod 600 {path}")
        key = serialization.load_pem_private_key(text, password=None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a readable private key: {error}.") from error
    if not isinstance(key, Key) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(f"{path} is not a P-384 private key.")
    return key


def ssh_public(key: PublicKey) -> bytes:
    """A public key in one line, as Flower's register command reads it."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)


def pem(what: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """A certificate or a request as text."""
    return what.public_bytes(serialization.Encoding.PEM).decode("ascii")


def public_key(what: x509.Certificate | x509.CertificateSigningRequest) -> PublicKey:
    """Its public key.

    Raises:
        ConfigError: It is damaged, or not a P-384 key.
    """
    try:
        key = what.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:  # read only now: a point off the curve
        raise ConfigError("its key is damaged.\n  Ask for the file again.") from error
    if not isinstance(key, PublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError("its key is not a P-384 key.")
    return key


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def name_of(what: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """Whose it is, by its common name; empty if it has none."""
    found = what.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else ""


def _certificate(name: str, key: PublicKey, *, issuer: str, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(_subject(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def new_authority(name: str, key: Key) -> Certificate:
    """The certificate of a consortium's own authority, signed by itself."""
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    builder = _certificate(name, key.public_key(), issuer=name, days=AUTHORITY_DAYS)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )


def server_certificate(authority: Certificate, signer: Key, key: Key, host: str) -> Certificate:
    """A certificate for a server that is reached as `host`, a name or an address."""
    try:
        name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        name = x509.DNSName(host)
    builder = _certificate(host, key.public_key(), issuer=name_of(authority), days=DAYS)
    builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
    return _leaf(builder, ExtendedKeyUsageOID.SERVER_AUTH, authority, signer)


def write_own_certificate(folder: Path, host: str) -> Path:
    """Write key.pem and certificate.pem for connections within this machine.

    Args:
        folder: Folder to create; it is needed as long as the processes that use it.
        host: The loopback address.

    Returns:
        The certificate of an authority made just for this; a process that connects must trust it.
    """
    folder.mkdir(mode=0o700)
    signer, key = new_key(), new_key()
    authority = new_authority("this machine", signer)
    write_key(folder / "key.pem", key)
    shown = server_certificate(authority, signer, key, host)
    (folder / "certificate.pem").write_text(pem(shown), encoding="ascii")
    trusted = folder / "authority.pem"
    trusted.write_text(pem(authority), encoding="ascii")
    return trusted


def client_certificate(
    authority: Certificate, signer: Key, key: PublicKey, name: str, *, days: int = DAYS
) -> Certificate:
    """A certificate that says that the holder of this key is the client `name`."""
    builder = _certificate(name, key, issuer=name_of(authority), days=days)
    return _leaf(builder, ExtendedKeyUsageOID.CLIENT_AUTH, authority, signer)


def _leaf(
    builder: x509.CertificateBuilder,
    use: x509.ObjectIdentifier,
    authority: Certificate,
    signer: Key,
) -> Certificate:
    signed_by = x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key(authority))
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        .add_extension(signed_by, critical=False)
        .sign(signer, hashes.SHA384())
    )


def new_request(name: str, key: Key) -> x509.CertificateSigningRequest:
    """What a client sends to be let in. It proves that the sender has the private key."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(name))
    return builder.sign(key, hashes.SHA384())


def prove(old: Key, request: str) -> str:
    """Sign a request for a new key with the client's present one: it is the same client."""
    return old.sign(request.encode("utf-8"), ec.ECDSA(hashes.SHA384())).hex()


def is_proven(key: PublicKey, request: str, proof: str) -> bool:
    """Whether a request was signed with this key by `prove`."""
    try:
        key.verify(bytes.fromhex(proof), request.encode("utf-8"), ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True


def read_request(text: str, *, where: str) -> x509.CertificateSigningRequest:
    """Read a request and check that its sender had the key.

    Raises:
        ConfigError: It is not a request, or was changed in transit; the text names `where`.
    """
    try:
        found = x509.load_pem_x509_csr(text.encode("utf-8"))
        valid = found.is_signature_valid
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where} is not a certificate request: {error}.") from error
    if not valid:
        raise ConfigError(
            f"{where} was changed after its client signed it.\n  Ask the client to send it again."
        )
    public_key(found)
    return found


def read_certificate(text: str, *, where: str) -> Certificate:
    """Read a certificate.

    Raises:
        ConfigError: It is not a certificate; the text names `where`.
    """
    try:
        return x509.load_pem_x509_certificate(text.encode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{where} is not a certificate: {error}.") from error


def is_signed_by(certificate: Certificate, authority: Certificate) -> bool:
    """Whether an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
