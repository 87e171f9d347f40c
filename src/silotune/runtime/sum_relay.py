"""The server's half of secure sums: it passes messages on, and opens the sum of a round.

It knows how to ask (`Ask`), not by what engine. What it needs in order to go on after it was
stopped while a sum was being opened is in the run folder: nothing there is secret from the server.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np

from silotune.core.atomic_files import write_atomically, write_json
from silotune.core.errors import UpdateError
from silotune.core.reading_back import read_object
from silotune.core.types import Failure, ServerState
from silotune.core.wording import counted
from silotune.federation.progress import Progress
from silotune.federation.run_folder import RunFolder
from silotune.federation.sampling import num_needed
from silotune.federation.secure_sum import check_cohort
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.member import Advert, Answer, threshold_of
from silotune.privacy.secure_sum.opening import NotOpened, open_sum, passed_on
from silotune.privacy.secure_sum.ring import Words
from silotune.recipes.schema import RunConfig
from silotune.runtime import sum_wire

Ask = Callable[
    [str, Mapping[str, dict[str, Any]]], Iterator[tuple[str, Mapping[str, Any] | Failure]]
]
"""(kind, what each client is told) -> each client's answer, or why there is none."""
FILE, WORDS = "secure-sum.json", "secure-sum.words"
"""In the run folder: the round whose sum is being opened, or was; and that sum."""
FIX = "Remove it and resume: its round is then void."


@dataclass(frozen=True)
class _Round:
    """What the server knows about the present round."""

    round: int
    known: Mapping[str, sum_wire.Known]
    shares: Mapping[str, Mapping[str, bytes]]

    @property
    def adverts(self) -> dict[str, Advert]:
        return {name: advert for name, (advert, _) in self.known.items()}


