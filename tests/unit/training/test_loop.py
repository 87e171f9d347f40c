"""The local loop: schedule, stream of rows, batches, and its equivalences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.algorithms import ALGORITHMS
from silotune.algorithms.fedprox import FedProxConfig, fedprox
from silotune.core.algorithm import LocalContext, LocalRule
from silotune.core.errors import UpdateError
from silotune.core.seeds import generator
from silotune.core.tree import l2_norm, sha256, subtract
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter, write_adapter
from silotune.training.loop import (
    TrainConfig,
    num_rows,
    plan_steps,
    round_lr,
    step_lr,
    stream,
    train,
)
from silotune.training.tasks.instruct import INSTRUCT, collate, prepare

PLAIN = LocalRule()


@pytest.fixture(scope="module")
def loaded(tiny_model):
    adapter = AdapterConfig(rank=2, alpha=4, dropout=0.0, targets=("q_proj", "v_proj"))
    model = ModelConfig(name=str(tiny_model), dtype="float32")
    return load_model(model, adapter, seed=1, device="cpu")


@pytest.fixture(scope="module")
def start(loaded):
    """An adapter with both factors away from zero, so that every gradient is."""
    gen = torch.Generator().manual_seed(9)
    state = read_adapter(loaded)
    return {n: torch.randn(t.shape, generator=gen) * 0.1 for n, t in state.items()}


@pytest.fixture(scope="module")
def examples(loaded):
    rows = [
        ({"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a" * (1 + 3 * i)})
        for i in range(8)
    ]
    return prepare(rows, loaded.tokenizer, 128).examples


def run(loaded, start, steps, cfg, *, rule=PLAIN, lr=1e-2, seed=5, round_=1):
    """Train from `start`; returns (result, adapter afterwards)."""
    write_adapter(loaded, start)
    context = LocalContext(dict(start), {}, {})
    result = train(loaded, steps, INSTRUCT, cfg, rule, context, round_=round_, lr=lr, seed=seed)
    return result, read_adapter(loaded)


# --- learning rate


def test_cosine_starts_at_lr_and_counts_rounds_from_zero():
    cfg = TrainConfig(lr=5e-5, lr_min=1e-6, schedule="cosine")
    assert round_lr(cfg, 1, 10) == 5e-5
    expected = 1e-6 + (5e-5 - 1e-6) * (1 + math.cos(math.pi * 9 / 10)) / 2
    assert round_lr(cfg, 10, 10) == pytest.approx(expected)


def test_flowertune_counting_gives_the_published_rates():
    """Recomputed by hand from lr(t) = min + (max - min)(1 + cos(pi t / T)) / 2, t = 1..T."""
    cfg = TrainConfig(lr=5e-5, lr_min=1e-6, schedule="cosine", compat=("late-schedule",))
    ten = [round_lr(cfg, r, 10) for r in range(1, 11)]
    published = [
        *(4.8801e-5, 4.5321e-5, 3.9901e-5, 3.3071e-5, 2.5500e-5),
        *(1.7929e-5, 1.1099e-5, 5.6791e-6, 2.1991e-6, 1.0000e-6),
    ]
    assert ten == pytest.approx(published, abs=5e-10)
    hundred = {1: 4.9988e-5, 25: 4.2824e-5, 50: 2.5500e-5, 75: 8.1759e-6, 100: 1.0000e-6}
    for r, lr in hundred.items():
        assert round_lr(cfg, r, 100) == pytest.approx(lr, abs=5e-10)


def test_linear_and_constant_schedules():
    linear = TrainConfig(lr=1.0, lr_min=0.2, schedule="linear")
    assert [round_lr(linear, r, 4) for r in (1, 2, 3, 4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])
    assert round_lr(TrainConfig(lr=0.3), 7, 9) == 0.3


def test_warmup_rises_in_equal_parts_and_no_step_is_wasted_at_zero():
    cfg = TrainConfig(local_steps=6, warmup_steps=2)
    assert [step_lr(cfg, 0.3, i) for i in range(4)] == pytest.approx([0.1, 0.2, 0.3, 0.3])


@pytest.mark.parametrize(
    ("settings_", "text"),
    [
        ({"local_steps": 2, "local_epochs": 1}, "local_steps or local_epochs"),
        ({"lr": 1e-4, "lr_min": 1e-3, "schedule": "cosine"}, "lr_min = 0.001 is above lr"),
        ({"lr_min": 1e-5}, "lr_min has no effect"),
        ({"compat": ("late-schedule",)}, "compat = 'late-schedule' has no effect"),
        ({"local_steps": 2, "warmup_steps": 2}, "warmup_steps must be less"),
    ],
)
def test_contradictions_are_refused(settings_, text):
    with pytest.raises(ValidationError, match=text):
        TrainConfig(**settings_)


# --- rows


@given(n=st.integers(1, 20), start=st.integers(0, 50), count=st.integers(0, 40))
def test_the_stream_continues_where_it_stopped(n, start, count):
    whole = stream(n, 3, "north")
    for _ in range(start):
        next(whole)
    again = stream(n, 3, "north", start=start)
    assert [next(again) for _ in range(count)] == [next(whole) for _ in range(count)]


@given(n=st.integers(1, 20))
def test_every_epoch_of_the_stream_holds_every_row_once(n):
    flow = stream(n, 3, "north")
    epochs = [[next(flow) for _ in range(n)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_every_client_has_its_own_stream():
    a, b = stream(50, 3, "north"), stream(50, 3, "south")
    assert [next(a) for _ in range(50)] != [next(b) for _ in range(50)]


@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 5),
    accumulation=st.integers(1, 3),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_a_plan_uses_every_row_as_often_as_it_was_drawn(n, batch_size, accumulation, steps, seed):
    cfg = TrainConfig(batch_size=batch_size, accumulation=accumulation, local_steps=steps)
    flow = stream(n, seed, "c")
    rows = [next(flow) for _ in range(num_rows(cfg, n))]
    lengths = [(7 * i) % 11 + 1 for i in range(n)]
    plan = plan_steps(rows, lengths, cfg, generator(seed, "order"))
    assert sorted(r for step in plan for batch in step for r in batch) == sorted(rows)
    assert len(plan) == steps
    assert all(len(step) == accumulation for step in plan)
    assert all(len(batch) == batch_size for step in plan for batch in step)


@given(n=st.integers(2, 40), batch_size=st.integers(1, 5), seed=st.integers(0, 9))
def test_local_epochs_visit_every_row_once_per_epoch(n, batch_size, seed):
    cfg = TrainConfig(batch_size=batch_size, local_epochs=2)
    flow = stream(n, seed, "c")
    rows = [next(flow) for _ in range(num_rows(cfg, n))]
    plan = plan_steps(rows, [1] * n, cfg, generator(seed, "order"))
    assert sorted(r for step in plan for b in step for r in b) == sorted([*range(n), *range(n)])


def test_grouping_by_length_saves_padding():
    gen = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 200, (256,), generator=gen).tolist()
    cfg = TrainConfig(batch_size=8, local_steps=32)
    rows = list(stream_list(256))

    def padded(plan):
        return sum(max(lengths[r] for r in b) * len(b) for s in plan for b in s)

    grouped = plan_steps(rows, lengths, cfg, generator(1, "order"))
    plain = [[rows[i : i + 8]] for i in range(0, 256, 8)]
    real = sum(lengths)
    assert padded(grouped) / real < 1.1 < padded(plain) / real


def stream_list(n):
    flow = stream(n, 0, "c")
    return [next(flow) for _ in range(n)]


def test_a_small_client_does_not_get_batches_of_one_repeated_row():
    cfg = TrainConfig(batch_size=4, local_steps=12)
    flow = stream(4, 0, "tiny")
    rows = [next(flow) for _ in range(48)]
    plan = plan_steps(rows, [1, 2, 3, 4], cfg, generator(0, "order"))
    assert all(len(set(batch)) == 4 for step in plan for batch in step)


# --- equivalences of the loop


def test_one_sgd_step_is_the_plain_formula(loaded, start, examples):
    cfg = TrainConfig(optimizer="sgd", clip_norm=0)
    _, after = run(loaded, start, [[collate(examples)]], cfg, lr=0.5)
    write_adapter(loaded, start)
    params = loaded.parameters
    batch = collate(examples)
    loss = INSTRUCT.loss(loaded, batch).loss_sum / batch.num_trained
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    for name in params:
        torch.testing.assert_close(after[name], start[name] - 0.5 * grads[name])


def test_accumulation_equals_one_large_batch(loaded, start, examples):
    cfg = TrainConfig(optimizer="sgd", clip_norm=0)
    _, whole = run(loaded, start, [[collate(examples)]], cfg)
    _, parts = run(loaded, start, [[collate([e]) for e in examples]], cfg)
    for name in whole:  # mean over tokens of all parts together, not mean of means
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-7)


WITH_A_RULE = {
    *("fedprox", "ffa_lora", "rolora", "fedsvd", "fedrot", "scaffold", "feddyn"),
    *("fed_sb", "fedsa_lora", "flora", "fedex"),
}


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - WITH_A_RULE))
def test_algorithms_without_a_local_rule_leave_local_training_alone(name):
    cfg, build = ALGORITHMS[name]
    assert build(cfg()).local == PLAIN


def test_fedprox_with_mu_zero_is_plain_training_bit_for_bit(loaded, start, examples):
    cfg, steps = TrainConfig(), [[collate(examples[:4])], [collate(examples[4:])]]
    _, plain = run(loaded, start, steps, cfg)
    _, prox = run(loaded, start, steps, cfg, rule=fedprox(FedProxConfig(mu=0.0)).local)
    assert sha256(plain) == sha256(prox)


def test_fedprox_does_nothing_in_the_first_step_and_pulls_back_later(loaded, start, examples):
    cfg, batch = TrainConfig(optimizer="sgd", clip_norm=0), [collate(examples)]
    rule = fedprox(FedProxConfig(mu=1.0)).local
    _, plain = run(loaded, start, [batch], cfg)
    _, prox = run(loaded, start, [batch], cfg, rule=rule)
    for name in plain:  # the pull is zero until the client has moved
        torch.testing.assert_close(prox[name], plain[name])
    moved = [
        l2_norm(subtract(run(loaded, start, [batch] * 6, cfg, rule=r, lr=0.3)[1], start))
        for r in (PLAIN, rule, fedprox(FedProxConfig(mu=3.0)).local)
    ]
    assert moved[0] > moved[1] > moved[2]


def test_the_penalty_counts_once_per_step_and_not_once_per_forward_batch(loaded, start, examples):
    cfg = TrainConfig(optimizer="sgd", clip_norm=0)
    rule = fedprox(FedProxConfig(mu=2.0)).local
    parts = [collate([e]) for e in examples]
    a, whole = run(loaded, start, [[collate(examples)]] * 3, cfg, rule=rule, lr=0.1)
    b, split = run(loaded, start, [parts] * 3, cfg, rule=rule, lr=0.1)
    assert a.penalty == pytest.approx(b.penalty, rel=1e-3)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-3, atol=1e-6)


def test_the_reported_loss_excludes_the_penalty(loaded, start, examples):
    cfg, steps = TrainConfig(optimizer="sgd"), [[collate(examples)]]
    plain, _ = run(loaded, start, steps, cfg)
    prox, _ = run(loaded, start, steps, cfg, rule=fedprox(FedProxConfig(mu=9.0)).local)
    assert plain.train_loss == pytest.approx(prox.train_loss)


def test_a_rule_that_freezes_tensors_leaves_them_byte_for_byte(loaded, start, examples):
    rule = LocalRule(trains=lambda name, round_: "lora_B" in name)
    _, after = run(loaded, start, [[collate(examples)]] * 2, TrainConfig(), rule=rule)
    for name in start:
        assert torch.equal(after[name], start[name]) == ("lora_A" in name)


def test_a_rule_may_replace_gradients(loaded, start, examples):
    rule = LocalRule(correct=lambda name, grad, context: torch.ones_like(grad))
    cfg = TrainConfig(optimizer="sgd", clip_norm=0)
    result, after = run(loaded, start, [[collate(examples)]] * 2, cfg, rule=rule, lr=0.25)
    assert result.lr_sum == 0.5
    for name in start:
        torch.testing.assert_close(after[name], start[name] - 0.5)


def test_gradient_clipping_bounds_the_step(loaded, start, examples):
    cfg = TrainConfig(optimizer="sgd", clip_norm=1e-3)
    _, after = run(loaded, start, [[collate(examples)]], cfg, lr=1.0)
    assert l2_norm(subtract(after, start)) <= 1e-3 * 1.001


def test_a_loss_that_is_not_a_number_is_an_update_error(loaded, start, examples):
    broken = {n: torch.full_like(t, math.nan) for n, t in start.items()}
    with pytest.raises(UpdateError, match=r"not a number[\s\S]*Lower train.lr"):
        run(loaded, broken, [[collate(examples)]], TrainConfig())


def test_training_leaves_the_global_generator_alone_and_dropout_is_seeded(tiny_model, examples):
    adapter = AdapterConfig(rank=2, dropout=0.5, targets=("q_proj",))
    model = load_model(ModelConfig(name=str(tiny_model)), adapter, seed=1, device="cpu")
    gen = torch.Generator().manual_seed(2)
    begin = {n: torch.randn(t.shape, generator=gen) for n, t in read_adapter(model).items()}
    before = torch.get_rng_state()
    results = [
        sha256(run(model, begin, [[collate(examples)]] * 2, TrainConfig(), seed=s)[1])
        for s in (5, 5, 6)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1] != results[2]
    assert not model.model.training


def test_result_counts_are_those_of_the_batches(loaded, start, examples):
    steps = [[collate(examples[:3])], [collate(examples[3:])]]
    result, _ = run(loaded, start, steps, TrainConfig())
    assert result.num_steps == 2
    assert result.num_tokens == sum(e.ids.numel() for e in examples)
    assert result.num_padded_tokens == sum(b.ids.numel() for s in steps for b in s)
    assert result.lr_sum == pytest.approx(2e-2)


# --- an optimizer that is kept from round to round


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_trainings_with_a_kept_optimizer_are_one_long_training(
    loaded, start, examples, optimizer
):
    cfg = TrainConfig(optimizer=optimizer, weight_decay=0.1, warmup_steps=2)
    steps = [[collate(examples[i : i + 2])] for i in (0, 2, 4, 6)]
    _, whole = run(loaded, start, steps, cfg)

    def go_on(begin, some, kept):
        write_adapter(loaded, begin)
        context = LocalContext(dict(begin), {}, {})
        more = {"round_": 1, "lr": 1e-2, "seed": 5, "kept": kept}
        result = train(loaded, some, INSTRUCT, cfg, PLAIN, context, **more)
        return result.optimizer, read_adapter(loaded)

    memory, half = go_on(start, steps[:2], {})
    if optimizer == "sgd":  # it remembers nothing, so each part has a warm-up
        assert memory == {}
        return
    _, parted = go_on(half, steps[2:], memory)
    assert sha256(parted) == sha256(whole)
    _, restarted = go_on(half, steps[2:], {})
    assert sha256(restarted) != sha256(whole)
    assert go_on(half, steps[2:], None)[0] == {}, "nothing is returned unless it is asked for"
