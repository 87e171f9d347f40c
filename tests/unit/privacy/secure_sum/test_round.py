"""A round of a secure sum: what it gives, who may drop out, and what no schedule opens."""

import dataclasses
import random

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from silotune.privacy.secure_sum import masks
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.member import (
    Advert,
    Member,
    Refused,
    Secrets,
    signed,
    threshold_of,
)
from silotune.privacy.secure_sum.opening import NotOpened, open_sum, passed_on
from silotune.privacy.secure_sum.ring import Ring

SESSION = Session("run-1", 3)
KEYS = [Ed25519PrivateKey.generate() for _ in range(9)]  # made once, because that takes a moment


def verify(key):
    public = key.public_key()

    def is_signed(message, signature):
        try:
            public.verify(signature, message)
        except InvalidSignature:
            return False
        return True

    return is_signed


class Round:
    """A round whose server is honest, unless a test meddles with what it passes on."""

    def __init__(self, num, count=8, session=SESSION, **options):
        self.names = [f"client-{n}" for n in range(num)]
        self.session, self.count = session, count
        keys = dict(zip(self.names, KEYS, strict=False))
        self.roster = {name: verify(key) for name, key in keys.items()}
        self.members = {
            name: Member(name, session, count, sign=key.sign, **options)
            for name, key in keys.items()
        }
        chance = np.random.default_rng(num)
        self.words = {
            name: chance.integers(-(2**20), 2**20, count).astype(np.uint32) for name in self.names
        }

    def advertise(self, names=None):
        self.adverts = {name: self.members[name].advertise() for name in names or self.names}
        return self.adverts

    def share(self, names=None):
        self.shares = {
            name: self.members[name].share(self.adverts, self.roster)
            for name in names or self.names
        }
        return passed_on(self.shares)

    def mask(self, names=None):
        hidden = passed_on(self.shares)
        self.masked = {
            name: self.members[name].mask(self.words[name], hidden[name])
            for name in names or self.names
        }
        return self.masked

    def answer(self, names=None):
        self.answers = {
            name: self.members[name].answer(self.masked) for name in names or self.masked
        }
        return self.answers

    def open(self):
        total = sum(self.masked.values(), np.zeros(self.count, np.uint32))
        return open_sum(self.session, self.adverts, self.shares, self.masked, total, self.answers)

    def plain(self, names):
        return sum((self.words[name] for name in names), np.zeros(self.count, np.uint32))


@given(st.integers(3, 9), st.data())
@settings(deadline=None, max_examples=25)
def test_whoever_drops_out_the_sum_is_that_of_the_others_exactly(num, data):
    """As many as the threshold allows, at any step, in any combination."""
    one, spare = Round(num), num - threshold_of(num)
    gone = data.draw(st.lists(st.sampled_from(one.names), max_size=spare, unique=True))
    when = [data.draw(st.sampled_from(["share", "mask", "answer"])) for _ in gone]

    def left(*steps):
        return [
            n
            for n in one.names
            if n not in {g for g, w in zip(gone, when, strict=True) if w in steps}
        ]

    one.advertise()
    one.share(left("share"))
    one.mask(left("share", "mask"))
    one.answer(left("share", "mask", "answer"))
    assert np.array_equal(one.open(), one.plain(left("share", "mask")))


@pytest.mark.parametrize("num", [3, 4, 7, 9])
def test_with_one_client_too_few_nothing_is_opened(num):
    few = threshold_of(num) - 1
    one = Round(num)
    one.advertise()
    one.share()
    one.mask()
    one.answer(one.names[:few])
    with pytest.raises(NotOpened, match=f"{few} of {num} clients answered"):
        one.open()
    late = Round(num)
    late.advertise()
    late.share()
    late.mask(late.names[:few])
    for name in late.names[:few]:
        with pytest.raises(Refused, match=f"over {few} of {num} clients only"):
            late.members[name].answer(late.masked)
    early = Round(num)
    early.advertise()
    early.share(early.names[:few])
    hidden = passed_on(early.shares)
    for name in early.names[:few]:
        with pytest.raises(Refused, match=f"only {few} clients of {num} are left"):
            early.members[name].mask(early.words[name], hidden[name])


def test_a_client_answers_once_and_gives_no_client_both_kinds_of_shares():
    one = Round(5)
    one.advertise()
    one.share()
    one.mask()
    whole = one.names
    for name in one.names:
        gone = next(other for other in one.names if other != name)
        first = one.members[name].answer([n for n in whole if n != gone])
        assert not first.own.keys() & first.masking.keys()
        with pytest.raises(Refused, match="the next one is 'nothing'"):
            one.members[name].answer(whole)


