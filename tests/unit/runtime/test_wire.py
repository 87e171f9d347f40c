"""Parcels survive every carrier bit for bit, and hostile ones are refused."""

import contextlib
import io
import json
import resource
import struct
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import UpdateError
from silotune.core.types import Broadcast, Failure, News, Score, Update
from silotune.runtime import wire
from silotune.runtime.flower import records
from silotune.runtime.flower.records import from_record, to_record
from silotune.runtime.payload import HEADER_BYTES, Parcel, pack, unpack

GOLDEN = Path(__file__).parents[2] / "golden" / "update_parcel.json"


def in_parts(parcel: Parcel) -> RecordDict:
    """The record of a parcel whose row is too large to go with the text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "part_bytes", lambda size: size // 2 or -1)
        return to_record(parcel)


CARRIERS = {
    "itself": lambda parcel: parcel,
    "bytes": lambda parcel: unpack(pack(parcel)),
    "record": lambda parcel: from_record(to_record(parcel)),
    "record in parts": lambda parcel: from_record(in_parts(parcel)),
}
EXACT = [1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, float("inf")]
METRICS = {
    "train_loss": 1.25,
    "penalty": 0.5,
    "lr": 1e-3,
    "num_steps": 2,
    "num_tokens": 5,
    "num_padded_tokens": 6,
    "seconds_training": 0.125,
    "seconds": 0.25,
}
SECRET = "4711.25"
"""A value; no message may hold it."""

# --- there and back ------------------------------------------------------------------------------

names = st.text(max_size=12)
shapes = st.lists(st.integers(0, 4), max_size=4)
float_bits = st.one_of(
    st.integers(-(2**31), 2**31 - 1),  # every float32, including all NaNs
    st.sampled_from([int(np.float32(x).view(np.int32)) for x in EXACT]),
)


@st.composite
def tensors(draw):
    shape = draw(shapes)
    size = int(np.prod(shape, dtype=int))
    bits = draw(st.lists(float_bits, min_size=size, max_size=size))
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).reshape(shape)


states = st.dictionaries(names, tensors(), max_size=3)
# a group without tensors is not sent: it says nothing
extras = st.dictionaries(
    names, st.dictionaries(names, tensors(), min_size=1, max_size=2), max_size=2
)
counts = st.integers(0, 2**53)
numbers = st.floats(allow_nan=False, allow_infinity=False)
scores = st.builds(Score, st.just("north"), numbers, st.integers(1, 2**53), counts, counts).map(
    lambda s: replace(
        s,
        loss_sum=abs(s.loss_sum) % (s.num_tokens * 1e6),
        num_correct=min(s.num_correct, s.num_tokens),
    )
)
MOST = {"train_loss": 1e6, "penalty": 1e12, "lr": 1e300, "seconds": 3e8, "seconds_training": 3e8}
metric_values = st.fixed_dictionaries(
    {key: st.floats(0, MOST[key]) if key in MOST else counts for key in METRICS}
)
updates = st.builds(
    Update,
    client=st.just("north"),
    round=st.integers(1, 10**6),
    delta=states,
    num_examples=counts,
    metrics=metric_values,
    settings=st.dictionaries(names, numbers, max_size=2),
    extra=extras,
    score=st.none() | scores,
)


def bits_of(state):
    return {
        n: (tuple(t.shape), t.dtype, t.reshape(-1).view(torch.int32).tolist())
        for n, t in state.items()
    }


def all_bits(delta, extra):
    return {"": bits_of(delta), **{f"/{key}": bits_of(state) for key, state in extra.items()}}


def num_floats(delta, extra):
    return sum(t.numel() for state in (delta, *extra.values()) for t in state.values())


@pytest.mark.parametrize("carrier", CARRIERS)
@given(
    sent=st.builds(Broadcast, st.integers(1, 10**6), states, extras, st.booleans()),
)
def test_a_broadcast_arrives_bit_for_bit(carrier, sent):
    parcel = CARRIERS[carrier](wire.encode_broadcast(sent))
    got = wire.decode_broadcast(parcel)
    assert (got.round, got.score) == (sent.round, sent.score)
    assert all_bits(got.adapter, got.extra) == all_bits(sent.adapter, sent.extra)
    assert parcel.values.nbytes == 4 * num_floats(sent.adapter, sent.extra)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_news_arrive_without_the_adapter_and_an_adapter_without_news(carrier):
    news = News(3, ("b", "a"), {"codes": torch.tensor([1, -2], dtype=torch.int8)})
    sent = Broadcast(5, {}, {"controls": {"a": torch.ones(1)}}, news=news)
    parcel = CARRIERS[carrier](wire.encode_broadcast(sent))
    got = wire.decode_broadcast(parcel)
    assert (got.adapter, got.news.base, got.news.names) == ({}, 3, ("b", "a"))
    assert torch.equal(got.news.payload["codes"], news.payload["codes"])
    assert parcel.values.nbytes == 2 + 4
    whole = replace(sent, adapter={"a": torch.ones(2)})
    got = wire.decode_broadcast(CARRIERS[carrier](wire.encode_broadcast(whole)))
    assert got.news is None
    assert bits_of(got.adapter) == bits_of(whole.adapter)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_the_start_goes_along_with_news_or_an_adapter(carrier):
    start, news = {"a": torch.randn(3)}, News(3, ("a",), {"a": torch.ones(3)})
    for sent in (Broadcast(5, {}, news=news, start=start), Broadcast(1, start, start=start)):
        got = wire.decode_broadcast(CARRIERS[carrier](wire.encode_broadcast(sent)))
        assert bits_of(got.start) == bits_of(start)
        assert bits_of(got.adapter) == bits_of(sent.adapter)
    assert wire.decode_broadcast(wire.encode_broadcast(Broadcast(1, start))).start == {}


def test_a_message_with_half_of_each_is_refused():
    whole = wire.encode_broadcast(Broadcast(1, {"a": torch.ones(1)}))
    for about in (
        {**whole.about, "base": 0},
        {**whole.about, "tensors": [["news", "a", [1]]]},
        {**whole.about, "base": -1},
        {**whole.about, "base": 0, "changed": [3], "tensors": [["news", "a", [1]]]},
    ):
        with pytest.raises(UpdateError):
            wire.decode_broadcast(Parcel(about, whole.values))


@pytest.mark.parametrize("carrier", CARRIERS)
@given(sent=updates, bytes_down=counts)
def test_an_update_arrives_bit_for_bit_and_its_bytes_are_counted(carrier, sent, bytes_down):
    parcel = CARRIERS[carrier](wire.encode_update(sent))
    got = wire.decode_answer(parcel, "north", bytes_down=bytes_down)
    assert isinstance(got, Update)
    assert all_bits(got.delta, got.extra) == all_bits(sent.delta, sent.extra)
    plain = {"delta": {}, "extra": {}}
    bytes_up = 4 * num_floats(sent.delta, sent.extra)
    expected = replace(sent, **plain, bytes_down=bytes_down, bytes_up=bytes_up)
    assert replace(got, **plain) == expected
    # 5 and 5.0 are equal, but not in metrics.jsonl
    assert json.dumps(got.metrics, sort_keys=True) == json.dumps(sent.metrics, sort_keys=True)


@pytest.mark.parametrize("carrier", CARRIERS)
@given(sent=scores, bytes_down=counts, round_=counts)
def test_a_score_arrives_with_what_it_cost(carrier, sent, bytes_down, round_):
    parcel = CARRIERS[carrier](wire.encode_score(sent, round_))
    got = wire.decode_answer(parcel, "north", bytes_down=bytes_down)
    assert got == replace(sent, size_bytes=bytes_down)


@pytest.mark.parametrize("carrier", CARRIERS)
@given(
    sent=st.builds(
        Failure,
        st.just("north"),
        st.integers(0, 10**6),
        st.text(max_size=100),
        st.text(max_size=1000),
        st.text(max_size=1000),
    )
)
def test_a_failure_arrives_intact(carrier, sent):
    parcel = CARRIERS[carrier](wire.encode_failure(sent))
    assert wire.decode_answer(parcel, "north", bytes_down=8) == sent


@pytest.mark.parametrize("carrier", CARRIERS)
def test_views_and_trainable_tensors_are_sent_by_their_values(carrier):
    whole = torch.arange(6.0).reshape(2, 3)
    delta = {"turned": whole.T, "part": whole[:, 1], "learns": torch.nn.Parameter(whole)}
    parcel = CARRIERS[carrier](wire.encode_update(update(delta=delta)))
    got = wire.decode_answer(parcel, "north", bytes_down=0)
    assert isinstance(got, Update)
    for name, sent in delta.items():
        assert torch.equal(got.delta[name], sent.detach()), name


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_arrives_can_be_written_to_and_shares_nothing_with_the_message(carrier):
    parcel = CARRIERS[carrier](wire.encode_update(update()))
    one, other = (wire.decode_answer(parcel, "north", bytes_down=0) for _ in range(2))
    one.delta["a"].add_(1)
    assert bits_of(other.delta) == bits_of(update().delta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.bool])
def test_other_types_are_not_sent(dtype):
    wrong = {"a": torch.ones(2, dtype=dtype)}
    with pytest.raises(AssertionError, match=f"a is {dtype}, which is not sent"):
        wire.encode_update(update(delta=wrong))
    with pytest.raises(AssertionError, match="not sent"):
        wire.encode_broadcast(Broadcast(1, wrong))
    with pytest.raises(AssertionError, match="not sent"):
        wire.encode_broadcast(Broadcast(1, {}, {"moments": wrong}))


PACKED = {
    "a": torch.tensor([1, -2, 3], dtype=torch.int8),
    "b": torch.tensor([[0.5, 3.0]]).bfloat16(),
    "c": torch.tensor([7, 2**31 - 1, -5], dtype=torch.int32),
    "d": torch.tensor([250], dtype=torch.uint8),
    "e": torch.tensor([1.5]),
}
"""Three bytes first, so that no later number begins at a multiple of its size."""


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_codecs_and_masks_make_of_a_change_arrives_as_it_is(carrier):
    parcel = CARRIERS[carrier](wire.encode_update(update(delta=PACKED)))
    assert parcel.values.nbytes == 3 + 4 + 12 + 1 + 4
    got = wire.decode_answer(parcel, "north", bytes_down=0)
    assert isinstance(got, Update)
    assert got.bytes_up == 24
    for name, sent in PACKED.items():
        assert got.delta[name].dtype == sent.dtype
        assert torch.equal(got.delta[name], sent), name


def test_a_type_that_is_not_known_is_refused():
    listed = [["delta", "a", [2], "float64"]]
    assert "brings 'a' as float64, which is not accepted" in refusal(parcel_of(tensors=listed))


def test_an_adapter_arrives_as_float32_only():
    parcel = wire.encode_broadcast(Broadcast(1, {"a": torch.ones(2).bfloat16()}))
    with pytest.raises(UpdateError, match="not float32"):
        wire.decode_broadcast(parcel)


def test_a_name_may_be_in_two_groups():
    sent = update(delta={"a": torch.ones(1)}, extra={"delta": {"a": torch.zeros(1)}})
    got = wire.decode_answer(wire.encode_update(sent), "north", bytes_down=0)
    assert isinstance(got, Update)
    assert all_bits(got.delta, got.extra) == all_bits(sent.delta, sent.extra)


# --- the format is a contract --------------------------------------------------------------------


def test_the_keys_and_the_shape_of_an_update_are_fixed():
    """A contract: changing it is a decision, because servers and clients are upgraded separately.

    tests/golden/update_parcel.json was written by hand from the description of the format (one
    text, then one row of bytes: groups in the order delta, extra; tensors in name order). It is
    not a copy of the code's output. Its numbers are exact in binary.
    """
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    sent = Update(
        client="never sent",
        round=3,
        delta={
            "z": torch.zeros(0, 3),
            "a.lora_B": torch.tensor(0.25),
            "a.lora_A": torch.tensor([[1.0, -0.5], [-0.0, 3.0]]),
        },
        num_examples=7,
        metrics=golden["about"]["update"]["metrics"],
        settings={"mu": 0.01},
        extra={"controls": {"c": torch.tensor([-8.0])}},
        score=Score("never sent", 4.5, 3, 1, 2, size_bytes=99),
        bytes_down=99,
        bytes_up=99,
    )
    parcel = wire.encode_update(sent)
    assert json.loads(json.dumps(parcel.about)) == golden["about"]
    row = struct.pack(f"<{len(golden['values'])}f", *golden["values"])
    assert parcel.values.tobytes() == row
    assert "never sent" not in json.dumps(parcel.about)
    # bytes: the length of the text in eight bytes, little-endian; the text; the row
    data = pack(parcel)
    assert data.endswith(b"}" + row)
    assert struct.unpack("<Q", data[:8])[0] == len(data) - 8 - len(row)
    assert json.loads(data[8 : -len(row)]) == golden["about"]
    # a Flower record: the same text under one name, the same row under another
    record = to_record(parcel)
    assert list(record) == ["about"]
    assert json.loads(str(record.config_records["about"]["about"])) == golden["about"]
    assert record.config_records["about"]["values"] == row
    # or in a separate record, if it is larger than one of Flower's parts
    record = in_parts(parcel)
    assert json.loads(str(record.config_records["about"]["about"])) == golden["about"]
    assert "values" not in record.config_records["about"]
    array = record.array_records["values"]["values"]
    assert (array.dtype, array.shape) == ("uint8", (24,))
    assert array.data == row
    # and what another silotune would write can be read
    got = wire.decode_answer(Parcel(golden["about"], parcel.values), "north", bytes_down=0)
    assert isinstance(got, Update)
    assert all_bits(got.delta, got.extra) == all_bits(sent.delta, sent.extra)


def test_the_keys_of_the_other_parcels_are_fixed():
    broadcast = Broadcast(2, {"a": torch.ones(2)}, {"moments": {"m": torch.ones(1)}}, score=False)
    assert json.loads(json.dumps(wire.encode_broadcast(broadcast).about)) == {
        "round": 2,
        "score": False,
        "tensors": [["adapter", "a", [2]], ["extra/moments", "m", [1]]],
    }
    assert wire.encode_score(Score("north", 1.5, 4, 2, 3, size_bytes=9), 5).about == {
        "score": {"loss_sum": 1.5, "num_tokens": 4, "num_correct": 2, "num_examples": 3},
        "round": 5,
    }
    assert wire.encode_failure(Failure("north", 5, "code", "place", "fix")).about == {
        "failure": {"round": 5, "code": "code", "place": "place", "fix": "fix"},
    }


# --- hostile or broken parcels -------------------------------------------------------------------


def update(**changes):
    plain = Update(
        client="north",
        round=1,
        delta={"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(float(SECRET))},
        num_examples=3,
        metrics=METRICS,
        score=Score("north", float(SECRET), 4, 2, 3),
    )
    return replace(plain, **changes)


def parcel_of(values=None, **changes):
    """A good update's parcel with keys of its text changed; `...` removes a key."""
    good = wire.encode_update(update())
    facts = {k: v for k, v in {**good.about["update"], **changes}.items() if v is not ...}
    row = good.values if values is None else np.asarray(values, dtype="<f4").view(np.uint8)
    return Parcel({"update": facts}, row)


