"""Arithmetic on adapter states: algebra of the mean, layouts, norms and fingerprints."""

import hashlib
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silotune.core.errors import UpdateError
from silotune.core.tree import (
    add,
    check_finite,
    check_same_layout,
    l2_norm,
    layout_of,
    scale,
    sha256,
    size_bytes,
    squared_distance,
    subtract,
    weighted_mean,
    zeros_like,
)
from silotune.core.types import TensorSpec

PROPERTY = settings(max_examples=25, deadline=None)
WHO = "client 'north', round 3"

values = st.floats(-1e3, 1e3, width=32)


@st.composite
def states(draw):
    """A state of two tensors, (3,) and (2, 2), float32."""
    flat = torch.tensor(draw(st.lists(values, min_size=7, max_size=7)), dtype=torch.float32)
    return {"layers.0.lora_A": flat[:3].clone(), "layers.0.lora_B": flat[3:].reshape(2, 2).clone()}


weights = st.integers(1, 5000).map(float)
pairs = st.lists(st.tuples(weights, states()), min_size=1, max_size=6)


def fingerprint(pairs):
    return [(weight, sha256(state)) for weight, state in pairs]


def assert_close(got, expected, *, rtol=1e-6, atol=1e-9):
    """Equal up to the last float32 digit: `rtol` of each value, `atol` where sums cancel."""
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=rtol, atol=atol)


def slow_mean(pairs):
    """The oracle: exact sums of Python floats, one coordinate at a time."""
    total = math.fsum(weight for weight, _ in pairs)
    return {
        name: torch.tensor(
            [
                math.fsum(w * s[name].flatten()[i].item() for w, s in pairs) / total
                for i in range(first.numel())
            ]
        ).reshape(first.shape)
        for name, first in pairs[0][1].items()
    }


# --- weighted_mean


@PROPERTY
@given(pairs)
def test_weighted_mean_equals_the_exact_sum_of_every_coordinate(pairs):
    assert_close(weighted_mean(pairs), slow_mean(pairs))


def test_weighted_mean_of_unequal_weights_and_both_signs():
    # by hand: (1 * 4 + 3 * -8) / 4 = -5 and (1 * -1 + 3 * 1) / 4 = 0.5
    pairs = [(1.0, {"a": torch.tensor([4.0, -1.0])}), (3.0, {"a": torch.tensor([-8.0, 1.0])})]
    assert weighted_mean(pairs)["a"].tolist() == [-5.0, 0.5]


@PROPERTY
@given(pairs, st.randoms(use_true_random=False))
def test_arrival_order_does_not_change_one_bit_once_pairs_are_sorted_by_name(pairs, random):
    named = [(f"client-{i}", pair) for i, pair in enumerate(pairs)]
    shuffled = random.sample(named, len(named))
    in_name_order = [pair for _, pair in sorted(shuffled, key=lambda item: item[0])]
    assert sha256(weighted_mean(in_name_order)) == sha256(weighted_mean(pairs))


@PROPERTY
@given(pairs, st.floats(1e-3, 1e3))
def test_scaling_all_weights_changes_nothing(pairs, factor):
    scaled = [(factor * weight, state) for weight, state in pairs]
    assert_close(weighted_mean(scaled), weighted_mean(pairs))


@PROPERTY
@given(weights, states())
def test_one_client_gets_its_own_delta_back_exactly(weight, state):
    assert all(torch.equal(t, state[n]) for n, t in weighted_mean([(weight, state)]).items())


@PROPERTY
@given(st.lists(weights, min_size=1, max_size=6), states())
def test_the_mean_of_equal_states_is_that_state(weights, state):
    assert_close(weighted_mean([(w, state) for w in weights]), state)


@PROPERTY
@given(pairs)
def test_a_client_split_into_two_clones_of_half_weight_changes_nothing(pairs):
    (weight, state), *others = pairs
    split = [(weight / 2, state), (weight / 2, state), *others]
    assert_close(weighted_mean(split), weighted_mean(pairs))


