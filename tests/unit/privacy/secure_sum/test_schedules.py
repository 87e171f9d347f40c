"""What no order of messages can bring about: a sum over too few, or both shares of one client.

A server may send any client any message at any time, and clients may be restarted in between. The
rounds here are driven by chance, not by a protocol.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.privacy.secure_sum.member import Member, Refused, threshold_of
from silotune.privacy.secure_sum.opening import NotOpened
from tests.unit.privacy.secure_sum.test_round import KEYS, SESSION, Round


@given(st.integers(3, 9), st.data())
@settings(deadline=None, max_examples=40)
def test_with_one_client_too_few_gone_at_any_steps_nothing_is_opened(num, data):
    """One more than may be missing, each lost at a step of its own: no schedule opens the sum."""
    one, spare = Round(num), num - threshold_of(num)
    gone = data.draw(st.permutations(one.names))[: spare + 1]
    when = {name: data.draw(st.sampled_from(["share", "mask", "answer"])) for name in gone}

    def left(*steps):
        return [name for name in one.names if when.get(name) not in steps]

    def rest():
        one.share(left("share"))
        one.mask(left("share", "mask"))
        one.answer(left("share", "mask", "answer"))
        return one.open()

    one.advertise()
    with pytest.raises((Refused, NotOpened), match=r"are left|clients only|clients answered"):
        rest()


STEPS = ("advertise", "share", "mask", "answer", "restart")


@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=12), st.data())
@settings(deadline=None, max_examples=200)
def test_no_schedule_makes_a_client_answer_twice_or_give_both_shares_of_another(steps, data):
    """Client-0 gets any messages in any order, about any others, with restarts in between."""
    one = Round(4)
    others = {name: member for name, member in one.members.items() if name != "client-0"}
    adverts = {name: member.advertise() for name, member in others.items()}
    own, given_, masked = one.members["client-0"], [], 0
    # the others' shares for client-0, made for the keys of its that they were shown first
    hidden = {}
    for step in ["advertise", *steps] if data.draw(st.booleans()) else steps:
        some = data.draw(st.lists(st.sampled_from(one.names), min_size=1, unique=True))
        if step == "restart":
            own = Member.again("client-0", SESSION, own.kept(), sign=KEYS[0].sign)
            continue
        try:
            if step == "advertise":
                adverts["client-0"] = own.advertise()
                for name, member in others.items():
                    hidden[name] = member.share(adverts, one.roster)["client-0"]
            elif step == "share":
                own.share(adverts, one.roster)
            elif step == "mask":
                own.mask(one.words["client-0"], hidden)
                masked += 1
            else:
                given_.append(own.answer(some))
        except Refused:
            pass
    assert masked <= 1
    assert len(given_) <= 1
    for answer in given_:
        assert not answer.own.keys() & answer.masking.keys()
        assert len(answer.own) >= threshold_of(4)
        assert "client-0" in answer.own


def test_the_schedules_above_do_come_to_an_answer():
    """Or the property would hold of clients that refuse everything."""
    one = Round(4)
    one.advertise()
    hidden = one.share()
    own = one.members["client-0"]
    for _ in range(2):
        own = Member.again("client-0", SESSION, own.kept(), sign=KEYS[0].sign)
    assert isinstance(own.mask(one.words["client-0"], hidden["client-0"]), np.ndarray)
    own = Member.again("client-0", SESSION, own.kept(), sign=KEYS[0].sign)
    assert len(own.answer(one.names).own) == 4
    again = Member.again("client-0", SESSION, own.kept(), sign=KEYS[0].sign)
    with pytest.raises(Refused, match="the next one is 'nothing'"):
        again.answer(one.names)
