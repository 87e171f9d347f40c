"""What is learned from a conversation, and the loss of a batch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from silotune.core.errors import DataError
from silotune.data.chat_templates import render
from silotune.models.loading import LoadedModel
from silotune.training.tasks.instruct import collate, loss, prepare, trained_spans
from tests.conftest import build_tokenizer


def talk(*texts: str):
    roles = ["user", "assistant"] * len(texts)
    return tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=False))


def learned_text(tokenizer, example) -> str:
    return tokenizer.decode(example.ids[example.trained])


words = st.text(alphabet="abcé 1?\n", min_size=1, max_size=20).filter(str.strip)


@given(question=words, reply=words)
def test_exactly_the_answer_and_its_end_token_are_learned(tokenizer, question, reply):
    (example,) = prepare([talk(question, reply)], tokenizer, 512).examples
    assert learned_text(tokenizer, example) == reply + "<|im_end|>"


@given(turns=st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_every_assistant_turn_is_learned_and_no_user_turn(tokenizer, turns):
    row = talk(*(text for turn in turns for text in turn))
    (example,) = prepare([row], tokenizer, 512).examples
    assert learned_text(tokenizer, example) == "".join(a + "<|im_end|>" for _, a in turns)


@given(question=words, reply=words)
def test_ids_are_those_of_the_chat_template_itself(tokenizer, question, reply):
    row = talk(question, reply)
    (example,) = prepare([row], tokenizer, 512).examples
    own = tokenizer.apply_chat_template(list(row), tokenize=True, return_dict=True)["input_ids"]
    assert example.ids.tolist() == list(own)


def test_the_mask_is_that_of_a_template_that_marks_its_answers_itself():
    """The independent oracle: transformers' own mask from {% generation %} blocks."""
    marked = build_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = talk("Why?", "So.", "And now?", "Nothing more, é.")
    (example,) = prepare([row], marked, 512).examples
    own = marked.apply_chat_template(
        list(row), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.ids.tolist() == list(own["input_ids"])
    assert example.trained.int().tolist() == list(own["assistant_masks"])


def test_a_prompt_at_inference_has_the_ids_it_had_in_training(tokenizer):
    row = talk("Why?", "So.")
    (example,) = prepare([row], tokenizer, 512).examples
    asked = tokenizer(render(tokenizer, row[:1], ask=True), add_special_tokens=False)["input_ids"]
    assert example.ids[: len(asked)].tolist() == asked
    assert not example.trained[: len(asked)].any()


def test_the_end_token_is_learned_although_it_is_also_the_padding_token(tokenizer):
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prepared = prepare([talk("a", "b"), talk("a", "a longer answer")], tokenizer, 512)
    batch = collate(prepared.examples)
    assert (batch.targets == tokenizer.eos_token_id).sum() == 2


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_answers():
    forgetful = build_tokenizer(
        "{% for m in messages[-2:] %}{{ m['role'] + m['content'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="changes earlier turns"):
        trained_spans(forgetful, talk("a", "b", "c", "d"))


def test_long_rows_are_truncated_at_their_end_and_counted(tokenizer):
    rows = [talk("q", "a" * 50), talk("q" * 100, "a"), talk("q", "a")]
    prepared = prepare(rows, tokenizer, 60)
    assert (prepared.num_cut, prepared.num_dropped, len(prepared.examples)) == (2, 1, 2)
    assert max(e.ids.numel() for e in prepared.examples) == 60


# --- the loss of a batch, against a slow obvious one


def build(family: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "head_dim": 8,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 1,
    }
    if family == "gpt2":
        small = {
            "vocab_size": 64,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small))
    model.eval()
    named = dict(model.named_parameters())
    return LoadedModel(model, None, torch.device("cpu"), torch.float32, named, kind="full")


def random_examples(seed: int, lengths: list[int]):
    from silotune.training.tasks.base import Example

    gen = torch.Generator().manual_seed(seed)
    examples = []
    for n in lengths:
        trained = torch.rand(n, generator=gen) < 0.5
        trained[0], trained[-1] = False, True
        examples.append(Example(torch.randint(2, 64, (n,), generator=gen), trained))
    return examples


def slow_loss(loaded: LoadedModel, example) -> torch.Tensor:
    """One unpadded row, all logits, one token at a time."""
    logits = loaded.model(input_ids=example.ids[None]).logits[0].float()
    total = torch.zeros(())
    for t in range(1, example.ids.numel()):
        if example.trained[t]:
            total = total + F.cross_entropy(logits[t - 1][None], example.ids[t][None])
    return total


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
def test_batch_loss_and_gradients_equal_a_loop_over_single_rows(family):
    loaded = build(family)  # gemma2 caps its logits after the head
    examples = random_examples(5, [9, 4, 6])
    params = list(loaded.parameters.values())
    fast = loss(loaded, collate(examples)).loss_sum
    slow = torch.stack([slow_loss(loaded, e) for e in examples]).sum()
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(fast, params, allow_unused=True),
        torch.autograd.grad(slow, params, allow_unused=True),
        strict=True,
    ):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_trained_positions_reach_the_vocabulary():
    loaded = build("llama")
    batch = collate(random_examples(2, [8, 3]))
    out = loss(loaded, batch)
    assert out.logits.shape == (batch.num_trained, 64)
    assert not loaded.model.get_output_embeddings()._forward_pre_hooks  # the hook is gone


@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_collate_pads_on_the_right_and_loses_no_trained_token(lengths, seed):
    examples = random_examples(seed, lengths)
    batch = collate(examples)
    assert batch.ids.shape == (len(lengths), max(lengths))
    assert batch.num_real_tokens == sum(lengths)
    expected = torch.cat([e.ids[e.trained] for e in examples])
    assert sorted(batch.targets.tolist()) == sorted(expected.tolist())
    flat = torch.cat([batch.ids, torch.zeros(len(lengths), 1, dtype=torch.int64)], 1).flatten()
    width = max(lengths)
    rows, columns = batch.positions // width, batch.positions % width
    assert torch.equal(flat[rows * (width + 1) + columns + 1], batch.targets)
