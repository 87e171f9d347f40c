"""The server's folder for a consortium: its identity, its authority, its members and its runs.

    hospitals/
      consortium.toml      name, address for clients, where it listens
      authority/           key.pem, certificate.pem: signs clients; keep a copy elsewhere
      server/              key.pem, certificate.pem: what the gate shows
      clients/NAME/        request.toml, certificate.pem: who is in
      kits/NAME.toml       what to send to NAME
      revoked/             who was in
      operators.*          what was done here and by whom, signed by the authority
      runs/                one run folder each
      engine/              what `silotune server up` needs while it runs

A client is in if its folder exists, and out if it does not. Nothing else matters, so adding or
removing a client affects no other client.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tomli_w
from pydantic import Field

from silotune.core.atomic_files import build_folder, free_place, write_atomically
from silotune.core.errors import ConfigError
from silotune.core.toml_file import read_table
from silotune.core.types import Config
from silotune.deployment.consortium.certificates import (
    DAYS,
    Certificate,
    Key,
    PublicKey,
    client_certificate,
    fingerprint,
    is_proven,
    new_authority,
    new_key,
    pem,
    public_key,
    read_certificate,
    read_key,
    read_request,
    server_certificate,
    write_key,
)
from silotune.deployment.consortium.kit import Kit, check_name, read_request_file, write_file
from silotune.federation.operator_log import record, record_new_key
from silotune.federation.roster import ABOUT, NAME, names_in

DEFAULT_PORT = 8443
HOST = r"\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?"


class About(Config):
    """consortium.toml."""

    name: str = Field(pattern=f"^{NAME}$")
    host: str = Field(min_length=1, max_length=253)
    """How clients reach the server: a name or an address. The certificate is issued for it."""
    port: int = Field(ge=1, le=65535)
    listen: str = Field(min_length=1)
    """Where the gate listens on this machine; ":8443" means every interface."""


@dataclass(frozen=True)
class Member:
    """A client that is in."""

    name: str
    folder: Path
    certificate: Certificate

    @property
    def key(self) -> PublicKey:
        """Its public key."""
        return public_key(self.certificate)


class Consortium:
    """The folder, with what the server's operators do with it."""

    def __init__(self, folder: Path, about: About) -> None:
        """See `create` and `open`."""
        self.folder, self.about = folder, about

    @classmethod
    def create(cls, folder: Path, *, name: str, address: str, listen: str | None = None) -> None:
        """Create a consortium, with its own authority.

        Args:
            folder: Must not exist.
            name: Name of the consortium.
            address: Where clients will reach it: host, or host:port.
            listen: Where the gate listens: host, :port or host:port. By default all interfaces, at
                the port of `address`.

        Raises:
            ConfigError: The folder exists, or the name or the address is invalid.
        """
        host, port = read_address(address)
        place = listen_address(listen or "", port)
        about = About(name=check_name(name), host=host, port=port, listen=place)
        if folder.exists():
            raise ConfigError(f"{folder} already exists.\n  Choose another --folder.")

        def build(part: Path) -> None:
            part.chmod(0o700)
            for own in ("authority", "server", "clients", "kits", "revoked", "runs", "engine"):
                (part / own).mkdir(mode=0o700)
            signer, key = new_key(), new_key()
            authority = new_authority(name, signer)
            own_certificate = server_certificate(authority, signer, key, host)
            for place, own_key, shown in (
                (part / "authority", signer, authority),
                (part / "server", key, own_certificate),
            ):
                write_key(place / "key.pem", own_key)
                (place / "certificate.pem").write_text(pem(shown), encoding="ascii")
            text = tomli_w.dumps(about.model_dump())
            (part / ABOUT).write_text(text, encoding="utf-8")
            shown = fingerprint(public_key(authority))
            record(part, "init", consortium=name, address=address, fingerprint=shown)

        folder.parent.mkdir(parents=True, exist_ok=True)
        build_folder(folder, build)

    @classmethod
    def open(cls, folder: Path) -> "Consortium":
        """Open the consortium in a folder.

        Raises:
            ConfigError: There is none, or its file has a mistake.
        """
        path = folder / ABOUT
        if not path.is_file():
            raise ConfigError(
                f"{folder} is not the folder of a consortium.\n"
                "  Create one: silotune server init NAME --address HOST"
            )
        return cls(folder, read_table(path, About))

    # --- its own identity

    def authority(self) -> Certificate:
        """The certificate of the authority."""
        path = self.folder / "authority" / "certificate.pem"
        return read_certificate(_text(path), where=str(path))

    def _signer(self) -> Key:
        return read_key(self.folder / "authority" / "key.pem")

    def fingerprint(self) -> str:
        """What clients compare by telephone before they join."""
        return fingerprint(public_key(self.authority()))

    def issue_server_certificate(self) -> None:
        """Issue a new certificate for the gate, if the old one expires soon or the host changed."""
        key = read_key(self.folder / "server" / "key.pem")
        made = server_certificate(self.authority(), self._signer(), key, self.about.host)
        path = self.folder / "server" / "certificate.pem"
        write_atomically(path, pem(made).encode("ascii"))

    # --- who is in

    def members(self) -> Mapping[str, Member]:
        """The clients that are in, by name."""
        found: dict[str, Member] = {}
        for name in names_in(self.folder):
            place = self.folder / "clients" / name
            path = place / "certificate.pem"
            found[name] = Member(name, place, read_certificate(_text(path), where=str(path)))
        return found

    def approve(self, request: Path, *, days: int = DAYS, again: bool = False) -> tuple[Path, str]:
        """Let a client in.

        Args:
            request: The file that the client's operators sent. One of `client renew` replaces the
                client's key: the key that it had is then revoked.
            again: Whether a key that was revoked may come back.
            days: How long its certificate is valid; approving it again renews it.

        Returns:
            The kit to send back, and the fingerprint of the client's key, to be compared.

        Raises:
            ConfigError: The request is not intact, another key has this name, or the key was
                revoked.
        """
        asked = read_request_file(request)
        key = public_key(read_request(asked.request, where=f"{request}: request"))
        members = self.members()
        before = members.get(asked.name)
        renews = before is not None and is_proven(before.key, asked.request, asked.proof)
        for name, member in members.items():
            same_key = fingerprint(member.key) == fingerprint(key)
            other = name != asked.name or not (same_key or renews)
            if name.lower() == asked.name.lower() and other:
                raise ConfigError(
                    f"'{name}' is already in, with another key.\n  If the client lost its key: "
                    f"silotune server revoke {name}, then approve the new request. If it still has "
                    "it: silotune client renew makes a request that replaces it."
                )
            if same_key and name != asked.name:
                raise ConfigError(f"this key is already in, as '{name}'.")
        if (before is None or renews) and not again and self._was_revoked(key):
            shown = fingerprint(key)
            record(self.folder, "approve refused", client=asked.name, fingerprint=shown)
            raise ConfigError(
                f"the key of '{asked.name}' was revoked.\n  If it may have been stolen, ask for a "
                "new request: silotune client init. To let the same key in again: silotune server "
                f"approve {request} --again"
            )
        place = self.folder / "clients" / asked.name
        if before is not None and renews:
            os.replace(before.folder, free_place(self.folder / "revoked" / asked.name))
            shown = fingerprint(before.key)
            record(self.folder, "key replaced", client=asked.name, fingerprint=shown)
        place.mkdir(mode=0o700, exist_ok=True)
        write_file(place / "request.toml", asked)
        kit = self._issue(asked.name, key, days)
        record(self.folder, "approve", client=asked.name, fingerprint=fingerprint(key), again=again)
        return kit, fingerprint(key)

    def renew_server_key(self) -> str:
        """Make a new key for the gate; clients trust it, because the authority signs it.

        Returns:
            Its fingerprint.
        """
        key, folder = new_key(), self.folder / "server"
        part = folder / "new.pem"
        part.unlink(missing_ok=True)  # of a renewal that was interrupted
        write_key(part, key)
        os.replace(part, folder / "key.pem")
        self.issue_server_certificate()
        record(self.folder, "server key replaced", fingerprint=fingerprint(key.public_key()))
        return fingerprint(key.public_key())

    def renew_authority(self) -> tuple[str, Sequence[Path]]:
        """Make a new authority, and kits of it for all clients; the keys of clients stay.

        Whoever has the old authority's key cannot pose as this server to a client with a new kit.
        Until a client takes its new kit, it does not trust the server, and is not let in.

        Returns:
            The new fingerprint, and the kits to send.
        """
        place = self.folder / "authority"
        part = place / "new.pem"
        if not part.exists():  # else a renewal was interrupted: the log may name its key already
            write_key(part, new_key())
        signer = read_key(part)
        shown = fingerprint(signer.public_key())
        record_new_key(self.folder, signer.public_key(), fingerprint=shown)
        text = pem(new_authority(self.about.name, signer))
        write_atomically(place / "certificate.pem", text.encode("ascii"))
        os.replace(part, place / "key.pem")
        self.issue_server_certificate()
        kits = [self._issue(name, own.key, DAYS) for name, own in self.members().items()]
        return shown, kits

    def _issue(self, name: str, key: PublicKey, days: int) -> Path:
        """Write a client's kit, and then its certificate, whose presence says that it is in."""
        authority = self.authority()
        made = client_certificate(authority, self._signer(), key, name, days=days)
        kit = self.folder / "kits" / f"{name}.toml"
        content = Kit(
            consortium=self.about.name,
            client=name,
            host=self.about.host,
            port=self.about.port,
            authority=pem(authority),
            certificate=pem(made),
        )
        write_file(kit, content)
        place = self.folder / "clients" / name
        write_atomically(place / "certificate.pem", pem(made).encode("ascii"))
        return kit

    def _was_revoked(self, key: PublicKey) -> bool:
        """Whether a client with this key was in and is not any more, under whatever name."""
        gone = (self.folder / "revoked").glob("*/certificate.pem")
        keys = {fingerprint(public_key(read_certificate(_text(p), where=str(p)))) for p in gone}
        return fingerprint(key) in keys

    def revoke(self, name: str) -> None:
        """Remove a client; its kit stops working as soon as the server notices.

        Raises:
            ConfigError: It is not in.
        """
        members = self.members()
        if name not in members:
            known = ", ".join(members) or "nobody"
            raise ConfigError(f"'{name}' is not in this consortium.\n  Its members: {known}.")
        (self.folder / "kits" / f"{name}.toml").unlink(missing_ok=True)
        place = free_place(self.folder / "revoked" / name)
        os.replace(members[name].folder, place)
        record(self.folder, "revoke", client=name, fingerprint=fingerprint(members[name].key))


def read_address(address: str) -> tuple[str, int]:
    """Host and port; IPv6 in brackets.

    Raises:
        ConfigError: It is not an address.
    """
    found = re.fullmatch(rf"({HOST})(?::([0-9]{{1,5}}))?", address)
    port = int(found[2] or DEFAULT_PORT) if found else 0
    if not found or not 1 <= port <= 65535:
        raise ConfigError(
            f"'{address}' is not an address.\n  Give a host, or host:port: fl.example.org:8443."
        )
    return found[1].strip("[]"), port


def listen_address(given: str, port: int) -> str:
    """Where a gate listens, as Caddy reads it: with a port, by default the one that the kits say.

    Raises:
        ConfigError: It is not an address of this machine.
    """
    found = re.fullmatch(rf"({HOST})?(?::([0-9]{{1,5}}))?", given)
    own = int(found[2] or port) if found else 0
    if not found or not 1 <= own <= 65535:
        raise ConfigError(
            f"'{given}' is not an address to listen on.\n"
            "  Give a host, :port, or host:port; IPv6 in brackets: 0.0.0.0:8443."
        )
    return f"{found[1] or ''}:{own}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from error
