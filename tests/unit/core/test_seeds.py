"""Named random draws: equal labels, equal draws; nothing else is touched."""

import hashlib
import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.seeds import derive, generator

label = st.integers(-(2**40), 2**40) | st.text("abcxyz-_.:/ 0123456789", max_size=12)


@given(st.integers(0, 2**63 - 1), st.lists(label, max_size=4))
def test_a_seed_is_the_first_63_bits_of_the_hash_of_seed_and_labels(seed, labels):
    # The contract that keeps old runs reproducible, spelt with hexadecimal digits instead of bytes.
    text = str(seed) + "".join("\x1f" + str(x) for x in labels)
    assert derive(seed, *labels) == int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2
    assert 0 <= derive(seed, *labels) < 2**63


@given(st.integers(0, 2**31), st.lists(label, max_size=4), st.lists(label, max_size=4))
def test_different_labels_give_different_seeds(seed, first, second):
    same = [str(x) for x in first] == [str(x) for x in second]
    assert (derive(seed, *first) == derive(seed, *second)) == same


def test_labels_are_kept_separate():
    drawn = {derive(1), derive(1, ""), derive(1, "ab", "c"), derive(1, "a", "bc"), derive(1, "abc")}
    assert len(drawn | {derive(11), derive(1, 1), derive(1, "c", "ab")}) == 8


def test_generators_of_equal_names_draw_equal_numbers_and_others_do_not():
    def draw(*name):
        return torch.rand(4, generator=generator(*name)).tolist()

    assert draw(17, "sampling", 3) == draw(17, "sampling", 3)
    others = [(18, "sampling", 3), (17, "noise", 3), (17, "sampling", 4), (17, "sampling", 3, "x")]
    assert all(draw(*name) != draw(17, "sampling", 3) for name in others)


def test_the_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate()
    torch.rand(3, generator=generator(17, "sampling", 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