@PROPERTY
@given(pairs)
def test_every_coordinate_stays_between_the_clients_smallest_and_largest(pairs):
    for name, mean in weighted_mean(pairs).items():
        stack = torch.stack([state[name] for _, state in pairs])
        slack = 1e-6 * stack.abs().amax(0) + 1e-9
        assert bool((mean >= stack.amin(0) - slack).all())
        assert bool((mean <= stack.amax(0) + slack).all())


@PROPERTY
@given(pairs)
def test_a_client_of_weight_zero_changes_nothing(pairs):
    silent = (0.0, {n: t + 1.0 for n, t in pairs[0][1].items()})
    assert sha256(weighted_mean([*pairs, silent])) == sha256(weighted_mean(pairs))


@PROPERTY
@given(pairs)
def test_weighted_mean_leaves_its_inputs_untouched(pairs):
    before = fingerprint(pairs)
    weighted_mean(pairs)
    assert fingerprint(pairs) == before


def test_weighted_mean_sums_in_float64_so_that_small_deltas_are_not_lost():
    # one client moves by 1, a thousand by 1e-8: folded in float32 the thousand vanish behind the 1
    small = torch.tensor([1e-8])
    pairs = [(1.0, {"a": torch.tensor([1.0])}), *[(1.0, {"a": small})] * 1000]
    exact = (1.0 + 1000 * 1e-8) / 1001
    folded = torch.tensor([1.0])
    for _ in range(1000):
        folded += small
    assert abs(weighted_mean(pairs)["a"].item() - exact) < 1e-10
    assert abs(folded.item() / 1001 - exact) > 5e-9


@pytest.mark.parametrize("weight", [1.0, 3.0, 2.0**29 - 1, 2.0**29, 2.0**29 + 1, 0.1, 1234.56789])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weighted_mean_rounds_each_product_and_each_sum_separately(weight, dtype):
    # If a product is not exact and is added without rounding, a remainder is left here:
    # x and -x cancel only if both products were rounded. Python floats fuse nothing.
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(67, generator=gen, dtype=torch.float64).to(dtype) for _ in range(2))
    pairs = [(weight, {"a": x}), (weight, {"a": -x}), (weight, {"a": y * 1e-3})]
    sums = [0.0] * 67
    for w, state in pairs:
        sums = [s + w * v for s, v in zip(sums, state["a"].tolist(), strict=True)]
    expected = torch.tensor([s / (3 * weight) for s in sums], dtype=torch.float64).to(dtype)
    before = fingerprint(pairs)
    assert torch.equal(weighted_mean(pairs[:2])["a"], torch.zeros(67, dtype=dtype))
    assert torch.equal(weighted_mean(pairs)["a"], expected)
    assert fingerprint(pairs) == before


