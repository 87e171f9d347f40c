"""What comes down: the whole adapter, or news that give the same bits."""

from dataclasses import replace

import pytest
import torch

from silotune.algorithms.fedavg import FedAvgConfig, fedavg
from silotune.compression.changes import CODECS
from silotune.compression.config import WireConfig
from silotune.core.algorithm import LocalRule
from silotune.core.errors import UpdateError
from silotune.core.tree import layout_of, sha256, size_bytes
from silotune.core.types import Broadcast, News, ServerState
from silotune.federation.downlink import (
    UNSENT,
    Holdings,
    bytes_of,
    held,
    hold,
    result_of,
    settle,
    with_known_first,
    with_news,
)
from silotune.recipes.schema import RunConfig

ALL = fedavg(FedAvgConfig())
ONLY_B = replace(ALL, local=LocalRule(trains=lambda name, _: name == "b"))


def run_of(**wire):
    return RunConfig.model_validate({"rounds": 3, "data": {"path": "x"}, "wire": wire})


def drawn(seed):
    gen = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(40, generator=gen), "b": torch.randn(7, 30, generator=gen)}


def rounds(run, algorithm=ALL, *, num=6):
    """States of a run whose adapter moves at random, each settled."""
    state = ServerState(0, drawn(0))
    yield state
    for r in range(1, num):
        moved = {
            name: t + 0.1 * drawn(r)[name] if algorithm.local.trains(name, r) else t
            for name, t in state.adapter.items()
        }
        state = settle(run, algorithm, state, replace(state, round=r, adapter=moved))
        yield state


@pytest.mark.parametrize("name", ["float32", *CODECS])
@pytest.mark.parametrize("algorithm", [ALL, ONLY_B], ids=["all", "only b"])
def test_news_give_the_adapter_of_the_server_bit_for_bit(name, algorithm):
    run = run_of(down=name)
    first, *later = rounds(run, algorithm)
    here = first.adapter
    for state in later:
        assert state.news.base == state.round - 1
        here = with_news(run.wire, here, state.news)
        assert all(torch.equal(here[n], state.adapter[n]) for n in here)
        assert set(state.news.names) == ({"a", "b"} if algorithm is ALL else {"b"})


def test_without_a_codec_nothing_is_changed_by_settling():
    run = run_of()
    before, moved = ServerState(0, drawn(0)), drawn(1)
    after = settle(run, ALL, before, ServerState(1, moved))
    assert after.adapter is moved
    assert UNSENT not in after.extra
    assert size_bytes(after.news.payload) == size_bytes(moved)


@pytest.mark.parametrize("name", ["int8", "int4", "sign", "topk"])
def test_what_is_left_out_comes_later(name):
    """After rounds without any change, clients have what the server wanted to send."""
    run = run_of(down=name)
    state, wanted = ServerState(0, drawn(0)), drawn(1)
    for r in range(1, 80):
        now = wanted if r == 1 else state.adapter
        state = settle(run, ALL, state, replace(state, round=r, adapter=now))
    off = sum(float((state.adapter[n] - wanted[n]).norm()) for n in wanted)
    assert off < 0.1 * sum(float(t.norm()) for t in wanted.values())


def test_without_feedback_it_does_not():
    run = run_of(down="sign", error_feedback=False)
    state = settle(run, ALL, ServerState(0, drawn(0)), ServerState(1, drawn(1)))
    assert UNSENT not in state.extra


def test_new_shapes_and_tensors_of_their_own_come_whole():
    before = ServerState(0, drawn(0))
    grown = {**drawn(1), "c": torch.ones(2)}
    assert settle(run_of(), ALL, before, ServerState(1, grown)).news is None
    own = replace(ALL, tailor=lambda broadcast, _: broadcast)
    assert settle(run_of(), own, before, ServerState(1, drawn(1))).news is None


def test_a_tensor_that_changed_against_the_algorithm_is_news_too():
    moved = {**drawn(0), "a": torch.zeros(40), "b": drawn(1)["b"]}
    state = settle(run_of(), ONLY_B, ServerState(0, drawn(0)), ServerState(1, moved))
    assert state.news.names == ("a", "b")


