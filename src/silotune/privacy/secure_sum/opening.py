"""The server's half of one round of a secure sum: it passes on what it cannot read."""

import hashlib
from collections.abc import Collection, Iterable, Mapping

from silotune.core.errors import SilotuneError
from silotune.privacy.secure_sum import masks, shamir
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.member import Advert, Answer, pair_key, signed_mask, threshold_of
from silotune.privacy.secure_sum.ring import Words


class NotOpened(SilotuneError):
    """A sum stays closed: too few clients answered, or what they answered does not fit."""


def passed_on(shares: Mapping[str, Mapping[str, bytes]]) -> dict[str, dict[str, bytes]]:
    """What each client that has shared gets: the shares of the others that have.

    Args:
        shares: By client, what it shared with whom.
    """
    return {
        name: {other: own[name] for other, own in shares.items() if other != name}
        for name in shares
    }


def open_sum(
    session: Session,
    adverts: Mapping[str, Advert],
    shared: Iterable[str],
    survivors: Collection[str],
    total: Words,
    answers: Mapping[str, Answer],
) -> Words:
    """The sum of the survivors' numbers, exactly.

    Args:
        session: The run and the round.
        adverts: Everyone who advertised keys.
        shared: Clients that have shared their secrets; all others have no mask.
        survivors: Clients whose masked numbers are in the total.
        total: The sum of their masked numbers, in the ring.
        answers: By client, its answer to the question for exactly these survivors.

    Raises:
        NotOpened: Fewer than the threshold answered, or a client has given a wrong share.
    """
    points = {name: point for point, name in enumerate(sorted(adverts), start=1)}
    threshold = threshold_of(len(adverts))
    if len(answers) < threshold or len(survivors) < threshold:
        raise NotOpened(
            f"round {session.round}: {len(answers)} of {len(adverts)} clients answered, and a "
            f"secure sum needs {threshold}.\n"
            "  Nothing was opened. Resume the run: the round begins again with new keys."
        )
    total = total.copy()
    for name in survivors:
        key = _rebuilt({points[p]: a.own.get(name) for p, a in answers.items()}, threshold)
        if key is None or hashlib.sha256(key).digest() != adverts[name].seal:
            raise _wrong(session, name)
        total -= masks.mask(key, len(total))
    for dropped in sorted(set(shared) - set(survivors)):
        found = {points[p]: a.masking.get(dropped) for p, a in answers.items()}
        raw = _rebuilt(found, threshold)
        private = None if raw is None else masks.read_private(raw)
        if private is None or masks.public_of(private) != adverts[dropped].masking:
            raise _wrong(session, dropped)
        for name in survivors:
            key = pair_key(session, private, dropped, name, adverts)
            total -= signed_mask(key, len(total), name, dropped)
    return total


def _rebuilt(shares: Mapping[int, bytes | None], threshold: int) -> bytes | None:
    held = {point: share for point, share in shares.items() if share is not None}
    few = dict(list(held.items())[:threshold])
    return shamir.rebuild(few) if len(few) == threshold else None


def _wrong(session: Session, name: str) -> NotOpened:
    return NotOpened(
        f"round {session.round}: the shares of the secrets of client '{name}' do not fit "
        "together, so at least one client has given a wrong one.\n"
        "  Nothing was opened. Resume the run: the round begins again with new keys."
    )
