"""Keys, masks, shares and numbers: published vectors, and what must hold for all."""

import itertools
import secrets

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.poly1305 import Poly1305
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import ConfigError
from silotune.privacy.secure_sum import masks, shamir
from silotune.privacy.secure_sum.masks import Session
from silotune.privacy.secure_sum.ring import BITS, Ring


def test_the_agreement_is_that_of_rfc_7748_and_5869():
    """RFC 7748, section 6.1; the secret then goes through HKDF, RFC 5869, test case 3."""
    alice = masks.read_private(
        bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob = masks.read_private(
        bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    )
    assert masks.public_of(alice).hex() == (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    )
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert masks.agree(alice, masks.public_of(bob), b"x") == masks.derive(shared, b"x")
    assert masks.agree(bob, masks.public_of(alice), b"x") == masks.derive(shared, b"x")
    okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert masks.derive(b"\x0b" * 22, b"", 42).hex() == okm


def test_a_mask_is_the_stream_of_rfc_8439():
    """Appendix A.1, test vector 1: key and nonce of zeros."""
    expected = "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    assert masks.mask(bytes(32), 8).astype("<u4").tobytes().hex() == expected


def sealed(key: bytes, nonce: bytes, text: bytes, about: bytes) -> bytes:
    """ChaCha20-Poly1305 put together from its two parts, as section 2.8 of RFC 8439 says."""

    def stream(counter: int, length: int) -> bytes:
        start = counter.to_bytes(4, "little") + nonce
        return Cipher(ChaCha20(key, start), mode=None).encryptor().update(bytes(length))

    hidden = bytes(a ^ b for a, b in zip(text, stream(1, len(text)), strict=True))
    padded = b"".join(part + bytes(-len(part) % 16) for part in (about, hidden))
    lengths = len(about).to_bytes(8, "little") + len(hidden).to_bytes(8, "little")
    return hidden + Poly1305.generate_tag(stream(0, 32), padded + lengths)


def test_the_oracle_of_hidden_texts_agrees_with_rfc_8439():
    """Section 2.8.2. Its nonce is not zero, so the vector cannot go through `hide` itself."""
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you "
        b"only one tip for the future, sunscreen would be it."
    )
    nonce = bytes.fromhex("070000004041424344454647")
    about = bytes.fromhex("50515253c0c1c2c3c4c5c6c7")
    found = sealed(bytes(range(0x80, 0xA0)), nonce, text, about)
    assert found[:16].hex() == "d31a8d34648e60db7b86afbc53ef7ec2"
    assert found[-16:].hex() == "1ae10b594f09e26a7e902ecbd0600691"


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=200), st.binary(max_size=40))
def test_a_text_is_hidden_as_rfc_8439_says(key, text, about):
    assert masks.hide(key, text, about) == sealed(key, bytes(12), text, about)


def test_a_key_with_which_every_secret_is_zero_is_refused():
    with pytest.raises(ValueError, match="shared"):
        masks.agree(masks.read_private(secrets.token_bytes(32)), bytes(32), b"x")


def test_a_hidden_text_is_read_with_its_key_and_purpose_only():
    key, other = secrets.token_bytes(32), secrets.token_bytes(32)
    hidden = masks.hide(key, b"text", b"a to b")
    assert masks.reveal(key, hidden, b"a to b") == b"text"
    assert masks.reveal(key, hidden, b"b to a") is None
    assert masks.reveal(other, hidden, b"a to b") is None
    assert masks.reveal(key, hidden[:-1], b"a to b") is None


@given(st.lists(st.text(max_size=4), min_size=1, max_size=4), st.data())
def test_no_two_purposes_have_the_same_bytes(words, data):
    """Neither words that run into each other nor another round."""
    others = data.draw(st.lists(st.text(max_size=4), min_size=1, max_size=4))
    one, two = Session("r", 1), Session("r", 2)
    assert (one.about(*words) == one.about(*others)) == (words == others)
    assert one.about(*words) != two.about(*words)
    assert Session("r", 11).about("x") != Session("r1", 1).about("x")


@given(st.integers(1, 9), st.data())
def test_any_threshold_of_the_shares_rebuild_the_secret(num, data):
    threshold = data.draw(st.integers(1, num))
    secret = data.draw(st.binary(min_size=32, max_size=32))
    shares = dict(enumerate(shamir.split(secret, range(1, num + 1), threshold), start=1))
    for some in itertools.islice(itertools.combinations(shares, threshold), 20):
        assert shamir.rebuild({p: shares[p] for p in some}) == secret
    assert shamir.rebuild(shares) == secret
    assert all(len(share) == shamir.SHARE_BYTES for share in shares.values())


def test_too_few_shares_say_nothing_about_the_secret():
    """For two shares of three, every secret fits exactly one third share."""
    secret, other = secrets.token_bytes(32), int.from_bytes(secrets.token_bytes(32), "big")
    one, two, _ = shamir.split(secret, [1, 2, 3], 3)
    # the polynomial of degree two through `other` at 0 and the two known shares, at point 3
    y1, y2, prime = int.from_bytes(one, "big"), int.from_bytes(two, "big"), shamir.PRIME
    third = (other - 3 * y1 + 3 * y2) % prime
    shares = {1: one, 2: two, 3: third.to_bytes(shamir.SHARE_BYTES, "big")}
    assert shamir.rebuild(shares) == other.to_bytes(32, "big")


def test_shares_that_do_not_fit_are_noticed_where_the_secret_would_be_too_long():
    shares = dict(enumerate(shamir.split(bytes(32), [1, 2, 3], 2), start=1))
    wrong = shares | {2: shamir.PRIME.to_bytes(66, "big")}
    assert shamir.rebuild({1: wrong[1], 2: wrong[2]}) is None


@pytest.mark.parametrize(("limit", "num"), [(0, 3), (-1, 3), (float("nan"), 3), (1, 0)])
def test_a_ring_that_makes_no_sense_is_refused(limit, num):
    with pytest.raises(ConfigError, match="do not fit"):
        Ring(limit, num)


def test_more_clients_than_the_ring_has_bits_for_are_refused():
    with pytest.raises(ConfigError, match="fewer clients"):
        Ring(1.0, 2**BITS)


@given(st.integers(1, 2000), st.floats(1e-6, 1e6))
def test_no_sum_goes_around_the_ring(num, limit):
    """All clients at the limit, rounded up: the sum is decoded with its sign."""
    ring = Ring(limit, num)
    top, _ = ring.encode(np.array([limit, -limit]), lambda n: np.full(n, 1 - 1e-9))
    total = (top.astype(np.uint64) * num).astype(np.uint32)
    assert ring.decode(total) == pytest.approx([num * limit, -num * limit], rel=1e-6)


def test_rounding_has_the_right_mean_and_cuts_are_counted():
    ring, chance = Ring(1.0, 2**20), np.random.default_rng(5)  # ten bits: steps of 0.001
    words, cut = ring.encode(np.full(200_000, 0.3333), chance.random)
    assert cut == 0
    mean = ring.decode(words).mean()
    assert mean == pytest.approx(0.3333, abs=5 * ring.step / np.sqrt(200_000))
    words, cut = ring.encode(np.array([2.0, -3.0, 0.0]), chance.random)
    assert cut == 2
    assert ring.decode(words) == pytest.approx([1, -1, 0])