@pytest.mark.parametrize("num", [4, 6, 9])
def test_a_server_that_names_two_cohorts_cannot_open_the_client_in_only_one_of_them(num):
    """Some are told that client-0 answered, the others that it did not: never enough of both."""
    for told in range(num):
        one = Round(num)
        one.advertise()
        one.share()
        one.mask()
        with_it, without = one.names[: told + 1], one.names[told + 1 :]
        answers = {name: one.members[name].answer(one.names) for name in with_it}
        answers |= {name: one.members[name].answer(one.names[1:]) for name in without}
        num_own = sum("client-0" in answer.own for answer in answers.values())
        num_masking = sum("client-0" in answer.masking for answer in answers.values())
        assert (num_own, num_masking) == (len(with_it), len(without))
        assert min(num_own, num_masking) < threshold_of(num)
        one.answers = {n: a for n, a in answers.items() if n in with_it}
        if len(with_it) < threshold_of(num):
            with pytest.raises(NotOpened):
                one.open()


@pytest.mark.parametrize("num", range(3, 60))
def test_with_a_third_of_the_clients_colluding_no_two_sums_can_be_opened(num):
    """The colluders answer both questions; the honest ones are shared out among the two."""
    c = (num - 1) // 3
    assert 2 * threshold_of(num) > num + c
    honest = num - c
    assert max(min(h + c, honest - h + c) for h in range(honest + 1)) < threshold_of(num)


def meddled(advert, **changes):
    return dataclasses.replace(advert, **changes)


def forged(name, key, session=SESSION, count=8):
    """Keys of the server's own making, under a client's name."""
    new = Secrets.new()
    public = [masks.public_of(masks.read_private(raw)) for raw in (new.channel, new.masking)]
    text = signed(session, name, count, *public, bytes(32))
    return Advert(*public, bytes(32), key.sign(text))


def test_a_server_cannot_bring_clients_or_keys_of_its_own():
    mine = Ed25519PrivateKey.generate()
    cases = {
        "not on this client's roster": lambda a: {**a, "client-9": forged("client-9", mine)},
        "not signed by it": lambda a: {**a, "client-1": forged("client-1", mine)},
        "changed or left out": lambda a: {**a, "client-0": forged("client-0", mine)},
        "own keys": lambda a: {n: each for n, each in a.items() if n != "client-0"},
        "fewer than 4": lambda a: {n: a[n] for n in list(a)[:3]},
        # signed, but for another round, another run, or numbers of another length
        "'client-1' are not": lambda a: {
            **a,
            "client-1": forged("client-1", KEYS[1], session=Session("run-1", 2)),
        },
        "for this round": lambda a: {
            **a,
            "client-1": forged("client-1", KEYS[1], session=Session("run-2", 3)),
        },
        "client-1": lambda a: {**a, "client-1": forged("client-1", KEYS[1], count=9)},
        "have the same keys": lambda a: {
            **a,
            "client-1": Advert(
                a["client-2"].channel,
                a["client-2"].masking,
                bytes(32),
                KEYS[1].sign(
                    signed(
                        SESSION,
                        "client-1",
                        8,
                        a["client-2"].channel,
                        a["client-2"].masking,
                        bytes(32),
                    )
                ),
            ),
        },
    }
    for said, meddle in cases.items():
        one = Round(5, smallest=4)
        member = one.members["client-0"]
        with pytest.raises(Refused, match=said):
            member.share(meddle(one.advertise()), one.roster)
        with pytest.raises(Refused, match="'nothing'"):  # not another try, with better lies
            member.share(one.adverts, one.roster)


def test_a_share_that_was_changed_swapped_or_replayed_is_refused():
    earlier = Round(4, session=Session("run-1", 2))
    earlier.advertise()
    old = earlier.share()["client-0"]
    for meddle in (
        lambda h: {**h, "client-1": bytes([h["client-1"][0] ^ 1]) + h["client-1"][1:]},
        lambda h: {**h, "client-1": h["client-2"]},
        lambda h: {**h, "client-1": old["client-1"]},
        lambda h: {**h, "client-1": b""},
    ):
        one = Round(4)
        one.advertise()
        hidden = meddle(one.share()["client-0"])
        with pytest.raises(Refused, match="shares of 'client-1' were changed"):
            one.members["client-0"].mask(one.words["client-0"], hidden)
    one = Round(4)
    one.advertise()
    hidden = one.share()["client-0"] | {"client-9": b"x"}
    with pytest.raises(Refused, match="shares of 'client-9'"):
        one.members["client-0"].mask(one.words["client-0"], hidden)


def test_a_survivor_is_not_told_that_it_dropped_out():
    one = Round(4)
    one.advertise()
    one.share()
    one.mask()
    with pytest.raises(Refused, match="said to be missing"):
        one.members["client-0"].answer(one.names[1:])
    with pytest.raises(Refused, match="'stranger'"):
        one.members["client-1"].answer([*one.names, "stranger"])


def test_steps_are_taken_once_and_in_their_order():
    one = Round(3)
    with pytest.raises(Refused, match="asked for step 'mask', and the next one is 'advertise'"):
        one.members["client-0"].mask(one.words["client-0"], {})
    two = Round(3)
    two.advertise()
    with pytest.raises(Refused, match="asked for step 'advertise'"):
        two.members["client-0"].advertise()


