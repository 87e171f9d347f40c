"""Keys, certificates and kits of a consortium, as files: what its operators would exchange."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tomli_w

from silotune.deployment.consortium.certificates import (
    client_certificate,
    fingerprint,
    new_authority,
    new_key,
    pem,
    write_key,
)
from silotune.deployment.consortium.kit import Kit


class Kits:
    """Folders with key.pem and kit.toml; the keys stay at hand."""

    def __init__(self, places: Mapping[str, Path]) -> None:
        self.places, self.signer = places, new_key()
        self.authority = new_authority("demo", self.signer)
        self.keys = {name: new_key() for name in places}
        self.roster = {n: fingerprint(key.public_key()) for n, key in self.keys.items()}
        for name, place in places.items():
            place.mkdir(parents=True, exist_ok=True)
            write_key(place / "key.pem", self.keys[name])
            kit = Kit(
                consortium="demo",
                client=name,
                host="localhost",
                port=1,
                authority=pem(self.authority),
                certificate=self.certificate(name, self.keys[name]),
            )
            (place / "kit.toml").write_text(tomli_w.dumps(kit.model_dump()))

    def certificate(self, name, key, authority=None, signer=None) -> str:
        by = (authority or self.authority, signer or self.signer)
        return pem(client_certificate(*by, key.public_key(), name))

    def others(self, name: str, known: Sequence[str] = ()) -> dict[str, str]:
        """A client's roster: all others, or those of `known`."""
        return {n: self.roster[n] for n in known or self.roster if n != name}
