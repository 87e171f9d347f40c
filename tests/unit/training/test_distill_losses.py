"""Divergences of distillation against loops in plain Python, gradients by side, layer maps by hand.

The oracles below use `math` on nested lists, one float at a time, in double precision.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from silotune.training.distill_losses import (
    attention_gap,
    joint_loss,
    kl,
    layer_map,
    mutual,
    published_loss,
    published_term,
)

temperatures = st.sampled_from([0.5, 1.0, 2.0, 7.0])
depths = st.integers(1, 40)


@st.composite
def logit_pairs(draw, dtype=torch.float64):
    """Two tensors of logits of one shape, (1 to 4, 2 to 6)."""
    num, classes = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    row = st.lists(st.floats(-20, 20, width=32), min_size=classes, max_size=classes)
    rows = draw(st.lists(row, min_size=2 * num, max_size=2 * num))
    both = torch.tensor(rows, dtype=dtype)
    return both[:num].clone(), both[num:].clone()


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention(*shape, seed):
    return torch.softmax(2 * random(*shape, seed=seed), dim=-1)


def leaf(tensor):
    return tensor.clone().requires_grad_()


def gradient(loss, tensor):
    """What the loss asks of a tensor; zeros where no path leads to it."""
    (grad,) = torch.autograd.grad(loss, tensor, retain_graph=True, allow_unused=True)
    return torch.zeros_like(tensor) if grad is None else grad


def probabilities(row, temperature):
    top = max(row)
    powers = [math.exp((x - top) / temperature) for x in row]
    return [x / sum(powers) for x in powers]


def kl_by_hand(target, given, temperature=1.0, top_k=0):
    """One row, one class at a time; a sort chooses the top classes."""
    total = 0.0
    for t_row, g_row in zip(target.tolist(), given.tolist(), strict=True):
        order = sorted(range(len(t_row)), key=lambda c: -t_row[c])
        kept = order[:top_k] if top_k else order
        p = probabilities([t_row[c] for c in kept], temperature)
        q = probabilities([g_row[c] for c in kept], temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
    return temperature**2 * total / len(target)


def gap_by_hand(student, teacher, mask):
    """Mean squared difference of one layer, over pairs of real positions, heads averaged first."""
    total = num = 0
    batch, heads, length, _ = student.shape
    for b in range(batch):
        for q in range(length):
            for k in range(length):
                if mask[b][q] and mask[b][k]:
                    s = [student[b, h, q, k].item() for h in range(heads)]
                    t = [teacher[b, h, q, k].item() for h in range(teacher.shape[1])]
                    if len(s) != len(t):
                        s, t = [sum(s) / len(s)], [sum(t) / len(t)]
                    total += sum((x - y) ** 2 for x, y in zip(s, t, strict=True))
                    num += len(s)
    return total / num


# ---- kl ----


@given(logit_pairs(), temperatures)
def test_kl_of_a_prediction_to_itself_is_zero(both, temperature):
    assert kl(both[0], both[0].clone(), temperature=temperature).item() == 0.0


@given(logit_pairs(torch.float32), temperatures, st.integers(0, 7))
def test_kl_is_never_negative_beyond_rounding(both, temperature, top_k):
    assert kl(*both, temperature=temperature, top_k=top_k).item() >= -1e-6 * temperature**2


def test_kl_is_positive_where_predictions_differ():
    assert kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() > 0.4


@given(logit_pairs(), temperatures, st.floats(-50, 50), st.floats(-50, 50), st.integers(0, 3))
def test_a_constant_added_to_a_row_changes_nothing(both, temperature, up, down, top_k):
    target, given_ = both
    moved = kl(target + up, given_ + down, temperature=temperature)
    torch.testing.assert_close(moved, kl(*both, temperature=temperature), rtol=1e-9, atol=1e-9)
    # ties at the edge of the top classes may fall either way after rounding: no shift of target
    moved = kl(target, given_ + down, temperature=temperature, top_k=top_k)
    still = kl(target, given_, temperature=temperature, top_k=top_k)
    torch.testing.assert_close(moved, still, rtol=1e-9, atol=1e-9)


@given(logit_pairs(), temperatures)
def test_kl_equals_a_loop_in_plain_python(both, temperature):
    got = kl(*both, temperature=temperature).item()
    assert got == pytest.approx(kl_by_hand(*both, temperature), rel=1e-9, abs=1e-9)


@given(logit_pairs(), temperatures)
def test_kl_equals_that_of_torch_on_log_probabilities(both, temperature):
    log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in both)
    torchs = torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    got = kl(*both, temperature=temperature)
    torch.testing.assert_close(got, torchs * temperature**2, rtol=1e-9, atol=1e-9)


def test_the_target_comes_first():
    sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = 1 / (1 + math.exp(-4))
    assert kl(sure, unsure).item() == pytest.approx(
        p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), abs=1e-6
    )
    assert kl(unsure, sure).item() == pytest.approx(
        0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)), abs=1e-6
    )


def test_rows_are_averaged_and_not_added():
    target, given_ = random(3, 5), random(3, 5, seed=1)
    repeated = kl(target.repeat(4, 1), given_.repeat(4, 1))
    torch.testing.assert_close(repeated, kl(target, given_))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_the_gradient_is_temperature_times_the_difference_of_probabilities(temperature):
    target, given_ = random(3, 5), leaf(random(3, 5, seed=1))
    p, q = (torch.softmax(x.detach() / temperature, -1) for x in (target, given_))
    got = gradient(kl(target, given_, temperature=temperature), given_)
    torch.testing.assert_close(got, temperature * (q - p) / 3)


def test_a_high_temperature_keeps_the_gradient_and_matches_centred_logits():
    """Hinton et al. 2015, equation 4: with T² the limit is the difference of logits / classes."""
    target, given_ = random(2, 5), leaf(random(2, 5, seed=1))
    difference = given_.detach() - target
    limit = (difference - difference.mean(dim=-1, keepdim=True)) / 5 / 2
    for temperature in (1e3, 1e4):
        got = gradient(kl(target, given_, temperature=temperature), given_)
        torch.testing.assert_close(got, limit, rtol=0, atol=2 / temperature)


def test_kl_lets_no_gradient_into_its_target():
    target, given_ = leaf(random(3, 5)), leaf(random(3, 5, seed=1))
    kl(target, given_, top_k=2).backward()
    assert target.grad is None
    assert given_.grad is not None
    assert given_.grad.abs().sum() > 0


def test_kl_of_a_learning_target_alone_has_nothing_to_learn():
    assert not kl(leaf(random(3, 5)), random(3, 5, seed=1)).requires_grad


def test_kl_passes_the_numerical_gradient_check():
    target = random(3, 5)
    for top_k in (0, 2):
        assert torch.autograd.gradcheck(
            lambda x, k=top_k: kl(target, x, temperature=2.0, top_k=k), leaf(random(3, 5, seed=1))
        )


def test_bfloat16_logits_are_compared_in_float32():
    target, given_ = (random(4, 300, seed=s, dtype=torch.bfloat16) for s in (0, 1))
    got = kl(target, given_, temperature=2.0)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(kl_by_hand(target, given_, 2.0), rel=1e-5)


def test_logits_of_different_shapes_are_refused_and_not_broadcast():
    with pytest.raises(AssertionError, match=r"logits \(3, 5\), \(3, 1\)"):
        kl(random(3, 5), random(3, 1))


def test_kl_leaves_its_arguments_as_they_were():
    target, given_ = random(3, 5), random(3, 5, seed=1)
    kl(target, given_, temperature=2.0, top_k=2)
    assert torch.equal(target, random(3, 5))
    assert torch.equal(given_, random(3, 5, seed=1))


# ---- top_k ----


@given(logit_pairs(), temperatures, st.integers(0, 3))
def test_top_k_of_all_classes_or_more_is_exact(both, temperature, beyond):
    exact = kl(*both, temperature=temperature)
    top_k = both[0].shape[1] + beyond
    assert torch.equal(kl(*both, temperature=temperature, top_k=top_k), exact)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_keeps_the_targets_best_classes_renormalised(top_k, temperature):
    target, given_ = 3 * random(6, 5), 3 * random(6, 5, seed=1)
    got = kl(target, given_, temperature=temperature, top_k=top_k).item()
    expected = kl_by_hand(target, given_, temperature, top_k)
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_top_class_leaves_nothing_to_compare():
    assert kl(random(3, 5), random(3, 5, seed=1), top_k=1).item() == 0.0


def test_classes_outside_the_top_get_no_gradient():
    target = torch.tensor([[5.0, 1.0, 4.0, 0.0]])
    given_ = leaf(torch.tensor([[0.0, 9.0, 2.0, 1.0]]))
    grad = gradient(kl(target, given_, top_k=2), given_)[0]
    assert (grad != 0).tolist() == [True, False, True, False]


# ---- mutual ----


@given(logit_pairs(), temperatures, st.integers(0, 4))
def test_mutual_is_both_directions_and_knows_no_order(both, temperature, top_k):
    student, teacher = both
    got = mutual(student, teacher, temperature=temperature, top_k=top_k)
    swapped = mutual(teacher, student, temperature=temperature, top_k=top_k)
    torch.testing.assert_close(got, swapped)
    by_hand = kl_by_hand(teacher, student, temperature) + kl_by_hand(student, teacher, temperature)
    exact = mutual(student, teacher, temperature=temperature).item()
    assert exact == pytest.approx(by_hand, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("top_k", [0, 2])
def test_each_side_of_mutual_learns_from_its_own_term_alone(top_k):
    student, teacher = leaf(random(3, 5)), leaf(random(3, 5, seed=1))
    how = {"temperature": 2.0, "top_k": top_k}
    both = mutual(student, teacher, **how)
    for side, other in ((student, teacher), (teacher, student)):
        own = gradient(kl(other.detach(), side, **how), side)
        torch.testing.assert_close(gradient(both, side), own)
        assert own.abs().sum() > 0


def test_two_sides_that_follow_mutual_meet():
    student, teacher = leaf(random(3, 5)), leaf(random(3, 5, seed=1))
    optimizer = torch.optim.SGD([student, teacher], lr=1.0)
    start = mutual(student, teacher, temperature=1.0).item()
    for _ in range(200):
        optimizer.zero_grad()
        mutual(student, teacher, temperature=1.0).backward()
        optimizer.step()
    assert mutual(student, teacher, temperature=1.0).item() < 1e-4 * start


# ---- layer_map ----


@pytest.mark.parametrize(
    ("num_student", "num_teacher", "expected"),
    [
        (6, 12, ((0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11))),
        (3, 6, ((0, 1), (1, 3), (2, 5))),
        (4, 6, ((0, 0), (1, 2), (2, 3), (3, 5))),
        (2, 5, ((0, 1), (1, 4))),
        (5, 7, ((0, 0), (1, 1), (2, 3), (3, 4), (4, 6))),
        (1, 4, ((0, 3),)),
        (3, 3, ((0, 0), (1, 1), (2, 2))),
        (1, 1, ((0, 0),)),
        (12, 6, ((1, 0), (3, 1), (5, 2), (7, 3), (9, 4), (11, 5))),
        (5, 2, ((1, 0), (4, 1))),
    ],
)
def test_layers_are_paired_last_with_last_and_evenly(num_student, num_teacher, expected):
    assert layer_map(num_student, num_teacher) == expected


@given(depths, depths)
def test_layer_maps_of_any_depths_rise_stay_inside_and_are_even(num_student, num_teacher):
    pairs = layer_map(num_student, num_teacher)
    assert len(pairs) == min(num_student, num_teacher)
    assert pairs[-1] == (num_student - 1, num_teacher - 1)
    for side, depth in ((0, num_student), (1, num_teacher)):
        layers = [-1, *(pair[side] for pair in pairs)]
        steps = {b - a for a, b in pairwise(layers)}
        assert steps <= {depth // len(pairs), -(-depth // len(pairs))}
        assert min(steps) >= 1


@given(depths, depths)
def test_swapping_the_models_swaps_the_pairs(num_student, num_teacher):
    swapped = layer_map(num_teacher, num_student)
    assert layer_map(num_student, num_teacher) == tuple((s, t) for t, s in swapped)


def test_the_published_map_is_ours_where_the_depths_divide():
    for num_student, ratio in [(6, 2), (3, 2), (4, 3), (5, 1)]:
        num_teacher = num_student * ratio
        stepped = {(num_student - i - 1, num_teacher - i * ratio - 1) for i in range(num_student)}
        assert set(layer_map(num_student, num_teacher)) == stepped


# ---- attention_gap ----

MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])
BOTH_REAL = MASK[:, None, :, None] & MASK[:, None, None, :]


def stacks(num_layers, heads, *, seed):
    return [attention(2, heads, 4, 4, seed=seed + layer) for layer in range(num_layers)]


def test_attention_gap_without_padding_is_the_plain_mean_squared_error():
    student, teacher, pairs = stacks(2, 3, seed=0), stacks(4, 3, seed=9), ((0, 1), (1, 3))
    mse = torch.nn.functional.mse_loss
    plain = mse(student[0], teacher[1]) + mse(student[1], teacher[3])
    torch.testing.assert_close(attention_gap(student, teacher, pairs, None), plain)
    nothing_padded = torch.ones(2, 4, dtype=torch.bool)
    torch.testing.assert_close(attention_gap(student, teacher, pairs, nothing_padded), plain)


@pytest.mark.parametrize("teacher_heads", [3, 5, 1])
def test_attention_gap_equals_a_loop_in_plain_python(teacher_heads):
    student, teacher = stacks(2, 3, seed=0), stacks(4, teacher_heads, seed=9)
    pairs = layer_map(2, 4)
    for mask in (None, MASK):
        real = torch.ones(2, 4, dtype=torch.bool) if mask is None else mask
        by_hand = sum(gap_by_hand(student[s], teacher[t], real.tolist()) for s, t in pairs)
        assert attention_gap(student, teacher, pairs, mask).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("junk", [7.0, math.nan, math.inf])
@pytest.mark.parametrize("teacher_heads", [3, 5])
def test_attention_at_padded_positions_changes_neither_value_nor_gradient(junk, teacher_heads):
    student, teacher = leaf(attention(2, 3, 4, 4, seed=0)), stacks(1, teacher_heads, seed=9)
    clean = attention_gap([student], teacher, [(0, 0)], MASK)
    spoilt = leaf(student.detach().masked_fill(~BOTH_REAL, junk))
    spoilt_teacher = [teacher[0].masked_fill(~BOTH_REAL, -junk)]
    got = attention_gap([spoilt], spoilt_teacher, [(0, 0)], MASK)
    assert torch.equal(got, clean)
    assert torch.equal(gradient(got, spoilt), gradient(clean, student))
    assert gradient(got, spoilt).masked_select(~BOTH_REAL).count_nonzero() == 0


def test_more_padding_does_not_dilute_the_gap():
    student, teacher = attention(2, 3, 4, 4, seed=0), attention(2, 3, 4, 4, seed=9)
    wider = [torch.nn.functional.pad(x, (0, 3, 0, 3)) for x in (student, teacher)]
    mask = torch.nn.functional.pad(MASK, (0, 3))
    torch.testing.assert_close(
        attention_gap([wider[0]], [wider[1]], [(0, 0)], mask),
        attention_gap([student], [teacher], [(0, 0)], MASK),
    )


def test_attention_gap_lets_no_gradient_into_the_teacher():
    student, teacher = leaf(attention(2, 3, 4, 4, seed=0)), leaf(attention(2, 3, 4, 4, seed=9))
    attention_gap([student], [teacher], [(0, 0)], MASK).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_head_order_counts_with_equal_heads_and_not_after_averaging():
    teacher = attention(2, 3, 4, 4, seed=9)
    turned = [teacher.flip(1)]
    assert attention_gap(turned, [teacher], [(0, 0)], None) > 1e-3
    mean_head = [teacher.mean(dim=1, keepdim=True)]
    assert attention_gap(turned, mean_head, [(0, 0)], None) < 1e-12


def test_attentions_of_different_lengths_are_refused_and_not_broadcast():
    with pytest.raises(AssertionError, match=r"\(2, 3, 4, 4\), \(2, 3, 1, 4\)"):
        attention_gap(stacks(1, 3, seed=0), [attention(2, 3, 1, 4, seed=9)], [(0, 0)], None)


def test_attention_gap_without_pairs_is_zero():
    assert attention_gap([], [], (), None).item() == 0.0


def test_bfloat16_attentions_are_compared_in_float32():
    student, teacher = (attention(2, 3, 4, 4, seed=s).bfloat16() for s in (0, 9))
    got = attention_gap([student], [teacher], [(0, 0)], MASK)
    assert got.dtype == torch.float32
    by_hand = gap_by_hand(student.double(), teacher.double(), MASK.tolist())
    assert got.item() == pytest.approx(by_hand, rel=1e-5)


# ---- joint_loss ----


def tasks_and_gap():
    """Two task losses and a distance that depend on one parameter, as in a real model."""
    w = leaf(torch.tensor(0.7, dtype=torch.float64))
    return w, w**2, 2 * w + 0.1, torch.exp(-3 * w)


def test_joint_loss_weights_the_distance_by_the_task_losses():
    one, three, six = (torch.tensor(x, dtype=torch.float64) for x in (1.0, 3.0, 6.0))
    assert joint_loss(one, three, six).item() == pytest.approx(1 + 3 + 6 / 4)


def test_joint_loss_of_perfect_fits_that_agree_is_zero():
    zero = torch.tensor(0.0)
    assert joint_loss(zero, zero, zero).item() == 0.0


def test_joint_loss_has_the_gradient_of_a_constant_denominator():
    w, ce_student, ce_teacher, distance = tasks_and_gap()
    constant = ce_student.item() + ce_teacher.item() + 1e-8
    expected = gradient(ce_student + ce_teacher + distance / constant, w)
    got = gradient(joint_loss(ce_student, ce_teacher, distance), w)
    torch.testing.assert_close(got, expected)
    attached = gradient(distance / (ce_student + ce_teacher), w)
    assert (
        attached - gradient(distance / constant, w)
    ).abs() > 1e-3  # the test can distinguish them


def test_a_larger_task_loss_is_never_rewarded_by_ours_and_is_by_the_published_one():
    ce = leaf(torch.tensor(0.01, dtype=torch.float64))
    assert gradient(joint_loss(ce, ce.detach(), torch.tensor(9.0)), ce).item() == 1.0
    zeros, two = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 1, 1, 1), 2.0)
    loss = published_loss(ce, ce.detach(), zeros, zeros, [two], [-two], [(0, 0)])  # ATT = 16
    assert gradient(loss, ce).item() < -10


# ---- published_loss ----


def published_by_hand(ce_s, ce_t, s_logits, t_logits, s_attentions, t_attentions, pairs):
    """The released formula, one float at a time; detaching does not change a value."""

    def k(a, b):
        rows = zip(a.tolist(), b.tolist(), strict=True)
        terms = [math.exp(y) * (y - x) for ra, rb in rows for x, y in zip(ra, rb, strict=True)]
        return sum(terms) / len(a)

    att = 0.0
    for s, t in pairs if s_attentions else ():
        one, other = s_attentions[s].flatten().tolist(), t_attentions[t].flatten().tolist()
        att += sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) / len(one)
    tasks = ce_s + ce_t
    return tasks + (att + k(t_logits, s_logits) + k(s_logits, t_logits)) / (tasks + 1)


@pytest.mark.parametrize("with_attentions", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_published_loss_equals_a_loop_in_plain_python(with_attentions, seed):
    s_logits, t_logits = random(4, 3, seed=seed), random(4, 3, seed=seed + 50)
    num = (2, 4) if with_attentions else (0, 0)
    attentions = stacks(num[0], 3, seed=seed), stacks(num[1], 3, seed=seed + 9)
    ce_s, ce_t = (torch.tensor(x, dtype=torch.float64) for x in (0.3, 1.1))
    rest = (s_logits, t_logits, *attentions, layer_map(2, 4))
    got = published_loss(ce_s, ce_t, *rest).item()
    assert got == pytest.approx(published_by_hand(0.3, 1.1, *rest), rel=1e-9)


def test_published_loss_detaches_exactly_what_the_release_detached():
    w, ce_s, ce_t, _ = tasks_and_gap()
    s, t = leaf(random(4, 3)), leaf(random(4, 3, seed=50))
    a, b = leaf(attention(2, 3, 4, 4, seed=0)), leaf(attention(2, 3, 4, 4, seed=9))
    loss = published_loss(ce_s, ce_t, s, t, [a], [b], [(0, 0)])
    tasks = ce_s.item() + ce_t.item()
    # d/ds of exp(s)(s - t)/B, t a constant; and the other way round
    torch.testing.assert_close(gradient(loss, s), s.exp() * (s - t + 1) / 4 / (tasks + 1))
    torch.testing.assert_close(gradient(loss, t), t.exp() * (t - s + 1) / 4 / (tasks + 1))
    torch.testing.assert_close(gradient(loss, a), 2 * (a - b) / a.numel() / (tasks + 1))
    torch.testing.assert_close(gradient(loss, b), -gradient(loss, a))
    att = torch.nn.functional.mse_loss(a, b).item()
    slope = gradient(ce_s + ce_t, w) * (1 - att / (tasks + 1) ** 2)
    torch.testing.assert_close(gradient(loss, w), slope)


def test_the_published_term_is_negative_where_ours_is_zero():
    """K([3, 1], [2, 0]) = -(e² + 1) = -8.39: two logits a constant apart, one softmax."""
    a, b = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0]])
    assert published_term(a, b).item() == pytest.approx(-(math.exp(2) + 1), rel=1e-6)
    assert published_term(b, a).item() == pytest.approx(math.exp(3) + math.e, rel=1e-6)
    assert kl(a, b).item() == pytest.approx(0.0, abs=1e-6)
    assert kl(b, a).item() == pytest.approx(0.0, abs=1e-6)


def test_the_published_terms_charge_sides_that_predict_the_same_and_ours_do_not():
    a, b, zero = torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor(0.0)
    published = published_loss(zero, zero, a, b, [], [], ())
    assert published.item() == pytest.approx(math.exp(3) + math.e - math.exp(2) - 1, rel=1e-6)
    assert mutual(a, b, temperature=1.0).item() == pytest.approx(0.0, abs=1e-6)


@given(logit_pairs())
def test_equal_sides_drift_by_the_published_loss_and_rest_by_ours(both):
    student, teacher = leaf(both[0]), leaf(both[0])
    zero = torch.tensor(0.0, dtype=torch.float64)
    drift = published_loss(zero, zero, student, teacher, [], [], ())
    rest = mutual(student, teacher, temperature=1.0)
    for side in (student, teacher):
        assert (gradient(drift, side) > 0).all()
        torch.testing.assert_close(gradient(rest, side), torch.zeros_like(side))


@given(logit_pairs())
def test_both_published_terms_together_are_never_negative(both):
    """Why a log of the released loss looks healthy although one term alone is not."""
    student, teacher = both
    total = published_term(teacher, student) + published_term(student, teacher)
    assert total.item() >= -1e-9 * (1 + both[0].exp().sum() + both[1].exp().sum()).item()