def refusal(parcel, client="north"):
    with pytest.raises(UpdateError) as caught:
        wire.decode_answer(parcel, client, bytes_down=0)
    text = str(caught.value)
    assert SECRET not in text
    assert "4711" not in text
    return text


def test_the_hand_made_parcel_is_good_before_it_is_spoilt():
    assert isinstance(wire.decode_answer(parcel_of(), "north", bytes_down=0), Update)


LAYOUTS = {
    "a name twice": ([["delta", "a", [1]], ["delta", "a", [2]]], "lists tensor 'a' twice"),
    "a negative size": ([["delta", "a", [-3]]], "negative size"),
    "two negative sizes": ([["delta", "a", [-3, -1]]], "negative size"),
    "a size of -1": ([["delta", "a", [-1]]], "negative size"),
    "too large": ([["delta", "a", [4]]], "fewer numbers than its tensors need"),
    "too small": ([["delta", "a", [2]]], "more numbers than its tensors need"),
    "no tensors": ([], "more numbers than its tensors need"),
    "a size that overflows": ([["delta", "a", [2**32, 2**32]]], "fewer numbers"),
    "a product that is 0 modulo 2^64": ([["delta", "a", [2**32, 2**32, 3]]], "fewer numbers"),
    "a terabyte": ([["delta", "a", [2**38]]], "fewer numbers"),
    "a size beyond 64 bits": ([["delta", "a", [10**40]]], "fewer numbers"),
    "nothing times 2^63": (
        [["delta", "a", [3]], ["delta", "b", [0, 2**63]]],
        "'b' an impossible shape",
    ),
    "nothing times a lot": (
        [["delta", "a", [3]], ["delta", "b", [0, 2**62, 2**62]]],
        "'b' an impossible shape",
    ),
    "too many dimensions": ([["delta", "a", [3] + [1] * 100]], "tensors.0"),
    "half a size": ([["delta", "a", [1.5, 2]]], "tensors.0"),
    "a size in words": ([["delta", "a", [SECRET]]], "tensors.0"),
    "a shape that is none": ([["delta", "a", SECRET]], "tensors.0"),
    "a name that is none": ([["delta", 7, [3]]], "tensors.0"),
    "no shape": ([["delta", "a"]], "tensors.0"),
    "no list": (SECRET, "tensors"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_an_impossible_layout_is_refused_and_nothing_is_allocated(kind):
    layout, text = LAYOUTS[kind]
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    assert text in refusal(parcel_of(tensors=layout))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    assert time.perf_counter() - began < 5


@given(
    layout=st.lists(
        st.tuples(
            st.sampled_from(["delta", "extra/a", "other"]),
            st.sampled_from("ab"),
            st.lists(st.integers(-2, 5) | st.integers(0, 2**70), max_size=5),
        ),
        max_size=4,
    )
)
def test_any_layout_is_read_or_refused_by_our_own_error(layout):
    try:
        got = wire.decode_answer(parcel_of(tensors=layout), "north", bytes_down=0)
    except UpdateError:
        return
    assert isinstance(got, Update)
    assert num_floats(got.delta, got.extra) <= 3


MISSING = ["round", "num_examples", "metrics", "settings", "score", "tensors"]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_named(key):
    assert f"cannot be read: {key}." in refusal(parcel_of(**{key: ...}))


SPOILT = {
    "unknown key": ({"verdict": SECRET}, "verdict"),
    "a client's name": ({"client": "mallory"}, "client"),
    "a text for a round": ({"round": "three " + SECRET}, "round"),
    "a text for a count": ({"num_examples": SECRET}, "num_examples"),
    "more examples than can be counted": ({"num_examples": 10**400}, "num_examples"),
    "metrics that are a text": ({"metrics": SECRET}, "metrics"),
    "a metric that is a text": ({"metrics": {**METRICS, "train_loss": "x" + SECRET}}, "train_loss"),
    "a metric that is NaN": ({"metrics": {**METRICS, "train_loss": float("nan")}}, "train_loss"),
    "a metric that is infinite": ({"metrics": {**METRICS, "seconds": float("inf")}}, "seconds"),
    "a missing metric": ({"metrics": {"train_loss": 1.0, "num_tokens": 1}}, "metrics"),
    "half of a loss": (
        {"metrics": {"train_loss": 1.0, "seconds": 1.0, "seconds_training": 1.0}},
        "metrics",
    ),
    # rows of metrics.jsonl hold metrics next to these keys: a client must not overwrite them
    "a metric called round": ({"metrics": {**METRICS, "round": 99}}, "metrics.round"),
    "a metric called client": ({"metrics": {**METRICS, "client": 1.0}}, "metrics.client"),
    "a list of settings": ({"settings": [SECRET]}, "settings"),
    "a score that is a text": ({"score": SECRET}, "score"),
    "half a score": ({"score": {"loss_sum": 1.0}}, "score"),
    "a score of fewer than no tokens": (
        {"score": {"loss_sum": 1.0, "num_tokens": -1, "num_correct": 0, "num_examples": 1}},
        "score.num_tokens",
    ),
    "a score of no tokens": (
        {"score": {"loss_sum": 1.0, "num_tokens": 0, "num_correct": 0, "num_examples": 1}},
        "score.num_tokens",
    ),
    "tensors in the text": ({"delta": [float(SECRET)]}, "delta"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_update_is_refused_by_its_key_and_no_value_is_shown(kind):
    changes, key = SPOILT[kind]
    text = refusal(parcel_of(**changes))
    assert text.startswith("a message cannot be read: ")
    assert key in text
    assert text.endswith("Install the same version of silotune on both sides.")
    assert "three" not in text
    assert "mallory" not in text


RANGES = {
    "metrics.train_loss": [-1.0, 1.1e6, 1e308],
    "metrics.penalty": [1e13, -1e308],
    "metrics.lr": [-1e-3],
    "metrics.seconds": [-1e308, -1.0, 1e308, 3.2e8],
    "metrics.seconds_training": [-1e308, 1e308],
    "metrics.noise_multiplier": [-1.0, 1e300],
    "metrics.sampling_rate": [-0.1, 1.5],
    "metrics.num_lots": [-1, 2**53],
    "metrics.num_steps": [-1, 2**54],
    "num_examples": [-1, 2**54],
    "round": [-1, 10**400],
}


@pytest.mark.parametrize("key", RANGES)
def test_every_number_that_arrives_has_a_range(key):
    """Bug: a metric of 1e308 passed, and ended the finished run in an OverflowError."""
    section, _, inner = key.rpartition(".")
    for value in RANGES[key]:
        changed = {"metrics": {**METRICS, inner: value}} if section else {inner: value}
        assert key in refusal(parcel_of(**changed)), value


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss_sum": -1e308}, "its held-out loss is impossible"),
        ({"loss_sum": -1e-9}, "its held-out loss is impossible"),
        ({"loss_sum": 1e308}, "its held-out loss is impossible"),
        ({"num_correct": 5}, "its score has more hits than predictions"),
    ],
)
def test_an_impossible_score_is_refused(changes, text):
    facts = {"loss_sum": 1.0, "num_tokens": 4, "num_correct": 2, "num_examples": 3, **changes}
    for parcel in (parcel_of(score=facts), Parcel({"score": facts, "round": 1})):
        assert text in refusal(parcel)


def test_text_that_nobody_reads_is_refused():
    """Bug: 60 MB in an unknown key of an answer were accepted, and counted nowhere."""
    good = parcel_of()
    long = "x" * 10_000
    for about in ({"note": long}, {long: 1}, {"score": None}, {"report": {}}, {"tensors": []}):
        text = refusal(Parcel({**good.about, **about}, good.values))
        assert text.startswith("a message cannot be read: ")
        assert len(text) < 300
    many = {f"{'y' * 90}{n}": 1.0 for n in range(100_000)}
    assert len(refusal(parcel_of(settings=many))) < 1000


def test_a_score_of_nothing_would_divide_by_zero_and_is_refused_alone_too():
    about = {"loss_sum": 1.0, "num_tokens": 0, "num_correct": 0, "num_examples": 1}
    assert "num_tokens" in refusal(Parcel({"score": about, "round": 1}))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), "nan"])
