"""What the messages of a secure sum say, as JSON values and back.

    query.keys     ->  keys      a client's public keys of a round, and how others know it
    query.shares   ->  shares    everyone's keys; back come a client's hidden shares
    train          ->  update    the hidden shares for this client; back come masked words
    query.open     ->  opened    who is in the sum; back come the shares that open it

If the same clients are asked in the rounds that follow, what the first two carry rides on others:
keys for the second round on the first message, and on query.open everyone's keys of the next round
and on its answer the shares for it, and keys for the round after. A round then has two messages.

Keys and shares are hexadecimal texts of known lengths. Forms are checked here; what a client makes
of them is in `privacy/secure_sum/member.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from silotune.core.types import Failure
from silotune.privacy.secure_sum.masks import KEY_BYTES
from silotune.privacy.secure_sum.member import Advert, Answer
from silotune.privacy.secure_sum.shamir import SHARE_BYTES
from silotune.runtime.payload import Parcel
from silotune.runtime.wire import Form, check_keys, read_failure, read_form

STEPS = {"query.keys": "keys", "query.shares": "shares", "query.open": "opened"}
"""The messages that only secure sums have, by Flower's names of them, and the part of an answer."""
TAG_BYTES = 16
"""What ChaCha20-Poly1305 adds to a text."""
MOST = 10_000
"""Most characters of a credential, and most clients of a round."""


def _hex(least: int, most: int) -> Any:
    return Field(pattern=f"^([0-9a-f]{{2}}){{{least},{most}}}$")


HIDDEN_BYTES = 2 * SHARE_BYTES + TAG_BYTES
Key = Annotated[str, _hex(KEY_BYTES, KEY_BYTES)]
Signature = Annotated[str, _hex(1, 200)]
Hidden = Annotated[str, _hex(HIDDEN_BYTES, HIDDEN_BYTES)]
Share = Annotated[str, _hex(SHARE_BYTES, SHARE_BYTES)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class _Keys(Form):
    channel: Key
    masking: Key
    seal: Key
    signature: Signature
    credential: Annotated[str, Field(max_length=MOST)]


class _Everyone(Form):
    keys: Annotated[dict[Name, _Keys], Field(max_length=MOST)]


class _Shares(Form):
    shares: Annotated[dict[Name, Hidden], Field(max_length=MOST)]


class _Survivors(Form):
    survivors: Annotated[list[Name], Field(max_length=MOST)]


class _Rounds(Form):
    keys: Annotated[
        dict[Annotated[str, Field(pattern="^[0-9]{1,15}$")], _Keys], Field(max_length=2)
    ]


class _Opened(Form):
    own: Annotated[dict[Name, Share], Field(max_length=MOST)]
    masking: Annotated[dict[Name, Share], Field(max_length=MOST)]
    shares: Annotated[dict[Name, Hidden], Field(max_length=MOST)] | None = None
    keys: _Keys | None = None


Known = tuple[Advert, str]
"""A client's keys, and the text by which others know it: its certificate, for example."""


def encode_keys(advert: Advert, credential: str) -> dict[str, str]:
    """A client's keys of a round."""
    return {**{k: v.hex() for k, v in vars(advert).items()}, "credential": credential}


def decode_keys(facts: object) -> dict[int, Known]:
    """A client's keys of one or two rounds, by round.

    Raises:
        UpdateError: It has another form. The same holds for all functions below.
    """
    form = read_form(_Rounds, {"keys": facts})
    return {int(round_): _known(each) for round_, each in form.keys.items()}


def _known(form: _Keys) -> Known:
    own = form.model_dump()
    credential = own.pop("credential")
    return Advert(**{key: bytes.fromhex(text) for key, text in own.items()}), credential


def encode_everyone(known: Mapping[str, Known]) -> dict[str, Any]:
    """Everyone's keys, by client."""
    return {name: encode_keys(*each) for name, each in known.items()}


def decode_everyone(facts: object) -> dict[str, Known]:
    """Undo `encode_everyone`."""
    form = read_form(_Everyone, {"keys": facts})
    return {name: _known(each) for name, each in form.keys.items()}


def encode_shares(shares: Mapping[str, bytes]) -> dict[str, str]:
    """Hidden shares, by the other client."""
    return {name: text.hex() for name, text in shares.items()}


def decode_shares(facts: object) -> dict[str, bytes]:
    """Undo `encode_shares`."""
    form = read_form(_Shares, {"shares": facts})
    return {name: bytes.fromhex(text) for name, text in form.shares.items()}


def decode_step(kind: str, answer: Parcel, client: str) -> Mapping[str, Any] | Failure:
    """A client's answer to one of the `STEPS`: the text of its one part, or a failure.

    Raises:
        UpdateError: It has another part.
    """
    check_keys(answer.about, STEPS[kind], "failure")
    if "failure" in answer.about:
        return read_failure(answer.about["failure"], client)
    return answer.about


def decode_survivors(facts: object) -> Sequence[str]:
    """The clients that a sum is said to hold."""
    return read_form(_Survivors, {"survivors": facts}).survivors


def encode_answer(answer: Answer) -> dict[str, dict[str, str]]:
    """The shares that open a sum."""
    return {"own": encode_shares(answer.own), "masking": encode_shares(answer.masking)}


@dataclass(frozen=True)
class Opened:
    """What a client answers when a sum is opened."""

    answer: Answer
    shares: Mapping[str, bytes] | None
    """For the next round, if it was told everyone's keys."""
    keys: Known | None
    """For the round after, if it was asked for them."""


def decode_opened(facts: object) -> Opened:
    """What came back from query.open."""
    form = read_form(_Opened, facts)
    kinds = (form.own, form.masking)
    own, masking = ({n: bytes.fromhex(text) for n, text in kind.items()} for kind in kinds)
    shares = None if form.shares is None else decode_shares(form.shares)
    return Opened(Answer(own, masking), shares, form.keys and _known(form.keys))
