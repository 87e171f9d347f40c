"""Each codec within its bound, bytes that are known before, and no trust in what arrives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from silotune.compression.changes import (
    CODECS,
    codec_of,
    decode_change,
    encode_change,
    payload_layout,
)
from silotune.compression.codec import in_blocks
from silotune.compression.config import WireConfig
from silotune.core.errors import UpdateError
from silotune.core.tree import layout_bytes, layout_of, size_bytes

NUMBERS = st.integers(1, 600).flatmap(
    lambda count: arrays("float32", count, elements=st.floats(-1e4, 1e4, width=32))
)
OPTIONS = st.sampled_from([WireConfig(), WireConfig(block=32), WireConfig(share=0.01, block=128)])
BLOCK = {"int4": 64}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def through(codec, values):
    return codec.decode(codec.encode(values), values.numel())


@pytest.mark.parametrize("name", CODECS)
@given(numbers=NUMBERS, cfg=OPTIONS)
def test_numbers_come_back_within_the_bound(name, numbers, cfg):
    values = torch.from_numpy(numbers)
    off = through(codec_of(name, cfg), values) - values
    block = cfg.block or BLOCK.get(name, 256)
    largest = in_blocks(values, block).abs().amax(dim=1, keepdim=True)
    squares = in_blocks(values, block).double().square().sum(dim=1)
    left = in_blocks(off, block).double().square().sum(dim=1)
    if name == "bf16":
        assert (off.abs() <= values.abs() * 2**-8 + 1e-40).all()
    elif name in ("int8", "int4"):
        half = (1 + 2**-6) / (2 * (127 if name == "int8" else 7)) * largest + 1e-38
        assert (in_blocks(off, block).abs() <= half * (1 + 1e-6)).all()
    elif name == "sign":
        assert (left <= squares * (1 + 1e-5)).all()
    else:
        k = -(-int(cfg.share * block * 1000) // 1000)
        rounding = k * ((1 + 2**-6) / 254 * largest[:, 0].double()).square()
        assert (left <= (1 - k / block) * squares + rounding + 1e-30).all()


@pytest.mark.parametrize("name", CODECS)
@given(count=st.integers(0, 700), cfg=OPTIONS)
def test_the_layout_is_known_before_there_are_numbers(name, count, cfg):
    codec = codec_of(name, cfg)
    payload = codec.encode(drawn(count))
    assert layout_of(payload) == codec.layout(count)
    assert codec.decode(payload, count).shape == (count,)


def test_bytes_beside_float32():
    sizes = {
        name: layout_bytes(codec_of(name, WireConfig()).layout(256_000)) / (4 * 256_000)
        for name in CODECS
    }
    rounded = {name: round(1 / size, 1) for name, size in sizes.items()}
    assert rounded == {"bf16": 2.0, "int8": 4.0, "int4": 7.5, "sign": 30.1, "topk": 19.0}


@pytest.mark.parametrize("name", CODECS)
def test_zeros_and_tiny_numbers_are_no_special_case(name):
    codec = codec_of(name, WireConfig())
    assert torch.equal(through(codec, torch.zeros(300)), torch.zeros(300))
    tiny = torch.full((300,), 1e-44)
    assert through(codec, tiny).abs().max() <= 1e-38


def test_the_largest_numbers_stay_finite():
    values = torch.tensor([torch.finfo(torch.float32).max, 1.0])
    assert through(codec_of("bf16", WireConfig()), values).isfinite().all()


def test_sign_keeps_signs_and_the_mean_size_of_a_block():
    values = torch.tensor([3.0, -1.0, 1.0, -3.0])
    assert through(codec_of("sign", WireConfig()), values).tolist() == [2.0, -2.0, 2.0, -2.0]


def test_topk_keeps_the_largest():
    values = torch.zeros(256)
    values[[3, 70, 200]] = torch.tensor([5.0, -4.0, 0.1])
    found = through(codec_of("topk", WireConfig(share=2 / 256)), values)
    assert found.nonzero().flatten().tolist() == [3, 70]
    assert found[[3, 70]].tolist() == pytest.approx([5.0, -4.0], rel=0.02)


# --- whole changes ---------------------------------------------------------------------------


def change(seed=0):
    return {"b": drawn(3, 40, seed=seed), "a": drawn(50, seed=seed + 100)}


@pytest.mark.parametrize("name", CODECS)
def test_a_change_keeps_names_and_shapes(name):
    codec, sent = codec_of(name, WireConfig()), change()
    payload, left = encode_change(codec, sent)
    assert layout_of(payload) == payload_layout(codec, layout_of(sent))
    arrived = decode_change(codec, payload, layout_of(sent))
    assert layout_of(arrived) == layout_of(sent)
    for key in sent:
        assert torch.allclose(arrived[key] + left[key], sent[key], atol=1e-6)


@pytest.mark.parametrize("name", CODECS)
def test_with_feedback_all_that_was_wanted_is_sent_or_still_kept(name):
    codec, left = codec_of(name, WireConfig()), {}
    wanted, arrived = torch.zeros(3, 40), torch.zeros(3, 40)
    for round_ in range(20):
        one = {"b": drawn(3, 40, seed=round_)}
        payload, left = encode_change(codec, one, left)
        wanted = wanted + one["b"]
        arrived = arrived + decode_change(codec, payload, layout_of(one))["b"]
    assert torch.allclose(arrived + left["b"], wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["int4", "sign", "topk"])
def test_feedback_makes_the_mean_of_many_sends_right(name):
    """The same change in every round: with feedback its mean arrives, without it an error stays."""
    codec, same = codec_of(name, WireConfig()), {"b": drawn(3, 40)}
    totals = {}
    for feedback in (True, False):
        left, total = {}, torch.zeros(3, 40)
        for _ in range(60):
            payload, kept = encode_change(codec, same, left)
            left = kept if feedback else {}
            total = total + decode_change(codec, payload, layout_of(same))["b"]
        totals[feedback] = float((total / 60 - same["b"]).norm() / same["b"].norm())
    assert totals[True] < totals[False] / 4


def test_what_was_left_of_tensors_that_are_not_sent_now_stays():
    codec = codec_of("sign", WireConfig())
    _, left = encode_change(codec, {"a": drawn(50)})
    _, later = encode_change(codec, {"b": drawn(3, 40)}, left)
    assert torch.equal(later["a"], left["a"])
    assert set(later) == {"a", "b"}


# --- what anybody may send ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4", "sign", "topk"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, 1e35])
def test_an_impossible_scale_is_refused(name, bad):
    codec = codec_of(name, WireConfig())
    payload = dict(codec.encode(drawn(300)))
    payload["scales"] = torch.full_like(payload["scales"], bad)
    with pytest.raises(UpdateError, match="impossible scale"):
        codec.decode(payload, 300)


def test_bfloat16_that_is_not_finite_is_refused():
    payload = {"values": torch.tensor([1.0, float("nan")]).bfloat16()}
    with pytest.raises(UpdateError, match="NaN"):
        codec_of("bf16", WireConfig()).decode(payload, 2)


@pytest.mark.parametrize("places", [[7, 7], [9, 3], [3, 40]])
def test_places_twice_out_of_order_or_outside_are_refused(places):
    codec = codec_of("topk", WireConfig(block=32, share=2 / 32))
    payload = dict(codec.encode(drawn(32)))
    payload["places"] = torch.tensor(places, dtype=torch.uint8)
    with pytest.raises(UpdateError, match="places"):
        codec.decode(payload, 32)


@pytest.mark.parametrize("name", ["int8", "int4", "sign", "topk"])
@given(data=st.data())
def test_any_bytes_decode_to_finite_numbers_or_are_refused(name, data):
    codec, count = codec_of(name, WireConfig()), 300
    payload = {}
    for key, spec in codec.layout(count).items():
        size = layout_bytes({key: spec})
        raw = data.draw(st.binary(min_size=size, max_size=size))
        payload[key] = torch.frombuffer(bytearray(raw), dtype=spec.dtype).reshape(spec.shape)
    try:
        found = codec.decode(payload, count)
    except UpdateError:
        return
    assert found.isfinite().all()


def test_sizes_count_what_travels():
    payload, _ = encode_change(codec_of("int4", WireConfig()), {"a": drawn(1000)})
    assert size_bytes(payload) == 500 + 2 * 16