def test_a_score_that_is_not_finite_is_refused_by_name(loss):
    facts = {"loss_sum": loss, "num_tokens": 1, "num_correct": 0, "num_examples": 1}
    for parcel in (parcel_of(score=facts), Parcel({"score": facts, "round": 1})):
        assert refusal(parcel) == "client 'north': its held-out loss is not finite."


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"update": None},
        {"update": []},
        {"update": SECRET},
        {"score": None},
        {"score": SECRET},
        {"failure": None},
        {"failure": SECRET},
        {"failure": {"round": 1, "code": "x" * 101, "place": "", "fix": ""}},
        {"failure": {"round": 1, "code": "", "place": "x" * 1001, "fix": ""}},
        {"failure": {"round": 1, "code": "", "place": "", "fix": "", "client": "mallory"}},
        {"failure": {"round": SECRET, "code": "", "place": "", "fix": ""}},
        {"failure": {"round": 1, "code": float(SECRET), "place": "", "fix": ""}},
        {"report": {}},
    ],
)
def test_a_parcel_that_is_not_an_answer_is_refused(about):
    refusal(Parcel(about))


@pytest.mark.parametrize(
    "about",
    [
        {},
        {"round": 0, "score": True, "tensors": []},
        {"round": 1, "score": True},
        {"round": 1, "score": True, "tensors": [], "recipe": SECRET},
        {"round": 1, "score": SECRET, "tensors": []},
    ],
)
def test_a_parcel_that_is_not_a_broadcast_is_refused(about):
    with pytest.raises(UpdateError, match="a message cannot be read") as caught:
        wire.decode_broadcast(Parcel(about))
    assert SECRET not in str(caught.value)