def test_weighted_mean_reads_a_generator_once_and_keeps_the_dtype():
    mean = weighted_mean((w, {"a": torch.ones(2, dtype=torch.bfloat16)}) for w in (1.0, 2.0))
    assert mean["a"].dtype == torch.bfloat16
    assert mean["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("pairs", [[], [(0.0, {"a": torch.ones(1)})]])
def test_a_mean_without_weight_says_what_is_needed(pairs):
    with pytest.raises(UpdateError) as error:
        weighted_mean(pairs)
    assert str(error.value) == (
        "weighted mean: no update carries weight.\n  At least one client needs examples."
    )


@pytest.mark.parametrize(
    "second", [{"a": torch.ones(1)}, {"b": torch.ones(2)}, {"a": torch.ones(2).double()}]
)
def test_weighted_mean_refuses_states_of_different_layouts(second):
    with pytest.raises(UpdateError, match=r"^weighted mean: "):
        weighted_mean([(1.0, {"a": torch.ones(2)}), (1.0, second)])


def test_a_first_state_without_tensors_fixes_the_layout_like_any_other():
    # Bug: "no sums yet" was read as "no state yet", so the second state set the layout again and
    # the weight of the empty one shrank the mean: 4 came out as 1.
    with pytest.raises(UpdateError, match="weighted mean: tensor 'a' is unknown"):
        weighted_mean([(3.0, {}), (1.0, {"a": torch.tensor([4.0])})])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_negative_or_not_finite_is_refused(weight, place):
    # Bug: weights were not checked. -1 next to 3 pushed the mean away from a client's delta, and
    # NaN passed `total <= 0` and made every coordinate NaN.
    pairs = [(3.0, {"a": torch.ones(1)})]
    pairs.insert(place, (weight, {"a": torch.ones(1)}))
    with pytest.raises(UpdateError) as error:
        weighted_mean(pairs)
    assert str(error.value) == (
        f"weighted mean: {weight} is not a valid weight.\n"
        "  Weights must be finite and not negative."
    )


# --- add, subtract, scale, zeros_like


@PROPERTY
@given(states(), states(), st.floats(-3, 3))
def test_sums_and_differences_equal_the_plain_formula_and_touch_nothing(a, b, factor):
    before = sha256(a), sha256(b)
    expected = {n: (a[n].double() + factor * b[n].double()).float() for n in a}
    assert sha256(add(a, b, scale=factor)) == sha256(expected)
    assert sha256(subtract(a, b)) == sha256({n: a[n] - b[n] for n in a})
    assert sha256(scale(a, factor)) == sha256({n: a[n] * factor for n in a})
    assert (sha256(a), sha256(b)) == before


@PROPERTY
@given(states(), states())
def test_adding_the_difference_leads_back(a, b):
    assert_close(add(b, subtract(a, b)), a, rtol=1e-5, atol=1e-3)


def test_add_has_scale_one_by_default():
    assert add({"a": torch.tensor([1.0])}, {"a": torch.tensor([2.0])})["a"].item() == 3.0


@pytest.mark.parametrize(
    ("operation", "who"), [(add, "sum of two states"), (subtract, "difference of two states")]
)
def test_sums_and_differences_never_broadcast(operation, who):
    with pytest.raises(UpdateError, match=rf"^{who}: 'a' has shape \(1,\)"):
        operation({"a": torch.ones(2, 1)}, {"a": torch.ones(1)})


@PROPERTY
@given(states())
def test_zeros_like_keeps_the_layout(state):
    zeros = zeros_like(state)
    assert layout_of(zeros) == layout_of(state)
    assert l2_norm(zeros) == 0.0


# --- layouts


EXPECTED = {
    "a": TensorSpec((2, 3), torch.float32),
    "b": TensorSpec((3, 2), torch.float32),
}
SAME_MODEL = "\n  Use the same model, adapter and algorithm at this client as at the server."
SAME_RANK = "\n  Set the same [adapter] rank and targets at this client as at the server."


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (
            {"a": torch.ones(2, 3)},
            f"{WHO}: tensor 'b' is missing (1 of 2 tensors).{SAME_MODEL}",
        ),
        (
            {},
            f"{WHO}: tensor 'a' is missing (2 of 2 tensors).{SAME_MODEL}",
        ),
        (
            {
                "a": torch.ones(2, 3),
                "b": torch.ones(3, 2),
                "d": torch.ones(1),
                "c": torch.ones(1),
            },
            f"{WHO}: tensor 'c' is unknown to the server (2 unknown tensors).{SAME_MODEL}",
        ),
        (
            {"a": torch.ones(2, 4), "b": torch.ones(3, 2)},
            f"{WHO}: 'a' has shape (2, 4), the server expects (2, 3).{SAME_RANK}",
        ),
        (
            {"a": torch.ones(6), "b": torch.ones(3, 2)},
            f"{WHO}: 'a' has shape (6,), the server expects (2, 3).{SAME_RANK}",
        ),
        (
            {"a": torch.ones(2, 3), "b": torch.ones(3, 2).half()},
            f"{WHO}: 'b' has dtype torch.float16, the server expects torch.float32.\n"
            "  Send float32, whatever dtype the client trains in.",
        ),
    ],
    ids=["missing", "all-missing", "unknown", "wrong-shape", "wrong-rank", "wrong-dtype"],
)
def test_a_wrong_layout_is_refused_and_the_first_wrong_tensor_named(state, text):
    with pytest.raises(UpdateError) as error:
        check_same_layout(state, EXPECTED, who=WHO)
    assert str(error.value) == text


