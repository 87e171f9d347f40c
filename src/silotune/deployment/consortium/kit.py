"""The two files that are exchanged when a client joins: its request, and the kit in reply.

Neither holds a secret: both may be sent by e-mail, and people compare fingerprints by telephone.
The request has the client's public key; the kit has the server's address, the certificate of the
consortium's authority and the client's certificate.
"""

import re
from pathlib import Path
from typing import Literal, TypeVar

import tomli_w
from pydantic import Field

from silotune.core.atomic_files import write_atomically
from silotune.core.errors import ConfigError
from silotune.core.toml_file import read_table
from silotune.core.types import Config
from silotune.deployment.consortium.certificates import (
    Certificate,
    is_signed_by,
    name_of,
    public_key,
    read_certificate,
    read_request,
)
from silotune.federation.roster import NAME

MOST_BYTES = 100_000
"""Neither file is larger; a larger file is not read."""
F = TypeVar("F", bound=Config)


class Request(Config):
    """A client's request to be let in."""

    kind: Literal["silotune request"] = "silotune request"
    name: str = Field(pattern=f"^{NAME}$")
    """The client's name in rounds and reports."""
    request: str
    """PKCS #10, signed with the client's own key."""
    proof: str = Field(default="", pattern="^[0-9a-f]*$", max_length=1000)
    """For a new key: the request's signature by the key that the client had before, in hex."""


class Kit(Config):
    """What a client needs to join, in one file."""

    kind: Literal["silotune kit"] = "silotune kit"
    consortium: str = Field(pattern=f"^{NAME}$")
    client: str = Field(pattern=f"^{NAME}$")
    host: str = Field(min_length=1, max_length=253)
    """Where clients reach the server."""
    port: int = Field(ge=1, le=65535)
    authority: str
    """The certificate of the consortium's authority; it must have signed the server's."""
    certificate: str
    """The client's certificate, for the key of its request."""


def check_name(name: str) -> str:
    """Return a valid name; raise a ConfigError for any other."""
    if not re.fullmatch(NAME, name):
        raise ConfigError(
            f"'{name}' is not a valid name.\n"
            "  Use letters, digits, '_', '.' and '-', at most 63 characters."
        )
    return name


def write_file(path: Path, content: Request | Kit) -> None:
    """Write a request or a kit; certificates keep their line breaks."""
    text = tomli_w.dumps(content.model_dump(), multiline_strings=True)
    write_atomically(path, text.encode())


def read_request_file(path: Path) -> Request:
    """Read a client's request and check that it is intact.

    Raises:
        ConfigError: It is not, or it names another client than the one it was signed for.
    """
    found = _read(path, Request)
    signed = read_request(found.request, where=f"{path}: request")
    if name_of(signed) != found.name:
        raise ConfigError(
            f"{path} says '{found.name}', but was signed for '{name_of(signed)}'.\n"
            "  Ask the client for the original file."
        )
    return found


def read_kit(path: Path) -> Kit:
    """Read a kit and check that its parts belong together.

    Raises:
        ConfigError: They do not, or a part cannot be read.
    """
    found = _read(path, Kit)
    authority = read_certificate(found.authority, where=f"{path}: authority")
    own = read_certificate(found.certificate, where=f"{path}: certificate")
    public_key(own)
    if not is_signed_by(own, authority) or name_of(own) != found.client:
        raise ConfigError(
            f"{path}: the certificate is not the one that the consortium's authority issued to "
            f"'{found.client}'.\n  Ask the server's operators for the kit again."
        )
    return found


def certificate_of(kit: Kit) -> Certificate:
    """The client's certificate; the kit was checked when it was read."""
    return read_certificate(kit.certificate, where="certificate")


def authority_of(kit: Kit) -> Certificate:
    """The certificate of the consortium's authority."""
    return read_certificate(kit.authority, where="authority")


def _read(path: Path, kind: type[F]) -> F:
    what, other = str(kind.model_fields["kind"].default), {"kind": "none"}
    return read_table(path, kind, what=what, unless_said=other, most_bytes=MOST_BYTES)
