"""Secure sums in a simulation: every client's half of the protocol, in one process.

What is computed is what clients on their own machines would compute, keys, shares and masks
included. Only the messages are missing. A round's keys live in memory: after an interruption, the
round begins again with new ones.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from silotune.core.types import Update
from silotune.federation.secure_sum import Numbers, as_sent, as_tensors, check_cohort
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.member import Advert, Member
from silotune.privacy.secure_sum.opening import open_sum, passed_on
from silotune.privacy.secure_sum.ring import Words
from silotune.recipes.schema import RunConfig
from silotune.runtime.identity import new_throwaway, verifier_of


class SimulatedSums:
    """Implements `Sums`, and hides updates as their clients would."""

    def __init__(self, run: RunConfig, names: Sequence[str]) -> None:
        """Make throwaway keys by which the clients know each other.

        Args:
            run: The recipe.
            names: All clients of the run.

        Raises:
            ConfigError: cryptography is not installed.
        """
        self.run, self.run_id = run, secrets.token_hex(8)
        self.signers: Mapping[str, Any] = {}
        if not run.secure_sum.simulate:
            self.signers = {name: new_throwaway() for name in names}
        self.roster = {name: verifier_of(key) for name, key in self.signers.items()}
        self.names: Sequence[str] = []
        self._members: dict[str, Member] = {}
        self._adverts: dict[str, Advert] = {}
        self._hidden: dict[str, dict[str, bytes]] = {}

    def begin(self, round_: int, names: Sequence[str], count: int) -> None:
        """New keys and shares for a round.

        Args:
            round_: The round.
            names: Its clients.
            count: Numbers of a change.

        Raises:
            ConfigError: There are fewer clients than `secure_sum.min_cohort`.
        """
        check_cohort(self.run, len(names))
        self.names = sorted(names)
        if self.run.secure_sum.simulate:
            return
        session = Session(self.run_id, round_)
        self._members = {
            name: Member(
                name,
                session,
                count + 1,  # the weight
                sign=self.signers[name].sign,
                smallest=self.run.secure_sum.min_cohort,
            )
            for name in self.names
        }
        self._adverts = {name: one.advertise() for name, one in self._members.items()}
        shares = {
            name: one.share(self._adverts, self.roster) for name, one in self._members.items()
        }
        self._hidden = passed_on(shares)

    def hide(self, update: Update) -> Update:
        """What the client sends instead of the update.

        Raises:
            UpdateError: It has more rows than `secure_sum.max_examples`.
        """
        words, cut = Numbers(self.run, len(self.names)).encode(update)
        if not self.run.secure_sum.simulate:
            words = self._members[update.client].mask(words, self._hidden[update.client])
        return as_sent(update, as_tensors(words), cut)

    def open(self, round_: int, survivors: Sequence[str], total: Words) -> tuple[Words, int]:
        """Ask every survivor once for its shares, and take the masks off."""
        if not self.run.secure_sum.simulate:
            answers = {name: self._members[name].answer(survivors) for name in survivors}
            session = Session(self.run_id, round_)
            total = open_sum(session, self._adverts, self._hidden, survivors, total, answers)
        return total, len(self.names)
