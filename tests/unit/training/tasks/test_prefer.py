"""The loss of a pair against an independent computation, and what a pair is as tensors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from silotune.core.errors import DataError
from silotune.data.preferences import PlacedPreference, preference
from silotune.models.adapters import AdapterConfig
from silotune.models.base import ModelConfig
from silotune.models.loading import load_model, read_adapter
from silotune.training.known_tokens import prepare_rows
from silotune.training.references import with_references
from silotune.training.scoring import build_eval_batches, evaluate, metrics, score_each
from silotune.training.tasks import build_task
from silotune.training.tasks.base import row_losses
from silotune.training.tasks.prefer import (
    PreferConfig,
    collate,
    num_tokens,
    prefer,
    prepare,
    score_pairs,
)

TEXTS = [
    ("Why?", "Because it is so.", "No."),
    ("What is a1?", "It is a1, yes.", "I do not know what that is, sorry."),
    ("Hm", "A longer answer. " * 3, "Short"),
    ("Who?", "He.", "She is the one."),
]


def pair(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return PlacedPreference.of(preference(row, where="pairs.csv:2"), "pairs.csv:2")


PAIRS = [pair(*texts) for texts in TEXTS]
SWAPPED = [pair(asked, rejected, chosen) for asked, chosen, rejected in TEXTS]


def configs():
    return st.builds(
        PreferConfig,
        beta=st.floats(0.01, 2),
        nll_weight=st.sampled_from([0.0, 0.7]),
        length_normalized=st.booleans(),
    ) | st.builds(PreferConfig, beta=st.floats(0.1, 2), loss=st.just("ipo"))


# --- the loss ---


def by_hand(cfg, chosen, rejected, ref_chosen, ref_rejected, num_chosen, num_rejected):
    """One pair's loss, in Python's floats and as the papers write it."""
    nll = -chosen / num_chosen
    if cfg.length_normalized:
        chosen, ref_chosen = chosen / num_chosen, ref_chosen / num_chosen
        rejected, ref_rejected = rejected / num_rejected, ref_rejected / num_rejected
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    if cfg.loss == "ipo":
        found = (h - 1 / (2 * cfg.beta)) ** 2
    else:
        right = 1 / (1 + math.exp(-cfg.beta * h))
        s = cfg.label_smoothing
        found = -(1 - s) * math.log(right) - s * math.log(1 - right)
    return found + cfg.nll_weight * nll


@given(
    st.lists(st.floats(-60, -1), min_size=4, max_size=4),
    st.lists(st.integers(1, 40), min_size=2, max_size=2),
    configs() | st.builds(PreferConfig, label_smoothing=st.floats(0, 0.49)),
)
def test_loss_is_that_of_the_papers(logps, counts, cfg):
    chosen, rejected, ref_chosen, ref_rejected = logps
    found = score_pairs(
        torch.tensor([[chosen, rejected]], dtype=torch.float64),
        torch.tensor([counts], dtype=torch.float64),
        torch.tensor([[ref_chosen, ref_rejected]], dtype=torch.float64),
        cfg,
    )
    margin = cfg.beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if abs(margin) < 30:  # beyond it, the naive formula rounds to log(0)
        assert found.losses.item() == pytest.approx(by_hand(cfg, *logps, *counts), rel=1e-9)
    if not cfg.length_normalized:
        assert found.margins.item() == pytest.approx(margin)
        assert found.gaps.item() == pytest.approx(chosen - rejected)


def test_a_certain_pair_has_a_finite_loss_and_gradient():
    logps = torch.tensor([[-9000.0, -1.0]], requires_grad=True)
    zeros = torch.zeros(1, 2)
    loss = score_pairs(logps, torch.ones(1, 2), zeros, PreferConfig(beta=1.0)).losses
    loss.sum().backward()
    assert loss.item() == pytest.approx(8999)
    assert logps.grad.tolist() == [[-1.0, 1.0]]


@given(configs())
def test_swapping_a_pair_negates_its_margin(cfg):
    logps = torch.tensor([[-3.0, -7.0]])
    counts, reference = torch.tensor([[2.0, 5.0]]), torch.tensor([[-4.0, -4.5]])
    one = score_pairs(logps, counts, reference, cfg)
    other = score_pairs(logps.flip(1), counts.flip(1), reference.flip(1), cfg)
    assert one.margins.item() == -other.margins.item()
    assert one.gaps.item() == -other.gaps.item()


def test_label_smoothing_is_refused_where_it_has_no_effect():
    with pytest.raises(ValidationError, match="only has an effect with loss = 'dpo'"):
        PreferConfig(loss="ipo", label_smoothing=0.1)


# --- rows as tensors ---


def test_a_pair_is_two_sequences_behind_one_prompt(tokenizer):
    (example,) = prepare(PAIRS[:1], tokenizer, 512).examples
    first = int((example.segments == 0).sum())
    sides = example.ids[:first], example.ids[first:]
    texts = [tokenizer.decode(ids) for ids in sides]
    prompt = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"{prompt}Because it is so.<|im_end|>\n", f"{prompt}No.<|im_end|>\n"]
    learned = [tokenizer.decode(ids[t]) for ids, t in zip(
        sides, (example.trained[:first], example.trained[first:]), strict=True)]  # fmt: skip
    assert learned == ["Because it is so.<|im_end|>", "No.<|im_end|>"], "the end is learned too"
    assert example.num_positions == 2 * first


def test_answers_in_the_prompt_are_not_learned(tokenizer):
    talk = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"))]
    ends = [[*talk, {"role": "user", "content": "c"}, {"role": "assistant", "content": x}]
            for x in "de"]  # fmt: skip
    row = preference({"chosen": ends[0], "rejected": ends[1]}, where="x")
    (example,) = prepare([row], tokenizer, 512).examples
    assert tokenizer.decode(example.ids[example.trained]) == "d<|im_end|>e<|im_end|>"


def test_a_batch_puts_the_answers_of_a_pair_next_to_each_other(tokenizer):
    examples = prepare(PAIRS, tokenizer, 512).examples
    batch = collate(examples)
    assert batch.ids.shape[0] == 2 * len(PAIRS)
    assert (batch.num_terms, batch.sequences) == (len(PAIRS), 2)
    assert batch.num_real_tokens == sum(e.ids.numel() for e in examples)
    for n, example in enumerate(examples):
        for which in (0, 1):
            ids = example.ids[example.segments == which]
            assert torch.equal(batch.ids[2 * n + which][: ids.numel()], ids)
    assert max(e.num_positions for e in examples) == 2 * batch.ids.shape[1]


def test_both_answers_are_cut_at_the_same_token(tokenizer):
    full = prepare(PAIRS, tokenizer, 512)
    limit = 40
    found = prepare(PAIRS, tokenizer, limit)
    assert found.num_cut == sum(n > limit for n in num_tokens(PAIRS, tokenizer)) > 0
    for row, example in zip(found.rows, found.examples, strict=True):
        for which in (0, 1):
            whole = full.examples[row].ids[full.examples[row].segments == which]
            assert torch.equal(example.ids[example.segments == which], whole[:limit])


def test_a_pair_without_an_answer_or_a_difference_within_the_limit_is_dropped(tokenizer):
    late = pair("Why?", "Because of a.", "Because of b.")
    prompt = len(tokenizer("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n").input_ids)
    assert prepare([late], tokenizer, prompt).num_dropped == 1
    same = prompt + len("Because of ")
    assert prepare([late], tokenizer, same).num_dropped == 1
    found = prepare([*PAIRS[:1], late], tokenizer, same + 1)
    assert (found.num_dropped, found.rows) == (0, (0, 1))


def test_a_row_that_the_template_refuses_is_named(tokenizer, monkeypatch):
    def refuse(*_, **__):
        raise DataError("no.\n  Fix it.")

    monkeypatch.setattr("silotune.training.tasks.instruct.trained_spans", refuse)
    with pytest.raises(DataError, match=r"^pairs.csv:2: no"):
        prepare(PAIRS[:1], tokenizer, 512)


# --- on a model ---


@pytest.fixture
def loaded(tiny_model):
    adapter = AdapterConfig(rank=2, alpha=4, targets=("q_proj", "v_proj"))
    cfg = ModelConfig(name=str(tiny_model), dtype="float32")
    return load_model(cfg, adapter, seed=1, device="cpu")


def disturb(loaded, seed=2):
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in loaded.parameters.values():
            p.copy_(torch.randn(p.shape, generator=gen) * 0.1)


def slow_logps(loaded, row):
    """Each answer's log-probability: one sequence at a time, token by token, in float64."""
    example = prepare([row], loaded.tokenizer, 512).examples[0]
    found = []
    for which in (0, 1):
        at = example.segments == which
        ids, trained = example.ids[at], example.trained[at]
        with torch.inference_mode():
            logits = loaded.model(input_ids=ids[None]).logits[0].double()
        logps = logits.log_softmax(-1)
        found.append(sum(float(logps[t - 1, ids[t]]) for t in range(1, len(ids)) if trained[t]))
    return found


