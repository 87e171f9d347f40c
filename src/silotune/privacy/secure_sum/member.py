"""A client's half of one round of a secure sum: four steps, each taken once.

    advertise   fresh keys, signed           -> server -> all
    share       shares of my two secrets     -> server -> each client its own
    mask        my numbers under my masks    -> server
    answer      shares of others' secrets    -> server, which can then open the sum

A member that doubts what it is told raises `Refused`, and nothing leaves it any more in that round.
Between two steps it can be put away (`kept`) and taken up again (`again`), in another process.
"""

import hashlib
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

from silotune.core.errors import SilotuneError
from silotune.privacy.secure_sum import masks, shamir
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.ring import Words

Sign = Callable[[bytes], bytes]
Verify = Callable[[bytes, bytes], bool]
"""(message, signature) -> whether the client to which this belongs has signed it."""

SMALLEST = 3
"""Of two clients, each learns the other's numbers: the sum minus its own."""


class Refused(SilotuneError):
    """A client takes no part in this round any more: what it was told cannot be right."""


@dataclass(frozen=True)
class Advert:
    """A client's keys for one round, and what it promises about its secrets."""

    channel: bytes
    """Public key that hides shares on their way; its secret half never leaves the client."""
    masking: bytes
    """Public key of the masks with others; its secret half is shared."""
    seal: bytes
    """SHA-256 of the own mask's key."""
    signature: bytes
    """Over all of this, the run, the round, the client's name and the length of its numbers."""


@dataclass(frozen=True)
class Answer:
    """What a client gives so that the sum can be opened: for each client one share, of one kind."""

    own: Mapping[str, bytes]
    """Shares of the keys of the own masks of those that answered."""
    masking: Mapping[str, bytes]
    """Shares of the private masking keys of those that did not."""


@dataclass(frozen=True)
class Secrets:
    """What only the client knows in a round, 32 bytes each."""

    channel: bytes = field(repr=False)
    masking: bytes = field(repr=False)
    own: bytes = field(repr=False)

    @classmethod
    def new(cls) -> "Secrets":
        """Fresh ones, from the system's cryptographic source."""
        return cls(*(secrets.token_bytes(masks.KEY_BYTES) for _ in range(3)))


SECRETS = tuple(each.name for each in fields(Secrets))


def threshold_of(num: int) -> int:
    """How many of a round's clients have to be there to open its sum: more than two thirds."""
    return 2 * num // 3 + 1


