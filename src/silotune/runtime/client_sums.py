"""A client's half of secure sums, one message at a time, kept on its own disk in between.

In deployment a worker may end between two messages of a round, and in Flower's simulation any actor
may answer the next one. So what a round needs is in a file of the client's own folder, readable by
its owner only. It is written before the answer leaves: whoever kills this process cannot make it
take a step twice. Secrets leave the file as soon as they are not needed: a client's own when its
numbers are masked, others' shares when it has given its part of them.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from silotune.core.atomic_files import make_folder, write_json
from silotune.core.errors import UpdateError
from silotune.core.reading_back import read_object
from silotune.core.types import Update
from silotune.federation.secure_sum import Numbers, as_sent, as_tensors
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.member import Member, Refused
from silotune.privacy.secure_sum.ring import Words
from silotune.recipes.schema import RunConfig
from silotune.runtime import sum_wire
from silotune.runtime.identity import Identity, Unknown
from silotune.runtime.payload import Parcel, round_of

FILE = "secure-sum.json"
"""In the client's own folder of a run: rounds under way, and the last one that it has opened."""
MOST_ROUNDS = 3
"""Rounds under way: the present one, the next, and the one after."""
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

    def answer(
        self, kind: str, about: dict[str, Any], count_in: Callable[[int], int]
    ) -> dict[str, Any]:
        """Answer one of the messages that only secure sums have.

        Args:
            kind: One of `sum_wire.STEPS`.
            about: What the server says.
            count_in: Numbers of a change in a round, by the model that is loaded here.

        Raises:
            Refused: It cannot be right; nothing leaves, in this round.
            UpdateError: It has another form.
        """
        round_ = round_of(about)
        ahead = about.get("ahead") is True
        if kind == "query.keys":
            rounds = (round_, round_ + 1) if ahead else (round_,)
            return {"keys": {str(r): self._keys(r, count_in(r)) for r in rounds}}
        if kind == "query.shares":
            return {"shares": self._shares(round_, about.get("keys"))}
        survivors = sum_wire.decode_survivors(about.get("survivors"))
        answer = self._step(round_, lambda member: member.answer(survivors), opens=True)
        opened: dict[str, Any] = sum_wire.encode_answer(answer)
        if "keys" in about:
            # for the next round: if they are wrong, this one is not, and the next will say so again
            try:
                opened["shares"] = self._shares(round_ + 1, about["keys"])
            except (Refused, UpdateError) as error:
                sys.stderr.write(f"{error}\n")
        if ahead:
            opened["keys"] = self._keys(round_ + 2, count_in(round_ + 2))
        return {"opened": opened}

    def taken_from(self, parcel: Parcel) -> tuple[Parcel, object]:
        """What a client trains on, and the shares beside it.

        Raises:
            Refused: This client has not shared its secrets for this round, or has sent its numbers.
        """
        about = dict(parcel.about)
        shares = about.pop("shares", None)
        round_ = round_of(about)
        if self._under_way(round_)["next"] != "mask":
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

        return as_sent(update, as_tensors(self._step(update.round, mask)), cut)

    # --- steps

    def _keys(self, round_: int, count: int) -> dict[str, str]:
        """Begin a round, or begin it again: with fresh keys, unless its sum may have been opened.

        With the changes of one round in two sums over almost the same clients, their difference
        would be one client's change.
        """
        self._check_new(round_)
        member = self._member(round_, {"next": "advertise", "count": count + 1})  # the weight
        advert = member.advertise()
        self._keep(round_, member)
        return sum_wire.encode_keys(advert, self.identity.credential)

    def _shares(self, round_: int, keys: object) -> dict[str, str]:
        everyone = sum_wire.decode_everyone(keys)

        def share(member: Member) -> dict[str, bytes]:
            try:
                roster = self.identity.verifiers({n: text for n, (_, text) in everyone.items()})
            except Unknown as error:
                member.refuse(str(error))
            return member.share({name: advert for name, (advert, _) in everyone.items()}, roster)

        return sum_wire.encode_shares(self._step(round_, share))

    def _step(self, round_: int, step: Callable[[Member], T], *, opens: bool = False) -> T:
        """Take one step of a round, and record it before its result can leave."""
        member = self._member(round_, self._under_way(round_))
        try:
            done = step(member)
        except Refused:
            self._keep(round_, member)
            raise
        self._keep(round_, member, opens=opens)
        return done

    def _under_way(self, round_: int) -> dict[str, Any]:
        """What is kept of a round."""
        self._check_new(round_)
        found = self._kept()["rounds"].get(str(round_))
        if found is None:
            raise self._not_begun(round_)
        return found

    def _check_new(self, round_: int) -> None:
        opened = self._kept()["opened"]
        if round_ <= opened:
            raise Refused(
                f"client '{self.name}', round {round_}, secure sum: this client has already given "
                f"its shares for round {opened} of this run, and a round's change is in one opened "
                "sum at most.\n  Nothing is sent. Ask who runs the server."
            )

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
            return {"opened": 0, "rounds": {}}
        return read_object(path, fix="Without it this client cannot know what it has opened.")

    def _keep(self, round_: int, member: Member, *, opens: bool = False) -> None:
        make_folder(self.folder)
        kept = self._kept()
        opened = round_ if opens else kept["opened"]
        others = {r: own for r, own in kept["rounds"].items() if r != str(round_)}
        rounds = {**others, str(round_): member.kept()}
        new = {r: own for r, own in rounds.items() if int(r) > opened}
        last = dict(list(new.items())[-MOST_ROUNDS:])
        write_json(self.folder / FILE, {"opened": opened, "rounds": last})
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power failure could bring the file of the step before back
        finally:
            os.close(folder)