class Relay:
    """Implements `Sums` with clients that are reached by messages."""

    def __init__(self, run: RunConfig, run_id: str, folder: RunFolder, ask: Ask) -> None:
        """Nothing is asked yet.

        Args:
            run: The recipe.
            run_id: What clients call the run.
            folder: The run's folder.
            ask: Sends a message to each client and waits for the answers.
        """
        self.run, self.run_id, self._folder, self._ask = run, run_id, folder, ask
        self._now: _Round | None = None
        self._ahead: dict[int, dict[str, sum_wire.Known]] = {}
        self._ready: _Round | None = None

    # --- before the first round, in case there was one

    def settle(self, state: ServerState, progress: Progress) -> ServerState:
        """Deal with the round that an interruption has left unfinished.

        If its sum was opened, it is used. If clients were asked to open it, some may have, and none
        of these begins the same round again: it is void, and the next one follows. Otherwise it
        begins again with fresh keys, and masked updates of the old ones are dropped.

        Args:
            state: The newest checkpoint.
            progress: Told about a void round.

        Returns:
            The state to go on from.
        """
        kept, spool = self._kept(), self._folder.spool(state.round + 1)
        if kept.get("round") != state.round + 1:
            spool.remove()
            return state
        if kept.get("sha256") and spool.names() == kept["survivors"]:
            return state
        spool.remove()
        progress.note(
            f"round {state.round + 1} is void: the run was interrupted while its sum was being "
            "opened, and clients open a round once. The run goes on with the next round"
        )
        state = replace(state, round=state.round + 1)
        self._folder.save(state, last=False)
        return state

    # --- a round

    def begin(
        self, round_: int, names: Sequence[str]
    ) -> tuple[list[Failure], dict[str, dict[str, Any]]]:
        """Exchange keys and shares, unless these clients have done so in earlier messages.

        Args:
            round_: The round.
            names: Its clients.

        Returns:
            The clients that cannot take part, and why; and what each of the others has to be told
            along with what it trains on.

        Raises:
            ConfigError: There are fewer clients than `secure_sum.min_cohort`.
        """
        if self._kept().get("round") == round_:
            late = "it had dropped out of this round when its sum was opened"
            return [Failure(name, round_, "no answer", late) for name in names], {}
        check_cohort(self.run, len(names))
        ready, self._ready = self._ready, None
        if ready is not None and ready.round == round_ and ready.shares.keys() == set(names):
            self._now = ready
            return [], _beside(ready)
        needed = max(
            self.run.secure_sum.min_cohort,
            threshold_of(len(names)),
            num_needed(self.run.sampling, len(names)),
        )
        failures: list[Failure] = []
        known: dict[str, sum_wire.Known] = {}
        self._ahead = {round_ + 1: {}, round_ + 2: {}}
        first = {"round": round_, "ahead": self._looks_ahead(round_ + 1)}
        for name, said in self._ask("query.keys", dict.fromkeys(names, first)):
            found = _read(name, round_, said, "keys", failures)
            if found is not None and round_ in found:
                known[name] = found[round_]
                if round_ + 1 in found:
                    self._ahead[round_ + 1][name] = found[round_ + 1]
        if len(known) < needed:
            return [*failures, *_void(round_, known, len(names), needed, "sent keys")], {}
        told = {"round": round_, "keys": sum_wire.encode_everyone(dict(sorted(known.items())))}
        shares: dict[str, Mapping[str, bytes]] = {}
        for name, said in self._ask("query.shares", dict.fromkeys(sorted(known), told)):
            if (found := _read(name, round_, said, "shares", failures)) is not None:
                if found.keys() == known.keys() - {name}:
                    shares[name] = found
                else:
                    why = "it has not shared its secrets with all the others"
                    failures.append(Failure(name, round_, "unreadable", why))
        if len(shares) < needed:
            return [*failures, *_void(round_, shares, len(names), needed, "sent shares")], {}
        self._now = _Round(round_, known, shares)
        return failures, _beside(self._now)

    def _looks_ahead(self, round_: int) -> bool:
        """Whether all clients are asked in every round, and there is such a round."""
        asked = self.run.sampling
        everyone = asked.num_clients is None and asked.fraction in (None, 1)
        return everyone and round_ <= self.run.rounds

    def open(self, round_: int, survivors: Sequence[str], total: Words) -> tuple[Words, int]:
        """Ask every survivor once for its shares, and take the masks off.

        Raises:
            NotOpened: Too few answered, or an answer was wrong. The run can be resumed: the round
                is then void.
        """
        kept = self._kept()
        if kept.get("round") == round_:
            return self._opened(kept), kept["num_clients"]
        now = self._now
        assert now is not None, "a round begins before its sum is opened"
        assert now.round == round_, "a round begins before its sum is opened"
        facts = {"round": round_, "survivors": list(survivors), "num_clients": len(now.known)}
        write_json(self._folder.path / FILE, facts)  # from here on, some may have given shares
        answers: dict[str, Answer] = {}
        failures: list[Failure] = []
        told: dict[str, Any] = {"round": round_, "survivors": list(survivors)}
        told["ahead"] = self._looks_ahead(round_ + 2)
        next_ = self._ahead.pop(round_ + 1, {})
        if self._looks_ahead(round_ + 1) and next_.keys() == set(survivors):
            told["keys"] = sum_wire.encode_everyone(dict(sorted(next_.items())))
        shares: dict[str, Mapping[str, bytes]] = {}
        after = self._ahead.setdefault(round_ + 2, {})
        for name, said in self._ask("query.open", dict.fromkeys(survivors, told)):
            if (found := _read(name, round_, said, "opened", failures)) is None:
                continue
            answers[name] = found.answer
            if found.shares is not None and found.shares.keys() == next_.keys() - {name}:
                shares[name] = found.shares
            if found.keys is not None:
                after[name] = found.keys
        if shares and shares.keys() == next_.keys():
            self._ready = _Round(round_ + 1, next_, shares)
        try:
            session = Session(self.run_id, round_)
            opened = open_sum(session, now.adverts, now.shares, survivors, total, answers)
        except NotOpened as error:
            first = str(error).partition("\n")[0]
            why = "".join(f"\n  {f.client}: {f.code}: {f.place}" for f in failures)
            raise NotOpened(
                f"{first}{why}\n  Nothing was opened. Resume the run: this round is then void, and "
                "the next one has new keys."
            ) from error
        raw = opened.astype("<u4").tobytes()
        write_atomically(self._folder.path / WORDS, raw)
        write_json(self._folder.path / FILE, {**facts, "sha256": sha256(raw).hexdigest()})
        return opened, len(now.known)

    def _kept(self) -> dict[str, Any]:
        path = self._folder.path / FILE
        return read_object(path, fix=FIX) if path.exists() else {}

    def _opened(self, kept: Mapping[str, Any]) -> Words:
        raw = (self._folder.path / WORDS).read_bytes()
        if sha256(raw).hexdigest() != kept.get("sha256"):
            raise NotOpened(
                f"{self._folder.path / WORDS} is damaged.\n  Remove {FILE} from the same folder "
                "and resume: clients that have opened this round take no part in it again."
            )
        return np.frombuffer(raw, dtype="<u4").astype(np.uint32)


def _read(
    name: str, round_: int, said: Mapping[str, Any] | Failure, part: str, failures: list[Failure]
) -> Any:
    """The part of an answer that a step asks for; None, and a failure more, if it is not there."""
    read: Mapping[str, Callable[[object], Any]] = {
        "keys": sum_wire.decode_keys,
        "shares": sum_wire.decode_shares,
        "opened": sum_wire.decode_opened,
    }
    if isinstance(said, Failure):
        failures.append(said)
        return None
    try:
        return read[part](said.get(part))
    except UpdateError as error:
        failures.append(Failure(name, round_, "unreadable", str(error)[:1000]))
        return None


def _beside(now: _Round) -> dict[str, dict[str, Any]]:
    """What each client is told along with what it trains on: the shares of the others."""
    hidden = passed_on(now.shares)
    return {name: {"shares": sum_wire.encode_shares(hidden[name])} for name in sorted(now.shares)}


def _void(
    round_: int, there: Mapping[str, object], num: int, needed: int, what: str
) -> Iterator[Failure]:
    why = f"{len(there)} of {counted(num, 'client')} {what}, and a secure sum needs {needed}"
    return (Failure(name, round_, "not asked to train", why) for name in sorted(there))