@pytest.mark.parametrize("kind", ["own", "masking"])
def test_a_wrong_share_is_noticed_and_nothing_is_opened(kind):
    one = Round(5)
    one.advertise()
    one.share()
    one.mask(one.names[1:])  # client-0 has dropped out
    one.answer()
    answer = one.answers["client-1"]
    victim = next(iter(getattr(answer, kind)))
    wrong = dict(getattr(answer, kind)) | {victim: bytes(65) + b"\x07"}
    one.answers["client-1"] = dataclasses.replace(answer, **{kind: wrong})
    with pytest.raises(NotOpened, match=f"client '{victim}' do not fit"):
        one.open()


def test_a_masked_vector_looks_like_chance():
    """Chi-square over bytes, of a vector of zeros; and no block occurs twice, anywhere."""
    count, blocks = 2**16, set()
    for session in (SESSION, Session("run-1", 4), Session("run-2", 3)):
        one = Round(3, count, session)
        one.words = dict.fromkeys(one.names, np.zeros(count, np.uint32))
        one.advertise()
        one.share()
        for words in one.mask().values():
            seen = np.bincount(words.view(np.uint8), minlength=256)
            assert stats.chisquare(seen).pvalue > 1e-6
            found = {words.tobytes()[at : at + 16] for at in range(0, 4 * count, 16)}
            assert len(found) == count // 4
            assert not blocks & found
            blocks |= found


@given(
    st.integers(3, 7),
    st.floats(1e-3, 1e3),
    st.lists(st.floats(-1.5, 1.5, width=32), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=25)
def test_numbers_survive_masks_and_ring(num, limit, shares):
    """The decoded sum is the sum of what was encoded, and within a step of the numbers' sum."""
    values = np.asarray(shares, dtype=np.float64) * limit
    ring, one = Ring(limit, num), Round(num, len(values))
    chance = np.random.default_rng(0)
    for n, name in enumerate(one.names):
        one.words[name], cut = ring.encode(values / (n + 1), chance.random)
        assert cut == np.count_nonzero(np.abs(values / (n + 1)) > limit)
    one.advertise()
    one.share()
    one.mask()
    one.answer()
    found = ring.decode(one.open())
    assert np.array_equal(found, ring.decode(one.plain(one.names)))
    exact = sum(np.clip(values / (n + 1), -limit, limit) for n in range(num))
    assert np.abs(found - exact).max() <= num * ring.step


def test_a_round_of_three_is_what_the_protocol_says_word_for_word():
    """Masks by hand from the library's primitives, and pinned: a new format breaks old clients."""
    names = ["client-0", "client-1", "client-2"]
    one = Round(3, 2)
    known = {
        name: Secrets(*(bytes([16 * n + k] * 32) for k in (1, 2, 3)))
        for n, name in enumerate(names)
    }
    for n, name in enumerate(names):
        one.members[name] = Member(name, SESSION, 2, sign=KEYS[n].sign, known=known[name])
        one.words[name] = np.array([n, 2**32 - 1 - n], dtype=np.uint32)
    one.advertise()
    one.share()
    masked = one.mask()
    for name in names:
        expected = one.words[name] + stream(known[name].own)
        for other in names:
            if other != name:
                words = stream(pair_secret(known[name].masking, known[other].masking, name, other))
                expected += words if name < other else -words
        assert masked[name].tolist() == expected.tolist()
    assert {name: words.tobytes().hex() for name, words in masked.items()} == PINNED
    one.answer()
    assert one.open().tolist() == [3, 2**32 - 6]


PINNED = {
    "client-0": "d57abe6c8286d176",
    "client-1": "c5fefb7fb7545e73",
    "client-2": "23aac613ec045c07",
}
"""Little-endian words; made by the formula above on 2026-11-30."""


def stream(key):
    """Two words of ChaCha20 with counter and nonce 0."""
    return np.frombuffer(
        Cipher(ChaCha20(key, bytes(16)), None).encryptor().update(bytes(8)), dtype="<u4"
    )


def pair_secret(mine, theirs, *pair):
    public = X25519PrivateKey.from_private_bytes(theirs).public_key()
    shared = X25519PrivateKey.from_private_bytes(mine).exchange(public)
    about = b"silotune secure sum 1"
    for word in ("run-1", "3", "mask", *sorted(pair)):
        about += len(word).to_bytes(4, "big") + word.encode()
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=about).derive(shared)


def test_the_order_of_arrival_changes_nothing():
    one = Round(6)
    one.advertise()
    one.share()
    one.mask()
    one.answer()
    first = one.open()
    for part in ("adverts", "shares", "masked", "answers"):
        items = list(getattr(one, part).items())
        random.Random(1).shuffle(items)
        setattr(one, part, dict(items))
    assert np.array_equal(one.open(), first)