def test_the_reference_is_the_base_whatever_the_adapter_holds(loaded):
    expected = [slow_logps(loaded, row) for row in PAIRS]  # a fresh adapter changes nothing
    disturb(loaded)
    before = read_adapter(loaded)
    found = prepare_rows(PAIRS, build_task("prefer"), loaded, 512).examples
    for example, own in zip(found, expected, strict=True):
        assert example.reference.tolist() == pytest.approx(own, rel=1e-5)
    after = read_adapter(loaded)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(p.requires_grad for p in loaded.parameters.values())


def test_the_loss_starts_at_ln_2_and_its_gradient_at_a_half(loaded):
    task = prefer(PreferConfig(beta=0.3))
    examples = with_references(prepare(PAIRS, loaded.tokenizer, 512).examples, task, loaded,
                               batch_size=8)  # fmt: skip
    losses, total = [], 0.0
    for batch in build_eval_batches(examples, task, 8):
        out = task.loss(loaded, batch)
        assert set(out.pairs.margins.tolist()) == {0.0}, "of the reference itself, exactly"
        assert row_losses(out, batch) is out.pairs.losses
        losses += out.pairs.losses.tolist()
        total += out.loss_sum.item()
    assert losses == [pytest.approx(math.log(2), abs=1e-7)] * len(PAIRS)
    assert total == pytest.approx(len(PAIRS) * math.log(2))