# --- who holds what ---------------------------------------------------------------------------


def broadcasts(run=None):
    for state in rounds(run or run_of(), ONLY_B):
        yield Broadcast(state.round + 1, state.adapter, news=state.news)


def test_whoever_answered_the_round_before_gets_news_and_others_all():
    holdings = Holdings()
    one, two, three, *_ = broadcasts()
    for name in ("north", "south"):
        assert holdings.tell(name, one).adapter
    holdings.note("north", one, answered=True)
    holdings.note("south", one, answered=False)
    assert not holdings.tell("north", two).adapter
    assert holdings.tell("south", two).news is None
    # north was not asked in the second round
    assert holdings.tell("north", three).adapter
    assert bytes_of(holdings.tell("north", two)) == 4 * 210
    assert bytes_of(holdings.tell("south", two)) == 4 * 250


@pytest.mark.parametrize("name", ["float32", *CODECS])
def test_whoever_holds_this_very_adapter_gets_no_numbers(name):
    """Regression: with a codec, clients refused news about no tensors."""
    holdings, wire = Holdings(), WireConfig(down=name)
    _, second, *_ = broadcasts(run_of(down=name))
    holdings.note("north", second, answered=True)
    told = holdings.tell("north", second)
    assert bytes_of(told) == 0
    assert with_news(wire, second.adapter, told.news) == second.adapter
    with pytest.raises(UpdateError):
        with_news(wire, second.adapter, replace(told.news, payload=second.adapter))


def test_a_result_comes_whole_to_whoever_holds_the_adapter_of_its_round():
    """Regression: an end in mid-round left clients with the adapter from which it was made."""
    holdings, (_, second, *_) = Holdings(), broadcasts()
    holdings.note("north", second, answered=True)
    result = replace(second, adapter=drawn(9), news=None)
    assert holdings.tell("north", result).adapter is result.adapter


def test_clients_that_are_told_the_same_share_one_message():
    holdings, (one, two, *_) = Holdings(), broadcasts()
    for name in ("east", "north"):
        holdings.note(name, one, answered=True)
    told = holdings.tell_all(dict.fromkeys(["east", "north", "south", "west"], two))
    assert told["east"] is told["north"]
    assert told["south"] is told["west"]
    assert told["east"] is not told["south"]


def test_the_start_goes_along_to_whoever_was_not_there_in_the_first_round():
    start, (one, two, three, *_) = drawn(0), broadcasts()
    holdings = Holdings(start)
    assert not holdings.tell("north", one).start, "the first adapter is the start"
    holdings.note("north", one, answered=True)
    told = holdings.tell_all({"north": two, "south": two})
    assert (told["north"].start, told["south"].start) == ({}, start)
    assert bytes_of(told["north"]) == 4 * 210
    assert bytes_of(told["south"]) == 4 * 250 + 4 * 250
    holdings.note("south", two, answered=True)
    assert not holdings.tell("south", three).start
    holdings.note("south", three, answered=False)
    assert holdings.tell("south", three).start is start, "it may have lost its folder"
    assert not Holdings().tell("south", three).start


def test_another_first_adapter_than_the_start_brings_the_start_too():
    one, *_ = broadcasts()
    part = replace(one, adapter={**one.adapter, "a": torch.zeros(20)})
    assert Holdings(drawn(0)).tell("low rank", part).start
    cores = {"m.lora_core.weight": torch.eye(3)}
    new, grown = ({**one.adapter, **cores}, {**one.adapter, "m.lora_core.weight": torch.ones(3, 3)})
    assert not Holdings(drawn(0)).tell("north", replace(one, adapter=new)).start
    assert Holdings(drawn(0)).tell("north", replace(one, adapter=grown)).start