def test_a_client_that_names_itself_another_answers_under_the_name_that_was_asked():
    for sent in (wire.encode_update(update()), wire.encode_score(Score("x", 1.0, 1, 1, 1), 1)):
        lying = Parcel({**sent.about, "client": "mallory"}, sent.values)
        assert wire.decode_answer(lying, "north", bytes_down=0).client == "north"
    failure = Parcel({**wire.encode_failure(Failure("x", 1, "c", "p")).about, "client": "mallory"})
    assert wire.decode_answer(failure, "north", bytes_down=0).client == "north"


# --- bytes


DATA = pack(wire.encode_update(Update("n", 1, {"a": torch.ones(2)}, 1, METRICS)))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20, len(DATA) - 9])
def test_incomplete_bytes_are_refused(length):
    with pytest.raises(UpdateError, match="Install the same version of silotune on both sides"):
        unpack(DATA[:length])


def test_missing_numbers_are_noticed_by_the_layout():
    assert "fewer numbers" in refusal(unpack(DATA[:-4]))
    assert "more numbers" in refusal(unpack(DATA + bytes(4)))


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda n, rest: n.to_bytes(8, "little") + rest,
        st.integers(0, 2**64 - 1),
        st.binary(max_size=30),
    )
)
def test_any_bytes_are_a_parcel_or_refused(data):
    try:
        parcel = unpack(data)
    except UpdateError:
        return
    assert isinstance(parcel.about, dict)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused_by_our_own_error(at, byte):
    data = bytearray(DATA)
    data[at] = byte
    with contextlib.suppress(UpdateError):
        wire.decode_answer(unpack(bytes(data)), "north", bytes_down=0)