def test_a_swapped_pair_has_the_opposite_gradient_at_the_start(loaded):
    task, found = build_task("prefer"), []
    for rows in (PAIRS, SWAPPED):
        examples = prepare_rows(rows, task, loaded, 512).examples
        task.loss(loaded, collate(examples)).loss_sum.backward()
        found.append({n: p.grad.clone() for n, p in loaded.parameters.items()})
        loaded.model.zero_grad()
    size = sum(float(g.square().sum()) for g in found[0].values())
    total = sum(float((found[0][n] + found[1][n]).square().sum()) for n in found[0])
    assert size > 0
    assert total < 1e-10 * size


def test_prompt_tokens_have_no_gradient_of_their_own(loaded):
    """The loss depends on the logits of answers only: all others are not even computed."""
    task = build_task("prefer")
    batch = collate(prepare_rows(PAIRS, task, loaded, 512).examples)
    assert task.loss(loaded, batch).logits.shape[0] == batch.num_trained
    trained = sum(int(e.trained.sum()) for e in prepare(PAIRS, loaded.tokenizer, 512).examples)
    assert batch.num_trained == trained < batch.num_real_tokens


def test_scores_count_likelier_and_preferred_answers(loaded):
    task = build_task("prefer")
    examples = prepare_rows(PAIRS, task, loaded, 512).examples
    batches = build_eval_batches(examples, task, 3)
    first = evaluate(loaded, batches, task, client="north", num_examples=len(PAIRS))
    assert "preference_accuracy" not in metrics([first])
    disturb(loaded)
    logps = [slow_logps(loaded, row) for row in PAIRS]
    margins = [0.1 * (c - r - float(e.reference[0] - e.reference[1]))
               for (c, r), e in zip(logps, examples, strict=True)]  # fmt: skip
    score = evaluate(loaded, batches, task, client="north", num_examples=len(PAIRS))
    assert score.num_tokens == len(PAIRS)
    assert score.num_correct == sum(c > r for c, r in logps)
    assert score.num_preferred == sum(m > 0 for m in margins)
    assert score.margin_sum == pytest.approx(sum(margins), abs=1e-4)
    assert score.loss_sum == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins), rel=1e-4)
    found = metrics([score, score])
    assert found["win_rate"] == score.num_correct / len(PAIRS)
    assert found["preference_accuracy"] == score.num_preferred / len(PAIRS)
    assert found["reward_margin"] == pytest.approx(sum(margins) / len(PAIRS), abs=1e-4)
    each = score_each(loaded, examples, task, batch_size=3)
    assert [row.margin for row in each] == pytest.approx(margins, abs=1e-4)
    assert sum(row.likelier for row in each) == score.num_correct
    assert sum(row.preferred for row in each) == score.num_preferred
