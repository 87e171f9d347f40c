"""Scores cost as few padded tokens as possible, and are those of one row at a time."""

import random
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F

from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model
from silotune.training.scoring import build_eval_batches, by_length, evaluate, score_each
from silotune.training.tasks import base, build_task
from silotune.training.tasks.base import Example, each_nll


def examples(lengths):
    return [Example(torch.zeros(n, dtype=torch.int64), torch.arange(n) > 0) for n in lengths]


def costs(lengths, groups, cost):
    return sum(cost + len(own) * max(lengths[i] for i in own) for own in groups)


def slow_best(lengths, batch_size, cost):
    """The least cost over all ways to cut the sorted lengths."""
    lengths, n, found = sorted(lengths), len(lengths), []
    for count in range(n):
        for cuts in combinations(range(1, n), count):
            parts = list(pairwise((0, *cuts, n)))
            if all(b - a <= batch_size for a, b in parts):
                found.append(sum(cost + (b - a) * lengths[b - 1] for a, b in parts))
    return min(found)


@pytest.mark.parametrize("cost", [0, 5, 32, 10_000])
def test_batches_take_the_least_time_of_all_ways_to_cut(cost):
    draw = random.Random(3)
    for batch_size in (1, 3, 8):
        lengths = [draw.randint(1, 60) for _ in range(9)]
        groups = by_length(examples(lengths), batch_size, cost=cost)
        assert sorted(i for own in groups for i in own) == list(range(9))
        assert max(map(len, groups)) <= batch_size
        ordered = [lengths[i] for own in groups for i in own]
        assert ordered == sorted(lengths)
        assert costs(lengths, groups, cost) == slow_best(lengths, batch_size, cost)


def test_without_a_cost_nothing_is_padded_and_with_a_large_one_batches_are_full():
    lengths = [7, 7, 9, 7, 9, 12, 7]
    assert [len(own) for own in by_length(examples(lengths), 8, cost=0)] == [4, 2, 1]
    assert len(by_length(examples(lengths), 3, cost=10_000)) == 3
    assert by_length([], 8, cost=32) == []


def test_a_clients_rows_are_padded_by_less_than_a_third_of_what_full_batches_would():
    draw = random.Random(0)
    lengths = [draw.randint(60, 200) for _ in range(20)]
    padded = costs(lengths, by_length(examples(lengths), 8, cost=32), 0) - sum(lengths)
    ordered = sorted(lengths)
    full = [ordered[at : at + 8] for at in range(0, 20, 8)]
    assert 3 * padded < sum(len(own) * max(own) for own in full) - sum(lengths)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request, tiny_model):
    model = ModelConfig(name=str(tiny_model), dtype=request.param)
    found = load_model(model, AdapterConfig(targets=("q_proj",)), seed=1, device="cpu")
    found.model.eval()
    return found


def rows():
    draw = random.Random(1)
    return [
        (
            {"role": "user", "content": "q" * draw.randint(1, 40)},
            {"role": "assistant", "content": "a" * draw.randint(1, 60)},
        )
        for _ in range(13)
    ]


def slow_loss(loaded, example):
    """All positions of one row alone, the whole vocabulary, in float32."""
    with torch.inference_mode():
        logits = loaded.model(input_ids=example.ids[None]).logits[0].float()
    trained = example.trained[1:]
    return float(F.cross_entropy(logits[:-1][trained], example.ids[1:][trained], reduction="sum"))


def test_the_loss_of_every_row_is_that_of_the_row_alone(loaded):
    task = build_task("instruct")
    made = task.prepare(rows(), loaded.tokenizer, 512).examples
    want = [slow_loss(loaded, example) for example in made]
    near = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[loaded.dtype]
    found = score_each(loaded, made, task, batch_size=8)
    assert [row.loss_sum for row in found] == pytest.approx(want, rel=near)
    assert [row.num_tokens for row in found] == [int(e.trained.sum()) for e in made]
    batches = build_eval_batches(made, task, 8)
    assert 1 < len(batches) < len(made), "otherwise this shows nothing"
    score = evaluate(loaded, batches, task, client="north", num_examples=len(made))
    assert score.loss_sum == pytest.approx(sum(want), rel=near)


def test_scoring_keeps_no_copy_of_all_logits_in_float32(loaded, monkeypatch):
    task, sizes, real = build_task("instruct"), [], F.cross_entropy

    def cross_entropy(logits, *parts, **more):
        assert logits.dtype == torch.float32
        sizes.append(len(logits))
        return real(logits, *parts, **more)

    monkeypatch.setattr(base, "PREDICTIONS_AT_ONCE", 16)
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    made = task.prepare(rows(), loaded.tokenizer, 512).examples
    batch = task.collate(made)
    with torch.inference_mode():
        found = task.loss(loaded, batch)
    assert found.logits.dtype == loaded.dtype
    assert max(sizes) == 16 < batch.num_trained == sum(sizes)


def test_the_nll_of_each_target_is_that_of_the_whole_matrix():
    gen = torch.Generator().manual_seed(4)
    logits = torch.randn(150, 31, generator=gen).bfloat16()
    targets = torch.randint(31, (150,), generator=gen)
    want = F.cross_entropy(logits.float(), targets, reduction="none")
    torch.testing.assert_close(each_nll(logits, targets), want)
    assert each_nll(logits[:0], targets[:0]).shape == (0,)