TEXTS = {
    "nothing": b"",
    "no JSON": f"hello {SECRET}".encode(),
    "a list": f"[{SECRET}]".encode(),
    "a number": SECRET.encode(),
    "no UTF-8": b"\xff\xfe\xfa\x00",
    "nested too deeply": b'{"a":' + b"[" * 200_000,
    "a number of 5000 digits": b'{"a": ' + b"7" * 5000 + b"}",
    # json.loads gives it; it could not be written to metrics.jsonl, which would end the run
    "half a character": rb'{"update": {"verdict \ud800": 1}}',
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_text_that_is_not_an_object_is_refused(kind):
    text = TEXTS[kind]
    with pytest.raises(UpdateError, match=r"a message has no readable text\.") as caught:
        unpack(len(text).to_bytes(HEADER_BYTES, "little") + text)
    assert SECRET not in str(caught.value)


# --- Flower's records


def record_of(array: Array, about: object = None) -> RecordDict:
    text = json.dumps(wire.encode_update(update()).about) if about is None else about
    records = {"about": ConfigRecord({"about": text})}
    return RecordDict({**records, "values": ArrayRecord({"values": array})})


def good_array() -> Array:
    return in_parts(wire.encode_update(update())).array_records["values"]["values"]


def npy(array, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("says", ["uint8", "object", "|O"])
@pytest.mark.parametrize("stype", ["numpy.ndarray", "same", "pickle"])
def test_an_object_array_is_never_decoded(tmp_path, says, stype):
    trap = tmp_path / "opened"
    data = npy(np.array([Trap(trap)], dtype=object), allow_pickle=True)
    np.load(io.BytesIO(data), allow_pickle=True)
    assert trap.exists(), "the trap works"
    trap.unlink()
    stype = good_array().stype if stype == "same" else stype
    with pytest.raises(UpdateError):
        wire.decode_answer(
            from_record(record_of(Array(says, (1,), stype, data))), "north", bytes_down=0
        )
    assert not trap.exists()


ROW = np.ones(3, dtype="<f4").tobytes()
ARRAYS = {
    "numpy's own file format": ("uint8", (12,), "numpy.ndarray", npy(np.ones(3))),
    "float32": ("float32", (3,), None, ROW),
    "bytes that are cut off": ("uint8", (12,), None, ROW[:-1]),
    "more than can be": ("uint8", (2**62,), None, ROW),
    "a negative size": ("uint8", (-12,), None, ROW),
    "two dimensions": ("uint8", (12, 1), None, ROW),
    "a scalar": ("uint8", (), None, ROW[:1]),
    "an unknown form": ("uint8", (12,), "torch.save", ROW),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_not_a_row_of_bytes_is_refused(kind):
    dtype, shape, stype, data = ARRAYS[kind]
    array = Array(dtype, shape, stype or good_array().stype, data)
    with pytest.raises(UpdateError, match="something else than bytes"):
        from_record(record_of(array))


@given(data=st.binary(max_size=40), shape=st.lists(st.integers(-1, 10), max_size=2))
def test_any_bytes_in_an_array_are_numbers_or_refused(data, shape):
    array = Array("uint8", tuple(shape), good_array().stype, data)
    try:
        values = from_record(record_of(array)).values
    except UpdateError:
        return
    assert values.tobytes() == data


@pytest.mark.parametrize("row", ["one", 3, 1.5, [1.0, 2.0], [b"four"]], ids=repr)
def test_a_row_next_to_the_text_that_is_not_a_row_is_refused(row):
    text = json.dumps(wire.encode_update(update()).about)
    record = RecordDict({"about": ConfigRecord({"about": text, "values": row})})
    with pytest.raises(UpdateError, match="something else than bytes"):
        from_record(record)


@pytest.mark.parametrize(
    ("count", "parts"),
    [
        (0, []),
        (2**19, []),
        (2**19 + 1, [2**19, 1]),
        (2**25, [2**19] * 64),
        (2**26, [2**20] * 64),
        (2**27 + 1, [2**21] * 64 + [1]),
    ],
)
def test_a_row_is_next_to_its_text_or_in_parts_that_pass_over_a_slow_link(count, parts):
    """Regression: parts were of 2 MB, and never arrived below 0.6 Mbit/s."""
    row = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8)
    record = to_record(Parcel({}, row))
    arrays = [array for found in record.array_records.values() for array in found.values()]
    assert [len(part.data) for array in arrays for _, part in array.slice_array()] == parts
    assert from_record(record).values.tobytes() == row.tobytes()
    # as it travels: objects by their hashes, put together again on the other side
    objects = {key: item.deflate() for key, item in get_all_nested_objects(record).items()}
    assert max(map(len, objects.values())) <= 2**21 + 2**10
    arrived = inflate_object_from_contents(record.object_id, objects)
    assert from_record(arrived).values.tobytes() == row.tobytes()


def test_a_record_without_a_text_is_refused():
    about = ConfigRecord({"about": 3})
    for record in (
        RecordDict(),
        RecordDict({"about": ConfigRecord()}),
        RecordDict({"about": about}),
        RecordDict({"other": ConfigRecord({"about": "{}"})}),
        record_of(good_array(), b"{}"),
        record_of(good_array(), ["{}"]),
        record_of(good_array(), f"hello {SECRET}"),
        RecordDict({"about": ArrayRecord({"about": good_array()})}),
    ):
        with pytest.raises(UpdateError, match=r"a message has no readable text\."):
            from_record(record)


def test_other_records_are_ignored_and_missing_numbers_are_noticed():
    good = in_parts(wire.encode_update(update()))
    more = RecordDict({**good, "pickle": ConfigRecord({"code": b"\x80\x04."})})
    assert isinstance(wire.decode_answer(from_record(more), "north", bytes_down=0), Update)
    none = RecordDict({"about": good["about"]})
    assert "fewer numbers" in refusal(from_record(none))
    other = RecordDict({"about": good["about"], "values": ArrayRecord({"x": good_array()})})
    assert "fewer numbers" in refusal(from_record(other))