class Member:
    """One client in one round.

    Args:
        name: The client's.
        session: The run and the round.
        count: How many numbers are summed.
        sign: With the key that others know this client by.
        smallest: Fewest clients whose sum this client takes part in, at least 3.
        known: The secrets; fresh ones if absent.
    """

    def __init__(
        self,
        name: str,
        session: Session,
        count: int,
        *,
        sign: Sign,
        smallest: int = SMALLEST,
        known: Secrets | None = None,
    ) -> None:
        assert smallest >= SMALLEST
        self._known = known = known or Secrets.new()
        self.name, self.session, self.count = name, session, count
        self._sign, self._smallest = sign, smallest
        self._channel = masks.read_private(known.channel)
        self._masking, self._own = masks.read_private(known.masking), known.own
        self._advert: Advert | None = None
        self._adverts: Mapping[str, Advert] = {}
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self._next = "advertise"

    @classmethod
    def again(
        cls,
        name: str,
        session: Session,
        kept: Mapping[str, Any],
        *,
        sign: Sign,
        smallest: int = SMALLEST,
    ) -> "Member":
        """The member that has given `kept`, at the same step."""
        known = Secrets(**_read(kept["secrets"])) if "secrets" in kept else None
        member = cls(name, session, kept["count"], sign=sign, smallest=smallest, known=known)
        member._next = kept["next"]
        adverts = {n: Advert(**_read(each)) for n, each in kept.get("adverts", {}).items()}
        member._advert, member._adverts = adverts.get(name), adverts if len(adverts) > 1 else {}
        held = kept.get("held", {}).items()
        member._held = {n: (bytes.fromhex(one), bytes.fromhex(two)) for n, (one, two) in held}
        return member

    @property
    def peers(self) -> Collection[str]:
        """The clients that the round began with, this one included."""
        return self._adverts.keys()

    def kept(self) -> dict[str, Any]:
        """All that the next step needs, as JSON values.

        It holds the round's secrets until the numbers are masked, others' shares until the last
        step has been taken, and neither after something was refused.
        """
        about: dict[str, Any] = {"next": self._next, "count": self.count}
        if self._next == "nothing":
            return about
        adverts = self._adverts or ({} if self._advert is None else {self.name: self._advert})
        if self._next != "answer":  # shares are all that it takes to answer
            about["secrets"] = {key: getattr(self._known, key).hex() for key in SECRETS}
        return {
            **about,
            "adverts": {n: {k: v.hex() for k, v in vars(a).items()} for n, a in adverts.items()},
            "held": {n: [one.hex(), two.hex()] for n, (one, two) in self._held.items()},
        }

    def advertise(self) -> Advert:
        """The first step: new keys."""
        self._begin("advertise", "share")
        channel, masking = masks.public_of(self._channel), masks.public_of(self._masking)
        seal = hashlib.sha256(self._own).digest()
        signature = self._sign(signed(self.session, self.name, self.count, channel, masking, seal))
        self._advert = Advert(channel, masking, seal, signature)
        return self._advert

    def share(
        self, adverts: Mapping[str, Advert], roster: Mapping[str, Verify]
    ) -> dict[str, bytes]:
        """The second step: for every client but this one, its hidden shares of my two secrets.

        Args:
            adverts: Of everyone in this round, this client included.
            roster: Everyone that this client accepts, by name; what the server says adds nobody.

        Raises:
            Refused: Someone is not on the roster or has not signed, this client's own keys were
                changed, keys come twice, or there are too few clients.
        """
        self._begin("share", "mask")
        if self._advert is None or adverts.get(self.name) != self._advert:
            self.refuse("the server has changed or left out this client's own keys")
        if len(adverts) < self._smallest:
            self.refuse(f"{len(adverts)} clients take part, fewer than {self._smallest}")
        for name, advert in adverts.items():
            about = (advert.channel, advert.masking, advert.seal)
            text = signed(self.session, name, self.count, *about)
            if name not in roster:
                self.refuse(f"'{name}' is not on this client's roster")
            if not roster[name](text, advert.signature):
                self.refuse(f"the keys of '{name}' are not signed by it for this round")
        keys = [key for each in adverts.values() for key in (each.channel, each.masking)]
        if len(set(keys)) < len(keys):
            self.refuse("two clients have the same keys")
        self._adverts = dict(sorted(adverts.items()))
        points, threshold = range(1, len(adverts) + 1), threshold_of(len(adverts))
        both = zip(
            shamir.split(self._masking.private_bytes_raw(), points, threshold),
            shamir.split(self._own, points, threshold),
            strict=True,
        )
        hidden: dict[str, bytes] = {}
        for other, shares in zip(self._adverts, both, strict=True):
            if other == self.name:
                self._held[other] = shares
            else:
                about = self.session.about("shares", self.name, other)
                hidden[other] = masks.hide(self._channel_key(other, about), b"".join(shares), about)
        return hidden

    def mask(self, values: Words, hidden: Mapping[str, bytes]) -> Words:
        """The third step: my numbers, which look like chance to whoever lacks a single mask.

        Args:
            values: (count,), from `Ring.encode`.
            hidden: What other clients have shared with this one. Those that are missing have
                dropped out and have no mask with anyone.

        Raises:
            Refused: A share was changed on its way, or too few clients are left.
        """
        self._begin("mask", "answer")
        assert values.shape == (self.count,)
        if strangers := hidden.keys() - self._adverts.keys() or hidden.keys() & {self.name}:
            self.refuse(f"shares of '{min(strangers)}', which is not a peer in this round")
        if len(hidden) + 1 < max(threshold_of(len(self._adverts)), self._smallest):
            self.refuse(f"only {len(hidden) + 1} clients of {len(self._adverts)} are left")
        for other, text in hidden.items():
            about = self.session.about("shares", other, self.name)
            both = masks.reveal(self._channel_key(other, about), text, about)
            if both is None or len(both) != 2 * shamir.SHARE_BYTES:
                self.refuse(f"the shares of '{other}' were changed on their way")
            self._held[other] = (both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :])
        masked = values + masks.mask(self._own, self.count)
        for other in self._held:
            if other != self.name:
                key = pair_key(self.session, self._masking, self.name, other, self._adverts)
                masked += signed_mask(key, self.count, self.name, other)
        return masked

    def answer(self, survivors: Collection[str]) -> Answer:
        """The last step: one share for everyone, of the kind that opens the sum of `survivors`.

        Args:
            survivors: Clients whose masked numbers are in the sum. Asked once: with both kinds of
                shares of a client, the server could read its numbers.

        Raises:
            Refused: This client, or too many others, are said to have dropped out, or someone is
                named that has shared nothing.
        """
        self._begin("answer", "nothing")
        named = set(survivors)
        if strangers := named - self._held.keys():
            self.refuse(f"the sum is said to hold '{min(strangers)}', which has no mask with us")
        if self.name not in named:
            self.refuse("this client's numbers are said to be missing, which were sent")
        if len(named) < max(threshold_of(len(self._adverts)), self._smallest):
            self.refuse(f"the sum is over {len(named)} of {len(self._adverts)} clients only")
        own = {name: shares[1] for name, shares in self._held.items() if name in named}
        masking = {name: shares[0] for name, shares in self._held.items() if name not in named}
        return Answer(own, masking)

    def _channel_key(self, other: str, about: bytes) -> bytes:
        return masks.agree(self._channel, self._adverts[other].channel, about)

    def _begin(self, step: str, then: str) -> None:
        if self._next != step:
            self.refuse(f"asked for step '{step}', and the next one is '{self._next}'")
        self._next = then

    def refuse(self, why: str) -> NoReturn:
        """Take no further part in this round, for a reason that a person reads."""
        self._next = "nothing"
        raise Refused(
            f"client '{self.name}', round {self.session.round}, secure sum: {why}.\n"
            "  Nothing more is sent in this round. Ask who runs the server."
        )


def _read(texts: Mapping[str, str]) -> dict[str, bytes]:
    return {key: bytes.fromhex(text) for key, text in texts.items()}


def signed(session: Session, name: str, count: int, *keys: bytes) -> bytes:
    """What a client signs when it advertises its keys."""
    return session.about("keys", name, str(count), *keys)


def pair_key(
    session: Session, private: object, name: str, other: str, adverts: Mapping[str, Advert]
) -> bytes:
    """The key of the mask of a pair, from one side's private key."""
    about = session.about("mask", *sorted((name, other)))
    return masks.agree(private, adverts[other].masking, about)


def signed_mask(key: bytes, count: int, name: str, other: str) -> Words:
    """A pair's mask as `name` adds it: the other of the two adds its negative."""
    words = masks.mask(key, count)
    return words if name < other else -words
