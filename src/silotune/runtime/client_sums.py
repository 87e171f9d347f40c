"""A client's half of secure sums, one message at a time, kept on its own disk in between.

In deployment a worker may end between two messages of a round, and in Flower's simulation any actor
may answer the next one. So what a round needs is in a file of the client's own folder, readable by
its owner only. It is written before the answer leaves: whoever kills this process cannot make it
take a step twice. Secrets leave the file as soon as they are not needed: a client's own when its
numbers are masked, others' shares when it has given its part of them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from silotune.core.atomic_files import make_folder, write_json
from silotune.core.reading_back import read_object
from silotune.core.types import Update
from silotune.federation.secure_sum import Numbers, as_sent
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.member import Member, Refused
from silotune.privacy.secure_sum.ring import Words
from silotune.recipes.schema import RunConfig
from silotune.runtime import sum_wire
from silotune.runtime.identity import Identity, Unknown
from silotune.runtime.payload import Parcel, round_of

FILE = "secure-sum.json"
"""In the client's own folder of a run: its present round, and the last one that it has opened."""
T = TypeVar("T")


@dataclass(frozen=True)
class ClientSums:
    """One client in one run."""

    name: str
    run: RunConfig
    run_id: str
    folder: Path
    """The client's own, of this run."""
    identity: Identity
    smallest: int
    """Fewest clients whose sum it takes part in."""

    def answer(self, kind: str, about: dict[str, Any], count: int) -> dict[str, Any]:
        """Answer one of the messages that only secure sums have.

        Args:
            kind: One of `sum_wire.STEPS`.
            about: What the server says.
            count: Numbers of a change in this round, by the model that is loaded here.

        Raises:
            Refused: It cannot be right; nothing leaves, in this round.
            UpdateError: It has another form.
        """
        round_ = round_of(about)
        if kind == "query.keys":
            return {"keys": self._keys(round_, count)}
        if kind == "query.shares":
            everyone = sum_wire.decode_everyone(about.get("keys"))
            return {"shares": self._step(round_, lambda member: self._shares(member, everyone))}
        survivors = sum_wire.decode_survivors(about.get("survivors"))
        answer = self._step(round_, lambda member: member.answer(survivors), opens=True)
        return {"opened": sum_wire.encode_answer(answer)}

    def taken_from(self, parcel: Parcel) -> tuple[Parcel, object]:
        """What a client trains on, and the shares beside it.

        Raises:
            Refused: This client has not shared its secrets for this round, or has sent its numbers.
        """
        about = dict(parcel.about)
        shares = about.pop("shares", None)
        kept, round_ = self._kept(), round_of(about)
        if kept.get("round") != round_ or kept["member"]["next"] != "mask":
            raise self._not_begun(round_)
        return Parcel(about, parcel.values), shares

    def hide(self, update: Update, shares: object) -> Update:
        """What is sent instead of the update.

        Args:
            update: Of a round whose keys and shares have been exchanged.
            shares: What the server passes on from the others.

        Raises:
            Refused, UpdateError: As in `answer`. Also: more rows than `secure_sum.max_examples`.
        """
        hidden = sum_wire.decode_shares(shares)
        cut = 0

        def mask(member: Member) -> Words:
            nonlocal cut
            words, cut = Numbers(self.run, len(member.peers)).encode(update)
            if len(words) != member.count:
                member.refuse(f"{len(words)} numbers, and keys were made for {member.count}")
            return member.mask(words, hidden)

        return as_sent(update, self._step(update.round, mask), cut)

    # --- steps

    def _keys(self, round_: int, count: int) -> dict[str, str]:
        """Begin a round, or begin it again: with fresh keys, unless its sum may have been opened.

        With the changes of one round in two sums over almost the same clients, their difference
        would be one client's change.
        """
        opened = self._kept().get("opened", 0)
        if round_ <= opened:
            raise Refused(
                f"client '{self.name}', round {round_}, secure sum: this client has already given "
                f"its shares for round {opened} of this run, and a round's change is in one opened "
                "sum at most.\n  Nothing is sent. Ask who runs the server."
            )
        member = self._member(round_, {"next": "advertise", "count": count + 1})  # the weight
        advert = member.advertise()
        self._keep(round_, member, opened)
        return sum_wire.encode_keys(advert, self.identity.credential)

    def _shares(self, member: Member, everyone: dict[str, sum_wire.Known]) -> dict[str, str]:
        try:
            roster = self.identity.verifiers({n: text for n, (_, text) in everyone.items()})
        except Unknown as error:
            member.refuse(str(error))
        shares = member.share({name: advert for name, (advert, _) in everyone.items()}, roster)
        return sum_wire.encode_shares(shares)

    def _step(self, round_: int, step: Callable[[Member], T], *, opens: bool = False) -> T:
        """Take one step of the present round, and record it before its result can leave."""
        kept = self._kept()
        if kept.get("round") != round_:
            raise self._not_begun(round_)
        member, opened = self._member(round_, kept["member"]), kept.get("opened", 0)
        try:
            done = step(member)
        except Refused:
            self._keep(round_, member, opened)
            raise
        self._keep(round_, member, round_ if opens else opened)
        return done

    def _not_begun(self, round_: int) -> Refused:
        return Refused(
            f"client '{self.name}', round {round_}, secure sum: this client has not exchanged keys "
            "and shares for this round, or has sent its numbers before.\n"
            "  Nothing is sent. Ask who runs the server."
        )

    # --- its memory

    def _member(self, round_: int, kept: dict[str, Any]) -> Member:
        session = Session(self.run_id, round_)
        return Member.again(
            *(self.name, session, kept), sign=self.identity.sign, smallest=self.smallest
        )

    def _kept(self) -> dict[str, Any]:
        path = self.folder / FILE
        if not path.exists():
            return {}
        return read_object(path, fix="Without it this client cannot know what it has opened.")

    def _keep(self, round_: int, member: Member, opened: int) -> None:
        make_folder(self.folder)
        facts = {"round": round_, "opened": opened, "member": member.kept()}
        write_json(self.folder / FILE, facts)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power failure could bring the file of the step before back
        finally:
            os.close(folder)