def test_a_client_keeps_the_adapter_and_says_what_it_lacks(tmp_path):
    with pytest.raises(UpdateError, match="holds no adapter"):
        held(tmp_path, 0)
    one, two, *_ = broadcasts()
    hold(tmp_path, one)
    assert all(torch.equal(held(tmp_path, 0)[n], t) for n, t in one.adapter.items())
    hold(tmp_path, two)
    with pytest.raises(UpdateError, match="since round 0, and this client holds that of round 1"):
        held(tmp_path, 0)
    (tmp_path / "held.safetensors").write_bytes(b"no")
    with pytest.raises(UpdateError, match="holds no adapter"):
        held(tmp_path, 1)


@pytest.mark.parametrize("down", ["float32", "int8"])
@pytest.mark.parametrize("bad", ["stranger", "shape", "missing", "type"])
def test_news_that_do_not_fit_are_refused(down, bad):
    run = run_of(down=down)
    first, state, *_ = rounds(run)
    news = state.news
    payload = dict(news.payload)
    key = min(payload)
    names = news.names
    if bad == "stranger":
        names = ("a", "c")
    elif bad == "shape":
        payload[key] = payload[key].reshape(-1)[:-1]
    elif bad == "missing":
        del payload[key]
    else:
        payload[key] = payload[key].double()
    with pytest.raises(UpdateError, match="the news since round 0"):
        with_news(run.wire, first.adapter, News(news.base, names, payload))


def test_a_settled_state_has_the_layout_that_it_had():
    for state in rounds(run_of(down="int4")):
        assert layout_of(state.adapter) == layout_of(drawn(0))


def test_a_result_that_is_another_adapter_is_no_news():
    *_, last = rounds(run_of())
    assert result_of(last, ALL) is last
    other = replace(ALL, result=lambda state: {n: 2 * t for n, t in state.adapter.items()})
    found = result_of(last, other)
    assert found.news is None
    assert torch.equal(found.adapter["a"], 2 * last.adapter["a"])


# --- the first adapter ------------------------------------------------------------------------


def test_the_first_adapter_does_not_travel_to_clients_that_begin_with_it():
    run = run_of()
    first, second, *_ = rounds(run, ONLY_B)
    known = sha256(first.adapter)
    holdings = Holdings(makes_first=lambda client, sha: client == "north" and sha == known)
    one = Broadcast(1, first.adapter, news=with_known_first(run, ONLY_B, first).news)
    told = holdings.tell("north", one)
    assert bytes_of(told) == 0
    for name in ("float32", *CODECS):
        assert with_news(WireConfig(down=name), first.adapter, told.news) == first.adapter
    assert holdings.tell("south", one).adapter is first.adapter
    # who takes part from the second round on makes the first adapter as well
    two = Broadcast(2, second.adapter, news=second.news)
    assert bytes_of(holdings.tell("north", two)) == 4 * 210
    assert holdings.tell("south", two).news is None
    holdings.note("north", one, answered=False)
    assert holdings.tell("north", two).news is None, "nobody knows what it holds now"
    # it has received the first one, but would take its own for it if it lost that
    holdings.note("south", one, answered=True)
    assert holdings.tell("south", two).news is None
    holdings.note("south", two, answered=True)
    assert bytes_of(holdings.tell("south", two)) == 0


def test_a_first_adapter_from_a_file_or_of_several_ranks_travels():
    state = ServerState(0, drawn(0))
    assert with_known_first(run_of(), ALL, state).news is not None
    tailored = replace(ALL, tailor=lambda common, client: common)
    assert with_known_first(run_of(), tailored, state).news is None
    started = run_of().model_copy(deep=True)
    adapter = started.adapter.model_copy(update={"start": "sha256:" + 64 * "0"})
    started = started.model_copy(update={"adapter": adapter})
    assert with_known_first(started, ALL, state).news is None
    assert with_known_first(run_of(), ALL, replace(state, round=1)).news is None


def test_nobody_makes_the_adapter_of_a_run_that_was_interrupted():
    """After it, the first adapter is not there to be compared."""
    holdings = Holdings(makes_first=lambda client, sha: True)
    _, two, *_ = broadcasts()
    assert holdings.tell("north", two).news is None