@given(states())
@PROPERTY
def test_a_state_fits_its_own_layout(state):
    check_same_layout(state, layout_of(state), who=WHO)


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_a_dimension_of_none_accepts_any_size(rank):
    expected = {"a": TensorSpec((None, 3), torch.float32)}
    check_same_layout({"a": torch.ones(rank, 3)}, expected, who=WHO)


def test_a_dimension_of_none_is_called_any_and_does_not_loosen_the_others():
    expected = {"a": TensorSpec((None, 3), torch.float32)}
    with pytest.raises(UpdateError) as error:
        check_same_layout({"a": torch.ones(7, 4)}, expected, who=WHO)
    assert str(error.value) == (
        f"{WHO}: 'a' has shape (7, 4), the server expects ('any', 3).{SAME_RANK}"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tensor_that_is_not_finite_is_named(bad):
    state = {"b": torch.ones(2), "a": torch.ones(2), "c": torch.tensor([0.0, bad])}
    with pytest.raises(UpdateError) as error:
        check_finite(state, who=WHO)
    assert str(error.value) == (
        f"{WHO}: 'c' contains NaN or infinity.\n"
        "  Lower train.lr or set train.clip_norm at this client; its update was not used."
    )


def test_finite_states_pass_even_at_the_edge_of_float32():
    check_finite({"a": torch.tensor([3.4e38, -3.4e38, 0.0]), "empty": torch.ones(0)}, who=WHO)


def test_finite_values_whose_sum_is_not_pass():
    check_finite({"a": torch.full((9,), 3e38), "b": torch.full((9,), 6e4).half()}, who=WHO)


def test_infinities_of_both_signs_do_not_cancel():
    with pytest.raises(UpdateError, match="'a' contains NaN or infinity"):
        check_finite({"a": torch.tensor([math.inf, 1.0, -math.inf])}, who=WHO)


# --- norms and distances


@PROPERTY
@given(states())
def test_l2_norm_is_torchs_norm_of_the_concatenation(state):
    flat = torch.cat([t.flatten() for t in state.values()]).double()
    assert l2_norm(state) == pytest.approx(torch.linalg.vector_norm(flat).item(), rel=1e-12)


def test_l2_norm_of_nothing_is_zero():
    assert l2_norm({}) == 0.0


def test_l2_norm_leaves_a_float64_state_untouched():
    state = {"a": torch.tensor([3.0, -4.0], dtype=torch.float64)}
    assert l2_norm(state) == 5.0
    assert state["a"].tolist() == [3.0, -4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_l2_norm_is_finite_only_if_every_value_is(bad):
    # accept() checks the values one by one only if the norm is not finite
    assert not math.isfinite(l2_norm({"a": torch.ones(3), "b": torch.tensor([1.0, bad])}))


def test_l2_norm_does_not_overflow_if_squares_exceed_float32():
    assert l2_norm({"a": torch.tensor([3e30]), "b": torch.tensor([4e30])}) == pytest.approx(5e30)


@PROPERTY
@given(states(), states())
def test_squared_distance_equals_the_plain_formula(a, b):
    a, b = ({n: t.double() for n, t in s.items()} for s in (a, b))
    expected = sum(
        (x - y) ** 2
        for n in a
        for x, y in zip(a[n].flatten().tolist(), b[n].flatten().tolist(), strict=True)
    )
    assert squared_distance(a, b).item() == pytest.approx(expected, rel=1e-12)


def test_the_gradient_of_squared_distance_is_twice_the_difference():
    now = {"a": torch.tensor([1.0, -2.0], requires_grad=True), "b": torch.ones(1)}
    received = {"a": torch.tensor([0.5, 3.0]), "b": torch.ones(1), "frozen": torch.full((4,), 9.0)}
    squared_distance(now, received).backward()
    assert now["a"].grad.tolist() == [2 * (1.0 - 0.5), 2 * (-2.0 - 3.0)]
    assert received["a"].grad is None


@pytest.mark.parametrize(("now", "received"), [((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (2,))])
def test_squared_distance_never_broadcasts(now, received):
    # Bug: (2, 3) minus (3,) is legal in torch, so a wrong shape gave a wrong pull, not an error.
    with pytest.raises(UpdateError, match=r"^distance of two states: 'a' has shape "):
        squared_distance({"a": torch.ones(now)}, {"a": torch.ones(received)})


def test_squared_distance_to_a_state_that_lacks_a_tensor_is_refused():
    # Bug: it was a bare KeyError, which no caller recognises as an unusable update.
    with pytest.raises(UpdateError, match=r"^distance of two states: .* missing"):
        squared_distance({"a": torch.ones(2), "b": torch.ones(2)}, {"a": torch.ones(2)})


def test_squared_distance_over_no_tensors_is_a_zero_that_can_join_a_loss():
    # Bug: torch.stack refuses an empty list, so a distance over nothing raised a RuntimeError.
    distance = squared_distance({}, {"a": torch.ones(2)})
    assert distance.shape == ()
    assert distance.item() == 0.0


# --- sizes and fingerprints


def test_size_bytes_counts_the_values_of_every_dtype():
    state = {
        "a": torch.ones(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.ones(0),
        "d": torch.ones(7, dtype=torch.int8),
    }
    assert size_bytes(state) == 2 * 3 * 4 + 5 * 2 + 0 + 7


def test_sha256_is_the_hash_of_name_dtype_shape_and_bytes_in_name_order():
    # Independent: struct packs the values, so a change of the format is seen here.
    text = (
        b"a|torch.float32|(2,)|"
        + struct.pack("<2f", 1.5, -2.0)
        + b"b|torch.float64|(1, 1)|"
        + struct.pack("<d", 0.1)
    )
    state = {"b": torch.tensor([[0.1]], dtype=torch.float64), "a": torch.tensor([1.5, -2.0])}
    assert sha256(state) == hashlib.sha256(text).hexdigest()


def test_sha256_of_a_tensor_without_dimensions_is_its_bytes_under_an_empty_shape():
    # Bug: torch cannot view a 0-dim tensor as bytes, so a state that holds a count had no hash.
    text = b"a|torch.float32|()|" + struct.pack("<f", -1.5)
    assert sha256({"a": torch.tensor(-1.5)}) == hashlib.sha256(text).hexdigest()
    assert sha256({"a": torch.tensor(-1.5)}) != sha256({"a": torch.tensor([-1.5])})


@PROPERTY
@given(states())
def test_sha256_ignores_the_order_of_names_and_the_memory_layout(state):
    turned = {n: (t.T.contiguous().T if t.ndim == 2 else t) for n, t in reversed(state.items())}
    assert sha256(turned) == sha256(state)


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.5]), "b": torch.zeros(0)},
        {"a": torch.tensor([1.0, 2.0, 4.0, 3.0]), "b": torch.zeros(0)},
        {"A": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(0)},
        {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.zeros(0)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]).view(torch.int32), "b": torch.zeros(0)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(0, 3)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])},
    ],
    ids=["value", "order", "name", "shape", "dtype", "empty-shape", "fewer"],
)
def test_sha256_changes_with_any_value_name_shape_or_dtype(other):
    state = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.zeros(0)}
    assert sha256(other) != sha256(state)
