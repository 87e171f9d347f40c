"""Encrypted sums: right within their precision, of one length, and unreadable without the key."""

import math

import numpy as np
import pytest
from scipy import stats

from silotune.core.errors import ConfigError, UpdateError
from silotune.privacy.secure_sum import ckks

tenseal = pytest.importorskip("tenseal", reason="needs the extra ckks")
CHANCE = np.random.default_rng(11)


@pytest.fixture(scope="module")
def holder():
    return ckks.Holder(1.0, 5)


@pytest.mark.parametrize("count", [1, ckks.SLOTS, ckks.SLOTS + 3])
def test_a_sum_of_ciphertexts_is_that_of_the_numbers(holder, count):
    server, total = holder.public(), None
    values = CHANCE.uniform(-1, 1, (5, count))
    for own in values:
        sent = holder.encrypt(own)
        assert sent.shape == (ckks.num_ciphertexts(count), ckks.CIPHERTEXT_BYTES)
        total = server.add(total, sent, who="x")
    assert total is not None
    assert np.abs(holder.decrypt(total, count) - values.sum(axis=0)).max() < 1e-8


def test_numbers_at_the_limit_of_all_clients_do_not_overflow():
    """Also where all coefficients of the encoding add up: equal numbers, and alternating ones."""
    for limit in (1.0, 1e4):
        holder = ckks.Holder(limit, 8)
        server = holder.public()
        for values in (np.full(ckks.SLOTS, limit), limit * (-1.0) ** np.arange(ckks.SLOTS)):
            total = None
            for _ in range(8):
                total = server.add(total, holder.encrypt(values), who="x")
            assert total is not None
            assert holder.decrypt(total, ckks.SLOTS) == pytest.approx(8 * values, rel=1e-6)


def test_the_server_has_no_secret_key(holder):
    server = holder.public()
    assert not server._context.has_secret_key()
    total = server.add(None, holder.encrypt(np.ones(3)), who="x")
    with pytest.raises(ValueError, match="secret"):
        total[0].decrypt()


def test_the_same_numbers_are_encrypted_differently_and_look_like_chance(holder):
    one, two = (holder.encrypt(np.zeros(ckks.SLOTS))[0][200:] for _ in range(2))
    assert np.mean(one == two) < 0.1
    low = one[: 8 * (len(one) // 8)].reshape(-1, 8)
    # all bytes but the one that holds the highest bits of a residue below 2^60, wherever it is
    passes = [
        stats.chisquare(np.bincount(low[:, at], minlength=256)).pvalue > 1e-6 for at in range(8)
    ]
    assert sum(passes) == 7


def test_every_client_has_the_key_that_opens_every_other_one(holder):
    """What masks do not allow, and why they are the default: the docs say it in these words."""
    alone = holder.public().add(None, holder.encrypt(np.array([0.25])), who="north")
    assert holder.decrypt(alone, 1) == pytest.approx([0.25])
    assert "opens every single change" in ckks.KEYS_NOTE


@pytest.mark.parametrize("meddle", ["zeros", "chance", "header"])
def test_what_is_no_ciphertext_is_refused_by_name(holder, meddle):
    good = holder.encrypt(np.ones(3))
    bad = {
        "zeros": np.zeros_like(good),
        "chance": CHANCE.integers(0, 256, good.shape, dtype=np.uint8),
        "header": np.concatenate([good[:, :40] ^ 255, good[:, 40:]], axis=1),
    }[meddle]
    with pytest.raises(UpdateError, match="client 'north', round 2: what it sent"):
        holder.public().add(None, bad, who="client 'north', round 2")


def test_a_ciphertext_of_fewer_numbers_is_refused(holder):
    few = tenseal.ckks_vector(holder._context, [1.0, 2.0]).serialize()
    row = np.frombuffer(few, dtype=np.uint8)
    padded = np.zeros((1, ckks.CIPHERTEXT_BYTES), dtype=np.uint8)
    padded[0, : len(row)] = row[: ckks.CIPHERTEXT_BYTES]
    with pytest.raises(UpdateError, match="no ciphertexts of this run"):
        holder.public().add(None, padded, who="x")


def test_numbers_too_large_for_a_useful_precision_are_refused():
    with pytest.raises(ConfigError, match="too large to be encrypted"):
        ckks.Holder(2.0**40, 4)


def test_a_million_numbers_take_eight_times_their_bytes():
    count = 10**6
    size = ckks.num_ciphertexts(count) * ckks.CIPHERTEXT_BYTES
    assert size / (4 * count) == pytest.approx(8.0, abs=0.05)
    assert math.ceil(count / ckks.SLOTS) == ckks.num_ciphertexts(count)
